"""Reads the runs, fills the template, writes the page."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from rich import get_console

from kedit_lightning.callbacks.figures import STYLE
from kedit_lightning.curves import curve, draw
from kedit_lightning.errors import KeditError
from kedit_lightning.html.contents import Contents, Finding, data_uri, refuse_mixed
from kedit_lightning.html.edit_list import edit_list
from kedit_lightning.html.grids import Grid, from_pairs, from_rich
from kedit_lightning.lines import Record
from kedit_lightning.report import LABELS, TEXTS, count, differences, table
from kedit_lightning.show import differing, names, settings_table
from kedit_lightning.writing import write_beside

WIDE = 10_000
"""Columns of a terminal that has room for every interval."""

CONDITION = {
    "earlier edits answered": "retention",
    "perplexity of held-out text": "perplexity",
    "drift of the edited matrices (L1)": "together.l1",
}
"""What of the collapse watch is drawn where several runs have it."""


def report(runs: Sequence[Path], *, out: Path = Path("report.html")) -> None:
    """Make one HTML page of runs: settings, tables, curves, probes and every edit; it needs no network.

    Args:
        runs: Run directories, or folders of their versions (the newest is taken), of any command; of one base model.
        out: The page.

    Raises:
        KeditError: A path is no run directory, a file of it is damaged, the runs are of several base models, or the
            page cannot be written.
    """
    contents = [Contents(path) for path in dict.fromkeys(map(Path, runs))]
    if not contents:
        msg = "expected at least one run directory, such as lightning_logs/edits/version_0"
        raise KeditError(msg)
    called = names([run.asked for run in contents], [{"editor": run.label} for run in contents])
    refuse_mixed(called, contents)
    text = page(called, contents)
    write_beside(out, lambda path: path.write_text(text, encoding="utf-8", errors="replace"))
    of = f"{len(contents)} run{'s' * (len(contents) > 1)}"
    get_console().print(f"{out}: {of}, {len(text) / 1e6:.1f} MB", soft_wrap=True, highlight=False, markup=False)


def page(called: Sequence[str], runs: Sequence[Contents]) -> str:
    """The page.

    Args:
        called: What the runs are called.
        runs: The runs.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    named = dict(zip(called, runs, strict=True))
    measured = [(name, run.report) for name, run in named.items() if run.report and {"pre", "post"} & set(run.report)]
    edited = {name: run for name, run in named.items() if (run.path / "edits.jsonl").is_file()}
    loader = PackageLoader("kedit_lightning.html", "template")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    script, style = (loader.get_source(environment, name)[0] for name in ("page.js", "page.css"))
    edits = edit_list(list(edited), [run.run for run in edited.values()])
    return environment.get_template("page.html").render(
        title=f"{', '.join(called)}: {count(len(edits['edits']))}" if edits["edits"] else ", ".join(called),
        runs=named,
        results=[from_rich(table(measured, WIDE))] if measured else [],
        warning=differences(measured) if measured else "",
        settings=list(_settings(named)),
        protocols=_grid({name: run["protocol"] for name, run in measured}),
        environment=_grid({name: run.environment for name, run in named.items()}),
        curves=_by_name(named, probed=False) | _together(named),
        probes=_by_name(named, probed=True),
        edits=edits,
        script=script,
        style=style,
        hashes={name: _hash(content) for name, content in (("script", script), ("style", style))},
    )


def _settings(named: Mapping[str, Contents]) -> Iterator[Grid]:
    """The settings that differ between the runs that say theirs."""
    told = {name: run.settings for name, run in named.items() if run.settings}
    if found := differing(list(told.values())):
        yield from_rich(settings_table(list(told), found))


def _grid(told: Mapping[str, Record]) -> Grid | None:
    """A row a setting, a column a run that says any."""
    told = {name: one for name, one in told.items() if one}
    return from_pairs(list(told), list(told.values())) if told else None


def _by_name(named: Mapping[str, Contents], *, probed: bool) -> dict[str, dict[str, Finding]]:
    """Findings of one name side by side, by run; figures of a kind come in the order of the runs."""
    found: dict[str, dict[str, Finding]] = {}
    for name, run in named.items():
        for finding in run.findings:
            if finding.probed == probed:
                found.setdefault(finding.title, {})[name] = finding
    return found


def _together(named: Mapping[str, Contents]) -> dict[str, dict[str, Finding]]:
    """What at least two runs measured at checkpoints, drawn in one figure."""
    from matplotlib import rc_context

    lines = {name: [lines] for name, run in named.items() if (lines := run.lines)}
    quantities = {
        **{label: f"so_far.{name}.mean" for name, label in LABELS.items() if name not in TEXTS},
        **CONDITION,
    }
    found: dict[str, dict[str, Finding]] = {}
    for label, quantity in quantities.items() if len(lines) > 1 else ():
        rows = curve(lines, quantity)
        if len({row["label"] for row in rows}) > 1:
            picture = BytesIO()
            with rc_context(STYLE):
                draw(rows, "", label).savefig(picture, format="svg")
            finding = Finding(label, data_uri(picture.getvalue(), "image/svg+xml"), None, "", {}, probed=False)
            found[label] = {"all runs": finding}
    return found


def _hash(content: str) -> str:
    """What the page's content security policy lets run: this text and no other."""
    return f"sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
