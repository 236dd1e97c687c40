"""ROME, TOP and RETS once more, slowly: from ../shared/spec/editors.md (1.1-1.7, 2.1, 2.4, 2.7) and nothing else.

It shares no code with the package: a row is one forward pass of a plain Hugging Face model, positions come from the
lengths of tokenised prefixes, everything is a loop. `write_case` records what it gives in the form of ../shared/golden,
so that the runner can be tried on model families for which no recording is at hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BLOCKS = {"gpt2": "transformer.h.{}", "gptj": "transformer.h.{}", "llama": "model.layers.{}"}
DOWN = {"gpt2": "mlp.c_proj", "gptj": "mlp.fc_out", "llama": "mlp.down_proj"}


class Slow:
    """One model, its tokenizer, the context templates and the second moment of one layer's keys.

    The text of a target's tokens is put after the prompt, as the released codes do it (1.1).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        contexts: Sequence[str],
        hparams: dict[str, Any],
    ) -> None:
        self.model, self.tokenizer, self.contexts, self.hparams = model, tokenizer, contexts, hparams
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.layer = hparams["layers"][0]
        self.block = BLOCKS[model.config.model_type]
        self.down_name = f"{self.block.format(self.layer)}.{DOWN[model.config.model_type]}"
        self.down = model.get_submodule(self.down_name)
        self.mlp = model.get_submodule(self.block.format(self.layer) + ".mlp")
        self.knowns: Sequence[str] = ()
        self.numbers: dict[str, Tensor] = {}
        self.values: dict[str, Any] = {}

    # ------------------------------------------------------------------ text

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def target_ids(self, request: dict[str, Any]) -> list[int]:
        """1.1: a leading space, and no BOS."""
        ids = self.tokenizer.encode(" " + request["target_new"]["str"])
        has_bos = self.tokenizer.encode("")[:1] == [self.tokenizer.bos_token_id]
        return ids[1:] if has_bos else ids

    def subject_last(self, template: str, subject: str) -> int:
        """1.2: the length of the text up to the subject's end, tokenised on its own."""
        return len(self.ids(template[: template.index("{}")] + subject)) - 1

    # ------------------------------------------------------------------ the model

    @contextmanager
    def adding(self, module: nn.Module, index: int, delta: Tensor) -> Iterator[None]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, index] = hidden[0, index] + delta
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = module.register_forward_hook(hook)
        yield
        handle.remove()

    def forward(self, ids: Sequence[int]) -> Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0]

    def output(self, module: nn.Module, ids: Sequence[int], index: int) -> Tensor:
        """What a module puts out at one position."""
        found = []
        handle = module.register_forward_hook(
            lambda _, __, output: found.append((output[0] if isinstance(output, tuple) else output)[0, index])
        )
        self.forward(ids)
        handle.remove()
        return found[0]

    def key(self, ids: Sequence[int], index: int) -> Tensor:
        """1.4: the input of the down-projection."""
        found = []
        handle = self.down.register_forward_pre_hook(lambda _, args: found.append(args[0][0, index]))
        self.forward(ids)
        handle.remove()
        return found[0].detach()

    # ------------------------------------------------------------------ the two optimisations

    def descend(
        self, where: str, origin: Tensor, steps: int, stop: float, terms: Callable[[Tensor], dict[str, Tensor]]
    ) -> Tensor:
        """1.6, steps 6-9: n evaluations, n - 1 updates; gives v0 + delta."""
        h = self.hparams
        delta = torch.zeros_like(origin, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=h["v_lr"])
        curves: dict[str, list[float]] = {}
        deltas = []
        for step in range(steps):
            optimizer.zero_grad()
            found = terms(delta)
            found["weight_decay"] = h["v_weight_decay"] * (delta.norm() / origin.norm() ** 2)
            loss = sum(found.values())
            deltas.append(delta.detach().clone())
            for name, value in {**found, "loss": loss}.items():
                curves.setdefault(name, []).append(value.item())
            if loss < stop or step == steps - 1:
                break
            loss.backward()
            optimizer.step()
            longest = h["clamp_norm_factor"] * origin.norm()
            if delta.norm() > longest:
                with torch.no_grad():
                    delta[...] = delta * longest / delta.norm()
        self.numbers |= {f"{where}/steps/{name}": torch.tensor(curve) for name, curve in curves.items()}
        self.numbers[f"{where}/steps/delta"] = torch.stack(deltas)
        self.numbers[f"{where}/target_init"] = origin
        self.numbers[f"{where}/delta"] = delta.detach().clone()
        self.numbers[f"{where}/target"] = origin + delta.detach()
        self.values[where] = {"n_loss_evaluations": len(deltas)}
        return origin + delta.detach()

    def make_likely(
        self, where: str, request: dict[str, Any], module: nn.Module, *, at_subject: bool, steps: int, stop: float
    ) -> Tensor:
        """1.6, steps 1-5: the vector that makes the target likely in all contexts while "{} is a" stays."""
        targets = self.target_ids(request)
        templates = [context.format(request["prompt"]) for context in self.contexts] + ["{} is a"]
        texts = [template.format(request["subject"]) for template in templates]
        rows = [self.ids(text + self.tokenizer.decode(targets[:-1])) for text in texts[:-1]]
        rows.append(self.ids(texts[-1]))
        if at_subject:
            at = [self.subject_last(template, request["subject"]) for template in templates]
        else:
            # In the row of "{} is a" this is the released code's slip; a long target would take it out of the row.
            at = [max(len(row) - 1 - len(targets[:-1]), 0) for row in rows]
        wanted = []
        for row in rows[:-1]:
            labels = torch.full((len(row),), -100)
            labels[len(row) - len(targets) :] = torch.tensor(targets)
            wanted.append(labels)
        origin = self.output(module, rows[0], at[0]).detach()
        initial = self.forward(rows[-1])[at[-1]].log_softmax(-1).detach()

        def terms(delta: Tensor) -> dict[str, Tensor]:
            each, kl = [], torch.zeros(())
            for i, (row, index) in enumerate(zip(rows, at, strict=True)):
                with self.adding(module, index, delta):
                    logits = self.forward(row)
                if i < len(wanted):
                    each.append(cross_entropy(logits, wanted[i], ignore_index=-100))
                else:
                    kl = kl_div(
                        initial[None], logits[index].log_softmax(-1)[None], log_target=True, reduction="batchmean"
                    )
            return {"nll_loss": torch.stack(each).mean(), "kl_loss": self.hparams["kl_factor"] * kl}

        value = self.descend(where, origin, steps, stop, terms)
        self._keep_rows(where, rows, wanted, targets, at)
        return value

    def move_feature(self, where: str, request: dict[str, Any], wanted: Tensor, steps: int) -> Tensor:
        """2.4, stage 2: the MLP output at the subject that brings the relation feature to what stage 1 found."""
        prompt, targets = request["prompt"].format(request["subject"]), self.target_ids(request)
        row = self.ids(prompt + self.tokenizer.decode(targets[:-1]))
        index = self.subject_last(request["prompt"], request["subject"])
        upper = self.model.get_submodule(self.block.format(self.layer + self.hparams["rel_feat_layer"]))

        def terms(delta: Tensor) -> dict[str, Tensor]:
            with self.adding(self.mlp, index, delta):
                feature = self.output(upper, row, len(row) - len(targets))
            return {"vec_loss": self.hparams["vec_loss_factor"] * (feature - wanted + 1e-6).norm()}

        origin = self.output(self.mlp, row, index).detach()
        value = self.descend(where, origin, steps, 0.05, terms)
        self.values[where]["lookup_idxs"] = [index]
        return value

    # ------------------------------------------------------------------ the edit

    def edit(self, editor: str, request: dict[str, Any], moment: Tensor | None) -> None:
        """2.1, 2.4 or 2.7, then 1.7's rank-one update; the weight is put back."""
        h, name = self.hparams, f"req{request['case_id']}"
        prompts = {
            "prompt": [request["prompt"].format(request["subject"])],
            "paraphrase": request["paraphrase_prompts"],
            "neighborhood": request["neighborhood_prompts"],
            "relation_specificity": request["relation_specificity_prompts"],
        }
        self._keep_logits(f"{name}/logits_pre", prompts)
        if editor == "RETS":
            request = request | {"prompt": "{}", "subject": prompts["prompt"][0]}
            for known in self.knowns:
                key = self.key(self.ids(known), len(self.ids(known)) - 1)
                moment = moment + torch.outer(key, key)
        if editor in ("ROME", "RETS"):
            last = name
            value = self.make_likely(last, request, self.mlp, at_subject=True, steps=h["v_num_grad_steps"], stop=0.05)
        else:
            last = f"{name}/stage2"
            upper = self.model.get_submodule(self.block.format(self.layer + h["rel_feat_layer"]))
            wanted = self.make_likely(
                f"{name}/stage1", request, upper, at_subject=False, steps=h["v_num_grad_steps1"], stop=0.02
            )
            value = self.move_feature(last, request, wanted, h["v_num_grad_steps2"])
        keys = []
        for context in self.contexts:
            template = context.format(request["prompt"])
            keys.append(
                self.key(self.ids(template.format(request["subject"])), self.subject_last(template, request["subject"]))
            )
        mean = torch.stack(keys).mean(0)
        direction = mean.double() if moment is None else torch.linalg.inv(moment.double()) @ mean.double()
        left = direction / direction.norm()
        math = self.down.weight if isinstance(self.down, nn.Linear) else self.down.weight.T
        current = math.double() @ keys[0].double() + (0 if self.down.bias is None else self.down.bias.double())
        right = (value.double() - current) / (keys[0].double() @ left)
        update = torch.outer(right, left)
        before = self.down.weight.clone()
        with torch.no_grad():
            self.down.weight += (update if isinstance(self.down, nn.Linear) else update.T).float()
            self.numbers[f"{name}/dW/{self.down_name}.weight"] = self.down.weight - before
            self._keep_logits(f"{name}/logits_post", prompts)
            self.down.weight.copy_(before)
        self.numbers |= {
            f"{name}/key/k_star_mean": mean,
            f"{last}/left_vector": left.float(),
            f"{last}/right_vector": right.float(),
        }

    def _keep_rows(
        self, where: str, rows: list[list[int]], wanted: list[Tensor], targets: list[int], at: list[int]
    ) -> None:
        longest = max(map(len, rows))
        self.numbers[f"{where}/input_ids"] = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        self.numbers[f"{where}/attention_mask"] = torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        )
        self.numbers[f"{where}/rewriting_targets"] = torch.stack(
            [torch.cat([labels, torch.full((longest - len(labels),), -100)]) for labels in wanted]
        )
        self.numbers[f"{where}/target_ids"] = torch.tensor(targets)
        self.values[where]["lookup_idxs"] = at

    @torch.no_grad()
    def _keep_logits(self, where: str, prompts: dict[str, list[str]]) -> None:
        for kind, texts in prompts.items():
            self.numbers[f"{where}/{kind}"] = torch.stack([self.forward(self.ids(text))[-1] for text in texts])


