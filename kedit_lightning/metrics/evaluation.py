"""How edits are evaluated: what can be set, and in words what every number depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kedit_lightning.errors import KeditError
from kedit_lightning.metrics.functional import WORD
from kedit_lightning.metrics.scorer import CANDIDATES
from kedit_lightning.models import LanguageModel

TOP_K = 5


@dataclass
class Evaluation:
    """How edits are evaluated.

    Attributes:
        generation: Also let the model write: fluency, consistency and free-generation efficacy (slower).
        generation_length: Length of a written text in tokens, its prompt included.
        max_tokens: Tokens of a batch, padding included; less needs less memory.
        seed: Seed of the written texts; each case and prompt has a random stream of its own.
        cache: Keep what the unedited model answers and scores in the cache, for later runs of the same base model,
            edits, settings and libraries.

    Raises:
        KeditError: A number of tokens is below 1.
    """

    generation: bool = True
    generation_length: int = 100
    max_tokens: int = 8192
    seed: int = 0
    cache: bool = True

    def __post_init__(self) -> None:
        """Refuse lengths that mean nothing."""
        for name in ("generation_length", "max_tokens"):
            if (value := getattr(self, name)) < 1:
                msg = f"evaluation.{name}: expected at least 1, got {value}"
                raise KeditError(msg)

    def protocol(self, base: LanguageModel) -> dict[str, Any]:
        """What every number depends on; numbers of different protocols do not compare.

        Args:
            base: The model that is evaluated.
        """
        return {
            "tokenizer": type(base.tokenizer).__name__,
            "dtype": str(next(base.model.parameters()).dtype).removeprefix("torch."),
            "joiner": " ",
            "scoring": "teacher-forced, float32 log-softmax, mean NLL over the target's tokens",
            "success": "strictly likelier; a tie fails",
            "r_specificity": f"first content token of the unedited model's {CANDIDATES} likeliest, against the least "
            "likely token of the new target; relations edited for the same subject in the batch left out",
            "locality": "tokens of the neighborhood's answers, teacher-forced, whose arg-max is the unedited model's",
            "aggregation": "mean over the prompts of a case, then over cases; std with ddof 0 over cases",
            "generated": "greedy, begins with the new target as whole words, tokens of the target + 1",
            "generation": {
                "enabled": self.generation,
                "length": self.generation_length,
                "top_k": TOP_K,
                "seed": self.seed,
                "text": "with its prompt, NFKD, end-of-text does not stop it",
                "words": WORD,
            },
        }
