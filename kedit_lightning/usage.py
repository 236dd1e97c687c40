"""The commands of `kedit`, and what its `--help` says; loads nothing, so that help comes at once."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

TRAINER_COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "fit": "edit a stream of facts, measured before and after",
        "validate": "measure the unedited model",
        "test": "measure an edited model (--delta)",
        "predict": "continue prompts before and after the edits (--delta)",
        "scale": "edit more and more facts at once, and draw how the scores change",
        "statistics": "collect the key statistics that a configuration needs",
    }
)
"""Methods of the trainer, which take a configuration."""

OTHER_COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "apply": "write an edited model, as a Hugging Face checkpoint or a LoRA adapter",
        "revert": "write the model without one edit, or without any",
        "show": "print the tables of runs, side by side",
        "pretrain": "train the almanac's model from scratch",
    }
)


def usage() -> str:
    """The commands, a line each."""
    commands = "\n".join(f"  {name:<12}{what}" for name, what in {**TRAINER_COMMANDS, **OTHER_COMMANDS}.items())
    return f"usage: kedit COMMAND …\n\n{commands}\n\n`kedit COMMAND --help` lists a command's options.\n"
