"""What holds for the editors that write a batch at once, beyond what holds for all (`test_invariants`)."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kedit_lightning import delta as delta_files
from kedit_lightning.data.prompts import ContextTemplates
from kedit_lightning.editors import JEEP, PMET, AlphaEdit, Editor, Loss, Stage
from kedit_lightning.editors.memit import MEMIT
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.statistics import Statistics
from kedit_lightning.run import RunDirectory
from tests.editors.fitting import STEPS, VALUES, Kept, bits, end_at, fit, make, relative, same
from tests.families import EDITS, FAMILIES, tiny_base

BATCH = [EDITS[0], EDITS[1], EDITS[3], EDITS[6]]
"""Subjects first, inside and at the end of the prompt, so that rows start at different tokens."""
BARE = ContextTemplates(templates=[["{}"]])
SQUARES = {"solver": "least_squares", "mom2_update_weight": 1.0}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in VALUES} | {
    "ROME, least squares": ("ROME", SQUARES),
    "TOP, least squares": ("TOP", SQUARES),
    "PMET, both": ("PMET", {"rewrite": "both"}),
    "JEEP, released": ("JEEP", {"preset": "released"}),
    "JEEP, apart": ("JEEP", {"joint": False}),
}
"""Every editor of values, and the ways of some that take other paths."""
MASS = [way for way, (name, settings) in WAYS.items() if name not in ("ROME", "TOP", "RETS", "FT") or settings]


def of(way: str, base: LanguageModel, layers: Sequence[int] = (1,), **settings: Any) -> Editor:
    name, own = WAYS[way]
    return make(name, base, layers, **{**own, **settings})


def quick(fast: tuple[str, ...], every: Sequence[str] = FAMILIES) -> list[Any]:
    return [one if one in fast else pytest.param(one, marks=pytest.mark.slow) for one in every]


def begun(editor: Editor, edits: Sequence[Edit] = BATCH) -> Stage:
    """An editor at the start of its first stage."""
    editor.prepare()
    editor.begin(edits)
    editor.take_up(editor.parts[0])
    stage = next(iter(editor.stages()))
    stage.begin()
    return stage


def total(run: RunDirectory, commit: int = 0) -> dict[str, Tensor]:
    """ΔW by name of a commit, in float64."""
    found: dict[str, Tensor] = {}
    for delta in run.commits()[commit][1]:
        found[delta.name] = found.get(delta.name, torch.zeros(())) + delta.update.double()
    return found


def agree(one: dict[str, Tensor], other: dict[str, Tensor], within: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, update in one.items():
        assert float((update - other[name]).norm() / other[name].norm()) < within, name


def agree_on_values(one: Kept, other: Kept, within: float = 1e-5) -> None:
    for mine, others in zip(one.commits, other.commits, strict=True):
        for (delta, value), (wanted, wanted_value) in zip(mine, others, strict=True):
            assert relative(delta, wanted) < within
            assert relative(value, wanted_value) < within


@contextmanager
def watching(base: LanguageModel, seen: Callable[[Any], None]) -> Iterator[None]:
    """Be told the rows of every forward pass."""
    logits = base.logits

    def told(batch: Any, *args: Any) -> Tensor:
        seen(batch)
        return logits(batch, *args)

    base.logits = told  # type: ignore[method-assign]
    try:
        yield
    finally:
        del base.logits


# ---------------------------------------------------------------------- what is wanted is what is written


@pytest.mark.parametrize("family", quick(("gpt2", "llama")))
@pytest.mark.parametrize("way", MASS)
def test_one_edit_in_one_layer_is_written_exactly_as_lambda_vanishes(way: str, family: str, tmp_path: Path) -> None:
    """MEMIT's z at the block's output, the others' values at the outputs of the maps that are written."""
    if family == "gemma2" and way in ("MEMIT", "AlphaEdit"):
        pytest.skip("what its MLP puts out is normalised before it joins the block's output, so no Δ of it gives z")
    base = tiny_base(family)
    weights: dict[str, Any] = {"mom2_update_weight": 1e-9}
    if way == "AlphaEdit":
        weights = {"L2": 1e-9, "nullspace_threshold": 2.0}
    if way == "PMET, both":
        weights["preset"] = "released"  # the MLP's key is read after the attention is written
    if way.startswith("JEEP"):
        weights = {"mom2_update_weight_low": 1e-9, "mom2_update_weight_high": 1e-9}
    editor, kept = of(way, base, context_templates=BARE, **weights), Kept()
    fit(editor, BATCH[1:2], tmp_path, kept)
    written = {Site(1, "block")} if isinstance(editor, MEMIT) and not isinstance(editor, PMET) else set(editor.sites())
    rows = editor.parts[0].bare_rows
    checked = set()
    for outcome in editor.outcomes:
        for delta in outcome.deltas:
            if delta.written_at in written:
                found = base.read(rows, {delta.written_at: rows.at[delta.token]})[delta.written_at]
                assert relative(found, delta.value) < 1e-4, delta.written_at
                assert relative(delta.origin, delta.value) > 1e-2
                checked.add(delta.written_at)
    assert checked == written


