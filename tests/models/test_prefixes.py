import pytest
import torch

from kedit_lightning.metrics.questions import questions
from kedit_lightning.models import Row, prefixes
from kedit_lightning.models.prefixes import answers
from tests.families import EDITS

ANSWERS = ("Norvast", "Norvast Mills and its bells", "High Kestrian", None)


@pytest.fixture(autouse=True)
def _sharing(monkeypatch):
    """Tiny batches share what they can, however little it saves."""
    monkeypatch.setattr(prefixes, "PASS", 0)


@pytest.fixture
def rows(base):
    """Prompts of a few templates, longer than the attention windows, with answers of one to many tokens and none."""
    found = {edit.text: questions(edit, {}, set()) for edit in EDITS}
    prompts = [question.prompt for edit in found.values() for asked in edit.values() for question in asked]
    return [base.encode(prompt, answer) for prompt in prompts if prompt for answer in ANSWERS]


@pytest.fixture
def run(gpt2_base):
    """The shape of each forward pass of the tiny GPT-2."""
    seen = []
    hook = gpt2_base.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    hook.remove()


def plain(base, row):
    """One row, one plain forward."""
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([row.ids])).logits[0]
    return logits[len(row.ids) - max(1, len(row.targets)) :]


def collected(base, rows, max_tokens, **settings):
    """Logits of each row, in the order of its targets."""
    found = [{} for _ in rows]
    for part in answers(base, rows, max_tokens, **settings):
        for row, index, line in zip(part.row.tolist(), part.index.tolist(), part.line.tolist(), strict=True):
            assert index not in found[row]
            found[row][index] = part.logits[line]
    return [torch.stack([of_row[i] for i in range(len(of_row))]) for of_row in found]


@pytest.mark.parametrize("max_tokens", [60, 8192])
def test_logits_equal_those_of_a_plain_forward_a_row(base, rows, max_tokens):
    for found, row in zip(collected(base, rows, max_tokens), rows, strict=True):
        expected = plain(base, row)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
        nll, exact = (x.log_softmax(-1).gather(1, torch.tensor(row.targets or [0])[:, None]) for x in (found, expected))
        torch.testing.assert_close(nll, exact, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))


def test_what_rows_have_in_common_is_run_once(gpt2_base, run):
    prompts = [
        f"{template} {name} is" for template in ("The mother tongue of", "The home of") for name in ("Ann", "Bo")
    ]
    rows = [gpt2_base.encode(prompt, answer) for prompt in prompts for answer in ("High Kestrian", "Norvast")]
    collected(gpt2_base, rows, 8192)
    tokens = sum(b * t for b, t in run)
    beginnings = {tuple(row.ids[:n]) for row in rows for n in range(1, len(row.ids) + 1)}
    assert len(beginnings) <= tokens < 0.6 * sum(len(row.ids) for row in rows)


def test_rows_of_different_owners_share_nothing(gpt2_base, run):
    owners, ends = (0, 1, -1), (9, 10, 11)
    rows = [Row([5, 6, 7, 8, end], [1, 2], {}, owner) for owner in owners for end in ends]
    torch.manual_seed(0)
    name = f"{gpt2_base.architecture.layers}.1.{gpt2_base.architecture.mlp_out}.weight"
    gpt2_base.side_by_side.write(1, name, torch.randn(32, 1), torch.randn(128, 1))
    try:
        shared = collected(gpt2_base, rows, 8192)
        assert run == [(3, 5), (6, 1)]
        alone = collected(gpt2_base, rows, 8192, levels=1)
    finally:
        gpt2_base.side_by_side.clear()
    for i, (one, other) in enumerate(zip(shared, alone, strict=True)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        apart = (one - plain(gpt2_base, rows[i])).abs().max()
        assert apart > 0.01 if rows[i].owner == 1 else apart < 1e-5


def test_a_model_without_a_plain_cache_runs_rows_whole(gpt2_base, monkeypatch):
    rows = [Row([5, 6, 7, 8, last], [1, 2], {}) for last in (9, 10, 11)]
    expected = [plain(gpt2_base, row) for row in rows]
    forward = gpt2_base.model.transformer.forward
    monkeypatch.setattr(
        gpt2_base.model.transformer,
        "forward",
        lambda *args, **given: forward(*args, **given | {"past_key_values": None}),
    )
    for found, logits in zip(collected(gpt2_base, rows, 8192), expected, strict=True):
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


def test_few_tokens_in_common_are_not_worth_a_pass(gpt2_base, run, monkeypatch):
    monkeypatch.undo()
    collected(gpt2_base, [Row([5, 6, 7, 8, end], [1, 2], {}) for end in (9, 10, 11)], 8192)
    assert run == [(3, 5)]


def test_no_rows_are_no_error(gpt2_base):
    assert collected(gpt2_base, [], 8192) == []
