"""Recorded cases on the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tests.golden.editors import EDITORS, Recorded


class BadFolderError(Exception):
    """The folder, or a case in it, cannot be used; one line says why."""


@dataclass(frozen=True)
class Case:
    """One recorded case: EDITOR_MODEL.json and EDITOR_MODEL.safetensors.

    Args:
        folder: The folder it lies in.
        editor: EDITOR of the file name.
        model: MODEL of the file name.
        meta: The JSON file.
    """

    folder: Path
    editor: str
    model: str
    meta: dict[str, Any]

    @property
    def recorded(self) -> Recorded | None:
        """The line of the table of editors, None where this project has no such editor."""
        return EDITORS.get(self.editor) or EDITORS.get(self.meta["editor"])

    @property
    def batches(self) -> list[list[int]]:
        """Case ids in the batches in which they are solved."""
        ids = self.meta["case_ids"]
        if self.meta["mode"] == "single":
            return [[case] for case in ids]
        if self.meta["mode"] == "batch":
            return [ids]
        if self.meta["mode"] == "seq2":
            return [ids[: len(ids) // 2], ids[len(ids) // 2 :]]
        msg = f"{self}: expected mode single, batch or seq2, got {self.meta['mode']!r}"
        raise BadFolderError(msg)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The requests in the order of the case ids, with the field names of our records."""
        found = read_json(self.folder / "requests.json")
        by_id = {r["case_id"]: dict(r) for key in ("requests", "requests_batch2") for r in found.get(key, [])}
        if missing := [case for case in self.meta["case_ids"] if case not in by_id]:
            msg = f"{self.folder / 'requests.json'}: the case {self} needs request {missing[0]}, which is not there"
            raise BadFolderError(msg)
        for request in by_id.values():
            request["relation_specific_prompts"] = request.pop("relation_specificity_prompts", [])
        return [by_id[case] for case in self.meta["case_ids"]]

    @property
    def templates(self) -> list[list[str]]:
        """The context templates in groups."""
        found = self.meta.get("context_templates")
        if not (found or self.meta["contexts"]):
            return [["{}"]]
        if not found:
            found = read_json(self.folder / "contexts.json")[self.meta["contexts"]]
        return [found] if isinstance(found[0], str) else found

    @property
    def knowns(self) -> list[str]:
        """The prompts of RETS' subject constraint."""
        found = json.loads(self.path("rets_knowns.json").read_text(encoding="utf-8"))
        return [r["prompt"].format(r["subject"]) for r in (record["requested_rewrite"] for record in found)]

    def check(self) -> None:
        """Refuse a case that cannot be run before the first is.

        Raises:
            BadFolderError: Something that the case needs is missing or cannot be read.
        """
        self.path(f"models/{self.model}/config.json")
        self.path(f"cov_{self.model}.safetensors")
        _ = self.requests, self.templates, self.batches
        self.numbers()

    def numbers(self) -> dict[str, Tensor]:
        """The recorded tensors."""
        path = self.folder / f"{self.editor}_{self.model}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            msg = f"{path}: expected the recorded tensors of the case {self}: {str(error).splitlines()[0]}"
            raise BadFolderError(msg) from error

    def path(self, name: str) -> Path:
        """A file or folder beside the case.

        Raises:
            BadFolderError: It is not there.
        """
        path = self.folder / name
        if not path.exists():
            msg = f"{path}: the case {self} needs it, and it is not there"
            raise BadFolderError(msg)
        return path

    def __str__(self) -> str:
        return f"{self.editor} {self.model}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadFolderError: The file cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path}: expected a JSON file: {str(error).splitlines()[0]}"
        raise BadFolderError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path}: expected a JSON object, got {type(found).__name__}"
        raise BadFolderError(msg)
    return found


def find(folder: Path, editor: str | None = None, model: str | None = None) -> list[Case]:
    """The cases of a folder, sorted by model and editor.

    Args:
        folder: The folder.
        editor: Only this editor, as in the file names.
        model: Only this model, as in the file names.

    Raises:
        BadFolderError: There is no such folder, or no such case in it.
    """
    if not folder.is_dir():
        msg = f"{folder}: there is no such folder; expected one in the form of ../shared/golden"
        raise BadFolderError(msg)
    every = list(_cases(folder))
    if not every:
        msg = f"{folder}: there is no case in it; expected files EDITOR_MODEL.json with EDITOR_MODEL.safetensors beside"
        raise BadFolderError(msg)
    found = [case for case in every if editor in (None, case.editor) and model in (None, case.model)]
    if not found:
        editors, models = ({getattr(case, key) for case in every} for key in ("editor", "model"))
        msg = f"{folder}: there is no case of --editor {editor or '(any)'} --model {model or '(any)'}; editors are "
        raise BadFolderError(msg + f"{', '.join(sorted(editors))}; models are {', '.join(sorted(models))}")
    return sorted(found, key=lambda case: (case.model, case.editor))


def _cases(folder: Path) -> Iterator[Case]:
    for path in sorted(folder.glob("*.json")):
        editor, separator, model = path.stem.partition("_")
        if separator and path.with_suffix(".safetensors").exists():
            meta = read_json(path)
            if missing := [key for key in ("editor", "hparams", "mode", "case_ids") if key not in meta]:
                msg = f"{path}: the field {missing[0]!r} of a recorded case is missing"
                raise BadFolderError(msg)
            yield Case(folder, editor, model, meta)
