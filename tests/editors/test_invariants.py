"""What holds for every editor on every model family."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from kedit_lightning import delta as delta_files
from kedit_lightning import editors
from kedit_lightning.delta import WeightDelta
from kedit_lightning.editors import ROME, Editor
from kedit_lightning.edits import Edit, Site, Token
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.statistics import Statistics
from kedit_lightning.run import RunDirectory
from kedit_lightning.trainer import EditTrainer
from tests.editors.fitting import (
    EDITORS,
    LEARNED,
    STEPS,
    VALUES,
    Kept,
    bits,
    end_at,
    fit,
    make,
    relative,
    same,
    untouched,
)
from tests.families import EDITS, FAMILIES, corpus, default_tokenizer, save_tiny, tiny_base, tiny_model, tokenizer

RANK_ONE = [name for name in EDITORS if issubclass(getattr(editors, name), ROME)]
QUICK = ("gpt2", "llama")
BATCH = [EDITS[0], EDITS[1], EDITS[3], EDITS[6]]
"""Subjects first, inside and at the end of the prompt; targets of different lengths."""
ENDS = {0: 2, 11: 4, 30: STEPS + 1, 6: 3}
"""Loss evaluations of each case; case 30 is ended by the number of steps."""
CLAMP = 0.3


def families_of(fast: tuple[str, ...]) -> list[Any]:
    """Every family, the others marked slow."""
    return [family if family in fast else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


@dataclass
class Run:
    family: str
    base: LanguageModel
    before: dict[str, Tensor]
    editor: Editor
    kept: Kept
    trainer: EditTrainer
    folder: Path

    @property
    def deltas(self) -> list[WeightDelta]:
        return self.trainer.run.commits()[0][1]


@pytest.fixture(scope="module", params=[(e, f) for e in EDITORS for f in FAMILIES], ids=lambda p: "-".join(p))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One edit batch, its edits ending at different steps, the clamp at work."""
    name, family = request.param
    base, kept, folder = tiny_base(family), Kept(), tmp_path_factory.mktemp(f"{name}-{family}")
    before = bits(base)
    editor = make(name, base, clamp_norm_factor=CLAMP)
    if name not in LEARNED:
        end_at(editor, ENDS)
    return Run(family, base, before, editor, kept, fit(editor, BATCH, folder, kept, batch_size=len(BATCH)), folder)


def test_edits_end_at_their_own_steps_and_are_clamped(run: Run) -> None:
    if type(run.editor).__name__ not in VALUES:
        pytest.skip("one loss for all edits")
    for outcome in run.editor.outcomes:
        assert outcome.steps.tolist() == [min(ENDS[edit.case_id], STEPS) for edit in BATCH]
        assert len(outcome.curves) == STEPS
    for delta in run.editor.deltas:
        share = delta.delta.detach().norm(dim=1) / (CLAMP * delta.origin.norm(dim=1))
        assert float(share.max()) == pytest.approx(1, abs=1e-5)


def test_the_edited_matrix_maps_each_key_to_its_value(run: Run) -> None:
    """(W + Δ) k = v* at the bare prompt, when the edit is written: later edits of the batch may move it again."""
    if type(run.editor).__name__ not in RANK_ONE:
        pytest.skip("only rank-one editors promise it")
    site, name = Site(1, "mlp"), run.base.name(Site(1, "mlp"))
    edited = run.base.weight(name).clone()
    run.base.restore()
    weight, bias = run.base.weight(name), run.base.linear(site).bias
    keys, wanted = run.editor.keys({site: Token.SUBJECT_LAST}, bare=True)[site].bare, run.editor.deltas[-1].value
    rows = run.editor.batch.rows.select(run.editor.batch.bare)
    for i, delta in enumerate(run.deltas):
        assert delta.name == name
        assert delta.left is not None
        assert delta.left.shape[1] == 1
        run.base.write(name, delta.update)
        value = weight.double() @ keys[i].double() + (0 if bias is None else bias.double())
        assert relative(value, wanted[i]) < 1e-5
        assert relative(run.base.read(rows, {site: rows.at[Token.SUBJECT_LAST]})[site][i], wanted[i]) < 1e-4
    assert torch.equal(weight, edited)


def test_edits_together_are_edits_one_by_one(run: Run) -> None:
    if type(run.editor).__name__ not in VALUES:
        pytest.skip("one loss for all edits")
    base, alone = tiny_base(run.family), Kept()
    editor = make(type(run.editor).__name__, base, clamp_norm_factor=CLAMP)
    end_at(editor, ENDS)
    fit(editor, BATCH, run.folder, alone, batch_size=1, restore_every=1, parallel_edits=1)
    assert len(alone.commits) == len(BATCH)
    for j, (delta, value) in enumerate(run.kept.commits[0]):
        assert relative(delta, torch.cat([commit[j][0] for commit in alone.commits])) < 1e-5
        assert relative(value, torch.cat([commit[j][1] for commit in alone.commits])) < 1e-5


