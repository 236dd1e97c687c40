"""Statistics of keys over documents: what to take them from, found again or computed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import distributed

from kedit_lightning.edits import Site
from kedit_lightning.errors import StatisticsError
from kedit_lightning.models import moment_files
from kedit_lightning.models.corpora import Corpus, tokenise
from kedit_lightning.models.fingerprint import fingerprint_below
from kedit_lightning.models.key_pass import Extent, KeyPass
from kedit_lightning.models.key_statistics import Identity, KeyStatistics
from kedit_lightning.models.language_model import LanguageModel
from kedit_lightning.models.moment_cache import About, MomentCache
from kedit_lightning.models.packing import ForwardDtype, KeyReader, rounds
from kedit_lightning.models.processes import of_all, ranks

log = logging.getLogger(__name__)
TOKENS_PER_DIMENSION = 10
KEYWORDS = ("almanac", "identity")
"""Sources that are no files."""


@dataclass(frozen=True)
class Statistics:
    """Where the second moments of keys come from. What has been computed is kept on disk and found again.

    Args:
        source: ``almanac``; a text file with one document a line; a ``.jsonl`` file; a Hugging Face dataset as
            ``NAME[:CONFIG][@REVISION]``, for instance ``wikimedia/wikipedia:20231101.en``; a statistics file
            (``.npz`` as published by ROME and MEMIT, or ``.safetensors``) or a folder of them; or ``identity``.
        tokens: Stop after this many tokens; ``full`` takes all ``n_samples`` documents, null 10 × the key width.
        n_samples: Documents at most, the first of the shuffled source.
        mom2_dtype: Type in which is summed.
        max_length: A document is cut after this many tokens, and at the model's own limit.
        skip_first_token: Leave out each document's first token (BOS), whose key is huge in some models.
        forward_dtype: Precision of the matrix products in the model's forward pass: ``float32``, ``tf32`` or
            ``bfloat16``; null: as the model is loaded. The weights stay as they are, and so does ``mom2_dtype``. Less
            than float32 takes a row a document, since documents packed into one would round otherwise.
        tolerance: End the count early, at the first doubling of the tokens that changes C⁻¹k by no more than this
            fraction in every layer (median over 256 held-out keys; say 0.05). The change is shown and kept in the
            file's header in any case. The held-out keys are of the first documents, which are counted last.
        ridge: Added to the diagonal of C before it is inverted, in units of the diagonal's mean.
        seed: Seed of the shuffle.
        batch_tokens: Tokens of a batch at most, padding counted; lower it when memory runs out.
        split: Split of a Hugging Face dataset.
        column: Field of the text in a Hugging Face dataset or ``.jsonl`` file.
        streaming: Read a Hugging Face dataset as a shuffled stream; null: unless ``tokens`` is ``full``.
        cache_dir: Folder of computed statistics; null: ``$KEDIT_CACHE/statistics``, by default
            ``~/.cache/kedit_lightning/statistics``.

    Raises:
        StatisticsError: A number is out of range.
    """

    source: str = "almanac"
    tokens: int | Literal["full"] | None = None
    n_samples: int = 100_000
    mom2_dtype: Literal["float32", "float64"] = "float32"
    forward_dtype: ForwardDtype | None = None
    tolerance: float | None = None
    max_length: int = 1024
    skip_first_token: bool = False
    ridge: float = 0.0
    seed: int = 1
    batch_tokens: int = 4096
    split: str = "train"
    column: str = "text"
    streaming: bool | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("ridge", "seed", "tolerance") else 1
            if isinstance(value, int | float) and not isinstance(value, bool) and not value >= least:
                msg = f"statistics.{field.name}: expected at least {least}, got {value}"
                raise StatisticsError(msg)

    def second_moments(
        self, base: LanguageModel, sites: Sequence[Site], *, accelerator: str | None = None, devices: int = 1
    ) -> dict[Site, KeyStatistics]:
        """Second moments of the keys of sites, on the unedited model; read from disk where they are there.

        Args:
            base: The base model. Its edits, if it has any, are lifted for the time of the pass.
            sites: Sites with a weight (attn or mlp).
            accelerator: Lightning's name of where the model is to run; by default it stays where it is.
            devices: Processes to start for the pass. Inside several processes that already talk to each other it
                stays 1, and all of them call this method.

        Returns:
            For each site its statistics.

        Raises:
            StatisticsError: The source is missing, unreachable or corrupt, or does not fit the model.
        """
        names = {site: base.name(site).removesuffix(".weight") for site in sites}
        widths = {site: base.weight(site).shape[1] for site in sites}
        if self.source == "identity":
            return {site: Identity(widths[site], names[site]) for site in names}
        if path := self.given:
            found = {s: moment_files.load(path, names[s], widths[s], fingerprint_below(base, s.layer)) for s in names}
        else:
            found = self._computed(base, names, widths, accelerator, devices)
        return {s: KeyStatistics(mean, count, self.ridge, names[s]) for s, (mean, count) in found.items()}

    @property
    def given(self) -> Path | None:
        """The statistics file or folder that is meant, if one is; a folder may well be called ``almanac``."""
        return None if self.source in KEYWORDS else moment_files.given(self.source)

    def check(self, base: LanguageModel, sites: Sequence[Site]) -> None:
        """See whether there is something to compute, as far as that shows before anything is computed.

        Raises:
            StatisticsError: There is not, or the source is no such file.
        """
        if self.source == "identity" or self.given:
            self.second_moments(base, sites)  # a given file is read, and so checked
            source = self.source
            msg = f"nothing to compute: `statistics.source` is {source}; expected almanac, a text file or a dataset"
            raise StatisticsError(msg)
        self._corpus.identity()

    def wanted(self, base: LanguageModel) -> int | Literal["full"]:
        """How many tokens are counted; ``full``: those of all ``n_samples`` documents."""
        widest = max(base.weight(Site(0, part)).shape[1] for part in ("attn", "mlp"))
        return self.tokens or TOKENS_PER_DIMENSION * widest

    def files(self, base: LanguageModel, sites: Sequence[Site]) -> dict[Site, Path]:
        """Where the computed statistics of sites are kept, or would be."""
        names = {site: base.name(site).removesuffix(".weight") for site in sites}
        return {site: self._cache.path(about) for site, about in self._about(base, names).items()}

    def _computed(
        self,
        base: LanguageModel,
        names: dict[Site, str],
        widths: dict[Site, int],
        accelerator: str | None,
        devices: int,
    ) -> dict[Site, moment_files.Moment]:
        about = self._about(base, names)
        kept = {site: self._cache.load(about[site], widths[site]) for site in names}
        found = {site: moment for site, moment in kept.items() if moment is not None}
        anywhere = of_all([name for site, name in names.items() if site not in found])  # so that all do the same pass
        if missing := [site for site in names if names[site] in anywhere]:
            found |= self._pass(base, missing, about, accelerator, devices)
        return {site: found[site] for site in names}

    def _pass(
        self,
        base: LanguageModel,
        sites: list[Site],
        about: dict[Site, About],
        accelerator: str | None,
        devices: int,
    ) -> dict[Site, moment_files.Moment]:
        """Compute second moments, and keep them."""
        one = about[sites[0]]
        extent = Extent(None if self.tokens == "full" else int(one["tokens"]), self._corpus.size, self.tolerance)
        documents, skip = self._tokenise(base, int(one["max_length"]), extent.tokens)
        if (first := next(documents, None)) is None:
            msg = f"{self.source}: expected documents with more than {skip} tokens, got none"
            raise StatisticsError(msg)
        layers = "1 layer" if len(sites) == 1 else f"{len(sites)} layers"
        log.info("Second moments of %s over %s.", layers, self.source)
        reader = KeyReader(base, sites, self.batch_tokens, skip, self.forward_dtype)
        partial = self._cache.partial([about[site] for site in sites])
        dtype = getattr(torch, self.mom2_dtype)
        one_pass = KeyPass(reader, chain([first], documents), extent, dtype, partial, place=accelerator is not None)
        moments, sums = one_pass.run(accelerator or "cpu", devices), one_pass.sums
        if self.tolerance is not None and not sums.enough:
            log.warning(
                "The tolerance %g was not reached within %d tokens; raise `statistics.tokens`.",
                *(self.tolerance, sums.tokens),
            )
        ended = extent.tokens is not None and not sums.enough and sums.tokens < extent.tokens
        if ended:
            log.warning("%s holds %d tokens, fewer than the %d asked for.", self.source, sums.tokens, extent.tokens)
        found = {}
        for site, (moment, count) in moments.items():
            changes = json.dumps(sums.convergence.changes[site])
            extra = {"source": self.source, "documents_read": str(sums.documents), "convergence": changes}
            found[site] = self._cache.keep(about[site], moment, count, extra)
        if ranks()[0] == 0:
            partial.unlink(missing_ok=True)
        if ranks()[1] > 1:
            distributed.barrier()  # the files are there for every process
        return found

    def _tokenise(self, base: LanguageModel, max_length: int, tokens: int | None) -> tuple[Iterator[torch.Tensor], int]:
        """Token ids of each document, and from which token on its keys count."""
        skip = int(self.skip_first_token)
        return tokenise(self._corpus, base.tokenizer, max_length=max_length, tokens=tokens, skip=skip), skip

    @property
    def _cache(self) -> MomentCache:
        return MomentCache(self.cache_dir)

    @property
    def _corpus(self) -> Corpus:
        streaming = self.tokens != "full" if self.streaming is None else self.streaming
        return Corpus(self.source, self.split, self.column, self.n_samples, self.seed, streaming)

    def _about(self, base: LanguageModel, names: dict[Site, str]) -> dict[Site, About]:
        """For each site everything that changes the answer, in words for the file's header."""
        shared = {
            "documents": self._corpus.identity(),
            "tokens": str(self.wanted(base)),
            "n_samples": str(self.n_samples),
            "seed": str(self.seed),
            "max_length": str(min(self.max_length, base.max_length)),
            "skip_first_token": str(self.skip_first_token),
            "mom2_dtype": self.mom2_dtype,
            "weights": str(base.weight(Site(0, "mlp")).dtype).removeprefix("torch."),
        }
        later = {"forward_dtype": self.forward_dtype, "tolerance": self.tolerance}  # absent where they change nothing
        shared |= {name: str(value) for name, value in later.items() if value is not None}
        if rounds(base, self.forward_dtype):
            shared["attention"] = str(base.model.config._attn_implementation)
        models = {layer: fingerprint_below(base, layer) for layer in {site.layer for site in names}}
        return {site: {"module": name, "model": models[site.layer], **shared} for site, name in names.items()}


def compute(
    base: LanguageModel,
    statistics: Statistics,
    sites: Sequence[Site],
    *,
    accelerator: str | None = None,
    devices: int = 1,
) -> list[Path]:
    """Compute second moments and keep them on disk, for editing runs to find.

    Args:
        base: The base model.
        statistics: What to compute.
        sites: Sites with a weight (attn or mlp), whose keys are wanted.
        accelerator: Lightning's name of where the model is to run; by default it stays where it is.
        devices: Processes to start.

    Returns:
        The files, one a site.

    Raises:
        StatisticsError: There is nothing to compute from this source, or the files cannot be written.
    """
    statistics.check(base, sites)
    statistics.second_moments(base, sites, accelerator=accelerator, devices=devices)
    paths = list(statistics.files(base, sites).values())
    if lost := [str(path) for path in paths if not path.is_file()]:
        msg = f"the statistics could not be written: {', '.join(lost)}; make room, or set `statistics.cache_dir`"
        raise StatisticsError(msg)
    return paths
