"""The commands of `kedit`, and what its `--help` says; loads nothing, so that help comes at once."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

TRAINER_COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "fit": "edit a stream of facts, measured before and after; train what MEND and MALMEN edit with",
        "plan": "say what `fit` will take before anything runs, and whether it fits",
        "validate": "measure the unedited model",
        "test": "measure an edited model (--delta)",
        "predict": "continue prompts before and after the edits (--delta)",
        "scale": "edit more and more facts at once, and draw how the scores change",
        "tune_gamma": "choose how far EAC compresses an editor's values",
        "suggest": "suggest where to edit a model that nobody has tuned",
        "probe": "look inside a model and its edits: the analyses of the papers (--probe)",
        "statistics": "collect the key statistics that a configuration needs",
    }
)
"""Methods of the trainer, which take a configuration."""

OTHER_COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "apply": "write an edited model, as a Hugging Face checkpoint or a LoRA adapter",
        "revert": "undo an edit of a run, and measure what changes",
        "log": "list what a run edited, when and with which health",
        "show": "print the tables of runs, side by side",
        "report": "make one HTML page of runs: tables, curves, probes, every edit",
        "compare": "run variants of a configuration over seeds, and draw their curves over the edits",
        "words": "build the word sets of facts that the contrast probe looks for (JEEP, Fig. 5)",
        "tables": "put the numbers that a paper prints beside those of runs",
        "tasks": "measure general abilities, and what an edited model keeps of them (--delta)",
        "pretrain": "train the almanac's model from scratch",
    }
)


def usage() -> str:
    """The commands, a line each."""
    both = {**TRAINER_COMMANDS, **OTHER_COMMANDS}
    commands = "\n".join(f"  {name.replace('_', '-'):<14}{what}" for name, what in both.items())
    return f"usage: kedit COMMAND …\n\n{commands}\n\n`kedit COMMAND --help` lists a command's options.\n"
