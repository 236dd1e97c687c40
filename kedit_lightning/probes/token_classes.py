"""What part a token plays in a prompt: TOP's seven classes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from types import MappingProxyType

from kedit_lightning.edits import SLOT, Edit, Token
from kedit_lightning.models import LanguageModel

CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "rp": "relation prefix",
        "fs": "first subject",
        "ms": "middle subject",
        "ls": "last subject",
        "fr": "first relation",
        "mr": "middle relation",
        "lr": "last relation",
    }
)
"""The classes in the order in which they stand in a prompt, and what their names are short for (TOP, section 3.2)."""


def token_classes(length: int, first: int, last: int, begin: int = 0) -> list[str]:
    """The class of every token of a prompt; the only token of a span is its last.

    Args:
        length: Tokens of the prompt, without its continuation.
        first: The subject's first token.
        last: The subject's last token.
        begin: How many tokens stand before the prompt (a start token, a context template); they have no class.

    Returns:
        A class a token, empty where it has none. A prompt that ends in its subject has no relation tokens but its
        prefix.

    >>> token_classes(8, 2, 4)
    ['rp', 'rp', 'fs', 'ms', 'ls', 'fr', 'mr', 'lr']
    >>> token_classes(4, 2, 2, begin=1)
    ['', 'rp', 'ls', 'lr']
    """
    subject, relation = _span(last + 1 - first, "s"), _span(length - last - 1, "r")
    return [""] * begin + ["rp"] * (first - begin) + subject + relation


def _span(n: int, kind: str) -> list[str]:
    """The classes of n tokens in a row, subject's (s) or relation's (r)."""
    places = ["f", *["m"] * (n - 2), "l"] if n > 1 else ["l"] * n
    return [place + kind for place in places]


def classes_of(base: LanguageModel, edit: Edit) -> list[str]:
    """The class of every token of an edit's prompt as the model reads it, without its continuation.

    Args:
        base: The model, whose tokenizer may put a start token before every text; that has no class.
        edit: The edit.

    Returns:
        A class a token, see `token_classes`.
    """
    start = edit.prompt.index(SLOT)
    row = base.encode(edit.text, None, (start, start + len(edit.subject)))
    begin = sum(1 for _ in takewhile(base.tokenizer.all_special_ids.__contains__, row.ids))
    first, last = row.positions[Token.SUBJECT_FIRST], row.positions[Token.SUBJECT_LAST]
    return token_classes(len(row.ids), first, last, min(begin, first))
