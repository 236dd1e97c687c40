"""What the results of a run depend on, and whether it can be gone on with as if it had never stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from kedit_lightning.callbacks.base import EditCallback
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.editors import Editor
from kedit_lightning.errors import KeditError
from kedit_lightning.measurement import Measurement
from kedit_lightning.models.fingerprint import fingerprint
from kedit_lightning.models.key_statistics import Identity
from kedit_lightning.models.processes import ranks, same
from kedit_lightning.run import SETTINGS, Record, RunDirectory
from kedit_lightning.tensor_files import checksum

if TYPE_CHECKING:
    from kedit_lightning.trainer import EditTrainer

_log = logging.getLogger(__name__)

LIBRARIES = ("kedit_lightning", "torch", "transformers", "tokenizers", "lightning", "torchmetrics", "numpy")
STREAM = ("edits", "data.batch_size", "data.restore_every")
"""Settings without which what is done and what is to come do not fit together."""
HASHES = ("edits", "weights")
"""What is kept as a hash, which says nothing to a reader."""
KEPT = ("seed", "budget", "parallel_edits", "moments")
"""What is known once the editor is prepared; `check_moments` compares the last."""
MACHINE = ("device", "threads")
"""What may differ among processes that work together."""
UNCOMPARED = (*KEPT, "base", "resumed")
"""What is kept beside the settings; a base model may lie elsewhere as long as its weights are the same."""


def settings(editor: Editor, datamodule: EditDataModule, measurement: Measurement) -> Record:
    """What the edits and their scores depend on, as plain data.

    Args:
        editor: The editor.
        datamodule: The edits.
        measurement: How they are measured.
    """
    base, trainer = editor.base, measurement.trainer
    parts: dict[str, Mapping[str, Any]] = {
        "model": editor.config,
        "data": datamodule.protocol,
        "evaluation": measurement.evaluator.protocol,
        **{_known_as(one): one.protocol for one in trainer.callbacks if isinstance(one, EditCallback)},  # type: ignore[attr-defined]
    }
    found = {
        "editor": type(editor).__name__,
        "base": base.name_or_path,
        "dtype": base.dtype,
        "evaluate": trainer.evaluate,
        "evaluate_at": trainer.evaluate_at,
        "edits": hashlib.sha256(repr(datamodule.edits).encode()).hexdigest(),
        "weights": fingerprint(base, editor.names()),
        **{f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()},
    }
    plain: Record = json.loads(json.dumps(found))
    return plain


def _known_as(callback: EditCallback) -> str:
    """The class whose protocol a callback has."""
    return next(kind.__name__ for kind in type(callback).__mro__ if "protocol" in vars(kind))


def environment(trainer: EditTrainer) -> Record:
    """What else the bits of the results depend on: libraries, device, and in how many threads sums are taken."""
    device = trainer.strategy.root_device
    return {
        **{f"library {name}": version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "world_size": trainer.world_size,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In words what differs between two descriptions."""
    return [
        f"{key}: {there.get(key)} there, {here.get(key)} here" if key not in HASHES else f"{key}: others than there"
        for key in {**there, **here}
        if key not in UNCOMPARED and there.get(key) != here.get(key)
    ]


def check(run: RunDirectory, here: Record, *, anyway: bool) -> Record | None:
    """Compare what a run depends on with what it was begun with.

    Args:
        run: The run directory.
        here: `settings` and `environment` of now.
        anyway: Go on although something differs, which the run then says; it no longer ends as an unbroken one.

    Returns:
        What the run goes by, its ``seed`` and ``budget`` as it was begun with; None if it has not begun.

    Raises:
        KeditError: Something differs; the message names it.
    """
    there = run.read_json(SETTINGS)
    if there is None:
        return None
    found = differences(there, here)
    if not found:
        return dict(there)
    if there["weights"] != here["weights"]:
        others = "; ".join(line for line in found if not line.startswith("weights: "))
        msg = (
            f"{run.path}: this run is of another base model: configuration, tokenizer or edited matrices of "
            f"{here['base']} differ from those of {there['base']}{f' ({others})' if others else ''}; resume it "
            "with the model and the layers that it was begun with"
        )
        raise KeditError(msg)
    fixed = [line for line in found if line.split(": ")[0] in STREAM]
    if fixed or not anyway:
        how = "begin another run" if fixed else "put it back, or add --resume_anyway true, which gives up bit-identity"
        msg = f"{run.path}: this run was begun otherwise ({'; '.join(fixed or found)}); {how}"
        raise KeditError(msg)
    goes_by = {**here, **{key: there[key] for key in KEPT if key in there}}
    _go_on(run, {**goes_by, "resumed": there.get("resumed", [])}, found)
    return goes_by


def check_processes(describe: Callable[[], Record]) -> None:
    """See that all processes have the same code, libraries and settings; devices and numbers of threads may differ.

    Args:
        describe: Gives the settings, whose hashes take a while; not asked where there is but one process.

    Raises:
        KeditError: They do not.
    """
    if ranks()[1] > 1:
        here = describe()
        code = hashlib.sha256()
        for file in sorted(Path(__file__).parent.rglob("*.py")):
            code.update(file.read_bytes())
        for what, value in (("the code of kedit_lightning", code.hexdigest()), ("settings and data", here)):
            known = value if isinstance(value, str) else {k: v for k, v in value.items() if k not in MACHINE}
            text = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
            same(what, text, "run one version of the command with one configuration on all machines")


def moments(editor: Editor) -> str:
    """Hash of the second moments of a prepared editor."""
    known = {str(site): each for site, each in editor.moments.items() if not isinstance(each, Identity)}
    return checksum({site: each.mean.cpu().contiguous() for site, each in known.items()})


def check_moments(run: RunDirectory, here: str, *, anyway: bool) -> None:
    """Compare second moments with those that a run was begun with: their files may have been replaced since then.

    Args:
        run: The run directory.
        here: `moments` of now.
        anyway: As in `check`.

    Raises:
        KeditError: They are others.
    """
    there = run.read_json(SETTINGS)
    if there.get("moments", here) == here:
        return
    if not anyway:
        msg = (
            f"{run.path}: the second moments of the keys are others than this run was begun with; put their files "
            "back, or add --resume_anyway true, which gives up bit-identity"
        )
        raise KeditError(msg)
    _go_on(run, {**there, "moments": here}, ["moments: others than there"])


def _go_on(run: RunDirectory, goes_by: Record, found: list[str]) -> None:
    """Say that a run is no longer as an unbroken one, and have it say so."""
    _log.warning(
        "warning: %s: goes on otherwise than it was begun, bit-identity is lost: %s", run.path, "; ".join(found)
    )
    changed = {"edits": len(run.lines), "differences": found}
    run.write_json(SETTINGS, {**goes_by, "resumed": [*goes_by.get("resumed", []), changed]})


@contextmanager
def random_stream(seed: int, name: str) -> Iterator[None]:
    """Give what happens inside the context random numbers of its own, the same whatever was drawn before.

    Args:
        seed: The seed of the run.
        name: Of what, such as the place of an edit batch in its run.
    """
    own = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
    with isolate_rng():
        torch.manual_seed(own)
        np.random.seed(own)  # noqa: NPY002 - of libraries that draw from it
        random.seed(own)
        yield
