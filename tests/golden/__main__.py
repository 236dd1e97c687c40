"""Command line: ``python -m tests.golden DIR [--editor E] [--model M] [--every]``."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from kedit_lightning.errors import KeditError
from tests.golden import report
from tests.golden.cases import BadFolderError, Case, find
from tests.golden.compare import Distance, compare, expected_exactly
from tests.golden.runner import run


def main(args: Sequence[str] | None = None) -> int:
    """Run the cases of a folder.

    Returns:
        0 where every case that was run holds, 1 where a tolerance is passed, 2 where the folder cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="recorded cases, in the form of ../shared/golden")
    parser.add_argument("--editor", help="only this editor, as in the file names: EAC-ROME")
    parser.add_argument("--model", help="only this model, as in the file names: gpt2-tiny")
    parser.add_argument("--every", action="store_true", help="also print the error of every single tensor")
    options = parser.parse_args(args)
    _quiet()
    try:
        cases = find(options.folder, options.editor, options.model)
        ours = [case for case in cases if case.recorded is not None]
        for case in ours:
            case.check()
        failed = [case for case in ours if not _holds(case, every=options.every)]
    except BadFolderError as error:
        sys.stderr.write(f"tests.golden: {error}\n")
        return 2
    if absent := [str(case) for case in cases if case.recorded is None]:
        _say(f"not in this project yet: {', '.join(absent)}")
    _say(
        f"{len(ours) - len(failed)} of {len(ours)} cases hold"
        + (f"; beyond tolerance: {', '.join(map(str, failed))}" if failed else "")
    )
    return 1 if failed else 0


def distances(case: Case) -> tuple[list[Distance], dict[str, object]]:
    """Run a case and compare it with its recording.

    Returns:
        The distances, and the hyper-parameters that nothing of ours takes.

    Raises:
        BadFolderError: The recording does not hold enough to say anything.
    """
    recorded = case.numbers()
    found = run(case)
    assert case.recorded is not None
    bare = [stage.prefix for stage in case.recorded.stages.values() if stage.bare]
    expected = expected_exactly(case.meta.get("values", {}), recorded, bare)
    measured = compare(found.numbers, recorded, found.exact, expected)
    kinds = {distance.quantity for distance in measured}
    if missing := [kind for kind in case.recorded.needed if kind not in kinds]:
        msg = f"{case.folder}: the recording of {case} holds nothing to compare of the kind {missing[0]!r}"
        raise BadFolderError(msg)
    return measured, found.unused


def _holds(case: Case, *, every: bool) -> bool:
    recorded = case.recorded
    assert recorded is not None
    origin = " ".join(str(case.meta.get(key, ""))[:7] for key in ("peer_repository", "peer_commit")).strip()
    loose = "".join(f", {quantity} {bound:g}" for quantity, bound in recorded.loose.items())
    _say(f"{case}: tolerance {recorded.tolerance:g}{loose}" + (f", recorded from {origin}" if origin else ""))
    try:
        measured, unused = distances(case)
    except KeditError as error:
        _say(f"  FAILED: {error}\n")
        return False
    for line in report.table(measured, recorded) + (report.every(measured) if every else []):
        _say(line)
    if unused:
        _say(f"  not taken by our {recorded.editor}: {', '.join(f'{k}={v}' for k, v in unused.items())}")
    holds = not report.too_far(measured, recorded)
    _say(f"  {'holds' if holds else 'does not hold'}\n")
    return holds


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _quiet() -> None:
    """One thread, as the recordings were made; nothing on the terminal but the table."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
