"""`kedit report`: one page of runs, read as a parser reads it and driven in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from kedit_lightning.html.command import report
from kedit_lightning.report import LABELS
from tests.browser import BROWSER, Page, browser
from tests.commandline import World, done, jsonl, kedit, write

EVIL = "<script>alert(1)</script>"
BREAKOUT = "</script><img src=x onerror=alert(2)>"
VOID = {"meta", "img", "input", "link", "br"}


class Document(HTMLParser):
    """A page: its elements, its tables as texts, and its scripts; elements must close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
            return
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        """What the list of edits is made from."""
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found

    def row(self, name: str) -> list[str]:
        """The row of a table that begins so."""
        return next(row for table in self.tables for row in table if row and row[0] == name)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attributes[name] for kind, attributes in self.elements if kind == tag and name in attributes]


@pytest.fixture(scope="module")
def runs(world: World) -> dict[str, Path]:
    """Two runs of four edits, with checkpoints."""
    steps = ("--trainer.evaluate_at", "[0, 2, 4]")
    return {
        "ROME": world.fit(world.config("ROME"), *steps, name="rome"),
        "TOP": world.fit(world.config("TOP"), *steps, "--data.batch_size", 2, name="top"),
    }


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]


def changed(run: Path, folder: Path, records: list[dict[str, Any]]) -> Path:
    """A copy of a run with other lines."""
    copy = Path(shutil.copytree(run, folder))
    jsonl(copy / "edits.jsonl", records)
    return copy


def made(out: Path, *paths: Path) -> Document:
    done("report", *paths, "--out", out)
    return Document(out)


# ---------------------------------------------------------------------- what is on the page


