from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors import ROME, Editor, Loss
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from tests.editors.fitting import TEMPLATES, bits, fit, make, same
from tests.families import EDITS, LAYERS, tiny_base

SITE = Site(1, "mlp")
KL, DECAY = 0.3, 0.7


@contextmanager
def added(module: nn.Module, at: int, delta: Tensor) -> Iterator[None]:
    """δ at one position of a single row, put there by a hook of our own."""

    def put(_: object, __: object, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, at] += delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = module.register_forward_hook(put)
    yield
    hook.remove()


def naive_loss(base: LanguageModel, edit: Edit, delta: Tensor, origin: Tensor) -> dict[str, float]:
    """ROME's loss for one edit, row by row, without batches or padding."""
    module = base.module(SITE)

    def log_p(text: str, subject: int, add: bool = True) -> tuple[Tensor, int]:
        words = base.tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        stop = subject + len(edit.subject)
        spans = words.pop("offset_mapping")[0].tolist()
        at = max(i for i, (a, b) in enumerate(spans) if max(a, subject) < min(b, stop))
        with torch.no_grad(), added(module, at, delta if add else torch.zeros_like(delta)):
            return base.model(**words).logits[0].float().log_softmax(-1), at

    losses = []
    for template in TEMPLATES.templates[0]:  # type: ignore[index]
        prompt = template.replace("{}", edit.text)
        whole = base.tokenizer(f"{prompt} {edit.target_new}")["input_ids"]
        length = len(base.tokenizer(prompt)["input_ids"])
        found, _ = log_p(f"{prompt} {edit.target_new}", prompt.index(edit.subject))
        losses.append(-sum(float(found[i - 1, whole[i]]) for i in range(length, len(whole))) / (len(whole) - length))
    essence = f"{edit.subject} is a"
    (edited, at), (unedited, _) = log_p(essence, 0), log_p(essence, 0, add=False)
    kl = float((edited[at].exp() * (edited[at] - unedited[at])).sum())
    return {
        "nll": sum(losses) / len(losses),
        "kl": KL * kl,
        "weight_decay": DECAY * float(delta.norm() / origin.norm() ** 2),
    }


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2"])
def test_the_loss_of_every_edit_is_that_of_its_rows_one_by_one(family: str) -> None:
    """The KL is at the subject's last token, the decay over ‖v₀‖², the NLL the mean of the rows' token means."""
    base = tiny_base(family)
    edits = [EDITS[0], EDITS[1], EDITS[3]]
    editor = make("ROME", base, kl_factor=KL, v_weight_decay=DECAY)
    editor.prepare()
    editor.begin(edits)
    editor.take_up(editor.parts[0])
    assert isinstance(editor, ROME)
    loss = editor.edit_loss(editor.v)
    for scale in (0.0, 1.0):
        with torch.no_grad():
            editor.v.delta.copy_(scale * torch.randn(editor.v.delta.shape, generator=torch.Generator().manual_seed(0)))
        terms = loss().terms
        for i, edit in enumerate(edits):
            wanted = naive_loss(base, edit, editor.v.delta[i].detach(), editor.v.origin[i])
            assert {name: float(value[i]) for name, value in terms.items()} == pytest.approx(wanted, abs=2e-5)
        gradient = torch.autograd.grad(terms["weight_decay"].sum(), editor.v.delta)[0]
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any()) == bool(scale)


def test_a_kl_that_counts_for_nothing_is_not_computed() -> None:
    """Its rows do not run, and the other terms are what they are with it."""
    base, terms, ran = tiny_base("gpt2"), {}, {}
    hook = base.linear(Site(LAYERS - 1, "mlp")).register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for factor in (KL, 0.0):
        rows: list[int] = []
        editor = make("ROME", base, kl_factor=factor)
        editor.prepare()
        editor.begin(EDITS[:2])
        editor.take_up(editor.parts[0])
        assert isinstance(editor, ROME)
        loss = editor.edit_loss(editor.v)
        rows.clear()
        terms[factor] = loss().terms
        ran[factor] = sum(rows)
    hook.remove()
    assert ran[KL] - ran[0.0] == 2
    torch.testing.assert_close(terms[0.0]["nll"], terms[KL]["nll"])
    assert not terms[0.0]["kl"].any()


