"""Tokenisation and token positions, for every kind of tokenizer and every shape of prompt."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kedit_lightning.edits import Token
from kedit_lightning.errors import DataError, ModelError
from kedit_lightning.models import IGNORE, Batch, Row, buckets, collate, encode
from tests.families import EDITS, FAMILY_CONFIGS, POSITIONS, TOKENIZERS, build, tokenizer

PROMPTS = {
    "first": ("{} was born in", "Velora Quint"),
    "middle": ("The mother tongue of {} is", "Oskel Tamrin"),
    "last": ("Everybody in the valley knows {}", "the Tower of Ysmer"),
    "question": ("Where does {} live?", "Dario Henk"),
    "question last": ("Who knew {}?", "Mirabel Foss"),
    "apostrophes": ("At home {}'s mother speaks", "Dario Henk-O'Malley"),
    "accents": ("{} plays the", "Åsa Ödegård"),
    "no alphabet": ("The river by {} is called", "東京"),
    "many bytes": ("Letters from {}: read by", "the 🦊 of Ürümqi"),
    "prefixed": ("It rained. The winter, they say. {} works as a", "Tobin"),
    "repeated": ("Foss, Foss and {} met at", "Foss"),
    "comma": ("In that year {}, who never slept, became a", "Hild"),
    "whole": ("{}", "Selka Hild"),
    "digits": ("In 1999 {} moved to", "Room 42B"),
}
TARGETS = ("Tessaro", "Ulm", "came from Wexmoor Mills", "Ödegård & Söhne", "東京", "42")


def full(prompt: str, subject: str) -> tuple[str, tuple[int, int]]:
    """The prompt with its subject, and where the subject stands."""
    start = prompt.index("{}")
    return prompt.replace("{}", subject), (start, start + len(subject))


def one(kind_or_words: str | PreTrainedTokenizerFast, *args: Any, **settings: Any) -> Row:
    words = tokenizer(kind_or_words) if isinstance(kind_or_words, str) else kind_or_words
    return encode(words, *args, **{"max_length": POSITIONS} | settings)


def prompt_ids(row: Row) -> list[int]:
    return row.ids[: row.positions[Token.PROMPT_LAST] + 1]


@pytest.fixture(params=TOKENIZERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PROMPTS.values(), ids=PROMPTS.keys())
def shaped(request: pytest.FixtureRequest) -> tuple[str, tuple[int, int]]:
    return full(*request.param)


def test_kinds_differ_where_tokenizers_do() -> None:
    """The test tokenizers have the properties they stand for."""
    pieces = {kind: tokenizer(kind)(" Tessaro").tokens() for kind in TOKENIZERS}
    assert pieces["byte_bpe"][0].startswith("ĠT")
    assert pieces["byte_bpe_bos"][:1] == ["<|begin_of_text|>"]
    assert pieces["spm"][:2] == ["<s>", "▁"], "a lone dummy prefix before a leading space"
    assert pieces["spm"][2].startswith("▁T")
    assert pieces["gemma"][0] == "<bos>"
    assert pieces["gemma"][1].startswith("▁T")
    assert tokenizer("spm")("Tessaro").tokens()[1].startswith("▁T")
    assert tokenizer("gemma")("Tessaro").tokens()[1].startswith("T")


def test_subject_last_agrees_with_prefix_length(kind: str, shaped: tuple[str, tuple[int, int]]) -> None:
    text, (start, stop) = shaped
    words = tokenizer(kind)
    row = one(words, text, None, (start, stop))
    head = words(text[:stop])["input_ids"]
    assert row.ids[: len(head)] == head, "here the prefix-length rule is valid"
    assert row.positions[Token.SUBJECT_LAST] == len(head) - 1
    assert row.positions[Token.PROMPT_LAST] == len(words(text)["input_ids"]) - 1
    after = len(head) if stop < len(text) else len(head) - 1
    assert row.positions[Token.SUBJECT_AFTER_LAST] == after


def test_subject_tokens_spell_the_subject(kind: str, shaped: tuple[str, tuple[int, int]]) -> None:
    text, (start, stop) = shaped
    words = tokenizer(kind)
    row = one(words, text, "Tessaro", (start, stop))
    first, last = row.positions[Token.SUBJECT_FIRST], row.positions[Token.SUBJECT_LAST]
    assert words.decode(row.ids[first : last + 1]).strip() == text[start:stop]


def test_positions_do_not_depend_on_the_target(kind: str, shaped: tuple[str, tuple[int, int]]) -> None:
    text, span = shaped
    alone = one(kind, text, None, span)
    for target in TARGETS:
        row = one(kind, text, target, span)
        assert row.positions == alone.positions
        assert prompt_ids(row) == alone.ids
        separate = one(kind, text, target, span, separate=True)
        assert separate.positions[Token.SUBJECT_LAST] == alone.positions[Token.SUBJECT_LAST]


def test_bos_once_and_never_in_the_target(kind: str, shaped: tuple[str, tuple[int, int]]) -> None:
    words = tokenizer(kind)
    for target in TARGETS:
        for separate in (False, True):
            row = one(words, shaped[0], target, separate=separate)
            assert row.ids.count(words.bos_token_id) == (kind != "byte_bpe")
            assert kind == "byte_bpe" or row.ids[0] == words.bos_token_id
            assert row.targets
            assert not set(row.targets) & set(words.all_special_ids)


def test_joint_ids_are_those_of_the_whole_string(kind: str, shaped: tuple[str, tuple[int, int]]) -> None:
    words = tokenizer(kind)
    for target in TARGETS:
        row = one(words, shaped[0], target)
        whole = prompt_ids(row) + row.targets
        assert whole == words(f"{shaped[0]} {target}")["input_ids"]
        assert row.ids == whole[:-1]
        assert words.decode(whole, skip_special_tokens=True) == f"{shaped[0]} {target}"
        assert words.decode(row.targets).strip() == target


@pytest.mark.parametrize("target", TARGETS)
def test_separate_is_the_released_codes_row(kind: str, target: str) -> None:
    """The target's own ids; the text of all but the last behind the prompt; places counted from the row's end."""
    text, span = full(*PROMPTS["middle"])
    words, joint, separate = (
        tokenizer(kind),
        one(kind, text, target, span),
        one(kind, text, target, span, separate=True),
    )
    ids = words(f" {target}", add_special_tokens=False)["input_ids"]
    assert separate.targets == ids
    assert separate.ids == words(text + words.decode(ids[:-1]))["input_ids"]
    assert separate.positions[Token.PROMPT_LAST] == len(separate.ids) - len(ids)
    if kind == "spm":
        # Where the joint target starts in a lone ▁ by itself, the dummy prefix makes it two.
        assert ids == [words.convert_tokens_to_ids("▁"), *joint.targets]
    elif target.isascii():
        assert separate == joint


def test_released_target_ids_are_the_separate_ones(kind: str) -> None:
    words = tokenizer(kind)
    for edit in EDITS:
        row = one(words, edit.text, edit.target_new, separate=True)
        assert row.targets == words(f" {edit.target_new}", add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {kind: build("llama", kind=kind, **FAMILY_CONFIGS["llama"]) for kind in TOKENIZERS}


def test_labels_give_plain_transformers_loss(kind: str, models: dict[str, PreTrainedModel]) -> None:
    """Reading the labels without a shift is Hugging Face's shifted loss over the target tokens."""
    model, words = models[kind], tokenizer(kind)
    cases = [(full(*prompt)[0], target) for prompt, target in zip(PROMPTS.values(), TARGETS * 3, strict=False)]
    batch = collate([one(words, *case) for case in cases])
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        losses = torch.nn.functional.cross_entropy(logits.mT, batch.labels, reduction="none", ignore_index=IGNORE)
        for i, (prompt, target) in enumerate(cases):
            head = words(prompt)["input_ids"]
            ids = torch.tensor([words(f"{prompt} {target}")["input_ids"]])
            labels = ids.clone()
            labels[:, : len(head)] = IGNORE
            expected = model(input_ids=ids, labels=labels).loss
            count = int((batch.labels[i] != IGNORE).sum())
            assert count == ids.shape[1] - len(head)
            torch.testing.assert_close(losses[i].sum() / count, expected, atol=1e-5, rtol=1e-5)