def test_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["ROME"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    page = made(tmp_path / "report.html", run.parent)  # the folder of its versions
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    shown = json.loads((run / "metrics.json").read_text())
    efficacy = page.row(LABELS["efficacy"])
    means = [f"{100 * shown[when]['efficacy']['mean']:.1f} ±" for when in ("pre", "post")]
    assert [cell[: len(mean)] for cell, mean in zip(efficacy[1:3], means, strict=True)] == means
    assert page.row("python")[1].count(".") == 2
    assert " ".join((run / "config.yaml").read_text().split()) in page.text
    assert len(page.attributes("img", "src")) == len(list(run.glob("*.png")))
    assert page.attributes("a", "download") == ["curve.csv"]
    first, written = page.data["edits"][0], lines(run)[0]
    assert first["prompt"] == written["prompt"]
    assert [first["answer_before"], first["answer_after"]] == [written["answer_before"], written["answer_after"]]
    assert len(page.data["edits"]) == 4
    place = page.data["metrics"].index(LABELS["efficacy"])
    assert first["after"][place] == 100 * written["after"]["efficacy"]
    assert first["stages"][0]["steps"] == written["stages"][0]["steps"]


def test_nothing_is_fetched(runs: dict[str, Path], tmp_path: Path) -> None:
    page = made(tmp_path / "report.html", *runs.values())
    every = [page.attributes(tag, name) for tag in ("img", "a", "link", "script") for name in ("src", "href")]
    assert {value.partition(":")[0] for values in every for value in values if not value.startswith("#")} == {"data"}
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "object", "embed", "base")]
    (policy,) = [each["content"] for _, each in page.elements if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_runs_side_by_side(runs: dict[str, Path], tmp_path: Path) -> None:
    page = made(tmp_path / "report.html", runs["ROME"], runs["TOP"], runs["ROME"])
    assert page.data["runs"] == ["ROME", "TOP"]
    assert page.tables[0][0] == ["", "raw", "ROME", "TOP"]
    assert page.row("model.init_args.rel_feat_layer") == ["model.init_args.rel_feat_layer", "–", "1"]
    assert page.row("data.batch_size") == ["data.batch_size", "1", "2"]
    assert not [row for table in page.tables for row in table if row[:1] in (["data.dataset"], ["trainer.name"])]
    pictures = page.attributes("img", "alt")
    assert {"Loss curves of ROME", "Loss curves of TOP", f"{LABELS['efficacy']} of all runs"} <= set(pictures)
    assert [edit["run"] for edit in page.data["edits"]] == [0] * 4 + [1] * 4


def test_the_texts_of_a_run_stay_texts(runs: dict[str, Path], tmp_path: Path) -> None:
    records = lines(runs["ROME"])
    records[1] |= {"subject": EVIL, "prompt": f"{BREAKOUT} {{}}", "answer_after": "\ud800\u2028" + BREAKOUT}
    records[2] |= {"rejected": f"its loss is {EVIL}", "commit": None}
    run = changed(runs["ROME"], tmp_path / "run", records)
    config = yaml.safe_load((run / "config.yaml").read_text())
    write(run / "config.yaml", config | {"note": EVIL})
    (run / f"{EVIL.replace('/', '')}.csv").write_text(f"{EVIL},b\n1,{BREAKOUT}\n")
    page = made(tmp_path / "report.html", run)
    assert len(page.scripts) == 2
    assert "onerror" not in {name for _, attributes in page.elements for name in attributes}
    assert not [tag for tag, attributes in page.elements if attributes.get("src") == "x"]
    assert page.data["edits"][1]["subject"] == EVIL
    assert page.data["edits"][1]["prompt"] == f"{BREAKOUT} {{}}"
    assert page.data["edits"][2]["outcome"] == "rejected"
    assert page.data["edits"][2]["why"] == f"its loss is {EVIL}"
    assert page.row("1")[1] == BREAKOUT
    assert f"note: {EVIL}" in page.text
    assert "alert(" not in page.scripts[1]


def test_numbers_that_are_none(runs: dict[str, Path], tmp_path: Path) -> None:
    records = lines(runs["ROME"])
    records[0]["after"]["efficacy"] = float("nan")
    records[0]["stages"][0]["nll"] = float("inf")
    page = made(tmp_path / "report.html", changed(runs["ROME"], tmp_path / "run", records))
    assert page.data["edits"][0]["after"][page.data["metrics"].index(LABELS["efficacy"])] is None
    assert page.data["edits"][0]["stages"][0]["nll"] is None


def test_a_run_that_has_not_ended(runs: dict[str, Path], tmp_path: Path) -> None:
    records = lines(runs["TOP"])[:2]
    for record in records:
        del record["answer_after"], record["after"]
    run = changed(runs["TOP"], tmp_path / "run", records)
    for name in ("metrics.json", "deltas/000001.safetensors"):
        (run / name).unlink()
    page = made(tmp_path / "report.html", run, runs["ROME"])
    assert "unfinished: 2 edits so far" in page.text
    assert page.data["runs"] == ["TOP", "ROME"]
    assert [edit["outcome"] for edit in page.data["edits"][:2]] == ["not measured"] * 2
    assert len(page.row(LABELS["efficacy"])) == 4  # before, after and change of the other
    for file in run.iterdir():
        if file.name != "config.yaml":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert "unfinished" in made(tmp_path / "report.html", run).text
    (run / "suggest.json").write_text(json.dumps({"settings": {"weights": "a1"}}))
    page = made(tmp_path / "report.html", run)
    assert "unfinished: the same kedit suggest goes on" in page.text.replace("`", "")
    assert "a1" not in page.text


def test_a_run_that_was_not_measured(runs: dict[str, Path], tmp_path: Path) -> None:
    run = changed(runs["TOP"], tmp_path / "run", lines(runs["TOP"]))
    found = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({k: v for k, v in found.items() if k not in ("pre", "post")}))
    page = made(tmp_path / "report.html", run, runs["ROME"])
    assert page.data["runs"] == ["TOP", "ROME"]
    assert len(page.row(LABELS["efficacy"])) == 4, "of the other"


