"""Function words of English, which say nothing about what a model knows."""

from __future__ import annotations

_FUNCTION_WORDS = """
a an the this that these those some any each every either neither no none all both half several many much more most
few fewer less least other another such same own one ones
i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
ourselves they them their theirs themselves who whom whose which what whatever whoever someone something anyone
anything everyone everything nobody nothing there here
am is are was were be been being do does did done doing have has had having can could may might must shall should
will would ought need
and or but nor so yet if then else than because since although though while whereas unless until when whenever where
wherever why how whether as
of in on at by for with without from to into onto out off over under above below between among through during
before after against about across along around behind beside besides beyond near toward towards upon within up down
via per
not never ever always often also too very just only even still already again now once perhaps quite rather really
however therefore thus etc
s t d ll m re ve
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
"""In lower case. Tokens without a letter or digit (punctuation, white space) are never content either."""


def is_content(text: str) -> bool:
    r"""Whether a token's text says something: it has a letter or digit and is no function word, whatever its case.

    >>> [is_content(text) for text in (" Paris", " The", " ,", "\n", " 12")]
    [True, False, False, False, True]
    """
    word = text.strip()
    return any(character.isalnum() for character in word) and word.lower() not in STOP_WORDS