@pytest.mark.parametrize(
    ("way", "settings", "powers"),
    [
        ("MEMIT", {}, (1.0,)),
        ("MEMIT", {"spread": "sqrt"}, (0.5,)),
        ("PMET", {}, (0.5,)),
        ("PMET", {"spread": "even"}, (1.0,)),
        ("AlphaEdit", {}, (1.0,)),
        ("JEEP", {}, (0.5, 1.0)),
        ("JEEP", {"spread_low": "even", "spread_high": "sqrt"}, (1.0, 0.5)),
        ("ROME, least squares", {}, (1.0,)),
        ("ROME, least squares", {"spread": "sqrt"}, (0.5,)),
        ("TOP, least squares", {}, (1.0,)),
    ],
)
def test_every_layer_takes_its_share_of_what_is_left(
    way: str, settings: dict[str, Any], powers: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Share i of n is 1/(n − i), or its square root, of what the model edited so far lacks at the last layer."""
    base, layers = tiny_base("gptj"), (0, 1, 2)
    if way == "JEEP":
        layers, settings = (0, 1), settings | {"layers_high": [2, 3]}
    editor = of(way, base, layers, **settings)
    solve, found = editor.solve, []

    def watch(site: Site, residual: Tensor, keys: Tensor, weight: float) -> Any:
        delta = next(d for d in editor.deltas if d.site.layer >= site.layer and (d.written_at.part != "attn"))
        rows = editor.parts[0].bare_rows
        now = base.read(rows, {delta.written_at: rows.at[delta.token]})[delta.written_at]
        found.append((site.layer, delta.value[editor.parts[0].index] - now, residual[editor.parts[0].index]))
        return solve(site, residual, keys, weight)

    monkeypatch.setattr(editor, "solve", watch)
    if way == "TOP, least squares":  # h_r is above
        monkeypatch.setattr(editor, "locate", _v_first(editor))
    fit(editor, BATCH, tmp_path, batch_size=4)
    regions = [[0, 1, 2]] if way != "JEEP" else [[0, 1], [2, 3]]
    wanted = [
        (layer, (len(region) - i) ** power)
        for region, power in zip(regions, powers, strict=True)
        for i, layer in enumerate(region)
    ]
    assert [layer for layer, _, _ in found] == [layer for layer, _ in wanted]
    for (_, lacking, share), (_, divisor) in zip(found, wanted, strict=True):
        assert relative(share, lacking / divisor) < 1e-5


def _v_first(editor: Any) -> Callable[[], None]:
    def locate() -> None:
        type(editor).locate(editor)
        editor.deltas = torch.nn.ModuleList(reversed(list(editor.deltas)))

    return locate


@pytest.mark.parametrize("way", MASS)
def test_what_fails_in_the_third_layer_leaves_the_first_two(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, written = tiny_base("gpt2"), []
    before = bits(base)
    editor = of(way, base, (0, 1, 2))
    solve, write = editor.solve, base.write

    def fails(site: Site, *args: Any) -> Any:
        if site.layer == 2:
            msg = "singular"
            raise KeditError(msg)
        return solve(site, *args)

    monkeypatch.setattr(editor, "solve", fails)
    monkeypatch.setattr(base, "write", lambda *args: (written.append(args[0]), write(*args))[1])
    with pytest.raises(KeditError, match="singular"):
        fit(editor, BATCH[:2], tmp_path, batch_size=2)
    assert {base.name(Site(layer)) for layer in (0, 1)} <= set(written)
    assert same(base, before)
    assert not list(tmp_path.rglob("*.safetensors"))
    if isinstance(editor, AlphaEdit):
        assert editor.remembered == {}


# ---------------------------------------------------------------------- AlphaEdit


def half_known(base: LanguageModel, layers: Sequence[int], folder: Path) -> tuple[Statistics, dict[str, Tensor]]:
    """Second moments of which half the directions are never taken, and the projectors P on these."""
    moments, projectors, noise = {}, {}, torch.Generator().manual_seed(0)
    for layer in layers:
        name = base.name(Site(layer))
        k = base.weight(name).shape[1]
        directions, _ = torch.linalg.qr(torch.randn(k, k, generator=noise, dtype=torch.float64))
        values = torch.cat([torch.zeros(k // 2), torch.linspace(1, 3, k - k // 2)]).double()
        moments[name.removesuffix(".weight")] = (directions * values @ directions.T).float().contiguous()
        projectors[name] = directions[:, : k // 2] @ directions[:, : k // 2].T
    save_file(moments | {"count": torch.tensor([10_000])}, folder / "moments.safetensors")
    return Statistics(str(folder / "moments.safetensors")), projectors


class Memories(Kept):
    """At each commit: the keys on the edited model, and what the editor remembers after it."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[dict[str, Tensor]] = []
        self.remembered: list[dict[str, Tensor]] = []

    def on_edits_committed(self, trainer: Any, editor: Any, records: Any) -> None:
        super().on_edits_committed(trainer, editor, records)
        keys = editor.keys({site: Token.SUBJECT_LAST for site in editor.sites()})
        self.keys.append({editor.base.name(site): found.mean for site, found in keys.items()})
        self.remembered.append(dict(editor.remembered))


def alphaedit(base: LanguageModel, folder: Path, layers: Sequence[int] = (1, 2)) -> tuple[AlphaEdit, dict[str, Tensor]]:
    statistics, projectors = half_known(base, layers, folder)
    editor = make("AlphaEdit", base, layers, mom2_adjustment=True, statistics=statistics, nullspace_threshold=0.1)
    assert isinstance(editor, AlphaEdit)
    return editor, projectors


def test_alphaedit_leaves_alone_what_the_projector_drops(tmp_path: Path) -> None:
    """Δ k = 0 for k = (I − P) x, with and without a memory; on P x it does something."""
    base = tiny_base("gpt2")
    editor, projectors = alphaedit(base, tmp_path)
    run = fit(editor, BATCH, tmp_path, batch_size=2).run
    noise = torch.Generator().manual_seed(1)
    for commit in (0, 1):
        for name, update in total(run, commit).items():
            x = torch.randn(len(projectors[name]), 50, generator=noise, dtype=torch.float64)
            known = x - projectors[name] @ x
            scale = torch.linalg.matrix_norm(update, 2)
            assert float(((update @ known).norm(dim=0) / known.norm(dim=0)).max()) < 1e-6 * scale
            assert float((update @ (x - known)).norm(dim=0).min()) > 1e-3 * scale


def test_alphaedit_saves_keys_with_each_commit_and_spares_them_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each update is that of the formula, with an explicit inverse, where M is the sum over the files before."""
    base, kept = tiny_base("gpt2"), Memories()
    editor, projectors = alphaedit(base, tmp_path)
    solve, systems = editor.solve, []

    def watch(site: Site, residual: Tensor, keys: Tensor, weight: float) -> Any:
        systems.append((base.name(site), residual.double().T, keys.double().T))
        return solve(site, residual, keys, weight)

    monkeypatch.setattr(editor, "solve", watch)
    run = fit(editor, BATCH, tmp_path, kept, batch_size=2).run
    memory = {name: torch.zeros_like(p) for name, p in projectors.items()}
    for commit in (0, 1):
        for name, r, k in systems[2 * commit : 2 * commit + 2]:
            p, identity = projectors[name], torch.eye(len(projectors[name]), dtype=torch.float64)
            for m, near in ((memory[name], True), (torch.zeros_like(p), commit == 0)):
                wanted = r @ k.T @ p @ torch.linalg.inv((k @ k.T + m) @ p + editor.L2 * identity)
                assert (float((total(run, commit)[name] - wanted).norm() / wanted.norm()) < 1e-5) == near
        saved = delta_files.load_memory(run.path / "deltas" / f"{commit:06d}.safetensors")
        assert saved.keys() == memory.keys()
        for name, keys in saved.items():
            assert relative(keys, kept.keys[commit][name]) < 1e-5, "keys of the edited model"
            memory[name] = memory[name] + keys.double().T @ keys.double()
            assert torch.allclose(kept.remembered[commit][name], memory[name])


def test_alphaedit_forgets_when_the_weights_are_restored(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "kept").mkdir()
    base = tiny_base("gpt2")
    run = fit(alphaedit(base, tmp_path)[0], BATCH[:2], tmp_path, restore_every=1).run
    alone = fit(alphaedit(tiny_base("gpt2"), tmp_path / "alone")[0], BATCH[1:2], tmp_path / "alone").run
    agree(total(run, 1), total(alone))
    going_on = fit(alphaedit(tiny_base("gpt2"), tmp_path / "kept")[0], BATCH[:2], tmp_path / "kept").run
    name = base.name(Site(1))
    assert float((total(going_on, 1)[name] - total(alone)[name]).norm() / total(alone)[name].norm()) > 1e-2


def test_alphaedit_remembers_nothing_of_a_commit_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, kept = tiny_base("gpt2"), Memories()
    editor, _ = alphaedit(base, tmp_path)
    commit = RunDirectory.commit

    def fails(self: RunDirectory, commits: Any, records: Any) -> None:
        if commits[0][0] == 1:
            msg = "the disk is full"
            raise KeditError(msg)
        commit(self, commits, records)

    monkeypatch.setattr(RunDirectory, "commit", fails)
    with pytest.raises(KeditError, match="disk is full"):
        fit(editor, BATCH[:2], tmp_path, kept)
    assert len(kept.remembered) == 1
    assert editor.remembered.keys() == kept.remembered[0].keys()
    assert all(torch.equal(editor.remembered[name], m) for name, m in kept.remembered[0].items())


def test_alphaedit_reads_the_keys_of_its_memory_in_one_forward_pass(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    editor, _ = alphaedit(base, tmp_path, (0, 1, 2))
    read: list[list[Site]] = []
    keys = base.keys
    base.keys = lambda rows, sites: (read.append(list(sites)), keys(rows, sites))[1]  # type: ignore[method-assign]
    fit(editor, BATCH, tmp_path, batch_size=4)
    assert read == [[Site(0)], [Site(1)], [Site(2)], [Site(0), Site(1), Site(2)]]


# ---------------------------------------------------------------------- PMET


def test_pmet_stops_when_certain_and_counts_the_nll_a_tenth() -> None:
    """By hand: five edits, whatever each was told last decides on its own next evaluation."""
    editor = make("PMET", tiny_base("gpt2"), nll_loss_factor=2.0)
    stage = begun(editor)
    assert isinstance(editor, PMET)
    plain = editor.edit_loss(*editor.both.values())
    evaluate = stage.prepare()

    def nll(loss: Callable[[], Loss]) -> Tensor:
        return loss().terms["nll"].detach()

    torch.testing.assert_close(nll(evaluate), 2.0 * nll(plain))
    kl, missed = torch.tensor([0.02, 0.01, 0.005, 0.5]), torch.tensor([0.0, 0.0, 1.0, 3.0])
    said = Loss({"nll": torch.tensor([1.0, 1.0, 1.0, 1.0]), "kl": kl}, torch.ones(4), missed)
    assert stage.stop(said).tolist() == [False, True, False, False]
    torch.testing.assert_close(nll(evaluate), torch.tensor([0.2, 0.2, 2.0, 2.0]) * nll(plain))
    said = Loss({"nll": torch.tensor([0.02, 0.0, 0.02, 0.02]), "kl": kl}, torch.ones(4), torch.ones(4))
    assert stage.stop(said).tolist() == [True, True, True, False], "a loss below 0.05 is enough"
    torch.testing.assert_close(nll(evaluate), 2.0 * nll(plain), msg="certain no longer: the NLL counts in full again")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_probability_and_certainty_are_those_of_the_rows_one_by_one(family: str) -> None:
    """The mean over the rows of the geometric mean over the tokens; certain: every token the likeliest in every row."""
    base = tiny_base(family)
    editor = make("JEEP", base)
    stage = begun(editor)
    for edit_as in ("the target", "what the model says itself"):
        if edit_as != "the target":
            rows = editor.batch.rows
            for line in torch.nonzero(~editor.batch.essence)[:, 0].tolist():
                asked = rows.labels[line] >= 0
                logits = base.model(rows.input_ids[line : line + 1]).logits[0]
                rows.labels[line, asked] = logits.argmax(-1)[asked]
            stage = next(iter(editor.stages()))
        found = stage.prepare()()
        assert found.probability is not None
        assert found.certain is not None
        for i in range(len(BATCH)):
            rows, each = editor.batch.rows, []
            for line in torch.nonzero((editor.batch.edit == i) & ~editor.batch.essence)[:, 0].tolist():
                asked = rows.labels[line] >= 0
                log_p = base.model(rows.input_ids[line : line + 1]).logits[0].log_softmax(-1)
                each.append(math.exp(float(log_p[asked].gather(1, rows.labels[line][asked][:, None]).mean())))
            assert float(found.probability[i]) == pytest.approx(sum(each) / len(each), rel=1e-4)
        assert found.certain.tolist() == [edit_as != "the target"] * len(BATCH)


# ---------------------------------------------------------------------- JEEP


class PMETWithoutAttention(PMET):
    """PMET's MLP alone, without its stopping rule."""

    def locate(self) -> None:
        self.both = {"mlp": self.value_delta(Site(self.layer, "mlp"), Token.SUBJECT_LAST)}

    def _stop(self, loss: Loss) -> Tensor:
        return loss.total < -1


@pytest.mark.parametrize("family", quick(("gpt2",), ("gpt2", "llama")))
def test_jeep_without_high_region_is_pmet_without_attention(family: str, tmp_path: Path) -> None:
    shared = {"v_num_grad_steps": STEPS, "v_lr": 0.3, "mom2_adjustment": False, "context_templates": GROUPED}
    pmet_base, jeep_base, of_pmet, of_jeep = tiny_base(family), tiny_base(family), Kept(), Kept()
    pmet = PMETWithoutAttention(
        pmet_base,
        [1, 2],
        kl_factor=0.4,
        mom2_update_weight=3.0,
        clamp_norm_factor=0.9,
        v_weight_decay=0.7,
        **shared,
    )
    jeep = JEEP(
        jeep_base,
        [1, 2],
        [3],
        kl_factor_low=0.4,
        mom2_update_weight_low=3.0,
        clamp_norm_factor_low=0.9,
        v_weight_decay_low=0.7,
        optimize="low",
        min_loss=2.0,
        **shared,
    )
    one = fit(pmet, BATCH, tmp_path / "pmet", of_pmet, batch_size=4).run
    other = fit(jeep, BATCH, tmp_path / "jeep", of_jeep, batch_size=4).run
    agree_on_values(of_jeep, of_pmet, 1e-7)
    agree(total(other), total(one), 1e-7)


GROUPED = ContextTemplates(templates=[["{}"], ["Yes. {}", "No. {}"]])
LOW, HIGH = [0, 1], [2, 3]
TABLE_4: dict[str, tuple[dict[str, Any], list[str], list[int], str]] = {
    "JEEP": ({}, ["low high"], LOW + HIGH, "mlp"),
    "w/o δ′ & Step2": ({"optimize": "high"}, ["high"], HIGH, "mlp"),
    "w/o δ* & Step3": ({"optimize": "low"}, ["low"], LOW, "mlp"),
    "w/o Step2": ({"rewrite": "high"}, ["low high"], HIGH, "mlp"),
    "w/o Step3": ({"rewrite": "low"}, ["low high"], LOW, "mlp"),
    "Separate Optimization": ({"joint": False}, ["low", "high"], LOW + HIGH, "mlp"),
    "Even Spread in Step2": ({"spread_low": "even"}, ["low high"], LOW + HIGH, "mlp"),
    "w/ MHSA in Step3": ({"high_site": "attn", "high_rewrite": "attn"}, ["low high"], LOW + HIGH, "attn"),
}
"""Settings, the δs of each pass, the layers that change, and what changes in the high ones."""


@pytest.mark.parametrize("row", TABLE_4)
def test_rows_of_table_4(row: str, tmp_path: Path) -> None:
    settings, moved, layers, high = TABLE_4[row]
    base = tiny_base("llama")
    before = bits(base)
    editor = make("JEEP", base, LOW, layers_high=HIGH, **settings)
    kept = Kept()
    run = fit(editor, BATCH[:3], tmp_path, kept, batch_size=3).run
    assert [" ".join(d.name for d in outcome.deltas) for outcome in editor.outcomes] == moved
    sites = {"low": (Site(1, "mlp"), Token.SUBJECT_LAST), "high": (Site(3, high), Token.PROMPT_LAST)}
    for outcome in editor.outcomes:
        for delta in outcome.deltas:
            assert (delta.site, delta.token) == sites[delta.name]
            assert delta.delta.any(dim=1).all()
    changed = {name for name, value in base.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {base.name(Site(layer, high if layer in HIGH else "mlp")) for layer in layers}  # type: ignore[arg-type]
    terms = set(editor.outcomes[0].curves[0])
    assert terms == {"nll", "kl", *(f"weight_decay_{name}" for name in moved[0].split())}
    assert len(run.commits()) == 1


def test_separate_optimisation_optimises_the_second_on_the_model_edited_by_the_first(tmp_path: Path) -> None:
    base = tiny_base("llama")
    editor = make("JEEP", base, LOW, layers_high=HIGH, joint=False)
    assert isinstance(editor, JEEP)
    run = fit(editor, BATCH[:3], tmp_path / "apart", batch_size=3).run
    low = make("JEEP", tiny_base("llama"), LOW, layers_high=HIGH, optimize="low")
    first = total(fit(low, BATCH[:3], tmp_path / "low", batch_size=3).run)
    agree({name: update for name, update in total(run).items() if name in first}, first)
    (high,) = editor.outcomes[1].deltas
    rows = editor.parts[0].bare_rows
    at, index = {high.site: rows.at[Token.PROMPT_LAST]}, editor.parts[0].index
    base.restore()
    assert relative(base.read(rows, at)[high.site], high.origin[index]) > 1e-2
    for name, update in first.items():
        base.write(name, update.float())
    assert relative(base.read(rows, at)[high.site], high.origin[index]) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_released_jeep_adds_to_the_attention_and_writes_the_mlp(family: str, tmp_path: Path) -> None:
    base = tiny_base(family)
    editor = make("JEEP", base, LOW, layers_high=HIGH, preset="released")
    assert isinstance(editor, JEEP)
    fit(editor, BATCH[:2], tmp_path, batch_size=2)
    high = editor.values["high"]
    assert (high.site, high.written_at) == (Site(3, "attn"), Site(3, "mlp"))
    assert editor.sites() == [Site(layer, "mlp") for layer in LOW + HIGH]


def test_jeep_stops_by_probability_alone() -> None:
    """The loss does not count; the threshold itself is enough."""
    for threshold, wanted in ((0.9, [False, True, True, False]), (0.5, [True, True, True, False])):
        stage = begun(make("JEEP", tiny_base("gpt2"), min_loss=threshold))
        said = Loss({"nll": torch.tensor([0.0, 9.0, 0.0, 0.0])}, torch.tensor([0.89, 0.9, 0.95, 0.1]))
        assert stage.stop(said).tolist() == wanted


def test_the_kl_of_eq_11_is_on_the_edit_prompt() -> None:
    """At the subject's last token of the bare prompt, where δ′ is; δ* comes later and cannot change it."""
    for kl_prompt in ("essence", "edit"):
        base = tiny_base("gpt2")
        editor = make("JEEP", base, kl_prompt=kl_prompt, kl_factor_low=1.0)
        stage = begun(editor, BATCH[:3])
        assert isinstance(editor, JEEP)
        evaluate = stage.prepare()
        low, noise = editor.values["low"], torch.Generator().manual_seed(0)
        with torch.no_grad():
            low.delta.copy_(torch.randn(low.delta.shape, generator=noise))
            editor.values["high"].delta.copy_(torch.randn(low.delta.shape, generator=noise))
        found = evaluate().terms["kl"]
        batch = editor.batch
        rows = batch.rows.select(batch.bare if kl_prompt == "edit" else torch.nonzero(batch.essence)[:, 0])
        at = rows.at[Token.SUBJECT_LAST]
        every = torch.arange(len(rows))
        with torch.no_grad():
            plain = base.logits(rows, (every, at)).log_softmax(-1)
            with base.add(low.site, at, low.delta):
                edited = base.logits(rows, (every, at)).log_softmax(-1)
        wanted = (edited.exp() * (edited - plain)).sum(-1)
        torch.testing.assert_close(found.detach(), wanted, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- part by part


@pytest.mark.parametrize("way", WAYS)
def test_the_size_of_the_parts_changes_nothing(way: str, tmp_path: Path) -> None:
    runs = {}
    for max_tokens in (None, 1):
        editor, kept = of(way, tiny_base("gpt2"), max_tokens=max_tokens), Kept()
        run = fit(editor, BATCH, tmp_path / str(max_tokens), kept, batch_size=4).run
        runs[max_tokens] = kept, total(run)
        assert (len(editor.parts) == 4) == (max_tokens == 1)
        assert (len(editor.parts) == 1) == (max_tokens is None)
    agree_on_values(runs[1][0], runs[None][0])
    agree(runs[1][1], runs[None][1])


@pytest.mark.parametrize("family", quick(("gpt2", "gptj", "llama", "gemma2")))
@pytest.mark.parametrize("way", WAYS)
def test_the_suffix_alone_gives_losses_and_gradients_of_the_whole(way: str, family: str) -> None:
    """Rows start at different tokens, and other templates put the subject elsewhere."""
    found: dict[str, list[Tensor]] = {}
    for forward in ("full", "suffix"):
        editor = (
            of(way, tiny_base(family), forward=forward, kl_factor_low=0.4)
            if way.startswith("JEEP")
            else of(way, tiny_base(family), forward=forward, kl_factor=0.4)
        )
        editor.prepare()
        editor.begin(BATCH)
        editor.take_up(editor.parts[0])
        noise = torch.Generator().manual_seed(0)
        found[forward] = []
        for stage in editor.stages():
            stage.begin()
            evaluate = stage.prepare()
            with torch.no_grad():
                for delta in stage.deltas:
                    delta.delta.copy_(0.5 * torch.randn(delta.delta.shape, generator=noise))
            loss = evaluate()
            found[forward] += list(loss.terms.values())
            found[forward] += torch.autograd.grad(loss.total.sum(), [delta.delta for delta in stage.deltas])
    assert len(found["full"]) >= 3
    for one, other in zip(found["suffix"], found["full"], strict=True):
        scale = other.detach().norm(dim=-1) if other.ndim == 2 else other.detach().abs()
        error = (one - other).detach().norm(dim=-1) if other.ndim == 2 else (one - other).detach().abs()
        assert bool((error <= 1e-5 * scale + 1e-7).all()), float((error / scale).max())


@pytest.mark.parametrize("family", quick(("gptj",)))
@pytest.mark.parametrize("way", quick(("MEMIT", "TOP", "JEEP"), tuple(WAYS)))
def test_the_suffix_alone_gives_the_same_edit(way: str, family: str, tmp_path: Path) -> None:
    runs = {}
    for forward in ("full", "suffix"):
        kept = Kept()
        run = fit(of(way, tiny_base(family), forward=forward), BATCH, tmp_path / forward, kept, batch_size=4).run
        runs[forward] = kept, total(run)
    agree_on_values(runs["suffix"][0], runs["full"][0], 1e-4)
    agree(runs["suffix"][1], runs["full"][1], 1e-4)


def run_out(base: LanguageModel, when: Callable[[Any, int], bool]) -> list[int]:
    """Let the model run out of memory on some forward passes; gives the tokens of those that it did run out on."""
    logits, calls, failed = base.logits, [0], []

    def limited(batch: Any, *args: Any) -> Tensor:
        calls[0] += 1
        if when(batch, calls[0]):
            failed.append(batch.input_ids.numel())
            raise torch.OutOfMemoryError
        return logits(batch, *args)

    base.logits = limited  # type: ignore[method-assign]
    return failed


@pytest.mark.parametrize("when", ["at once", "midway"])
@pytest.mark.parametrize("way", quick(("MEMIT", "PMET", "TOP", "JEEP, apart"), tuple(WAYS)))
def test_out_of_memory_halves_the_part(way: str, when: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, plenty, scarce = tiny_base("gpt2"), Kept(), Kept()
    first = of(way, tiny_base("gpt2"))
    wanted = total(fit(first, BATCH, tmp_path / "plenty", plenty, batch_size=4).run)
    editor = of(way, base)
    whole = first.parts[0].tokens
    if when == "at once":
        failed = run_out(base, lambda batch, _: batch.input_ids.numel() > whole // 2)
    else:
        failed = run_out(base, lambda batch, call: call == 6)
    with caplog.at_level(logging.WARNING):
        run = fit(editor, BATCH, tmp_path / "scarce", scarce, batch_size=4).run
    assert len(failed) == 1
    said = [record.message for record in caplog.records if "memory" in record.message]
    assert said == [f"Out of memory at {whole} tokens: going on with at most {whole // 2} together."]
    assert len(editor.parts) > 1
    assert max(part.tokens for part in editor.parts) <= whole // 2
    agree_on_values(scarce, plenty)
    agree(total(run), wanted)
    for one, other in zip(editor.outcomes, first.outcomes, strict=True):
        assert one.steps.tolist() == other.steps.tolist()
        assert len(one.curves) == len(other.curves)
        for term, values in one.curves[-1].items():
            torch.testing.assert_close(values, other.curves[-1][term], atol=1e-5, rtol=1e-4)


def test_a_smaller_part_is_kept_for_the_next_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What did not fit once is not tried again."""
    base = tiny_base("gpt2")
    editor = make("MEMIT", base)
    run_out(base, lambda batch, _: batch.input_ids.numel() > 200)
    with caplog.at_level(logging.WARNING):
        fit(editor, [*BATCH, EDITS[2], EDITS[4], EDITS[5]], tmp_path, batch_size=4)
    sizes = [record.args[0] for record in caplog.records if "Out of memory" in record.message]  # type: ignore[index]
    assert sizes == sorted(set(sizes), reverse=True)


def test_an_edit_that_does_not_fit_alone_is_named(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    before = bits(base)
    editor = make("MEMIT", base)
    run_out(base, lambda batch, _: len(batch) > 1)
    with pytest.raises(KeditError, match=r"^case \d+: out of memory with this edit alone \(\d+ tokens\); take fewer"):
        fit(editor, BATCH, tmp_path, batch_size=4)
    assert same(base, before)


def test_another_error_is_not_taken_for_a_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make("MEMIT", tiny_base("gpt2"))

    def boom() -> None:
        raise RuntimeError

    monkeypatch.setattr(editor, "edit_loss", lambda *_: boom)
    with pytest.raises(RuntimeError):
        fit(editor, BATCH, tmp_path, batch_size=4)


def test_edits_that_are_done_leave_the_part(tmp_path: Path) -> None:
    """Forward passes get smaller; what the others get stays, see `test_edits_together_are_edits_one_by_one`."""
    base = tiny_base("gpt2")
    editor, rows = make("MEMIT", base), list[tuple[int, int]]()
    end_at(editor, {0: 1, 11: 1, 30: STEPS, 6: 3})
    evaluate = editor.edit_loss

    def watch(*args: Any) -> Any:
        loss = evaluate(*args)
        return lambda: (rows.append((len(editor.batch), len(editor.batch.rows))), loss())[1]

    editor.edit_loss = watch  # type: ignore[method-assign]
    fit(editor, BATCH, tmp_path, batch_size=4)
    assert rows == [(4, 16), (2, 8), (2, 8), (1, 4), (1, 4), (1, 4)]
    assert editor.outcomes[0].steps.tolist() == [1, 1, STEPS, 3]


def edits(n: int) -> list[Edit]:
    return [Edit("{} was born in", f"Velora Quint {chr(65 + i)}", "Ulm", case_id=i) for i in range(n)]


@pytest.mark.parametrize("way", ["MEMIT", "PMET", "JEEP", "AlphaEdit"])
def test_the_largest_forward_pass_does_not_grow_with_the_edits(way: str, tmp_path: Path) -> None:
    def largest(n: int, max_tokens: int | None) -> int:
        base, tokens = tiny_base("gpt2"), [0]
        with watching(base, lambda batch: tokens.append(batch.input_ids.numel())):
            fit(of(way, base, max_tokens=max_tokens, v_num_grad_steps=2), edits(n), tmp_path, batch_size=n)
        return max(tokens)

    one = largest(1, None)
    assert largest(8, 2 * one) == largest(4, 2 * one) == 2 * one
    assert largest(8, None) >= 8 * one, "the measure can tell"


def test_live_memory_grows_with_the_edits_by_vectors_only(tmp_path: Path) -> None:
    """What is alive at a loss evaluation: an edit more is its rows, δ, v₀ and curves, no logits, no cache."""

    def peak(n: int, max_tokens: int) -> tuple[int, int]:
        base = tiny_base("gpt2")
        editor, sizes = make("PMET", base, max_tokens=max_tokens, v_num_grad_steps=2), list[int]()

        def live() -> int:
            gc.collect()
            tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.device.type == "cpu"]
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
            del tensors
            return sum(storages.values())

        evaluate = editor.edit_loss

        def watch(*args: Any) -> Any:
            loss = evaluate(*args)

            def measured() -> Loss:
                found = loss()
                if editor._part == len(editor.parts) - 1 and not sizes:
                    sizes.append(live())
                return found

            return measured

        started = live()
        editor.edit_loss = watch  # type: ignore[method-assign]
        fit(editor, edits(n), tmp_path, batch_size=n)
        return sizes[0] - started, editor.parts[0].tokens // len(editor.parts[0])

    few, tokens = peak(4, 80)
    many, _ = peak(24, 80)
    vectors = 2 * 4 * 32 * 4  # two δs: δ and v₀ of all edits, as they are kept and as they are shown
    assert (many - few) / 20 < 2 * (vectors + tokens * 3 * 8)


def test_alphaedit_keeps_no_inert_weight_and_remembers_all_layers_or_none(gpt2_base: LanguageModel) -> None:
    editor = make("AlphaEdit", gpt2_base)
    assert "mom2_update_weight" not in editor.config
    assert isinstance(editor, AlphaEdit)
    editor.remember({"a": torch.ones(2, 3), "b": torch.ones(1, 3)})
    before = {name: gram.clone() for name, gram in editor.remembered.items()}
    with pytest.raises(RuntimeError):
        editor.remember({"a": torch.ones(2, 3), "b": torch.ones(1, 4)})  # the second fails
    assert all(torch.equal(gram, before[name]) for name, gram in editor.remembered.items())
    editor.remember({"a": torch.ones(2, 3)})
    assert torch.equal(editor.remembered["a"], torch.full((3, 3), 4.0).double())
    assert torch.equal(editor.remembered["b"], before["b"])
