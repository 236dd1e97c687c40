"""Every experiment of the papers: its file names what exists, its command runs on a tiny model with 3 records."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kedit_lightning import editors, papers, probes
from kedit_lightning.comparison import fit_configuration, read
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.datasets import LOADERS
from kedit_lightning.messages import settings_of
from kedit_lightning.metrics import REPORTED
from kedit_lightning.models import LanguageModel
from kedit_lightning.models.encoding import collate
from kedit_lightning.tables import RAW
from tests.commandline import done, flat, jsonl, write
from tests.families import EDITS, FAMILY_CONFIGS, build, corpus, default_tokenizer, tokenizer

ROOT = Path(__file__).parent.parent
EXPERIMENTS = {path.stem: path for path in sorted((ROOT / "configs/experiments").glob("*.yaml"))}
FAMILIES = {"gpt2-xl": "gpt2", "gpt-j": "gptj", "Qwen": "qwen2", "lama": "llama"}
DEPTHS = {"gpt2": 48, "gptj": 28, "qwen2": 48, "llama": 40}
ELSEWHERE = {  # figures whose twin has another name, or is that of another figure of the same kind
    "eac_performance_counterfact": "eac_performance",
    "eac_performance_llama2-13b": "eac_performance",
    "eac_tasks_counterfact": "eac_tasks",
    "eac_tasks_llama2-13b": "eac_tasks",
    "eac_ft_counterfact": "eac_ft",
    "eac_table3_zsre": "eac_table3",
    "eac_table3_counterfact": "eac_table3",
    "jeep_fig4": "jeep_scaling",
}


@pytest.fixture(scope="module", autouse=True)
def read_fast() -> Iterator[None]:
    """The C reader of YAML: a table is up to 16 configurations, and there are many tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "safe_load", partial(yaml.load, Loader=yaml.CSafeLoader))
        yield


def command(name: str) -> tuple[str, list[Path]]:
    """The command of an experiment's first line, and its configurations."""
    _, method, *args = shlex.split(EXPERIMENTS[name].read_text().splitlines()[0].removeprefix("# "))
    return method, [ROOT / path for path in args[1::2]]


@cache
def variants(name: str) -> dict[str, dict[str, Any]]:
    """The runs of a comparison, by variant."""
    experiment = read(EXPERIMENTS[name])
    return {one: fit_configuration(experiment, one, 0, Path("logs")) for one in experiment["variants"]}


def of_kind(*methods: str) -> list[str]:
    return [name for name in EXPERIMENTS if command(name)[0] in methods]


# ---------------------------------------------------------------------- what they name is there


@pytest.mark.parametrize("name", of_kind("compare"))
def test_a_comparison_names_what_exists(name: str) -> None:
    experiment = read(EXPERIMENTS[name])
    for variant, run in variants(name).items():
        kind = getattr(editors, run["model"]["class_path"])
        assert set(run["model"]["init_args"]) <= set(settings_of(kind)), variant
        assert set(run["data"]) <= set(inspect.signature(EditDataModule).parameters), variant
        assert run["data"]["dataset"] in LOADERS
        assert set(run["base"]) >= {"name"}, variant
    names = {"ES", "GS", "LS", "Score"} | set(REPORTED)
    assert set(experiment["scores"]) <= names
    if experiment["paper"]:
        rows = papers.load(experiment["paper"]).rows
        assert set(experiment["variants"]) <= set(rows), "rows of the paper"
        here = {row.split()[-1] for row in rows} - {RAW.split()[-1], "MEND", "MALMEN"}
        if name not in (
            "jeep_table4",
            "jeep_table4_almanac",
            "eac_table1",
            "top_table2_almanac",
            "jeep_table2_almanac",
        ):
            assert {variant.split()[-1] for variant in experiment["variants"]} == here


@pytest.mark.parametrize("name", of_kind("probe"))
def test_a_probe_names_what_exists(name: str) -> None:
    _, files = command(name)
    content = yaml.safe_load(EXPERIMENTS[name].read_text())
    probe = content["probe"]
    assert isinstance(getattr(probes, probe["class_path"])(**probe["init_args"]), probes.Probe)
    assert set(content) <= {"base", "data", "probe", "trainer"}
    assert set(content.get("data", {})) <= set(inspect.signature(EditDataModule).parameters)
    assert content["trainer"] == {"name": name}
    assert ("almanac" in files[0].stem) == name.endswith("_almanac")


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if not name.endswith("_almanac")])
def test_every_experiment_has_a_twin_that_runs_offline(name: str) -> None:
    assert f"{ELSEWHERE.get(name, name)}_almanac" in EXPERIMENTS


def test_every_table_and_figure_is_in_the_index() -> None:
    index = (ROOT / "benchmarks/papers.md").read_text()
    for name in EXPERIMENTS:
        assert f"experiments/{name}.yaml" in index or f"`{name}`" in index, name


# ---------------------------------------------------------------------- they run