@torch.no_grad()
def second_moment(slow: Slow, texts: Sequence[str]) -> tuple[Tensor, int]:
    """1.5: the mean of k k^T over all tokens, the first included."""
    keys: list[Tensor] = []
    handle = slow.down.register_forward_pre_hook(lambda _, args: keys.extend(args[0][0]))
    for text in texts:
        slow.forward(slow.ids(text))
    handle.remove()
    total = sum(torch.outer(key, key) for key in keys)
    return total / len(keys), len(keys)


def write_case(
    folder: Path,
    editor: str,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[dict[str, Any]],
    contexts: Sequence[str],
    hparams: dict[str, Any],
    moment: tuple[Tensor, int] | None = None,
    knowns: Sequence[tuple[str, str]] = (),
) -> None:
    """Record a case in the form of ../shared/golden.

    Args:
        folder: Where; made if need be.
        editor: ROME, TOP or RETS.
        name: MODEL of the file names.
        model: The model; its weights are as before afterwards.
        tokenizer: Its tokenizer.
        requests: The edits, each on the unedited model.
        contexts: Context templates, the bare one first.
        hparams: Hyper-parameters under the released names.
        moment: Second moment of the edited layer's keys and the number of tokens; None takes the identity.
        knowns: Prompts and subjects of RETS' constraint.
    """
    if not (folder / "models" / name).exists():
        model.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
    slow = Slow(model, tokenizer, contexts, hparams)
    slow.knowns = [prompt.format(subject) for prompt, subject in knowns]
    records = [{"requested_rewrite": {"prompt": prompt, "subject": subject}} for prompt, subject in knowns]
    (folder / "rets_knowns.json").write_text(json.dumps(records), encoding="utf-8")
    if moment is None:
        moment = torch.eye(slow.down.weight.shape[1 - int(not isinstance(slow.down, nn.Linear))]), 1
    for request in requests:
        slow.edit(editor, request, moment[0])
    save_file(
        {slow.down_name: moment[0].contiguous(), "count": torch.tensor([moment[1]])}, folder / f"cov_{name}.safetensors"
    )
    save_file(
        {key: value.detach().contiguous().clone() for key, value in slow.numbers.items()},
        folder / f"{editor}_{name}.safetensors",
    )
    meta = {
        "editor": editor,
        "model": name,
        "hparams": hparams,
        "contexts": "flat",
        "context_templates": list(contexts),
        "mode": "single",
        "case_ids": [request["case_id"] for request in requests],
        "values": slow.values,
    }
    (folder / f"{editor}_{name}.json").write_text(json.dumps(meta), encoding="utf-8")
    (folder / "requests.json").write_text(json.dumps({"requests": list(requests)}), encoding="utf-8")
    (folder / "contexts.json").write_text(json.dumps({"flat": list(contexts)}), encoding="utf-8")
