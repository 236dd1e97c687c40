"""The seven token classes of TOP."""

from __future__ import annotations

import pytest

from kedit_lightning.edits import Edit
from kedit_lightning.probes.token_classes import CLASSES, classes_of, token_classes
from tests.families import FAMILY_CONFIGS, tiny_base

EDIT = Edit("The mother tongue of {} is spoken in", "Velora Quint", "Tessaro")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ((9, 3, 5), "rp rp rp fs ms ls fr mr lr"),
        ((6, 0, 3), "fs ms ms ls fr lr"),
        ((3, 1, 1), "rp ls lr"),
        ((3, 1, 2), "rp fs ls"),
        ((1, 0, 0), "ls"),
        ((8, 2, 3), "rp rp fs ls fr mr mr lr"),
    ],
)
def test_each_token_has_a_class_in_order(prompt: tuple[int, int, int], expected: str) -> None:
    found = token_classes(*prompt)
    assert found == expected.split()
    assert sorted(found, key=list(CLASSES).index) == found


def test_what_stands_before_the_prompt_has_none() -> None:
    assert token_classes(5, 2, 3, begin=2) == ["", "", "fs", "ls", "lr"]


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_classes_stand_where_the_text_does(family: str) -> None:
    """By what the tokens of each class spell, whatever the tokenizer."""
    base = tiny_base(family)
    ids, classes = base.encode(EDIT.text).ids, classes_of(base, EDIT)
    assert len(ids) == len(classes)
    spelt = {
        kind: base.tokenizer.decode([i for i, name in zip(ids, classes, strict=True) if name[-1:] == kind])
        for kind in ("", "p", "s", "r")
    }
    assert spelt["p"].strip() == "The mother tongue of"
    assert spelt["s"].strip() == "Velora Quint"
    assert spelt["r"].strip() == "is spoken in"
    assert spelt[""] in ("", base.tokenizer.bos_token)


def test_a_start_token_has_no_class() -> None:
    base = tiny_base("llama")
    classes = classes_of(base, EDIT)
    assert base.encode(EDIT.text).ids[0] == base.tokenizer.bos_token_id
    assert classes[0] == ""
    assert "" not in classes[1:]
