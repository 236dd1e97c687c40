"""The benchmarks of whole runs: their commands at tiny sizes, and that the ways that they compare give the same."""

from __future__ import annotations

import re
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import measuring, second_moments, sequential, side_by_side
from kedit_lightning.models import LanguageModel, collate


def table(page: Path) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a page's table."""
    head, _, *found = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [cell.strip() for cell in head.strip("|").split("|")], [
        [cell.strip() for cell in line.strip("|").split("|")] for line in found
    ]


def checked(page: Path, command: str) -> list[dict[str, str]]:
    """The table's lines; the page names its command, the machine and the versions."""
    text = page.read_text()
    assert f"`python -m {command}" in text
    assert re.search(rf"{torch.get_num_threads()} threads; Python 3\.\d+.*, torch {re.escape(torch.__version__)}", text)
    head, found = table(page)
    assert all(len(line) == len(head) for line in found)
    return [dict(zip(head, line, strict=True)) for line in found]


def number(cell: str) -> float:
    """The number that a cell begins with."""
    found = re.match(r"\**([+-]?[\d.]+(?:e[+-]?\d+)?)", cell)
    assert found, cell
    return float(found[1])


@pytest.mark.slow
def test_side_by_side(tmp_path: Path) -> None:
    """All ways give equal updates and scores."""
    page = tmp_path / "page.md"
    side_by_side.main(["--quick", "--editors", "MEMIT", "--threads", "1", "--out", str(page)])
    (line,) = checked(page, "benchmarks.side_by_side --quick")
    assert line["editor"] == "MEMIT"
    assert number(line["faster than one by one"]) > 0
    assert number(line["than plain"]) > 0
    for apart in ("Δ apart", "by rounding alone"):
        assert 0 < number(line[apart]) <= 1e-5, "0: the same way twice"
    assert number(line["log p apart"]) <= 1e-5
    assert line["otherwise"] == "0 (0)"


def test_differences_are_seen() -> None:
    one = side_by_side.Found(2.0, 1.0, 1.0, [torch.ones(4)], [{"p_new": 0.5, "p_true": 0.25}])
    other = side_by_side.Found(2.0, 1.0, 1.0, [2 * torch.ones(4)], [{"p_new": 0.2, "p_true": 0.25}])
    update, score, otherwise, really = side_by_side.apart(one, other)
    assert (update, otherwise, really) == (1.0, 1, 1)
    assert score == pytest.approx(0.916, abs=1e-3)
    assert side_by_side.apart(one, one) == (0.0, 0.0, 0, 0)


@pytest.mark.slow
def test_sequential(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    sequential.main(["--quick", "--threads", "1", "--out", str(page)])
    found = checked(page, "benchmarks.sequential --quick")
    assert [line["edits"] for line in found] == ["2 to 3", "4 to 5", "GPT-2 small, 2 to 4"]
    for line in found:
        assert number(line["model, s"]) > 0
        assert 0 < number(line["framework"]) < 100
    assert re.search(r"last 2 edits take [+-].*all rises by [+-]", page.read_text())


def test_growth_of_a_line() -> None:
    assert sequential.growth([1.0] * 10) == 0
    assert sequential.growth([1 + i / 9 for i in range(10)]) == pytest.approx(1.0)


def test_model_compute_counts_nothing_twice(gpt2_base: LanguageModel) -> None:
    """A call inside another, and one that fails, are on the clock once."""
    clock = measuring.Clock()
    inner = clock.watch(time.sleep)
    began = time.perf_counter()
    clock.watch(lambda: [inner(0.02) for _ in range(2)])()
    assert 0.04 <= clock.seconds <= time.perf_counter() - began
    with measuring.model_compute(gpt2_base) as found:
        gpt2_base.logits(collate([gpt2_base.encode("The tower is in")]))
        forward = found.seconds
        with pytest.raises(RuntimeError, match="grad"):
            torch.ones(()).backward()
        assert found.seconds > forward > 0
    assert "forward" not in vars(gpt2_base.model)


@pytest.mark.parametrize("processes", [[], pytest.param(["2"], marks=pytest.mark.slow)])
def test_second_moments(processes: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    second_moments.main(["--quick", "--threads", "1", "--out", str(page), "--processes", *processes])
    found = checked(page, "benchmarks.second_moments --quick")
    assert [line["processes"] for line in found] == ["1", *processes]
    assert all(number(line[name]) > 0 for line in found for name in ("plain", "plain, to the layer", "ours"))
    assert all(line["to plain"].endswith("%**") for line in found)


def test_plain_pass_reads_what_ours_reads() -> None:
    """As many tokens, in as many batches as there are."""
    made = second_moments.build([1], 300, 24, 3)
    ((_, (_, count)),) = made.ours().items()
    batches = made.reader.batches(made.texts)
    assert count == made.tokens == sum(len(ids) for batch in batches for row in batch for ids in row)
    with mock.patch.object(made.base, "run", wraps=made.base.run) as run:
        made.plain()
        made.plain(1)
    assert [call.args[1] for call in run.call_args_list] == [2] * len(batches) + [1] * len(batches)
