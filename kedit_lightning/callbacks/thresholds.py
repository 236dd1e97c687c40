"""When an edited model is no longer healthy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kedit_lightning.errors import KeditError
from kedit_lightning.lines import Record


@dataclass(frozen=True)
class Thresholds:
    """What is no longer healthy; what is null is measured and warned of never.

    Attributes:
        l1: Relative L1 drift of an edited matrix, (‖W‖₁ − ‖W₀‖₁) / ‖W₀‖₁ (EAC, Fig. 2). What a healthy model bears
            depends on the model, so neither this nor the next two are set by default.
        frobenius: ‖W − W₀‖_F / ‖W₀‖_F of an edited matrix.
        spectral: ‖W − W₀‖₂ / ‖W₀‖₂ of an edited matrix.
        perplexity: Perplexity of held-out text, relative to that of the unedited model.
        retention: How far retention may fall below the best so far; 0.1 are ten points.
    """

    l1: float | None = None
    frobenius: float | None = None
    spectral: float | None = None
    perplexity: float | None = 1.25
    retention: float | None = 0.1

    def __post_init__(self) -> None:
        """Refuse what every model crosses.

        Raises:
            KeditError: A threshold is not above 0, or that of perplexity not above 1.
        """
        for name, value in vars(self).items():
            least = 1 if name == "perplexity" else 0
            if value is not None and not value > least:
                msg = f"thresholds.{name}: expected more than {least} or null, got {value}"
                raise KeditError(msg)

    def crossed(self, history: Sequence[Record]) -> dict[str, str]:
        """What the last check has found unhealthy.

        Args:
            history: All checks so far, as in health.jsonl.

        Returns:
            By measure a sentence; a number that is not finite is unhealthy.
        """
        if not history:
            return {}
        now, found = history[-1], {}
        for measure in ("l1", "frobenius", "spectral"):
            if (limit := getattr(self, measure)) is None:
                continue
            name, drift = max(((n, d[measure]) for n, d in now["drift"].items()), key=lambda at: _rank(at[1]))
            if not drift <= limit:
                found[measure] = f"{measure} drift of {name} is {drift:.3g} (threshold {limit:g})"
        if self.perplexity is not None and now["perplexity"] is not None:
            before = history[0]["perplexity"]
            if not now["perplexity"] <= self.perplexity * before:
                found["perplexity"] = (
                    f"perplexity of held-out text is {now['perplexity']:.4g}, that of the unedited model {before:.4g} "
                    f"(threshold {self.perplexity:g} times)"
                )
        if self.retention is not None and now["retention"] is not None:
            best = max(check["retention"] for check in history if check["retention"] is not None)
            if best - now["retention"] > self.retention:
                found["retention"] = (
                    f"{now['retention']:.0%} of earlier edits are still answered, it was {best:.0%} "
                    f"(threshold {100 * self.retention:g} points lost)"
                )
        return {measure: f"after {now['edits']} edits {sentence}" for measure, sentence in found.items()}


def _rank(value: float) -> float:
    """The value, with nan above all others."""
    return value if value == value else float("inf")
