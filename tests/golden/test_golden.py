"""Our editors against the authors' own numbers, and the command that compares them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kedit_lightning.edits import Token
from tests.golden.__main__ import main
from tests.golden.cases import Case, find, read_json
from tests.golden.compare import Distance, compare, expected_exactly
from tests.golden.extract import CASES, DATA
from tests.golden.report import too_far
from tests.golden.runner import Run, run

SHARED = Path(__file__).parents[3] / "shared" / "golden"


def one_request(target: Path, editor: str, case_id: int = 2) -> Case:
    """A folder with a single request of a case of the extract."""
    (case,) = find(DATA, editor)
    shutil.copytree(DATA, target, ignore=shutil.ignore_patterns(*(f"{name}_*" for name in CASES)))
    numbers = {name: tensor for name, tensor in case.numbers().items() if name.startswith(f"req{case_id}/")}
    values = {name: value for name, value in case.meta["values"].items() if name.startswith(f"req{case_id}")}
    write(target, editor, case.meta | {"case_ids": [case_id], "values": values}, numbers)
    return find(target)[0]


def write(target: Path, editor: str, meta: dict[str, object], numbers: dict[str, Tensor]) -> None:
    save_file(numbers, target / f"{editor}_gpt2-tiny.safetensors")
    (target / f"{editor}_gpt2-tiny.json").write_text(json.dumps(meta))


# ---------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    "editor", [pytest.param(name, marks=pytest.mark.slow if name == "MEMIT" else []) for name in CASES]
)
def test_extract_holds(capsys: pytest.CaptureFixture[str], editor: str) -> None:
    """MEMIT's values are AlphaEdit's first batch, too."""
    status = main([str(DATA), "--editor", editor])
    shown = capsys.readouterr()
    assert status == 0, shown.out
    assert shown.err == ""
    assert "1 of 1 cases hold" in shown.out
    assert {"curves", "dW"} | (set() if editor.startswith("FT-") else {"k*", "value"}) <= set(shown.out.split())
    assert ("u" in shown.out.split()) == (editor in ("ROME", "TOP", "RETS", "EAC-ROME"))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here; the extract in tests/golden/data is tested")
@pytest.mark.parametrize(
    "editor", [pytest.param(name, marks=[] if name in ("ROME", "TOP") else pytest.mark.slow) for name in CASES]
)
def test_shared_cases_hold(capsys: pytest.CaptureFixture[str], editor: str) -> None:
    status = main([str(SHARED), "--editor", editor, "--model", "gpt2-tiny", "--every"])
    assert status == 0, capsys.readouterr().out


# ---------------------------------------------------------------------- the check can fail


@pytest.fixture(scope="module", params=["ROME", "TOP", "JEEP", pytest.param("AlphaEdit", marks=pytest.mark.slow)])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Run]:
    if request.param in ("JEEP", "AlphaEdit"):
        (case,) = find(DATA, request.param)
        return case, run(case)
    case = one_request(tmp_path_factory.mktemp("golden") / request.param, request.param)
    return case, run(case)


def measure(case: Case, found: Run, recorded: dict[str, Tensor], values: dict[str, object]) -> list[Distance]:
    assert case.recorded is not None
    bare = [stage.prefix for stage in case.recorded.stages.values() if stage.bare]
    distances = compare(found.numbers, recorded, found.exact, expected_exactly(values, recorded, bare))
    return too_far(distances, case.recorded)


def test_every_number_counts(ran: tuple[Case, Run]) -> None:
    """Each recorded tensor, moved by twice the tolerance, is noticed."""
    case, found = ran
    recorded, values = case.numbers(), case.meta["values"]
    assert case.recorded is not None
    assert measure(case, found, recorded, values) == []
    unnoticed = set()
    for name, tensor in recorded.items():
        moved = tensor.clone()
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
            moved += noise * 2 * case.recorded.tolerance * max(float(tensor.norm()), 1.0) / noise.norm()
        elif name.endswith("attention_mask"):
            moved[0, 0] = 0
        else:
            moved.view(-1)[tensor.argmax() if name.endswith("targets") else 0] += 1
        if not measure(case, found, recorded | {name: moved}, values):
            unnoticed.add(name)
    assert unnoticed == set()


def test_every_position_and_count_counts(ran: tuple[Case, Run]) -> None:
    case, found = ran
    recorded, values = case.numbers(), case.meta["values"]
    for where, value in values.items():
        for key in (key for key in value if key == "n_loss_evaluations" or key.startswith("lookup_idxs")):
            moved = value[key] + 1 if isinstance(value[key], int) else [value[key][0] + 1, *value[key][1:]]
            assert measure(case, found, recorded, values | {where: value | {key: moved}}), (where, key)


def test_what_is_missing_or_broken_in_our_run_is_noticed(ran: tuple[Case, Run]) -> None:
    case, found = ran
    recorded, values = case.numbers(), case.meta["values"]
    updated = [name for name in recorded if "dW/" in name][-1]
    for numbers in (
        {name: tensor for name, tensor in found.numbers.items() if name != updated},
        found.numbers | {updated: found.numbers[updated] * float("nan")},
        found.numbers | {updated: found.numbers[updated].T},
        found.numbers | {updated.replace(".weight", ".bias"): torch.ones(48)},
    ):
        assert measure(case, Run(found.editor, numbers, found.exact), recorded, values)


@pytest.mark.parametrize("hparam", ["v_lr", "kl_factor", "v_weight_decay"])
def test_command_fails_on_another_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str], hparam: str) -> None:
    case = one_request(tmp_path / "golden", "ROME")
    hparams = case.meta["hparams"]
    write(case.folder, "ROME", case.meta | {"hparams": hparams | {hparam: hparams[hparam] * 1.01}}, case.numbers())
    assert main([str(case.folder)]) == 1
    shown = capsys.readouterr().out
    assert "FAILED req2: steps/loss: relative error" in shown
    assert "0 of 1 cases hold; beyond tolerance: ROME gpt2-tiny" in shown


# ---------------------------------------------------------------------- the command


def test_other_editors_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = one_request(tmp_path / "golden", "ROME")
    write(case.folder, "NEXT-ROME", case.meta | {"editor": "NEXT"}, case.numbers())
    assert main([str(case.folder), "--editor", "NEXT-ROME"]) == 0
    assert "not in this project yet: NEXT-ROME gpt2-tiny\n" in capsys.readouterr().out


def test_unknown_hyperparameters_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = one_request(tmp_path / "golden", "ROME")
    hparams = case.meta["hparams"] | {"nll_loss_factor": 2, "new_trick": True}
    write(case.folder, "ROME", case.meta | {"hparams": hparams}, case.numbers())
    assert main([str(case.folder)]) == 0
    assert "not taken by our ROME: nll_loss_factor=2, new_trick=True\n" in capsys.readouterr().out


def test_bad_folders_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(folder: Path, *options: str) -> str:
        assert main([str(folder), *options]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        return shown.err

    assert "there is no such folder" in refused(tmp_path / "nowhere")
    assert "there is no case in it" in refused(tmp_path)
    folder = one_request(tmp_path / "golden", "ROME").folder
    assert "editors are ROME" in refused(folder, "--editor", "TOP")
    assert "models are gpt2-tiny" in refused(folder, "--model", "gptj-tiny")
    for name, complaint in {
        "cov_gpt2-tiny.safetensors": "the case ROME gpt2-tiny needs it",
        "models/gpt2-tiny/config.json": "the case ROME gpt2-tiny needs it",
        "requests.json": "expected a JSON file",
    }.items():
        away = folder / f"{name}.away"
        (folder / name).rename(away)
        assert complaint in refused(folder)
        away.rename(folder / name)
    tensors = folder / "ROME_gpt2-tiny.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    assert "expected the recorded tensors" in refused(folder)
    tensors.write_bytes(whole)
    (folder / "ROME_gpt2-tiny.json").write_text("{")
    assert "expected a JSON file" in refused(folder)


def test_recording_without_curves_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = one_request(tmp_path / "golden", "ROME")
    numbers = {name: tensor for name, tensor in case.numbers().items() if "/steps/" not in name}
    write(case.folder, "ROME", case.meta, numbers)
    assert main([str(case.folder)]) == 2
    assert "holds nothing to compare of the kind 'curves'" in capsys.readouterr().err


# ---------------------------------------------------------------------- half precision


@pytest.mark.parametrize("editor", ["ROME", "TOP"])
def test_bfloat16(tmp_path: Path, editor: str) -> None:
    """In bfloat16 every number is finite, and the edited map gives v* at the bare prompt's key."""
    case = one_request(tmp_path / "golden", editor)
    found = run(case, "bfloat16")
    assert all(tensor.isfinite().all() for tensor in found.numbers.values())
    ours, v = found.editor, found.editor.v  # type: ignore[attr-defined]
    assert ours.base.model.dtype == torch.bfloat16
    rows = ours.batch.rows.select(ours.batch.bare)
    at = {v.site: rows.at[Token.SUBJECT_LAST]}
    wanted = v.value[0]
    master = ours.base.project(v.site, ours.base.keys(rows, at)[v.site][0])
    assert torch.dist(master.float(), wanted) < 1e-5 * wanted.norm()
    assert torch.dist(ours.base.read(rows, at)[v.site][0], wanted) < 2e-2 * wanted.norm()


def test_extract_is_small() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_400_000
    moments = {f"transformer.h.{layer}.mlp.c_proj" for layer in range(1, 6)}
    assert load_file(DATA / "cov_gpt2-tiny.safetensors").keys() == {*moments, "count"}
    requests = read_json(DATA / "requests.json")
    assert [r["case_id"] for key in ("requests", "requests_batch2") for r in requests[key]] == list(range(16))