def test_undoing_gives_the_pristine_bits(run: Run) -> None:
    edited = bits(run.base)
    assert not same(run.base, run.before)
    run.base.restore()
    assert same(run.base, run.before)
    for delta in run.deltas:
        run.base.write(delta.name, delta.update)
    assert same(run.base, edited)


def test_the_saved_delta_gives_the_edited_model_in_plain_transformers(run: Run) -> None:
    plain = AutoModelForCausalLM.from_pretrained(save_tiny(run.family, run.folder / "model"), dtype=torch.float32)
    assert all(torch.equal(value, run.before[name]) for name, value in plain.state_dict().items())
    words = run.base.tokenizer("The mother tongue of Oskel Tamrin is", return_tensors="pt")
    with torch.no_grad():
        unedited = plain(**words).logits
        deltas, _ = delta_files.load(run.trainer.run.path / "delta.safetensors")
        for delta in deltas:
            parameter, owner = plain.get_parameter(delta.name), plain.get_submodule(delta.name.rpartition(".")[0])
            update = delta.update.T if isinstance(owner, Conv1D) else delta.update
            parameter += update.reshape(parameter.shape)
        edited, wanted = plain(**words).logits, run.base.model(**words).logits
    assert not torch.allclose(edited, unedited, atol=1e-2)
    torch.testing.assert_close(edited, wanted, atol=1e-4, rtol=1e-4)


def test_only_the_named_matrices_change_and_the_model_stays_frozen(run: Run) -> None:
    changed = {name for name, value in run.base.model.state_dict().items() if not torch.equal(value, run.before[name])}
    assert changed == {delta.name for delta in run.deltas} == set(run.editor.names())
    assert untouched(run.base)


# ---------------------------------------------------------------------- several layers


@pytest.mark.parametrize("family", families_of(QUICK))
@pytest.mark.parametrize("name", EDITORS)
def test_several_layers(name: str, family: str, tmp_path: Path) -> None:
    base = tiny_base(family)
    before = bits(base)
    editor = make(name, base, (1, 2))
    run = fit(editor, BATCH[:2], tmp_path, batch_size=2).run
    updates = 2 if name in RANK_ONE else 1
    assert [delta.name for delta in run.commits()[0][1]] == [n for n in editor.names() for _ in range(updates)]
    assert sorted({outcome.pass_ for outcome in editor.outcomes}) == list(range(len(editor.passes())))
    assert {line["layer"] for line in run.records()[0]["stages"]} == set(editor.passes())
    base.restore()
    assert same(base, before)


# ---------------------------------------------------------------------- failures


class Boom(Exception):
    pass


