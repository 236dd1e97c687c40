"""Argument errors in one line: jsonargparse reports every branch of a union, a person needs the one that failed."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import is_dataclass
from pathlib import Path
from typing import NoReturn

import yaml

LONGEST = 60
"""Characters of a wrong value that are shown."""

UNKNOWN = r"Option '([^']+)' is not accepted|Key '([^']+)' is not expected|unrecognized arguments: --([^=\s]+)"
"""What jsonargparse says of a key that a class does not take."""


def say(message: str) -> None:
    """Say something in one line; where torchrun or SLURM has started several processes the first says it for all."""
    if number("RANK", "SLURM_PROCID") == 0:
        sys.stderr.write(f"kedit: {message}\n")


def number(*names: str) -> int:
    """This process's number, which what has started several leaves in one of these environment variables."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), 0)


def fail(message: str, status: int) -> NoReturn:
    """Say why in one line, and leave."""
    say(message)
    sys.exit(status)


def one_line(message: str, keys: Iterable[str] = ()) -> str:
    """Say in one line what an argument parser's message says.

    Args:
        message: The message, possibly of many lines.
        keys: The keys there are, for the nearest one to a misspelt one.

    Returns:
        The keys down to the one that is wrong, what was expected and what was got.

    >>> one_line("unrecognized arguments: --bsae.name=gpt2", ["base.name", "data.path"])
    'unknown key bsae.name; did you mean base.name?'
    """
    if found := re.match(r"unrecognized arguments: (\S+)|\w+ '[^']+' does not accept option '([^']+)'", message):
        key = found[1] or found[2]
        if not (key.startswith("-") or found[2]):
            return f"unexpected argument {key!r}"
        return f"unknown key {_near(key.lstrip('-').partition('=')[0], _with_parents(keys))}"
    if found := re.match(r"the following arguments are required: (.+)", message):
        names = ", ".join(name.removeprefix("fit.") for name in found[1].split(", "))
        no_model = re.search(r"\bmodel$", names)
        return f"missing: {names}" + ("; give --config FILE, such as one of configs/" if no_model else "")
    return _nested(message)


