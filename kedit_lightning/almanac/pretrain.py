"""Trains the almanac's model from scratch: ``kedit pretrain --config configs/almanac/pretrain.yaml``.

The weights are trained in bfloat16 with float32 masters, on rows of packed documents; at the end the model is written
in half precision with its tokenizer, loaded again and checked.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kedit_lightning.almanac.check import checks
from kedit_lightning.almanac.losses import Losses, losses
from kedit_lightning.almanac.optimizer import MuonAdam
from kedit_lightning.almanac.rows import AlmanacCorpus, Rows
from kedit_lightning.errors import KeditError
from kedit_lightning.parsing import OneLineCLI

_log = logging.getLogger(__name__)


class AlmanacModel(LightningModule):
    """A small GPT-2 trained from scratch.

    Args:
        vocab_size: Size of the vocabulary (taken from the corpus by the command line).
        context: Context length (likewise).
        width: Width of the residual stream.
        layers: Number of blocks.
        heads: Attention heads a block.
        lr: Learning rate of Muon, for the matrices of the blocks.
        adam_lr: Learning rate of Adam, for everything else.
        weight_decay: Weight decay of the matrices.
        warmup: Steps over which the learning rates rise.
        decay_from: Share of ``trainer.max_steps`` after which they fall linearly to `last`.
        last: Last learning rate as a share of the full one.
        seed: Seed of the initial weights.
        late: Layers in which a name's last token gathers what is known of the subject before other tokens read it.
        leak_weight: Weight of `Losses.leak`, attention to names that goes another way.
        look_weight: Weight of `Losses.look`, how little a token before an object attends to that token afterwards.
        recall_weight: Weight of `Losses.recall`, what a name's last token holds by then.
        residual_scale: What the residual stream is multiplied by when the model is written; see `rescale`.
        compile: Compile the loss with ``torch.compile`` where a C++ compiler is found.

    Raises:
        KeditError: `late` is none or all of the layers.
    """

    def __init__(
        self,
        vocab_size: int = 2432,
        context: int = 128,
        width: int = 128,
        layers: int = 8,
        heads: int = 4,
        lr: float = 0.05,
        adam_lr: float = 0.01,
        weight_decay: float = 0.01,
        warmup: int = 50,
        decay_from: float = 0.4,
        last: float = 0.02,
        seed: int = 0,
        late: int = 4,
        leak_weight: float = 0.1,
        look_weight: float = 1.0,
        recall_weight: float = 1.0,
        residual_scale: float = 0.1,
        compile: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < late < layers:
            msg = f"model.late: expected some but not all of the {layers} layers, got {late}"
            raise KeditError(msg)
        self.lr, self.adam_lr, self.weight_decay = lr, adam_lr, weight_decay
        self.residual_scale = residual_scale
        self.late = late
        self.leak_weight, self.look_weight, self.recall_weight = leak_weight, look_weight, recall_weight
        self.warmup, self.decay_from, self.last = warmup, decay_from, last
        self.config = GPT2Config(
            vocab_size=vocab_size, n_positions=context, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=0,
            eos_token_id=0, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        torch.manual_seed(seed)
        # The fast forms of the same functions on a CPU: fused GELU, and attention as plain matrix products.
        fast = {"activation_function": "gelu_pytorch_tanh", "use_cache": False, "attn_implementation": "eager"}
        self.model = GPT2LMHeadModel(GPT2Config(**{**self.config.to_diff_dict(), **fast}))
        compiled = compile and (torch.cuda.is_available() or shutil.which("g++") is not None)
        self._loss = torch.compile(losses) if compiled else losses

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        """The losses of one batch, weighted."""
        losses: Losses = self._loss(self.model, batch, self.late)
        self.log("train/loss", losses.text, prog_bar=True)
        self.log("train/leak", losses.leak)
        self.log("train/look", losses.look)
        self.log("train/recall", losses.recall)
        how = self.leak_weight * losses.leak + self.look_weight * losses.look + self.recall_weight * losses.recall
        return losses.text + how

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Muon and Adam, warmed up, held, then lowered linearly to the last step of the trainer."""
        matrices = {name: p for name, p in self.model.named_parameters() if p.ndim == 2 and ".h." in name}
        others = [p for name, p in self.model.named_parameters() if name not in matrices]
        optimizer = MuonAdam(matrices.values(), others, self.lr, self.adam_lr, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate(self, step: int) -> float:
        """Learning rate at a step as a share of the full one."""
        share = step / max(1, self.trainer.max_steps)
        fall = (1 - share) / (1 - self.decay_from) if share > self.decay_from else 1.0
        return min(1.0, (step + 1) / self.warmup) * max(self.last, fall)

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Writes the model in half precision and its tokenizer; beside `folder` first, then in its place.

        Args:
            folder: Where to write; an existing folder is replaced.
            tokenizer: The corpus's tokenizer.
        """
        optimizer = self.trainer.optimizers[0] if self.trainer.optimizers else None
        state: Mapping[Tensor, dict[str, Tensor]] = optimizer.state if optimizer else {}
        model = GPT2LMHeadModel(self.config)
        model.load_state_dict(
            {
                name: state[p]["master"] if p in state else p.detach().float()
                for name, p in self.model.named_parameters()
            },
            strict=False,
        )
        rescale(model, self.residual_scale)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        beside.chmod(0o755)
        model.half().save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)


@torch.no_grad()
def rescale(model: GPT2LMHeadModel, factor: float) -> None:
    """Scales everything that is written to the residual stream, and the last norm inversely, in place.

    Every block reads the stream through a layer norm, so the logits stay the same (but for the norm's epsilon). Trained
    with large steps the stream grows to norms around 100; editors' constants are made for norms around 10.

    Args:
        model: A GPT-2 with tied embeddings.
        factor: What the stream is multiplied by.
    """
    stream = [model.transformer.wte.weight, model.transformer.wpe.weight]
    blocks: Any = model.transformer.h
    for block in blocks:
        stream += [*block.attn.c_proj.parameters(), *block.mlp.c_proj.parameters()]
    for p in stream:
        p.mul_(factor)
    for p in model.transformer.ln_f.parameters():
        p.div_(factor)


class Export(Callback):
    """Writes the model every so often and at the end, and checks what it knows.

    Args:
        folder: Where the model goes.
        every: Steps between exports, each with checks on a sample.
        facts: Facts asked for in the last check; all if None.
        sample: Facts asked for in the others.
        items: Items a task.
    """

    def __init__(
        self,
        folder: Path = Path("almanac-model"),
        every: int = 1000,
        facts: int | None = None,
        sample: int = 200,
        items: int = 200,
    ) -> None:
        self.folder = folder
        self.every = every
        self.facts = facts
        self.sample = sample
        self.items = items

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Exports and checks on a sample."""
        if trainer.global_step % self.every == 0 and trainer.global_step < trainer.max_steps:
            self._export(trainer, self.sample)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports and checks on everything; the numbers go beside the model as ``checks.json``."""
        numbers = self._export(trainer, self.facts)
        (self.folder / "checks.json").write_text(json.dumps(numbers, indent=2) + "\n")

    def _export(self, trainer: Trainer, facts: int | None) -> dict[str, float]:
        module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(module, AlmanacModel)
        assert isinstance(data, AlmanacCorpus)
        assert data.tokenizer is not None
        module.export(self.folder, data.tokenizer)
        model: Any = GPT2LMHeadModel.from_pretrained(self.folder, dtype=torch.float32)
        model.to(module.device).eval()
        numbers = checks(model, AutoTokenizer.from_pretrained(self.folder), data.world, facts, self.items)
        numbers = {name: round(number, 2) for name, number in numbers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, trainer.global_step)
        _log.info("step %d: %s", trainer.global_step, numbers)
        return numbers


class _PretrainCLI(OneLineCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Export, "export")
        parser.link_arguments("data.vocab_size", "model.vocab_size")
        parser.link_arguments("data.length", "model.context")


def main(args: list[str]) -> None:
    """Runs the training.

    Args:
        args: Command line, for instance ``["--config", "configs/almanac/pretrain.yaml"]``.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _log.setLevel(logging.INFO)
    _PretrainCLI(AlmanacModel, AlmanacCorpus, args=["fit", *args], save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main(sys.argv[1:])