class Small:
    """A folder with a tiny deep model of every family, three records in every form, and documents."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.logs = folder, folder / "logs"
        self.texts = folder / "few.txt"
        self.texts.write_text("\n".join(corpus()[:30]))
        questions = [{"prompt": f"Where does {edit.subject} live?", "answer": "Ulm"} for edit in EDITS]
        self.items = jsonl(folder / "items.jsonl", questions)

    @cache  # noqa: B019 - as long as the tests of this module
    def base(self, family: str) -> Path:
        """A model with every layer that is named."""
        place, depth = self.folder / family, DEPTHS[family]
        depths = {"n_layer": depth, "num_hidden_layers": depth}
        settings = {k: depths.get(k, v) for k, v in FAMILY_CONFIGS[family].items()}
        if "layer_types" in settings:
            settings |= {"layer_types": ["full_attention"] * depth, "use_sliding_window": False}
        build(family, initializer_range=0.2, **settings).save_pretrained(place)
        tokenizer(default_tokenizer(family)).save_pretrained(place)
        return place

    @cache  # noqa: B019
    def records(self, family: str, dataset: str) -> Path:
        """Three records in the form of a data set, whose present answers are the model's own next tokens."""
        base = LanguageModel(str(self.base(family)))
        found: list[dict[str, Any]] = []
        subjects = (
            f"{a} {b}" for a in ("Velora", "Oskel", "Dario", "Tobin", "Lise", "Arden") for b in ("Quint", "Foss", "")
        )
        prompts = ((i, subject.strip()) for subject in subjects for i in (0, 1, 4))
        while len(found) < 3:
            i, subject = next(prompts)
            record = flat(i) | {"subject": subject}
            text = record["prompt"].replace("{}", subject)
            batch = collate([base.encode(text)])
            with torch.no_grad():
                order = base.logits(batch)[0, -1].argsort(descending=True).tolist()
            words = {token: str(base.tokenizer.decode([token])).strip() for token in order}
            known = [word for token, word in words.items() if word and base.encode(text, word).targets == [token]]
            if known[0] != words[order[0]]:
                continue
            old, new = known[:2]
            rewrite = {"prompt": record["prompt"], "subject": record["subject"], "relation_id": f"P{i}"}
            rewrite |= {"target_new": {"str": new, "id": "Q1"}, "target_true": {"str": old, "id": "Q2"}}
            nested = {**EDITS[i].as_record(), "case_id": len(found), "requested_rewrite": rewrite}
            question = {"src": f"{text}?", "rephrase": f"Say: {text}?", "answers": [new], "alt": new}
            zsre = {"subject": record["subject"], **question, "loc": "nq question: who rings", "loc_ans": "Tobin"}
            found.append(zsre if dataset == "zsre" else nested)
        return write(self.folder / f"{family}_{dataset}.json", json.dumps(found))

    def data(self, data: dict[str, Any], family: str) -> dict[str, Any]:
        """The data block with three records."""
        if data.get("dataset") == "almanac":
            few = {name: min(3, data[name]) for name in ("batch_size", "restore_every") if data.get(name)}
            return data | {"stop": 3} | few
        kept = {name: value for name, value in data.items() if name not in ("size", "options")}
        options = {k: v for k, v in data.get("options", {}).items() if k != "seed"}
        return kept | {"path": str(self.records(family, data["dataset"])), "options": options}

    def model(self, model: dict[str, Any], almanac: bool) -> dict[str, Any]:
        """The editor with few steps, short context templates and few documents."""
        settings = dict(model["init_args"])
        settings |= {name: 2 for name in settings if name.startswith(("v_num_grad_steps", "num_steps"))}
        if "compress" in settings:
            settings["compress"] = settings["compress"] | {f"v_num_grad_steps{i}": 1 for i in (1, 2)}
        if "elastic_net" in settings:
            settings["elastic_net"] = settings["elastic_net"] | {"num_steps": 1}
        if "context_templates" in settings_of(getattr(editors, model["class_path"])):
            settings["context_templates"] = {"templates": [["{}"], ["Yes. {}"]]}
        if "statistics" in settings and not almanac:
            settings["statistics"] = {"source": str(self.texts), "ridge": 0.1}
        if "nullspace_threshold" in settings and not almanac:
            settings["nullspace_threshold"] = 1.0  # of so small a model's keys
        if "constraint" in settings:
            source = {} if almanac else {"path": str(self.records("gpt2", "counterfact"))}
            settings["constraint"] = settings["constraint"] | {"size": 3} | source
        return {"class_path": model["class_path"], "init_args": settings}

    def trainer(self, trainer: dict[str, Any]) -> dict[str, Any]:
        """The trainer with its checkpoints at the last edit, and the tasks of a file."""
        trainer = {name: value for name, value in trainer.items() if name not in ("name", "save_dir")}
        trainer |= {"enable_progress_bar": False, "evaluation": {"generation": False}}
        if "evaluate_at" in trainer:
            trainer["evaluate_at"] = [0, 3]
        for callback in trainer.get("callbacks", []):
            if callback["class_path"] == "TaskCurves":
                callback["init_args"]["tasks"] |= {"items": 2}
                names = callback["init_args"]["tasks"].get("names", [])
                callback["init_args"]["tasks"]["sources"] = {one: str(self.task(one)) for one in names}
        return trainer

    @staticmethod
    def words() -> list[dict[str, Any]]:
        """Word sets of whatever facts."""
        sets = {"related": ["baker", "sailor"], "factual": ["Ulm"], "non_factual": ["flute"]}
        return [{"case_id": case, **sets} for case in range(50)]

    def task(self, name: str) -> Path:
        """Two records of one of EAC's tasks."""
        fields = {
            "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": "entailment"},
            "nq": {"question": "who sleeps", "answer": ["Tobin"], "output": ["Tobin sleeps."]},
            "samsum": {"id": "1", "dialogue": "A: Hi.", "summary": "A says hi."},
            "sst2": {"sentence": "fine", "label": "1"},
        }
        return jsonl(self.folder / f"{name}.jsonl", [fields[name]] * 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Small(tmp_path_factory.mktemp("experiments"))


def family_of(base: str) -> str:
    return next((family for part, family in FAMILIES.items() if part in base), "")


@pytest.mark.slow
@pytest.mark.parametrize("name", of_kind("compare"))
def test_a_comparison_runs(small: Small, name: str) -> None:
    experiment = read(EXPERIMENTS[name])
    runs: dict[str, Any] = {}
    for variant, run in variants(name).items():
        family = family_of(run["base"]["name"])
        runs[variant] = {
            "base": {"name": str(small.base(family)), "dtype": "float32"} if family else run["base"],
            "model": small.model(run["model"], not family),
            "data": small.data(run["data"], family),
            "trainer": small.trainer(run["trainer"]),
        }
    made = {key: experiment[key] for key in ("quantities", "paper", "scores") if experiment[key]}
    content = {"name": name, "title": experiment["title"], "seeds": [0], **made, "variants": runs}
    file = write(small.folder / f"{name}.yaml", content)
    shown = done("compare", "--config", file, "--save_dir", small.logs).out
    assert f"of {len(runs)}: " in shown
    tables = [path for path in (small.logs / name / name).iterdir() if path.suffix in (".csv", ".md", ".png")]
    assert any(path.suffix == ".csv" for path in tables)
    again = done("compare", "--config", file, "--save_dir", small.logs).out
    assert "run 1 of" not in again  # what is done is skipped


@pytest.mark.slow
@pytest.mark.parametrize("name", of_kind("probe", "scale", "predict"))
def test_any_other_experiment_runs(small: Small, name: str) -> None:
    method, (shipped, own) = command(name) if len(command(name)[1]) == 2 else (command(name)[0], command(name)[1] * 2)
    first, content = yaml.safe_load(shipped.read_text()), yaml.safe_load(own.read_text())
    family = family_of(first["base"]["name"])
    if family:
        first["base"] = {"name": str(small.base(family)), "dtype": "float32"}
    first["model"] = small.model(first["model"], not family)
    if method == "probe":  # an edit has to work for some of them
        wanted = yaml.safe_load(shipped.read_text())["model"]["init_args"]
        steps = {key: value for key, value in wanted.items() if key.startswith("v_num_grad_steps")}
        free = {"clamp_norm_factor": 40, "v_weight_decay": 0, "statistics": {"source": "identity"}}
        first["model"]["init_args"] |= steps | {key: free[key] for key in free if family and key in wanted}
    data = first["data"] | content.get("data", {})
    first["data"] = small.data(data, family)
    first["trainer"] = {"evaluation": {"generation": False}, "enable_progress_bar": False, "save_dir": str(small.logs)}
    content.pop("data", None), content.pop("base", None)
    if name.startswith("jeep_scaling"):
        content = {}
    content.setdefault("trainer", {"name": name}).pop("evaluation", None)
    config = write(small.folder / f"{name}_0.yaml", first)
    options: list[str] = []
    given = content.get("probe", {}).get("init_args", {})
    if {"run", "runs"} & set(given) or method == "predict":
        edited = ("--data.restore_every", "null", "--trainer.name", f"{name}_run")
        done("fit", "--config", config, *edited)
        run = str(small.logs / f"{name}_run")
        if method == "predict":
            content["delta"] = run
        given |= {"run": run, "source": str(small.items), "task": "questions", "prompts": 6} if "run" in given else {}
        given |= {"runs": {label: [run] for label in given["runs"]}} if "runs" in given else {}
    if "edits" in given:
        given["edits"] = 3
    if "words" in given:
        given["words"] = str(write(small.folder / "words.json", json.dumps(small.words())))
    if method == "scale":
        options, content = ["--counts=[1, 3]", "--seeds=[0]"], {"trainer": {"name": name}}
    overlay = write(small.folder / f"{name}_1.yaml", content)
    done(method, "--config", config, "--config", overlay, *options)
    run_ = small.logs / content["trainer"]["name"] / "version_0"
    run_ = max(run_.parent.iterdir())
    expected = {"probe": "*.csv", "scale": "scaling.csv", "predict": "predictions.jsonl"}[method]
    assert list(run_.glob(expected)), sorted(run_.iterdir())
