"""One display for all that takes long: a bar of its own, or a row of the bars that are up already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

Step = Callable[[int, int | None, str], None]
"""Called with what is done, what there is to do (None: not known), and a note."""

DISPLAY: ContextVar[Callable[[str, int, int | None, str], None] | None] = ContextVar("DISPLAY", default=None)
"""Shows a step under a name, where bars are up in this context."""


def bars(console: Console) -> Progress:
    """Bars with a spinner, n of m, the time left and a note; they vanish when they are stopped."""
    return Progress(
        SpinnerColumn(finished_text=Text("✓", "green")),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", style="dim", table_column=Column(no_wrap=True)),
        console=console,
        transient=True,
        refresh_per_second=4,
        speed_estimate_period=600,
    )


@contextmanager
def steps(name: str, *, watched: bool = True) -> Iterator[Step]:
    """Show the steps of a piece of work.

    Args:
        name: What is being done.
        watched: Whether this process is the one that shows anything.

    Yields:
        What to call at every step: it advances a row of the bars that are up, else a bar on standard error, if that is
        a terminal.
    """
    console = Console(stderr=True)
    if not watched:
        yield lambda *_: None
    elif (display := DISPLAY.get()) is not None:
        yield lambda done, total, note: display(name, done, total, note)
    elif not console.is_terminal or console.is_dumb_terminal:
        yield lambda *_: None
    else:
        with bars(console) as progress:
            task = progress.add_task(name, total=None, note="")
            yield lambda done, total, note: progress.update(task, completed=done, total=total, note=note)