def test_random_strings(kind: str) -> None:
    """Hundreds of odd strings: whatever the text, head, subject and target come apart at the right token."""
    draw = random.Random(0)
    odd = ["é", "ß", "東", "🦊", "42", "-", "(", "naïve", "x" * 9, "“quoted”", "Ĝ", "a.b", "#"]
    bits = ["Velora", "Quint's", "O'Malley", *odd]
    words = tokenizer(kind)
    for _ in range(300):
        before, subject, after, target = (" ".join(draw.choices(bits, k=draw.randint(0, 3))) for _ in range(4))
        subject, target = subject or "Tobin", target or "Ulm"
        text = " ".join(part for part in (before, subject, after) if part)
        start = len(before) + 1 if before else 0
        row = one(words, text, target, (start, start + len(subject)))
        assert prompt_ids(row) == words(text)["input_ids"]
        assert words.decode(row.targets).strip() == target
        assert row.positions[Token.SUBJECT_LAST] == len(words(text[: start + len(subject)])["input_ids"]) - 1


def test_subject_that_ends_inside_a_token() -> None:
    """Where the prefix-length rule would miss, the token that holds the subject's last character counts."""
    words = tokenizer("byte_bpe")
    text = "Yes, Velora was born in"
    whole = words(text)["input_ids"]
    token = words.convert_ids_to_tokens(whole).index("ĠVelora")
    assert whole[: token + 1] != words("Yes, Velor")["input_ids"]
    assert one(words, text, None, (5, 10)).positions[Token.SUBJECT_LAST] == token


