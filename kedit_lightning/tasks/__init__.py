"""General abilities: tasks that have nothing to do with the edits, and what an edited model keeps of them."""

from kedit_lightning.tasks.suite import Score, Tasks, retained, scores
from kedit_lightning.tasks.table import ALMANAC, PERPLEXITY, TASKS, TaskName
from kedit_lightning.tasks.task import Answer, Cloze, Item, Question, Scorer, Summarisation, Task

__all__ = [
    "ALMANAC",
    "PERPLEXITY",
    "TASKS",
    "Answer",
    "Cloze",
    "Item",
    "Question",
    "Score",
    "Scorer",
    "Summarisation",
    "Task",
    "TaskName",
    "Tasks",
    "retained",
    "scores",
]