def wrong_file(file: Path) -> str:
    """Why a configuration file cannot be read; empty if it can."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        return f"{file}: no configuration file can be read there ({error.strerror})"
    except UnicodeDecodeError:
        return f"{file}: expected a configuration in YAML, got bytes that are no text"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return f"{file}{where}: not valid YAML ({getattr(error, 'problem', None) or 'unreadable'})"
    if not isinstance(content, dict):
        return f"{file}: expected the blocks base, model, data and trainer, got {_short(content)}"
    return ""


def _nested(message: str) -> str:
    """The innermost problem in a tree of keys, classes and union branches."""
    path: list[str] = []
    expected: list[str] = []
    others: list[str] = []
    got: str | None = None
    wanted: type | None = None
    given: type | None = None
    depth = -1
    bad_class = beside_class = False
    for text in message.splitlines():
        line = text.strip().removeprefix("- ").strip()
        if found := re.match(r'Parser key "([^"]+)":?\s*(.*)', line):
            if found[1] != "config" and path[-1:] != [found[1]]:
                path.append(found[1])
            line = found[2]
        if found := re.match(r"Problem with given class_path '([^']+)'", line):
            given = _imported(found[1])
            bad_class |= given is None
            path += ["init_args"] if given is not None and not is_dataclass(given) else []
        elif found := re.match(UNKNOWN, line):
            return _unknown(path, next(filter(None, found.groups())), given)
        elif found := re.match(r"Subtypes: \[<class '([^']+)'>", line):
            wanted = _imported(found[1])
        elif found := re.match(r"Given value: (?:NestedArg\(.*\bval=)?(.*?)\)?$", line):
            got = got if got is not None else found[1].strip("'")
        elif found := re.match(r"Expected an? (?!dot import|path but)(.+?)(?:\. Got value: (.*))?$", line):
            inner, depth = depth, len(text) - len(text.lstrip())
            if "NoneType" not in found[1]:
                expected.append(_type(found[1]))
            elif depth == inner:  # beside the last type, not one of the blocks around it
                expected.append("null")
            got = found[2] if found[2] is not None and got is None else got
        elif line.startswith("Not a valid subclass"):
            beside_class = True
        elif re.match(r"Expected a dot import path|Import path does not correspond|.* has no attribute", line):
            bad_class = True
        elif line and not re.match(r"Expected a path but|Does not validate|Errors:|Given value type:", line):
            others.append(line.replace('"', "'").replace("the following arguments are required:", "missing:"))
    where = ".".join(path)
    if beside_class and (odd := _beside_class_path(got)):
        return f"unknown key {where}.{_near(odd, ['class_path', 'init_args'])}"
    if bad_class and wanted is not None:
        return f"{where}: {_class_wanted(wanted, got)}"
    if expected:
        return f"{where}: expected {' or '.join(dict.fromkeys(expected))}, got {_short(got)}"
    reason = "; ".join(dict.fromkeys(others)) or "the value cannot be used"
    return f"{where}: {reason}" if where else reason


def _unknown(path: list[str], key: str, given: type | None) -> str:
    """A misspelt parameter of a class, or one whose absence the class explains in its ``lacks``."""
    known = list(settings_of(given)) if given is not None else []
    first = key.partition(".")[0]
    if (why := getattr(given, "lacks", {}).get(first)) is not None:
        return f"{'.'.join([*path, first])}: {why}"
    if path[-1:] == ["init_args"] and difflib.get_close_matches(key, ["init_args", "class_path"], n=1):
        path, known = path[:-1], ["class_path", "init_args"]
    name = f" of {given.__name__}" if given is not None else ""
    near = [] if first in known else difflib.get_close_matches(first, known, n=1)
    return f"unknown key {'.'.join([*path, key])}{name}" + (
        f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(known)}"
    )


def settings_of(kind: type) -> dict[str, inspect.Parameter]:
    """What a class can be given by name, with what it hands on to the classes that it is built on."""
    from jsonargparse import ArgumentParser  # which takes a while

    names: list[str] = ArgumentParser().add_class_arguments(kind)
    own = [inspect.signature(vars(one)["__init__"]).parameters for one in kind.__mro__ if "__init__" in vars(one)]
    return {name: next(found[name] for found in own if name in found) for name in names}


def _beside_class_path(block: str | None) -> str | None:
    """The key of a block that should hold a class path and its arguments, and holds something else."""
    try:
        keys = list(ast.literal_eval(block or ""))
    except (SyntaxError, ValueError):
        return None
    return next((str(key) for key in keys if key not in ("class_path", "init_args")), None)


def _class_wanted(wanted: type, got: str | None) -> str:
    if is_dataclass(wanted):
        return f"expected the keys of {wanted.__name__}, got {_short(got)}"
    known = sorted(each.__name__ for each in _subclasses(wanted) if not inspect.isabstract(each))
    return f"expected a class ({', '.join(known)}), got {_short(got)}"


def _subclasses(base: type) -> set[type]:
    below: list[type] = type.__subclasses__(base)
    return {base}.union(*(_subclasses(each) for each in below))


def _imported(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _type(text: str) -> str:
    """A type as a person writes it."""
    if found := re.match(r"typing\.Literal\[(.+)\]", text):
        return found[1] if "," not in found[1] else f"one of {found[1]}"
    found = re.match(r"<class '(?:.*\.)?(\w+)'>", text)
    return found[1] if found else text


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _near(key: str, keys: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(keys), n=1)
    return f"{key}; did you mean {near[0]}?" if near else f"{key}; --help lists the keys"


def _with_parents(keys: Iterable[str]) -> set[str]:
    return {key.rsplit(".", n)[0] for key in keys for n in range(key.count(".") + 1)}