def test_what_a_probe_found(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "trace"
    run.mkdir()
    config = yaml.safe_load((runs["TOP"] / "config.yaml").read_text())
    write(run / "config.yaml", config | {"probe": {"class_path": "kedit_lightning.probes.CausalTrace"}})
    with (run / "causal_trace.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("layer", "part", "effect"), *((i, "mlp", i / 3) for i in range(300))])
    shutil.copy(runs["TOP"] / "loss_curves.png", run / "causal_trace.png")
    (run / "causal_trace.json").write_text(json.dumps({"used": 3, "skipped": {"unknown": 1}}))
    (run / "drift.json").write_text(json.dumps({"alone": "said"}))
    page = made(tmp_path / "report.html", run, runs["TOP"])
    assert "TOP CausalTrace" in page.text
    assert "Causal trace of TOP CausalTrace" in page.attributes("img", "alt")
    assert page.row("1") == ["1", "mlp", "0.3333"]
    assert "the first 200 of 300 rows" in page.text
    for note in ("skipped.unknown 1", "used 3", "alone said"):
        assert note in page.text
    assert re.search(r"Probes .*Causal trace", page.text)


def test_a_scaling_run_and_tasks(tmp_path: Path) -> None:
    run = tmp_path / "scaling"
    run.mkdir()
    (run / "scaling.json").write_text(json.dumps({"editor": "MEMIT", "data.dataset": "almanac"}))
    assert "nothing is measured yet" in made(tmp_path / "report.html", run).text
    scores = dict.fromkeys(("ES", "GS", "LS", "Score"), 0.5)
    points = [{"edits": edits, "seed": 0, "scores": scores} for edits in (0, 8)]
    jsonl(run / "scaling.jsonl", points)
    measured = {"nli": {"score": 0.25, "n": 8, "measure": "accuracy"}}
    (run / "tasks.json").write_text(json.dumps({"base": "b", "edits": 0, "scorer": "strict", "pre": measured}))
    page = made(tmp_path / "report.html", run)
    assert page.row("8")[:3] == ["8", "1", "50.0"]
    assert page.row("nli") == ["nli", "accuracy", "8", "25.0"]


# ---------------------------------------------------------------------- what cannot be reported


def test_what_is_no_run_is_one_clear_line(runs: dict[str, Path], tmp_path: Path) -> None:
    def refused(words: str, *paths: object, status: int = 1) -> None:
        result = kedit("report", *paths, "--out", tmp_path / "out" / "report.html")
        assert (result.status, result.err.count("\n")) == (status, 1)
        assert words in result.err
        assert not (tmp_path / "out").exists()

    empty = tmp_path / "empty"
    empty.mkdir()
    refused("there is no such directory", runs["ROME"], tmp_path / "none")
    refused("this is a file", runs["ROME"] / "config.yaml")
    refused("found no file of one", empty)
    refused("runs", status=2)
    broken = changed(runs["ROME"], tmp_path / "broken", ["{", "{}"])  # type: ignore[list-item]
    refused("edits.jsonl: expected a JSON object a line", broken)
    other = changed(runs["TOP"], tmp_path / "other", lines(runs["TOP"]))
    config = yaml.safe_load((other / "config.yaml").read_text())
    write(other / "config.yaml", config | {"base": {"name": "gpt2-xl"}})
    refused("expected runs of one base model", runs["ROME"], other)
    result = kedit("report", runs["ROME"], "--out", runs["ROME"])
    assert result.status == 1
    assert "cannot be written" in result.err


def test_runs_of_different_edits_have_a_raw_column_each(world: World, runs: dict[str, Path], tmp_path: Path) -> None:
    fewer = world.fit(world.config("TOP"), "--data.stop", 2, name="fewer")
    page = made(tmp_path / "report.html", runs["ROME"], fewer)
    assert ["", "ROME raw", "ROME", "TOP raw", "TOP"] in [table[0] for table in page.tables]
    assert "The protocols differ" in page.text


# ---------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def opened(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page of 10,000 edits in a browser."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    folder = tmp_path_factory.mktemp("browser")
    records = [{**line} for _ in range(2500) for line in lines(runs["ROME"])]
    for i, record in enumerate(records):
        record |= {"case_id": 7 * i % 10_000, "commit": i, "subject": f"Subject s{i}"}
    records[4]["subject"] = EVIL
    records[5]["answer_after"] = BREAKOUT
    records[6] |= {"rejected": "its loss is not finite", "commit": None}
    report([changed(runs["ROME"], folder / "run", records), runs["TOP"]], out=folder / "report.html")
    with browser(folder / "profile") as page:
        page.look(1400)
        page.open(folder / "report.html")
        yield page


CELLS = "[...document.querySelectorAll('#list > tbody > tr:not(.more)')].map(row => row.cells[{}].textContent)"
SORT = "[...document.querySelectorAll('#list > thead button')].find(each => each.textContent === '{}').click()"
NARROWED = "at = document.getElementById('{}'), at.value = '{}', at.dispatchEvent(new Event('input')), undefined"
STATUS = "document.getElementById('status').textContent"


def test_the_search_filters(opened: Page) -> None:
    assert opened.run(STATUS) == "10,004 of 10,004 edits; here 1 to 50"
    assert opened.run("document.querySelectorAll('#list > tbody > tr').length") == 50
    opened.run("document.getElementById('words').focus()")
    for key in "s1234":
        opened.key(key, ord(key.upper()), key)
    assert opened.run(STATUS) == "1 of 10,004 edits; here 1 to 1"
    assert "Subject s1234" in opened.run(CELLS.format(4))[0]
    opened.run(NARROWED.format("words", "no such thing"))
    assert opened.run(STATUS).startswith("None of 10,004")
    opened.run(NARROWED.format("words", ""))
    opened.run(NARROWED.format("run", "1"))
    assert opened.run(CELLS.format(2)) == ["TOP"] * 4
    opened.run(NARROWED.format("run", ""))
    opened.run(NARROWED.format("outcome", "rejected"))
    assert opened.run(CELLS.format(9)) == ["rejectedits loss is not finite"]
    opened.run(NARROWED.format("outcome", ""))
    assert opened.run(STATUS).startswith("10,004 of")


def test_a_heading_sorts(opened: Page) -> None:
    opened.run(SORT.format("Case"))
    cases = [int(case) for case in opened.run(CELLS.format(3))[:6] if not case.startswith("@")]
    assert cases == sorted(cases)
    assert opened.run("document.querySelectorAll('#list [aria-sort=ascending]').length") == 1
    opened.run(SORT.format("Commit"))
    assert opened.run(CELLS.format(14))[0] == "0"
    opened.run(SORT.format("Commit"))
    assert opened.run(CELLS.format(14))[:3] == ["9999", "9998", "9997"]
    opened.run(SORT.format("Prompt"))
    prompts = [prompt for prompt in opened.run(CELLS.format(4)) if "Subject s" in prompt]
    assert len(prompts) > 40
    assert prompts == sorted(prompts, key=lambda prompt: [int(n) for n in re.findall(r"\d+", prompt)])
    opened.run("document.getElementById('later').click()")
    assert opened.run("document.getElementById('place').textContent") == "Page 2 of 201"
    opened.run(SORT.format("#"))
    assert opened.run(CELLS.format(1))[:4] == ["1", "1", "2", "2"]


def test_a_row_opens_by_the_keyboard(opened: Page) -> None:
    opened.run("document.querySelector('#list .open').focus()")
    opened.key("Enter", 13, "\r")
    assert opened.run("document.querySelectorAll('#list tr.more').length") == 1
    assert "Efficacy" in opened.run("document.querySelector('#list tr.more').textContent")
    assert opened.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    opened.key("Enter", 13, "\r")
    assert opened.run("document.querySelectorAll('#list tr.more').length") == 0


def test_texts_stay_texts_in_the_browser(opened: Page) -> None:
    opened.run(NARROWED.format("words", "alert(1)"))
    assert EVIL in opened.run(CELLS.format(4))[0]
    opened.run(NARROWED.format("words", "onerror"))
    assert opened.run(CELLS.format(8)) == [BREAKOUT]
    assert opened.run("document.querySelectorAll('script').length") == 2
    assert opened.run("document.querySelectorAll('#list img').length") == 0
    opened.run(NARROWED.format("words", ""))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_and_can_be_read(opened: Page, width: int, *, dark: bool) -> None:
    """Nothing sticks out sideways, and texts have at least 4.5 to 1 against the ground (WCAG 2, AA)."""
    opened.look(width, dark=dark)
    assert opened.run("document.documentElement.scrollWidth") <= width
    worst = opened.run("""(() => {
        const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
        const light = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = (element) => {
            const own = getComputedStyle(element).backgroundColor;
            const clear = numbers(own).length === 4 && numbers(own)[3] === 0;
            return clear && element.parentElement ? ground(element.parentElement) : own;
        };
        return Math.min(...[...document.body.querySelectorAll("*")]
            .filter((each) => [...each.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
            .filter((each) => each.checkVisibility() && !each.disabled && each.tagName !== "SCRIPT")
            .map((each) => [light(getComputedStyle(each).color), light(ground(each))])
            .map(([one, other]) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05)));
    })()""")
    assert worst >= 4.5
    narrow = opened.run("getComputedStyle(document.getElementById('by').parentElement).display") != "none"
    assert narrow == (width == 390)


def test_the_browser_has_nothing_to_complain_of(opened: Page) -> None:
    """The whole session: no message, no exception, nothing refused by the policy, nothing asked for but the page."""
    assert opened.said() == []
    assert len(opened.requests()) == 1
    assert opened.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
