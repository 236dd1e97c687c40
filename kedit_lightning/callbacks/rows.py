"""Rows of the work under way: live bars on a terminal, a line now and then in a file."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Console
from rich.progress import Progress, Task, TaskID
from rich.text import Text

from kedit_lightning.models.progress import bars

MINUTE = 60.0
"""Seconds between two lines on the same work where there are no bars."""


class Rows:
    """What is being done, how far it is and how long it will take, a row each.

    Args:
        out: Where to write; if it is no terminal, what takes longer than a minute has a line a minute.
    """

    def __init__(self, out: Console) -> None:
        self.out, self.live = out, out.is_terminal and not out.is_dumb_terminal
        self._progress: Progress | None = None
        self._ids: dict[str, TaskID] = {}

    def show(self, name: str, done: float, total: int | None, note: str = "") -> None:
        """Show a row, which is made when it is first named and begins anew when less is done than before.

        A row without a total is there until the next one is made.
        """
        if self._progress is None:
            self._progress, self._ids = bars(self.out), {}
            if self.live:
                self._progress.start()
        if name not in self._ids:
            for task in self._progress.tasks:
                self._progress.update(task.id, visible=task.total is not None)
            self._ids[name] = self._progress.add_task(name, total=total, note="", said=0.0)
        task = self._progress.tasks[self._ids[name]]
        if done < task.completed:
            self._progress.reset(task.id, note="", said=0.0)
        self._progress.update(task.id, completed=done, total=total, note=note)
        if not self.live and task.total is not None:
            self._now_and_then(task)

    def _now_and_then(self, task: Task) -> None:
        elapsed, left = task.elapsed or 0.0, task.time_remaining
        if elapsed - task.fields["said"] < MINUTE:
            return
        task.fields["said"] = elapsed
        line = [f"{task.description}: {task.completed:,.0f} of {task.total:,.0f}"]
        line += [f"{timedelta(seconds=round(left))} left"] if left else []
        line += [task.fields["note"]] if task.fields["note"] else []
        self.line(Text(" · ".join(line)))

    def line(self, text: Text) -> None:
        """One line above the rows, which the terminal may break but a file keeps whole."""
        self.out.print(text, soft_wrap=True)

    def close(self) -> None:
        """Take the rows away and give the cursor back."""
        if self._progress is not None and self.live:
            self._progress.stop()
        self._progress = None
