"""What the benchmarks of whole runs share: editors as their shipped configurations have them, clocks, and the table.

A command prints its table, and with ``--out`` writes it to a file as well.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import transformers
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from kedit_lightning import __version__, editors
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors import Editor
from kedit_lightning.metrics import Evaluation
from kedit_lightning.models import LanguageModel, Statistics
from kedit_lightning.trainer import EditTrainer

CONFIGS = Path(__file__).parent.parent / "configs"
CHARTS = ("Console", "Figures")
"""Callbacks that are left out: what they print and draw is the same whatever the run took."""

T = TypeVar("T")


# ---------------------------------------------------------------------- what is run


def gpt2_small(**sizes: Any) -> LanguageModel:
    """A random model of GPT-2 small's shape, but for some sizes, that reads the almanac's texts."""
    torch.manual_seed(0)
    return LanguageModel.wrap(GPT2LMHeadModel(GPT2Config(**sizes)), LanguageModel("almanac").tokenizer)


def shipped(name: str, base: LanguageModel, **changes: Any) -> Editor:
    """An editor as its ``configs/*_almanac.yaml`` has it, but for some settings."""
    content = yaml.safe_load((CONFIGS / f"{name.lower()}_almanac.yaml").read_text(encoding="utf-8"))
    settings = {**content["model"]["init_args"], **changes}
    for key, kind in (("context_templates", ContextTemplates), ("statistics", Statistics)):
        if isinstance(settings.get(key), dict):
            settings[key] = kind(**settings[key])
    made: Editor = getattr(editors, name)(base, **settings)
    return made


def trainer(folder: Path | str, *, evaluate: bool) -> EditTrainer:
    """A trainer that measures teacher-forced, each time anew, or not at all; without figures."""
    made = EditTrainer(
        save_dir=str(folder),
        evaluation=Evaluation(generation=False, cache=False),
        evaluate=evaluate,
        accelerator="cpu",
        enable_progress_bar=False,
    )
    made.callbacks = [one for one in made.callbacks if type(one).__name__ not in CHARTS]  # type: ignore[attr-defined]
    return made


def almanac_edits(start: int, stop: int, **settings: Any) -> EditDataModule:
    """Edits of the almanac, loaded."""
    data = EditDataModule(start=start, stop=stop, **settings)
    data.setup("fit")
    return data


# ---------------------------------------------------------------------- clocks


@dataclass
class Clock:
    """Seconds inside calls that it watches; a call inside another is not counted again.

    Args:
        seconds: So far.
        inside: Whether one of them is under way.
    """

    seconds: float = 0.0
    inside: bool = False

    def watch(self, call: Callable[..., T], when: Callable[[], bool] = lambda: True) -> Callable[..., T]:
        """The same call, on the clock when it is to be."""

        def timed(*args: Any, **kwargs: Any) -> T:
            if self.inside or not when():
                return call(*args, **kwargs)
            self.inside, start = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.inside = False

        return timed


@contextmanager
def model_compute(base: LanguageModel, when: Callable[[], bool] = lambda: True) -> Iterator[Clock]:
    """On the clock inside the context: the model's forward passes, hooks included, and all backward passes."""
    clock = Clock()
    with (
        mock.patch.object(base.model, "forward", clock.watch(base.model.forward, when)),
        mock.patch.object(torch.Tensor, "backward", clock.watch(torch.Tensor.backward, when)),
    ):
        yield clock


def resident(what: str) -> int:
    """Bytes of this process in main memory: now (``VmRSS``), or at most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def grown(work: Callable[[], object]) -> float:
    """MB by which this process grows at its peak during some work."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = resident("VmRSS")
    work()
    return (resident("VmHWM") - before) / 1e6


# ---------------------------------------------------------------------- the table


def machine(device: str = "cpu") -> str:
    """What this was run on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    if device == "cpu" and (info := Path("/proc/cpuinfo")).exists():
        name = next(line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line)
    return (
        f"{name}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, kedit_lightning {__version__}; {datetime.now(UTC):%Y-%m-%d}"
    )


def spread(values: Sequence[float]) -> str:
    """The median, and in brackets the least and the most."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


class Table:
    """A Markdown table that is printed line by line, below a title, the command and the machine.

    Args:
        title: Of the page.
        module: Whose command it is.
        words: The command's arguments.
        explained: What the columns mean.
        head: The columns.
        out: A file to write the page to as well, when it is complete.
    """

    def __init__(
        self,
        title: str,
        module: str,
        words: Sequence[str],
        explained: str,
        head: Sequence[str],
        out: Path | None = None,
    ) -> None:
        self.page, self.out = "", out
        command = " ".join(["python", "-m", module, *words])
        self._say(f"# {title}\n\n`{command}`\n\n{machine()}.\n\n{explained}\n\n")
        self.line(*head)
        self.line(*["---"] + ["---:"] * (len(head) - 1))

    def line(self, *cells: object) -> None:
        """Add a line."""
        self._say(f"| {' | '.join(map(str, cells))} |\n")

    def close(self, *remarks: str) -> None:
        """Add paragraphs, and write the page."""
        self._say("".join(f"\n{remark}\n" for remark in remarks))
        if self.out is not None:
            self.out.write_text(self.page, encoding="utf-8")

    def _say(self, text: str) -> None:
        self.page += text
        sys.stdout.write(text)
        sys.stdout.flush()
