"""Argument errors in one line: jsonargparse reports every branch of a union, a person needs the one that failed."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re

_NOISE = re.compile(
    r"Expected a <class 'NoneType'>|Does not validate against|Subtypes:|Errors:|Given value type:|Problem with given"
    r"|Expected a path but .* either not accessible or invalid"
)


def one_line(message: str) -> str:
    """Say in one line what an argument parser's message says.

    Args:
        message: The message, possibly of many lines.

    Returns:
        The keys down to the one that is wrong, the reason, and for a misspelt key the nearest one there is.
    """
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    keys = [key for line in lines for key in re.findall(r'Parser key "([^"]+)":?', line)]
    where = ".".join(key for key in keys if key != "config")
    reasons = [re.sub(r'^Parser key "[^"]+":\s*', "", line) for line in lines if line and not _NOISE.search(line)]
    reasons = [reason for reason in reasons if reason and not reason.startswith("Given value")]
    classes = re.findall(r"Problem with given class_path '([^']+)'", message)
    unknown = re.search(r"Option '([^']+)' is not accepted", message) or re.search(
        r"Key '([^']+)' is not expected", message
    )
    if unknown is not None:
        key = unknown.group(1)
        prefix = f"{where}." if where and not key.startswith(where) else ""
        return f"unknown key {prefix}{key}{_nearest(key, classes[-1] if classes else None)}"
    if re.search(r"Expected a dot import path string", message):
        return f"{where or 'class_path'}: unknown class {reasons[-1].rsplit(' ', 1)[-1]}"
    reason = "; ".join(dict.fromkeys(reasons)) or "the value cannot be used"
    return f"{where}: {reason}" if where else reason


def _nearest(key: str, class_path: str | None) -> str:
    """Which of a class's parameters a misspelt one may mean."""
    if class_path is None:
        return "; `kedit fit --help` lists the keys"
    module, _, name = class_path.rpartition(".")
    known = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    near = difflib.get_close_matches(key, known, n=1)
    return f" of {name}" + (f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(known)}")
