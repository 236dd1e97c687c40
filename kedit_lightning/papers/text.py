"""A table as text: Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]], title: str, note: str) -> str:
    """A table as Markdown.

    >>> print(markdown(["", "Eff"], [["TOP, paper", "98.7"]], "TOP", "A note."), end="")
    TOP
    <BLANKLINE>
    | | Eff |
    |---|---|
    | TOP, paper | 98.7 |
    <BLANKLINE>
    A note.
    """
    lines = ["|".join(["", *(f" {cell} " if cell else " " for cell in line), ""]) for line in (header, *cells)]
    return "\n".join([title, "", lines[0], "|---" * len(header) + "|", *lines[1:], "", note, ""])


def latex(header: Sequence[str], cells: Sequence[Sequence[str]], title: str, note: str) -> str:
    r"""A table as LaTeX; it needs the package booktabs.

    >>> print(latex(["", "Eff"], [["w/o x & y", "98.7 ± 1"]], "TOP", "100 %."), end="")
    \begin{table}
    \caption{TOP. 100 \%.}
    \begin{tabular}{lr}
    \toprule
     & Eff \\
    \midrule
    w/o x \& y & 98.7 $\pm$ 1 \\
    \bottomrule
    \end{tabular}
    \end{table}
    """
    lines = [" & ".join(map(escaped, line)) + r" \\" for line in (header, *cells)]
    caption = escaped(f"{title}. {note}")
    begin = [r"\begin{table}", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"]
    end = [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join([*begin, r"\toprule", lines[0], r"\midrule", *lines[1:], *end])


def escaped(text: str) -> str:
    """A text as LaTeX has it."""
    for one, other in {"\\": r"\textbackslash{}", **{c: f"\\{c}" for c in "&%$#_"}}.items():
        text = text.replace(one, other)
    for one, other in {"±": r"$\pm$", "δ": r"$\delta$", "γ": r"$\gamma$", "′": "$'$"}.items():
        text = text.replace(one, other)
    return text
