"""Rules of the code that no other tool holds; import-linter holds the layers, ruff holds `print`."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kedit_lightning
from kedit_lightning import editors
from kedit_lightning.editors import Editor
from tests.editors.fitting import EDITORS

PACKAGE = Path(kedit_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
STAND_ON = {
    "base",
    "checks",
    "closed_form",
    "learned",
    "losses",
    "parts",
    "reading",
    "stages",
    "training",
    "tuned",
    "tuning",
}
"""Modules of `editors` that are no editors: all of them may import these."""


def source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a file with its dotted name as far as it has one, such as ``torch.load`` or ``.cuda``."""
    for node in ast.walk(ast.parse(source(path))):
        if isinstance(node, ast.Call):
            named = isinstance(node.func, (ast.Name, ast.Attribute))
            name = ast.unparse(node.func) if named else ""
            yield name, node


def where(found: list[tuple[Path, int]]) -> list[str]:
    return [f"{path.relative_to(PACKAGE)}:{line}" for path, line in found]


@pytest.mark.parametrize(
    "forbidden",
    [
        pytest.param(r"print", id="print"),
        pytest.param(r"(.*\.)?(cuda|pdb\.set_trace|breakpoint)", id="cuda and debuggers"),
        pytest.param(r"(pickle|dill|joblib)\..*|torch\.(load|save)|numpy\.load|np\.load", id="pickle"),
        pytest.param(r"eval|exec|os\.system", id="eval"),
    ],
)
def test_nobody_calls(forbidden: str) -> None:
    """`np.load` is allowed where it is told not to unpickle: that is its default, and said explicitly here."""
    found = [
        (path, call.lineno)
        for path in FILES
        for name, call in calls(path)
        if re.fullmatch(forbidden, name)
        and not any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in call.keywords)
    ]
    assert where(found) == []


def test_no_device_is_written_out() -> None:
    """What kind of device a tensor is on may be asked."""
    found = [
        (path, number)
        for path in FILES
        for number, line in enumerate(source(path).splitlines(), 1)
        if re.search(r"""(?<!\.type [!=]= )["']cuda(:\d+)?["']""", line)
    ]
    assert where(found) == []


def test_no_code_of_a_checkpoint_is_run() -> None:
    found = [
        (path, call.lineno)
        for path in FILES
        for _, call in calls(path)
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
    ]
    assert where(found) == []
    assert not [path for path in FILES if re.search(r"import (pickle|dill)", source(path))]


def test_no_models_name_is_looked_into() -> None:
    """A family is what the table says of its configuration, never what a model is called or what its type contains."""
    called = r"model_name|name_or_path|model_type|class_name|__name__"
    sniffing = re.compile(
        rf"""["'][\w.-]+["'] (not )?in [\w.]*\b({called})\b|\b(name|{called})\.(lower|upper|casefold)\("""
    )
    found = [
        (path, number)
        for path in FILES
        for number, line in enumerate(source(path).splitlines(), 1)
        if sniffing.search(line)
    ]
    assert where(found) == []


# ---------------------------------------------------------------------- editors


@pytest.mark.parametrize("path", sorted((PACKAGE / "editors").glob("*.py")), ids=lambda path: path.stem)
def test_an_editor_imports_only_the_editor_it_subclasses(path: Path) -> None:
    if path.stem in STAND_ON | {"__init__"}:
        return
    imported = set(re.findall(r"^from kedit_lightning\.editors\.(\w+) import", source(path), re.MULTILINE))
    assert not re.search(r"from kedit_lightning(\.editors)? import .*editors|import kedit_lightning", source(path))
    bases = {
        base.__module__.rpartition(".")[2]
        for name in EDITORS
        if getattr(editors, name).__module__.endswith(f".{path.stem}")
        for base in getattr(editors, name).__bases__
    }
    assert imported <= STAND_ON | bases


@pytest.mark.parametrize("name", EDITORS)
def test_what_an_editor_does_fits_on_a_screen(name: str) -> None:
    """`locate`, `stages` and `write` of its own, docstrings and all."""
    own = [vars(getattr(editors, name)).get(method) for method in ("locate", "stages", "write")]
    assert sum(len(inspect.getsource(method).splitlines()) for method in own if method) <= 60


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_overrides_what_editors_are_made_of_and_no_more(name: str) -> None:
    words = {"__init__", "locate", "stages", "write", "passes", "sites", "solve", "prepare", "request"}
    words |= {"remember", "forget"}  # of a sequence
    words |= {
        "names",
        "scheme",
        "separate_targets",
        "kept",
        "memory_size",
        "lacks",
        "kind",
        "moments_dtype",
    }  # said, not done
    editor = getattr(editors, name)
    own = {key for key, value in vars(editor).items() if inspect.isfunction(value) and hasattr(Editor, key)}
    assert own <= words
    assert {key for key in vars(editor) if not key.startswith("_")} <= words


# ---------------------------------------------------------------------- weights


IN_PLACE = re.compile(
    r"(\bweight\(.*?\)|\bweight|\bparameter|\bmaster|\.data)(\.(add|copy|sub|mul|zero|fill)_\(|\[.*\] =)"
)


def test_only_the_language_model_writes_weights() -> None:
    """The almanac trains a model of its own."""
    own = {"models/weights.py"}
    found = [
        (path, number)
        for path in FILES
        if path.relative_to(PACKAGE).as_posix() not in own and "almanac" not in path.relative_to(PACKAGE).parts
        for number, line in enumerate(source(path).splitlines(), 1)
        if IN_PLACE.search(line)
    ]
    assert where(found) == []


def test_updates_are_written_by_the_callback_and_by_whoever_applies_a_saved_delta() -> None:
    """A stream that is resumed replays its commits."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        for name, _ in calls(path)
        if re.fullmatch(r"(.*\.)?base\.write", name)
    }
    applying = {"commands.py", "commits.py", "export.py", "probes/drift.py", "remeasurement.py", "tasks/command.py"}
    assert found <= {"callbacks/weight_update.py", "trainer.py"} | applying


def test_files_are_short() -> None:
    """About 250 lines; whoever passes them looks for the second idea in the file."""
    lines = {path.relative_to(PACKAGE).as_posix(): len(source(path).splitlines()) for path in FILES}
    assert {name for name, n in lines.items() if n > 275} <= {"models/language_model.py", "almanac/lexicon.py"}
