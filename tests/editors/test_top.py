from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors import TOP, Loss, Stage
from kedit_lightning.edits import Site, Token
from kedit_lightning.errors import KeditError, ModelError
from kedit_lightning.models import LanguageModel
from tests.editors.fitting import Kept, fit, make
from tests.families import EDITS, LAYERS, tiny_base

EDITED = [EDITS[0], EDITS[1], EDITS[6]]
"""In the last one the subject's last token is the prompt's last token."""


def top(base: LanguageModel, layers: Any = (1,), **settings: Any) -> TOP:
    editor = make("TOP", base, layers, **settings)
    assert isinstance(editor, TOP)
    return editor


def begun(base: LanguageModel, **settings: Any) -> TOP:
    editor = top(base, **settings)
    editor.prepare()
    editor.begin(EDITED)
    editor.take_up(editor.parts[0])
    return editor


def test_h_r_is_the_block_at_the_prompts_last_token_and_v_the_mlp_at_the_subjects() -> None:
    editor = begun(tiny_base("gpt2"), rel_feat_layer=2)
    assert (editor.h_r.site, editor.h_r.token) == (Site(3, "block"), Token.PROMPT_LAST)
    assert (editor.v.site, editor.v.token) == (Site(1, "mlp"), Token.SUBJECT_LAST)


def test_first_h_r_then_v(tmp_path: Path) -> None:
    """The second stage takes h_r* as it is: h_r stays, bit for bit, while v moves."""
    editor = top(tiny_base("gpt2"))
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    stages = editor.stages

    def watch() -> Iterator[Stage]:
        for stage in stages():

            def prepare(stage: Stage = stage) -> Any:
                return partial(loss, stage.name, stage.prepare())

            def loss(name: str, evaluate: Any) -> Any:
                seen.append((name, editor.h_r.delta.detach().clone(), editor.v.delta.detach().clone()))
                return evaluate()

            yield replace(stage, prepare=prepare)

    editor.stages = watch  # type: ignore[method-assign]
    fit(editor, EDITED, tmp_path, batch_size=3)
    first = [(h_r, v) for name, h_r, v in seen if name == "h_r"]
    second = [(h_r, v) for name, h_r, v in seen if name == "v"]
    assert [name for name, _, _ in seen] == ["h_r"] * len(first) + ["v"] * len(second)
    assert all(not v.any() for _, v in first)
    assert first[-1][0].any()
    assert all(torch.equal(h_r, first[-1][0]) for h_r, _ in second)
    assert second[-1][1].any()
    assert [list(outcome.curves[0]) for outcome in editor.outcomes] == [
        ["nll", "kl", "weight_decay"],
        ["distance", "weight_decay"],
    ]


@pytest.mark.parametrize("family", ["gpt2", "gptj", "mistral"])
@pytest.mark.parametrize("offset", range(LAYERS - 1))
def test_the_distance_is_of_the_bare_prompts_h_r_from_its_target(family: str, offset: int) -> None:
    """For every l_a from the edited layer itself to the last; other templates take no part."""
    base = tiny_base(family)
    editor = begun(base, rel_feat_layer=offset, vec_loss_factor=0.3, v_weight_decay=0.2)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        editor.h_r.delta.copy_(torch.randn(editor.h_r.delta.shape, generator=noise))
    wanted = 0.3 * (editor.h_r.delta + 1e-6).norm(dim=1)
    torch.testing.assert_close(
        editor._vector_loss()().terms["distance"].detach(), wanted.detach(), atol=1e-4, rtol=1e-4
    )
    with torch.no_grad():
        editor.v.delta.copy_(torch.randn(editor.v.delta.shape, generator=noise))
    terms = editor._vector_loss()().terms
    for i, edit in enumerate(EDITED):
        row = base.encode(
            edit.text, None, (edit.text.index(edit.subject), edit.text.index(edit.subject) + len(edit.subject))
        )

        def put(_: object, __: object, output: torch.Tensor, i: int = i, row: Any = row) -> torch.Tensor:
            output = output.clone()
            output[0, row.positions[Token.SUBJECT_LAST]] += editor.v.delta[i].detach()
            return output

        found: list[torch.Tensor] = []
        hooks = [
            base.module(editor.v.site).register_forward_hook(put),
            base.module(editor.h_r.site).register_forward_hook(
                lambda _, __, out, found=found: found.append((out[0] if isinstance(out, tuple) else out)[0, -1])
            ),
        ]
        base.model(torch.tensor([row.ids]))
        for hook in hooks:
            hook.remove()
        distance = 0.3 * (found[0] - editor.h_r.value[i] + 1e-6).norm()
        assert float(terms["distance"][i]) == pytest.approx(float(distance), rel=1e-4)
        decay = 0.2 * editor.v.delta[i].norm() / editor.v.origin[i].norm() ** 2
        assert float(terms["weight_decay"][i]) == pytest.approx(float(decay), rel=1e-5)
    terms["distance"].sum().backward()
    assert editor.v.delta.grad is not None
    ends = torch.tensor([edit.text.endswith(edit.subject) for edit in EDITED])
    sees = torch.ones(len(EDITED), dtype=torch.bool) if offset else ends
    assert torch.equal(editor.v.delta.grad.any(dim=1), sees), "block l's last token sees v only where v is at it"
    assert editor.h_r.delta.grad is None


