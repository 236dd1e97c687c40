"""Which option a generated text chooses: soundly, and as the papers' scripts have it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from kedit_lightning.almanac.tasks import normalise
from kedit_lightning.metrics.tasks import exact_match

INVALID = -1
"""What is no option."""

Reader = Callable[[str, Sequence[str], int], int]
"""A text, the options and the right one → the option read, or `INVALID`."""


def first_word(text: str, options: Sequence[str], label: int = INVALID) -> int:
    """The option that is the first word of a text; single letters as they are, longer options in any case.

    >>> [first_word(text, ("true", "false")) for text in (" True.", "False or true", "It is true", "untrue")]
    [0, 1, -1, -1]
    """
    del label
    return _only(_words(text, options)[:1], options)


def only_word(text: str, options: Sequence[str], label: int = INVALID) -> int:
    """The one option among the words of a text; none if there are several.

    >>> [only_word(text, ("no", "yes")) for text in ("I say: No!", "yes and no", "not", "The answer is yes, yes")]
    [0, -1, -1, 1]
    """
    del label
    return _only(_words(text, options), options)


def favourable(text: str, options: Sequence[str], label: int) -> int:
    """As the EAC script: the right option if the text has it as a part, else another that it has.

    >>> favourable("Untrue or false", ("true", "false"), 1), favourable("untrue", ("true", "false"), 1)
    (1, 0)
    """
    low = text.lower()
    return next((i for i in (label, *range(len(options))) if options[i].lower() in low), INVALID)


def first_tested(first: int, marker: str) -> Reader:
    """As AlphaEdit's code: one option is looked for as a part of the text, then the others.

    Args:
        first: The option looked for first.
        marker: Words that end a prompt; where the model goes on to write them, what follows the last of them counts.

    >>> first_tested(1, "Answer:")("not yes", ("no", "yes"), 0), first_tested(0, "Answer:")("nothing", ("no", "yes"), 1)
    (1, 0)
    """

    def read(text: str, options: Sequence[str], label: int) -> int:
        del label
        low = text.split(marker)[-1].lower()
        return next((i for i in (first, *range(len(options))) if options[i].lower() in low), INVALID)

    return read


def letter_at_line_end(text: str, options: Sequence[str], label: int = INVALID) -> int:
    r"""As AlphaEdit's code for MMLU: a letter counts only right before a line break, be it the end of a word.

    >>> [letter_at_line_end(text, "ABCD") for text in (" B\n", " B", " (B)\n", "a club\n", "idea\nB\n")]
    [1, -1, -1, 1, 0]
    """
    del label
    return next((i for i, option in enumerate(options) if f"{option.lower()}\n" in text.lower()), INVALID)


def script_counts(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[int]:
    """How often the EAC script counts each item of open question answering as right.

    Broken, and here for comparison only: the texts are prompt, passage and generation together, an item may count
    several times, and once a span of several words has matched, later items are looked at less closely.

    Args:
        texts: Prompt and continuation of each item, in the order of the data.
        answers: The accepted answers of each.
    """
    counts, stop = [], False
    for text, accepted in zip(texts, answers, strict=True):
        words = normalise(text.split("Answer:")[-1]).split() or [""]
        if exact_match(words[0], accepted) or exact_match(words[-1], accepted):
            counts.append(1)
            continue
        count = 0
        for i, word in enumerate(words[:-1]):
            if exact_match(word, accepted):
                count += 1
                continue
            if any(exact_match(" ".join(words[i:j]), accepted) for j in range(i + 2, len(words) + 1)):
                count, stop = count + 1, True
            if stop:
                break
        counts.append(count)
    return counts


def _words(text: str, options: Sequence[str]) -> list[str]:
    return re.findall(r"\w+", text if _letters(options) else text.casefold())


def _only(words: Sequence[str], options: Sequence[str]) -> int:
    wanted = options if _letters(options) else [option.casefold() for option in options]
    found = {wanted.index(word) for word in words if word in wanted}
    return found.pop() if len(found) == 1 else INVALID


def _letters(options: Sequence[str]) -> bool:
    return all(len(option) == 1 for option in options)
