"""How far a pass over documents has come: added up over processes, kept on the disk, and taken up after a kill."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed

from kedit_lightning.edits import Site
from kedit_lightning.errors import KeditError, StatisticsError
from kedit_lightning.models import moment_files
from kedit_lightning.models.convergence import Convergence
from kedit_lightning.models.processes import agreed, ranks
from kedit_lightning.models.second_moment import SecondMoment

log = logging.getLogger(__name__)


class Sums:
    """Second moments so far, what went into them, and how they converge.

    Args:
        widths: Width k of each site's keys.
        dtype: Type in which is summed.
    """

    def __init__(self, widths: Mapping[Site, int], dtype: torch.dtype) -> None:
        self.moments = {site: SecondMoment(width, dtype) for site, width in widths.items()}
        self.convergence = Convergence({})
        self.documents = self.tokens = 0
        self.enough = False

    # ------------------------------------------------------------------ over processes

    def gather(self, device: torch.device) -> None:
        """Add the sums of all processes into those of the first.

        Args:
            device: Where processes can add them: a process that had no keys yet has them elsewhere.
        """
        rank, processes = ranks()
        if processes > 1:
            for moment in self.moments.values():
                for state in _on(device, moment):
                    distributed.reduce(state, dst=0)
                    if rank:
                        state.zero_()

    def take(self, device: torch.device) -> dict[Site, tuple[Tensor, int]]:
        """The sums of all processes, shape ``(k, k)``, on the CPU, and the numbers of keys; nothing is left here."""
        found = {}
        for site in list(self.moments):
            moment = self.moments.pop(site)
            if ranks()[1] > 1:
                for state in _on(device, moment):
                    distributed.all_reduce(state)
            moment.moment = moment.moment.cpu()  # where there is room for the whole of it
            found[site] = moment.total(), int(moment.count)
        return found

    # ------------------------------------------------------------------ at a doubling

    def read_off(self, tolerance: float | None) -> None:
        """Say the relative change of ``C⁻¹ k``, and whether it is within the tolerance; after `gather`."""
        enough = False
        if ranks()[0] == 0:
            found = {  # compute() would ask the other processes
                site: self.convergence.update(site, moment.total() / moment.count, self.tokens)
                for site, moment in self.moments.items()
            }
            changes = {site: change for site, change in found.items() if change is not None}
            if changes:
                worst = max(changes, key=lambda site: changes[site])
                enough = len(changes) == len(found) and changes[worst] <= (tolerance or 0.0)
                what = f"relative change of C⁻¹k on {len(self.convergence.keys[worst])} held-out keys"
                within = f"; within {tolerance:g}, enough" if enough else ""
                log.info("%d tokens: %s %.2g (layer %d)%s.", self.tokens, what, changes[worst], worst.layer, within)
        self.enough = agreed(enough)

    # ------------------------------------------------------------------ the partial file

    def keep(self, path: Path) -> bool:
        """Keep it all in a partial file; after `gather`, in the first process.

        Returns:
            Whether there was room for it.
        """
        tensors = {}
        for i, (site, moment) in enumerate(self.moments.items()):
            tensors[f"moment.{i}"] = moment.moment.cpu()
            if site in self.convergence.before:
                tensors[f"solved.{i}"] = self.convergence.before[site].cpu()
        changes = [self.convergence.changes[site] for site in self.moments]
        state = {"documents": self.documents, "tokens": self.tokens, "enough": self.enough, "changes": changes}
        try:
            moment_files.save_partial(path, tensors, {"state": json.dumps(state)})
        except (KeditError, SafetensorError) as error:
            log.warning("Cannot keep partial sums: %s. Going on; a kill would cost the whole pass.", error)
            return False
        return True

    def resume(self, path: Path | None) -> None:
        """Take up a partial file, if there is one: its sums in the first process, where it stood in all of them."""
        found = None
        try:
            found = moment_files.load_partial(path) if path and ranks()[0] == 0 else None
        except StatisticsError as error:
            log.warning("%s. The pass starts from its beginning.", error)
        state = {}
        if found:
            tensors, about = found
            state = json.loads(about["state"])
            for i, (site, moment) in enumerate(self.moments.items()):
                moment.moment, moment.count = tensors[f"moment.{i}"], torch.tensor(state["tokens"])
                if f"solved.{i}" in tensors:
                    self.convergence.before[site] = tensors[f"solved.{i}"]
                self.convergence.changes[site] = {int(n): change for n, change in state["changes"][i].items()}
            log.info("Going on at %d tokens, where a pass was stopped.", state["tokens"])
        state = agreed(state)
        self.documents, self.tokens = state.get("documents", 0), state.get("tokens", 0)
        self.enough = state.get("enough", False)


def _on(device: torch.device, moment: SecondMoment) -> tuple[Tensor, Tensor]:
    """The states of a second moment, moved there."""
    moment.moment, moment.count = moment.moment.to(device), moment.count.to(device)
    return moment.moment, moment.count
