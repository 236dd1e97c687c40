"""The folder where computed second moments are kept and found again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from kedit_lightning import __version__
from kedit_lightning.cache import cache_dir
from kedit_lightning.errors import KeditError, StatisticsError
from kedit_lightning.models import moment_files
from kedit_lightning.models.processes import ranks

About = dict[str, str]
"""Everything that changes a site's second moment, in words for the file's header."""

log = logging.getLogger(__name__)


class MomentCache:
    """Files of second moments, each named by what it was computed from.

    Args:
        folder: Where they are; by default in the cache of kedit_lightning.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else cache_dir() / "statistics"

    def path(self, about: About) -> Path:
        """The file of a second moment; its name ends in a hash of everything that changes the answer."""
        return self.folder / f"{about['module']}_{about['mom2_dtype']}_mom2_{_key(about)}.safetensors"

    def partial(self, abouts: Sequence[About]) -> Path:
        """The file of a pass under way over several sites."""
        return self.folder / f"partial_{_key(abouts)}.safetensors"

    def load(self, about: About, width: int) -> moment_files.Moment | None:
        """C and the number of keys in it, if they are there; of a bad file it is said that it will be made again."""
        path = self.path(about)
        try:
            return moment_files.load(path, about["module"], width, about["model"]) if path.is_file() else None
        except StatisticsError as error:
            log.warning("%s. It is computed again.", error)
            return None

    def keep(self, about: About, moment: Tensor, count: int, extra: About) -> moment_files.Moment:
        """Keep a new sum, once for all processes; where there is no room for it, that is said.

        Args:
            about: What it was computed from.
            moment: The sum, shape ``(k, k)``.
            count: Keys in it.
            extra: What else the header is to say.

        Returns:
            C and the number of keys in it.

        Raises:
            StatisticsError: The sum is not finite.
        """
        module = about["module"]
        if not moment.isfinite().all():
            msg = f"the keys of {module} are not finite in {about['weights']}: load the model in float32 or bfloat16"
            raise StatisticsError(msg)
        if ranks()[0] == 0:
            header = {**about, "count": str(count), "kedit_lightning": __version__, **extra}
            try:
                moment_files.save(self.path(about), moment, count, header)
            except (KeditError, SafetensorError) as error:
                log.warning("Cannot keep the second moment of %s: %s. Going on without.", module, error)
        return moment / count, count


def _key(about: About | Sequence[About]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
