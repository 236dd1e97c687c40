import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from kedit_lightning.data.prompts import START_WORDS, ContextTemplates, edit_batch
from kedit_lightning.edits import Edit, Token
from kedit_lightning.errors import DataError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.generation import sample
from tests.families import EDITS, tiny_base

TEMPLATES = [["{}", "Yes. {}"]]


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return tiny_base("gpt2")


def said(base: LanguageModel, row: int, batch: Any, token: Token) -> str:
    """The text of a row up to and with the token of a rule."""
    return str(base.tokenizer.decode(batch.rows.input_ids[row, : int(batch.rows.at[token][row]) + 1]))


# ---------------------------------------------------------------------- templates


def test_rome_takes_ten_short_and_ten_longer_prefixes(base: LanguageModel) -> None:
    (group,) = ContextTemplates()(base)
    assert len(group) == 21
    assert group[0] == "{}"
    assert all(template.endswith(". {}") and template.count("{}") == 1 for template in group[1:])
    short, longer = sample(base, None, 10, 5, seed=0), sample(base, None, 10, 10, seed=1)
    cleaned = [text.replace("{", " ").replace("}", " ") for text in [*short, *longer]]
    assert group[1:] == [f"{text}. {{}}" for text in cleaned]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_lengths_are_total_with_the_start_token(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, asked = tiny_base(family), []
    forward = base.model.forward

    def watch(**inputs: Any) -> Any:
        asked.append(inputs["input_ids"].clone())
        return forward(**inputs)

    monkeypatch.setattr(base.model, "forward", watch)
    ContextTemplates(context_template_length_params=[(5, 3)])(base)
    start = base.tokenizer.bos_token_id
    assert asked[0].tolist() == [[start]] * 3
    assert len(asked) == 4, "four tokens follow the start token"


def test_templates_depend_on_the_seed_alone(base: LanguageModel) -> None:
    torch.manual_seed(1)
    first = ContextTemplates()(base)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert ContextTemplates()(tiny_base("gpt2")) == first
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert ContextTemplates(seed=1)(base) != first
    assert len(set(first[0])) > 15


def test_memit_takes_one_prefix_for_each_start_word_in_a_group_of_their_own(base: LanguageModel) -> None:
    bare, group = ContextTemplates(scheme="memit")(base)
    assert bare == ["{}"]
    assert len(group) == 5
    assert all(template.startswith(word) for word, template in zip(START_WORDS, group, strict=True))
    batch = edit_batch(base, EDITS[:2], [bare, group])
    assert batch.weight.tolist() == pytest.approx([0.5, *[0.1] * 5, 0] * 2)


def test_braces_in_a_prefix_become_spaces(base: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter([["a {} b", "{", "x}y{z"], []])
    monkeypatch.setattr("kedit_lightning.data.prompts.sample", lambda *_, **__: next(texts))
    assert ContextTemplates()(base) == [["{}", "a    b. {}", " . {}", "x y z. {}"]]


@pytest.mark.parametrize("scheme", ["rome", "memit"])
def test_a_word_may_be_excluded(base: LanguageModel, scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(_: object, word: str | None, *__: object, **___: object) -> list[str]:
        return [f"{word} import x", f"{word} x"]

    monkeypatch.setattr("kedit_lightning.data.prompts.sample", texts)
    kept = [template for group in ContextTemplates(scheme=scheme, exclude="import")(base) for template in group]
    assert not any("import" in template for template in kept)
    assert len(kept) == 1 + (2 if scheme == "rome" else 5)


def test_where_all_prefixes_are_excluded_the_bare_prompt_has_all_the_weight(
    base: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kedit_lightning.data.prompts.sample", lambda *_, **__: ["import x"])
    templates = ContextTemplates(scheme="memit", exclude="import")(base)
    assert edit_batch(base, EDITS[:1], templates).weight.tolist() == [1, 0]


def test_given_templates_are_taken_as_they_are(base: LanguageModel) -> None:
    given = [["{}"], ["Yes. {}", "{ok}. {}"]]
    assert ContextTemplates(templates=given)(base) == given
    assert ContextTemplates(templates=[["{}"], []])(base) == [["{}"]]


@pytest.mark.parametrize(
    "given",
    [[], [[]], [["Yes. {}"]], [["{}", "no slot"]], [["{}", "{} and {}"]], [["{}"], ["{ }"]], [["Yes. {}", "{}"]]],
)
def test_given_templates_are_validated(base: LanguageModel, given: list[list[str]]) -> None:
    with pytest.raises(DataError, match=r"exactly one \{\} in each and the bare '\{\}' first, got"):
        ContextTemplates(templates=given)(base)


# ---------------------------------------------------------------------- rows


def test_rows_are_every_template_then_the_essence_edit_after_edit(base: LanguageModel) -> None:
    batch = edit_batch(base, EDITS[:3], TEMPLATES)
    assert (len(batch), len(batch.rows)) == (3, 9)
    assert batch.edit.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert batch.essence.tolist() == [False, False, True] * 3
    assert batch.bare.tolist() == [0, 3, 6]
    assert batch.weight.tolist() == [0.5, 0.5, 0] * 3
    for i, edit in enumerate(EDITS[:3]):
        wanted = [edit.text, f"Yes. {edit.text}", f"{edit.subject} is a"]
        assert [said(base, 3 * i + j, batch, Token.PROMPT_LAST) for j in range(3)] == wanted
        for j in range(3):
            labels = batch.rows.labels[3 * i + j]
            target = "" if j == 2 else f" {edit.target_new}"
            assert base.tokenizer.decode(labels[labels >= 0]) == target


def test_essence_rows_have_no_labels_and_only_the_prompts_tokens(base: LanguageModel) -> None:
    batch = edit_batch(base, EDITS[:2], TEMPLATES)
    assert bool((batch.rows.labels[batch.essence] == -100).all())
    lengths = batch.rows.attention_mask[batch.essence].sum(dim=1)
    assert torch.equal(lengths - 1, batch.rows.at[Token.PROMPT_LAST][batch.essence])


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize(
    ("prompt", "subject", "before"),
    [
        ("Tobin, they say, and {} was born in", "Tobin", "Tobin, they say, and Tobin"),
        ("{} of Tobin was born in", "Tobin", "Tobin"),
        ("In {} of {x} they say {z", "a{b}c", "In a{b}c"),
        ("They write {} as", "{", "They write {"),
        ("They write {} as", "x{}y", "They write x{}y"),
        ("Everybody knows {}", "Oskel Tamrin", "Everybody knows Oskel Tamrin"),
    ],
)
def test_the_subject_is_where_the_slot_is(family: str, prompt: str, subject: str, before: str) -> None:
    """Also when it comes twice, or holds braces, and in templates of all kinds."""
    base = tiny_base(family)
    templates = [["{}", "Tobin {said}. {}", "{{} {"]]
    batch = edit_batch(base, [Edit(prompt, subject, "Ulm")], templates)
    for row, template in enumerate(templates[0]):
        until = base.tokenizer.decode(
            batch.rows.input_ids[row, : int(batch.rows.at[Token.SUBJECT_LAST][row]) + 1], skip_special_tokens=True
        )
        wanted = template[: template.index("{}")] + before
        assert re.sub(r"\s", "", str(until)).startswith(re.sub(r"\s", "", wanted))
        assert len(str(until).strip()) <= len(wanted) + 1, "at most a merged neighbour"


def test_targets_may_be_tokenised_on_their_own() -> None:
    base = tiny_base("mistral")
    joint, alone = (edit_batch(base, EDITS[:1], [["{}"]], separate=separate) for separate in (False, True))
    own = base.tokenizer(f" {EDITS[0].target_new}", add_special_tokens=False)["input_ids"]
    assert alone.rows.labels[0][alone.rows.labels[0] >= 0].tolist() == own
    assert joint.rows.labels[0][joint.rows.labels[0] >= 0].tolist() != own


def test_edits_together_have_the_rows_they_have_alone(base: LanguageModel) -> None:
    together = edit_batch(base, EDITS, TEMPLATES)
    for i, edit in enumerate(EDITS):
        alone, rows = edit_batch(base, [edit], TEMPLATES), together.rows.select(together.edit == i)
        assert torch.equal(rows.input_ids, alone.rows.input_ids)
        assert torch.equal(rows.labels, alone.rows.labels)
        assert all(torch.equal(at, alone.rows.at[token]) for token, at in rows.at.items())


def test_a_batch_goes_to_a_device_as_a_whole(base: LanguageModel) -> None:
    batch = edit_batch(base, EDITS[:2], TEMPLATES).to("meta")
    tensors = [batch.edit, batch.essence, batch.weight, batch.rows.input_ids, *batch.rows.at.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_what_is_wrong_is_named_by_case(base: LanguageModel) -> None:
    with pytest.raises(DataError, match="case 30: the prompt takes"):
        edit_batch(base, [EDITS[0], replace(EDITS[3], prompt="word " * 200 + "{}")], TEMPLATES)