@pytest.mark.parametrize("offset", [0, 2], ids=["the edited layer", "the last layer"])
def test_any_l_a_edits(offset: int, tmp_path: Path) -> None:
    editor = top(tiny_base("llama"), rel_feat_layer=offset, v_lr=0.05, vec_loss_factor=1.0)
    fit(editor, EDITED, tmp_path, batch_size=3)
    for outcome in editor.outcomes:
        first = torch.stack(list(outcome.curves[0].values())).sum(dim=0)
        for i in (2,) if offset == 0 and outcome.stage == "v" else range(len(EDITED)):
            assert sum(outcome.final(i)[term] for term in outcome.curves[0]) < float(first[i])


def test_l_a_is_one_offset_or_one_a_layer() -> None:
    base = tiny_base("gpt2")
    assert top(base, (1, 2), rel_feat_layer=1).l_a == {1: 2, 2: 3}
    assert top(base, (1, 2), rel_feat_layer=[2, 1]).l_a == {1: 3, 2: 3}


def test_each_pass_has_its_own_l_a(tmp_path: Path) -> None:
    editor, sites = top(tiny_base("gpt2"), (1, 2), rel_feat_layer=[2, 0]), []
    locate = editor.locate

    def watch() -> None:
        locate()
        sites.append((editor.h_r.site, editor.v.site))

    editor.locate = watch  # type: ignore[method-assign]
    fit(editor, EDITED[:1], tmp_path)
    assert sites == [(Site(3, "block"), Site(1, "mlp")), (Site(2, "block"), Site(2, "mlp"))]


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([1], KeditError, r"one for each of the layers \[1, 2\], got \[1\]"),
        ([], KeditError, "one for each of the layers"),
        (-1, KeditError, "expected an offset ≥ 0"),
        ([1, -1], KeditError, "expected an offset ≥ 0"),
        (2, ModelError, "between 0 and 3, got 4"),
    ],
)
def test_offsets_are_checked(offsets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        top(tiny_base("gpt2"), (1, 2), rel_feat_layer=offsets)


# ---------------------------------------------------------------------- the released code


def test_the_released_kl_slips_one_token_to_the_left_for_every_further_target_token() -> None:
    """With one target token it is where the paper has it; it never leaves the row."""
    editor = begun(tiny_base("gpt2"), preset="released")
    rows, essence = editor.batch.rows, editor.batch.essence
    for i, edit in enumerate(EDITED):
        tokens = len(editor.base.encode(edit.text, edit.target_new, separate=True).targets)
        last = len(editor.base.encode(f"{edit.subject} is a").ids) - 1
        assert int(rows.at[Token.PROMPT_LAST][essence][i]) == last
        assert int(editor._slip()[i]) == tokens - 1
    assert len(set(editor._slip().tolist())) > 1


def test_only_the_released_preset_slips(tmp_path: Path) -> None:
    curves = {}
    for preset in ("paper", "released"):
        editor = top(tiny_base("gpt2"), preset=preset, kl_factor=1.0)
        fit(editor, EDITED[1:2], tmp_path)
        curves[preset] = editor.outcomes[0].curves
    assert torch.equal(curves["paper"][0]["nll"], curves["released"][0]["nll"])
    assert not torch.allclose(curves["paper"][2]["kl"], curves["released"][2]["kl"])


def test_released_drops_prefixes_with_import() -> None:
    base, own = tiny_base("gpt2"), ContextTemplates(seed=5)
    assert top(base, context_templates=own, preset="released").context_templates == replace(
        own, scheme="rome", exclude="import"
    )
    assert top(base, context_templates=own).context_templates == replace(own, scheme="rome")


def test_an_edit_that_needs_no_second_stage_keeps_its_value(tmp_path: Path) -> None:
    """Below stop1 at once, h_r* is h_r, so the distance is nothing and v stays too."""
    editor, kept = top(tiny_base("gpt2"), stop1=1e9), Kept()
    fit(editor, EDITED[:2], tmp_path, kept, batch_size=2)
    assert [outcome.steps.tolist() for outcome in editor.outcomes] == [[1, 1], [1, 1]]
    assert all(not delta.any() for delta, _ in kept.commits[0])


def test_each_stage_has_its_own_threshold() -> None:
    editor = begun(tiny_base("gpt2"), stop1=0.25, stop2=0.5)
    loss = Loss({"any": torch.tensor([0.2, 0.3, 0.6])})
    assert [stage.stop(loss).tolist() for stage in editor.stages()] == [
        [True, False, False],
        [True, True, False],
    ]


def test_stage_1_can_end_by_the_targets_probability(tmp_path: Path) -> None:
    """However large the loss is; the second stage keeps its threshold."""
    editor = begun(tiny_base("gpt2"), stop1_probability=0.5, stop2=0.5)
    loss = Loss({"any": torch.tensor([9.0, 9.0, 0.2])}, probability=torch.tensor([0.4, 0.5, 0.6]))
    assert [stage.stop(loss).tolist() for stage in editor.stages()] == [[False, True, True], [False, False, True]]
    editor = top(tiny_base("gpt2"), rel_feat_layer=2, stop1_probability=3e-3, v_num_grad_steps1=20)
    fit(editor, EDITED, tmp_path, batch_size=3)
    first = editor.outcomes[0]
    assert torch.equal(first.converged, first.probability >= 3e-3)
    assert first.converged.any(), first.probability


@pytest.mark.parametrize("probability", [0.0, 1.5])
def test_a_probability_is_one(probability: float) -> None:
    with pytest.raises(KeditError, match="stop1_probability: expected a probability above 0, at most 1, or null"):
        top(tiny_base("gpt2"), stop1_probability=probability)