def test_the_kl_is_against_the_model_as_it_stands(tmp_path: Path) -> None:
    """Also in a sequence: the first evaluation, with δ = 0, measures no divergence from an edited model."""
    editor = make("ROME", tiny_base("gpt2"))
    firsts: list[float] = []
    stages = editor.stages

    def watch() -> Iterator[Any]:
        for stage in stages():
            firsts.append(float(stage.prepare()().terms["kl"][0]))
            yield stage

    editor.stages = watch  # type: ignore[method-assign]
    fit(editor, [EDITS[0], EDITS[1]], tmp_path)
    assert firsts == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("templates", "weights"),
    [
        (TEMPLATES, [1 / 3, 1 / 3, 1 / 3]),
        (ContextTemplates(templates=[["{}"], ["Yes. {}", "No. {}"]]), [1 / 2, 1 / 4, 1 / 4]),
    ],
)
def test_keys_are_the_mean_over_groups_of_templates(templates: ContextTemplates, weights: list[float]) -> None:
    base = tiny_base("gpt2")
    editor = make("ROME", base, context_templates=templates)
    editor.prepare()
    editor.begin(EDITS[:2])
    mean, bare = editor.keys({SITE: Token.SUBJECT_LAST}, bare=True)[SITE]
    for i, edit in enumerate(EDITS[:2]):
        keys = []
        for template in (template for group in editor.templates for template in group):
            prompt = template.replace("{}", edit.text)
            start = prompt.index(edit.subject)
            row = base.encode(prompt, None, (start, start + len(edit.subject)))
            seen: list[Tensor] = []
            hook = base.linear(SITE).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            base.model(torch.tensor([row.ids]))
            hook.remove()
            keys.append(seen[0][0, row.positions[Token.SUBJECT_LAST]])
        torch.testing.assert_close(bare[i], keys[0], atol=1e-5, rtol=1e-5)
        wanted = sum(weight * key for weight, key in zip(weights, keys, strict=True))
        torch.testing.assert_close(mean[i], wanted, atol=1e-5, rtol=1e-5)


def test_a_single_edit_is_a_matrix_of_rank_one_towards_v(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    editor = make("ROME", base)
    run = fit(editor, EDITS[:1], tmp_path).run
    (delta,) = run.commits()[0][1]
    assert (delta.left is not None, delta.right is not None, delta.dense) == (True, True, None)
    assert int(torch.linalg.matrix_rank(delta.update)) == 1
    direction = editor.keys({SITE: Token.SUBJECT_LAST})[SITE].mean[0]  # without C: k* itself
    assert delta.right is not None
    assert float(torch.cosine_similarity(delta.right[:, 0], direction, dim=0).abs()) == pytest.approx(1, abs=1e-6)


def test_the_target_becomes_likelier(tmp_path: Path) -> None:
    editor = make("ROME", tiny_base("gpt2"), v_num_grad_steps=20, v_lr=0.05, kl_factor=0.0)
    fit(editor, EDITS[:3], tmp_path, batch_size=3)
    outcome = editor.outcomes[0]
    fall = [float(outcome.curves[0]["nll"][i]) - outcome.final(i)["nll"] for i in range(3)]
    assert min(fall) > 0
    assert sum(fall) > 0.3


def test_edits_stop_below_a_loss_of_five_hundredths() -> None:
    editor = make("ROME", tiny_base("gpt2"))
    editor.prepare()
    editor.begin(EDITS[:1])
    editor.take_up(editor.parts[0])
    (stage,) = editor.stages()
    terms = {"nll": torch.tensor([0.03, 0.03, 0.06]), "kl": torch.tensor([0.0, 0.03, 0.0])}
    assert stage.stop(Loss(terms)).tolist() == [True, False, False]


def test_layers_are_passes_from_the_lowest_up() -> None:
    editor = make("ROME", tiny_base("gpt2"), (0, 2))
    assert list(editor.passes()) == [0, 2]
    assert editor.sites() == [Site(0), Site(2)]


def test_a_second_layer_is_edited_on_the_first_ones_result(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    editor = make("ROME", base, (1, 2))
    fit(editor, EDITS[:1], tmp_path)
    together = bits(base)
    base.restore()
    assert isinstance(editor, ROME)
    first = make("ROME", base, (1,))
    (delta,) = fit(first, EDITS[:1], tmp_path).run.commits()[0][1]
    second = make("ROME", base, (2,))
    second.prepare()
    second.begin(EDITS[:1])
    second.take_up(second.parts[0])
    assert isinstance(second, ROME)
    torch.testing.assert_close(second.v.origin, editor.v.origin, atol=0, rtol=0)
    base.restore()
    base.write(delta.name, delta.update)
    assert torch.equal(base.model.state_dict()[delta.name], together[delta.name])


def test_a_key_that_the_direction_cannot_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("gpt2")
    before = bits(base)
    monkeypatch.setattr(Editor, "whiten", lambda _, keys, __: torch.zeros_like(keys))
    with pytest.raises(KeditError, match="case 11: expected a key with a part along"):
        fit(make("ROME", base), [EDITS[1]], tmp_path)
    assert same(base, before)