def _changed(kind: str, post_processor: processors.PostProcessor) -> PreTrainedTokenizerFast:
    words = tokenizer(kind)
    backend = Tokenizer.from_str(words.backend_tokenizer.to_str())
    backend.post_processor = post_processor
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=words.bos_token, eos_token=words.eos_token, unk_token=words.unk_token
    )


def test_tokenizer_that_appends_eos() -> None:
    """EOS at the end of every text is neither the prompt's last token nor part of the target."""
    plain = tokenizer("spm")
    specials = [("<s>", plain.bos_token_id), ("</s>", plain.eos_token_id)]
    closing = _changed("spm", processors.TemplateProcessing("<s> $A </s>", None, specials))
    text, span = full(*PROMPTS["last"])
    assert closing(text)["input_ids"][-1] == plain.eos_token_id
    for target in (None, *TARGETS):
        for separate in (False, True):
            settings = {"separate": separate}
            assert one(closing, text, target, span, **settings) == one(plain, text, target, span, **settings)


def test_trimmed_offsets() -> None:
    """Byte-level tokenizers may leave the space out of a token's span; positions stay the same."""
    trimmed = _changed("byte_bpe", processors.ByteLevel(trim_offsets=True))
    for prompt in PROMPTS.values():
        text, span = full(*prompt)
        for target in (None, *TARGETS):
            assert one(trimmed, text, target, span) == one("byte_bpe", text, target, span)


def test_padding_and_truncation_of_the_tokenizer_are_ignored(kind: str) -> None:
    words = tokenizer(kind)
    words.backend_tokenizer.enable_padding(length=40)
    words.backend_tokenizer.enable_truncation(3)
    text, span = full(*PROMPTS["middle"])
    assert one(words, text, "Tessaro", span) == one(kind, text, "Tessaro", span)


# ---------------------------------------------------------------------- refusals


def test_too_long_prompt(kind: str) -> None:
    """The last target token is never fed, so a row may be exactly as long as the context."""
    text, span = full(*PROMPTS["middle"])
    length = len(one(kind, text, "came from Wexmoor Mills", span).ids)
    assert len(one(kind, text, "came from Wexmoor Mills", span, max_length=length).ids) == length
    with pytest.raises(DataError, match=rf"takes {length} tokens with its target, the model reads {length - 1}"):
        one(kind, text, "came from Wexmoor Mills", span, max_length=length - 1)
    with pytest.raises(DataError) as error:
        one(kind, "word " * 500 + "is", None)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_subject_outside_the_prompt(kind: str) -> None:
    with pytest.raises(DataError, match="no token of 'Tobin was born in' lies in the subject"):
        one(kind, "Tobin was born in", "Ulm", (40, 45))
    with pytest.raises(DataError, match="no token"):
        one(kind, "Tobin was born in", "Ulm", (3, 3))