def fail(editor: Editor, place: str, error: type[BaseException], pass_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an editor fail at some place of some pass."""

    def boom(*_: object, **__: object) -> None:
        if editor.pass_ == pass_:
            raise error

    def midway() -> None:
        if editor.outcomes and len(editor.outcomes[-1].curves) == (0 if type(editor).__name__ in LEARNED else 2):
            boom()

    def then(method: Any, fails: Callable[[], None] = boom) -> Any:
        return lambda *args: (fails(), method(*args))[1]

    def late(method: Any) -> Any:
        def generator() -> Iterator[Any]:
            for found in method():
                yield found
                boom()

        return generator

    if place == "commit":
        monkeypatch.setattr(RunDirectory, "commit", boom)
    elif place == "weight":
        monkeypatch.setattr(editor.base, "write", then(editor.base.write))
    elif place == "loss":
        monkeypatch.setattr(editor.base, "logits", then(editor.base.logits, midway))
    else:
        monkeypatch.setattr(editor, place, (late if place in ("stages", "write") else then)(getattr(editor, place)))


FAILURES = [(place, Boom) for place in ("locate", "stages", "loss", "write", "weight", "commit")]
INTERRUPTS = [("loss", KeyboardInterrupt), ("write", KeyboardInterrupt)]


@pytest.mark.parametrize("family", families_of(("gpt2",)))
@pytest.mark.parametrize(("place", "error"), [*FAILURES, *INTERRUPTS])
@pytest.mark.parametrize("name", EDITORS)
def test_nothing_is_left_of_an_edit_batch_that_fails(
    name: str, place: str, error: type[BaseException], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the last pass, so that earlier ones have been written, and as the second batch: the first one stays."""
    base, handler = tiny_base(family), signal.getsignal(signal.SIGINT)
    before = bits(base)
    editor = make(name, base, (1, 2))
    last = len(editor.passes()) - 1
    with monkeypatch.context() as patch:
        fail(editor, place, error, last, patch)
        with pytest.raises(error):
            fit(editor, BATCH[:2], tmp_path / "first", batch_size=2)
    assert same(base, before)
    assert untouched(base)
    assert not list(tmp_path.rglob("*.safetensors"))

    second = make(name, base, (1, 2))
    with monkeypatch.context() as patch:
        kept = _Snapshot(lambda: fail(second, place, error, last, patch))
        with pytest.raises(error):
            fit(second, BATCH[:2], tmp_path / "second", kept)
    assert same(base, kept.bits)
    assert untouched(base)
    assert [file.stem for file in tmp_path.rglob("*.safetensors")] == ["000000"]
    assert signal.getsignal(signal.SIGINT) is handler, "a later Ctrl-C is heard too"


class _Snapshot(Kept):
    """The weights after the first commit; then lets something happen."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__()
        self.then = then

    def on_edits_committed(self, trainer: Any, editor: Editor, records: Any) -> None:
        self.bits = bits(editor.base)
        self.then()


# ---------------------------------------------------------------------- half precision


@pytest.mark.parametrize("family", families_of(QUICK))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", EDITORS)
def test_half_precision_keeps_float32_masters(name: str, dtype: torch.dtype, family: str, tmp_path: Path) -> None:
    base = LanguageModel.wrap(tiny_model(family).to(dtype), tokenizer(default_tokenizer(family)))
    before = bits(base)
    if name in LEARNED and dtype == torch.float16:
        with pytest.raises(KeditError, match="gradients become 0"):
            make(name, base)
        return
    editor = make(name, base)
    run = fit(editor, BATCH[:1], tmp_path).run
    site = Site(1, "mlp")
    weight, master = base.weight(site), base.master(base.name(site))
    assert (weight.dtype, master.dtype) == (dtype, torch.float32)
    assert {delta.delta.dtype for delta in editor.deltas} == ({torch.float32} if name not in LEARNED else set())
    pristine = before[base.name(site)]
    pristine = pristine.T if isinstance(base.linear(site), Conv1D) else pristine
    total = pristine.float()
    for delta in run.commits()[0][1]:
        if delta.name == base.name(site):
            total = total + delta.update
    assert torch.equal(master, total)
    assert torch.equal(weight, total.to(dtype))
    if name in RANK_ONE:
        key, wanted = editor.keys({site: Token.SUBJECT_LAST}, bare=True)[site].bare[0], editor.deltas[-1].value[0]
        assert relative(base.project(site, key), wanted) < 1e-5
        rounding = (master.double() - weight.double()) @ key.double()
        assert bool((rounding.abs() <= torch.finfo(dtype).eps * (master.abs() @ key.abs())).all())
    base.restore()
    assert same(base, before)


# ---------------------------------------------------------------------- whitening


@pytest.mark.parametrize("family", families_of(("gpt2", "gemma2")))
@pytest.mark.parametrize("name", RANK_ONE)
def test_keys_are_whitened_by_their_second_moment(name: str, family: str, tmp_path: Path) -> None:
    """Δ ∝ (C⁻¹ k*)ᵀ with C and k* computed here, on the unedited model."""
    texts = corpus()[:80]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    statistics = Statistics(str(tmp_path / "texts.txt"), tokens="full", cache_dir=str(tmp_path), mom2_dtype="float64")
    base, site = tiny_base(family), Site(1, "mlp")
    editor = make(name, base, mom2_adjustment=True, statistics=statistics)
    run = fit(editor, BATCH[:1], tmp_path).run
    base.restore()

    def keys(text: str) -> Tensor:
        found: list[Tensor] = []
        hook = base.linear(site).register_forward_pre_hook(lambda _, args: found.append(args[0][0].double()))
        base.model(**base.tokenizer(text, return_tensors="pt"))
        hook.remove()
        return found[0]

    seen = torch.cat([keys(text) for text in texts])
    mean = torch.stack([keys(_prompt(text, editor.request(BATCH[0])))[-1] for text in editor.templates[0]]).mean(dim=0)
    direction = torch.linalg.solve(seen.T @ seen / len(seen), mean)
    right = run.commits()[0][1][0].right
    assert right is not None
    assert abs(float(torch.cosine_similarity(right[:, 0].double(), direction, dim=0))) > 1 - 1e-4


def _prompt(template: str, edit: Edit) -> str:
    """The prompt up to its subject's end: what comes later cannot change the key there."""
    prompt = template.replace("{}", edit.text)
    return prompt[: prompt.index(edit.subject) + len(edit.subject)]