def test_empty_prompt() -> None:
    with pytest.raises(DataError, match="at least one token"):
        one("byte_bpe", "", "Ulm")
    assert one("spm", "", "Ulm").positions[Token.PROMPT_LAST] == 0, "BOS alone is a prompt"


def test_slow_tokenizer() -> None:
    class SlowTokenizer(SimpleNamespace):
        is_fast = False

    with pytest.raises(ModelError, match=r"expected a fast tokenizer .* got SlowTokenizer"):
        encode(SlowTokenizer(), "Tobin was born in", max_length=POSITIONS)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- batches


@pytest.fixture
def rows(kind: str) -> list[Row]:
    made = []
    for edit in EDITS:
        start = edit.prompt.index("{}")
        made.append(one(kind, edit.text, edit.target_new, (start, start + len(edit.subject))))
    return made


def test_collate(rows: list[Row]) -> None:
    batch = collate(rows)
    assert len(batch) == len(rows)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape
    for i, row in enumerate(rows):
        n, m = len(row.ids), len(row.targets)
        assert batch.input_ids[i, :n].tolist() == row.ids
        assert batch.attention_mask[i].tolist() == [1] * n + [0] * (batch.labels.shape[1] - n)
        assert (batch.labels[i] != IGNORE).nonzero().flatten().tolist() == list(range(n - m, n))
        assert batch.labels[i, n - m : n].tolist() == row.targets
        assert n - m == row.positions[Token.PROMPT_LAST], "the prompt's last token predicts the first target token"
        assert {token: int(at[i]) for token, at in batch.at.items()} == row.positions


def test_padding_is_told_by_length_not_by_id() -> None:
    """Rows full of the padding value stay real tokens."""
    batch = collate([Row([0, 0, 0], [0], {Token.PROMPT_LAST: 2}), Row([5], [0], {Token.PROMPT_LAST: 0})])
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 0], [0, IGNORE, IGNORE]]


def test_collate_keeps_only_shared_rules() -> None:
    batch = collate([one("spm", "Tobin was", "Ulm", (0, 5)), one("spm", "It rained")])
    assert set(batch.at) == {Token.PROMPT_LAST}
    assert (batch.labels[1] == IGNORE).all()


def _same(one: Batch, other: Batch) -> None:
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.attention_mask, other.attention_mask)
    assert torch.equal(one.labels, other.labels)
    assert one.at.keys() == other.at.keys()
    assert all(torch.equal(one.at[token], other.at[token]) for token in one.at)


def test_select_is_collating_fewer(rows: list[Row]) -> None:
    batch, chosen = collate(rows), [4, 0, 5]
    _same(batch.select(torch.tensor(chosen)), collate([rows[i] for i in chosen]))
    mask = torch.tensor([i in (1, 3) for i in range(len(rows))])
    _same(batch.select(mask), collate([rows[1], rows[3]]))
    assert len(batch.select(torch.zeros(len(rows), dtype=torch.bool))) == 0


def test_to_moves_every_tensor(rows: list[Row]) -> None:
    moved = collate(rows).to("meta")
    tensors = [moved.input_ids, moved.attention_mask, moved.labels, *moved.at.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_position_ids_count_from_zero(rows: list[Row]) -> None:
    positions = collate(rows).position_ids
    assert torch.equal(positions, torch.arange(positions.shape[1]).repeat(len(rows), 1))


def test_buckets_hold_every_row_once_within_the_budget() -> None:
    lengths = [3, 50, 7, 7, 20, 1, 90]
    found = buckets(lengths, 60, extra=5)
    assert sorted(i for batch in found for i in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + 5) <= 60 for batch in found)
    assert buckets([], 10) == []
