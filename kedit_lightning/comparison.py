"""Several configurations side by side: each is a run of `kedit fit` over several seeds, together curves and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from rich import get_console

from kedit_lightning.curves import curves
from kedit_lightning.errors import KeditError
from kedit_lightning.messages import settings_of, wrong_file
from kedit_lightning.run import COMMITS, RunDirectory, newest
from kedit_lightning.tables import compared
from kedit_lightning.writing import write_beside

BLOCKS = ("base", "model", "data", "trainer")
"""What a run of `kedit fit` is configured by."""

TAKEN = ("base", "model")
"""What an experiment takes over of a configuration that it names."""

DEEPEST = 8
"""Files that extend each other."""


def compare(
    *,
    config: Path,
    seeds: list[int] | None = None,
    variants: list[str] | None = None,
    save_dir: str = "lightning_logs",
) -> list[Path]:
    """Run an experiment's variants over seeds; draw their course over the edits, put their scores beside a paper's.

    The same command goes on where it was stopped: finished runs are kept, one under way is resumed, and so is one that
    its collapse watch has stopped.

    Args:
        config: YAML: ``name``; ``title`` of the figures; ``seeds``; what is made of the runs: ``quantities`` to draw by
            name (see `curves`), ``paper`` whose table stands beside them, or ``scores`` in a table of their own (see
            `tables`); what all runs have in common (the blocks ``base``, ``model``, ``data`` and ``trainer`` of
            `kedit fit`); and ``variants``, by name what a variant has otherwise, or ``sweep``, a setting and its
            values, a variant each. ``config: FILE`` (or several), in a variant or for all, takes over the blocks
            ``base`` and ``model`` of a configuration beside it. ``extends: FILE`` takes over what another such file
            says, where its own variants and quantities replace those; one name is one set of runs.
        seeds: Instead of the configuration's.
        variants: Those to run; default: all.
        save_dir: Where runs are kept: ``SAVE_DIR/NAME/VARIANT/seed_N``, the figures in ``SAVE_DIR/NAME/FILE``.

    Returns:
        The PNG and CSV files, and the tables.

    Raises:
        KeditError: The configuration cannot be used, or the folder holds runs of another one.
    """
    from kedit_lightning.configured import run_trainer

    experiment = read(config)
    chosen = experiment["variants"] if variants is None else {one: _variant(experiment, one) for one in variants}
    if not (chosen_seeds := experiment["seeds"] if seeds is None else seeds):
        msg = "seeds: expected at least one, got none"
        raise KeditError(msg)
    folder = Path(save_dir) / experiment["name"]
    todo = [(name, seed) for seed in chosen_seeds for name in chosen]
    for number, (name, seed) in enumerate(todo, 1):
        place = folder / name / f"seed_{seed}"
        written = _configuration(place, fit_configuration(experiment, name, seed, place.parent))
        report = RunDirectory(newest(place, "metrics.json")).read_json("metrics.json")
        if report is None or report.get("stopped"):
            get_console().print(f"run {number} of {len(todo)}: {name}, seed {seed}", highlight=False)
            begun = newest(place, COMMITS)
            started = any(begun.glob(COMMITS))
            anew = ["--config", str(written), "--trainer.save_dir", str(place.parent)]  # it may have been moved
            run_trainer(["fit", *(["--resume", str(begun)] if started else anew)])
    runs = {name: [folder / name / f"seed_{seed}" for seed in chosen_seeds] for name in chosen}
    place, title = folder / config.stem, experiment["title"]
    files = curves(runs, experiment["quantities"], place, title) if experiment["quantities"] else []
    if experiment["paper"] or experiment["scores"]:
        files += compared(runs, experiment["paper"], experiment["scores"], place, title, *experiment["sweep"])
    get_console().print("\n".join(str(file) for file in files), highlight=False)
    return files


def read(config: Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """An experiment's configuration, checked.

    Args:
        config: The file.
        above: The files that extend it.

    Raises:
        KeditError: It cannot be read, or a block is missing, unknown or of another kind.
    """
    if why := wrong_file(config):
        raise KeditError(why)
    experiment: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    experiment = _taken(config.parent, experiment)
    if {"sweep", "variants"} <= set(experiment):
        msg = f"{config}: expected variants or a sweep, got both"
        raise KeditError(msg)
    if isinstance(experiment.get("variants"), dict):
        experiment["variants"] = {name: _taken(config.parent, one) for name, one in experiment["variants"].items()}
    if (other := experiment.pop("extends", None)) is not None:
        if len(above) == DEEPEST:
            msg = f"{config}: expected files that extend each other in a chain, got {' → '.join(map(str, above))}"
            raise KeditError(msg)
        experiment = _extended(read(config.parent / str(other), (*above, config.name)), experiment)
    optional: dict[str, type] = {"quantities": dict, "paper": str, "scores": list, "sweep": dict}
    optional |= dict.fromkeys(BLOCKS, dict)
    kinds: dict[str, type] = {"name": str, "title": str, "seeds": list, "variants": dict, **optional}
    if unknown := sorted(set(experiment) - set(kinds)):
        msg = f"{config}: unknown block {unknown[0]!r}; an experiment has {', '.join(kinds)}"
        raise KeditError(msg)
    for block, kind in kinds.items():
        if (block in optional and block not in experiment) or (block == "variants" and "sweep" in experiment):
            experiment.setdefault(block, kind())
        elif block not in experiment:
            msg = f"{config}: expected an experiment as in configs/experiments, with a {block}, got none"
            raise KeditError(msg)
        elif not isinstance(experiment[block], kind):
            msg = f"{config}: expected {block} to be a {kind.__name__}, got {experiment.get(block)!r}"
            raise KeditError(msg)
        elif not experiment[block] and block not in BLOCKS:
            msg = f"{config}: {block} is empty; give at least one"
            raise KeditError(msg)
    if not any(experiment[block] for block in ("quantities", "paper", "scores")):
        msg = f"{config}: expected quantities, a paper's table or scores, got nothing to be made of the runs"
        raise KeditError(msg)
    swept = list(experiment["sweep"].values())
    if len(swept) > 1 or any(not isinstance(values, list) or not values for values in swept):
        msg = f"{config}: expected sweep to be one setting and a list of its values, got {experiment['sweep']}"
        raise KeditError(msg)
    for setting, values in experiment["sweep"].items():
        experiment["variants"] = {f"{value}": _nested(setting.split("."), value) for value in values}
    for name, overlay in experiment["variants"].items():
        overlay = experiment["variants"][name] = overlay or {}
        if not isinstance(overlay, dict) or set(overlay) - set(BLOCKS):
            msg = f"{config}: variant {name!r}: expected some of the blocks {', '.join(BLOCKS)}, got {overlay!r}"
            raise KeditError(msg)
        for block, value in overlay.items():
            if not isinstance(value, dict):
                msg = f"{config}: variant {name!r}: expected {block} to be a mapping, got {value!r}"
                raise KeditError(msg)
    return experiment


def fit_configuration(experiment: Mapping[str, Any], variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """The configuration of one run: what all have in common, the variant's overlay and its seed.

    Args:
        experiment: As `read` gives it.
        variant: Its name.
        seed: Its seed.
        folder: Where the run's own folder, ``seed_N``, is to lie.

    Returns:
        The blocks of `kedit fit`. The seed chooses facts and new objects, where the data set has a choice, and context
        templates.
    """
    from kedit_lightning import editors
    from kedit_lightning.data.datasets import LOADERS

    common = {block: experiment[block] for block in BLOCKS}
    merged: dict[str, Any] = _merged(common, _variant(experiment, variant))
    loader = LOADERS.get(merged["data"].get("dataset", ""))
    if loader is not None and "seed" in signature(loader).parameters:
        merged["data"] = _merged(merged["data"], {"options": {"seed": seed}})
    kind = getattr(editors, str(merged["model"].get("class_path")).rpartition(".")[2], None)
    if kind is None or "context_templates" in settings_of(kind):
        merged["model"] = _merged(merged["model"], {"init_args": {"context_templates": {"seed": seed}}})
    merged["trainer"] |= {"name": f"seed_{seed}", "save_dir": str(folder)}
    return merged


def _extended(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says that takes over another: of quantities and variants its own alone, where it has some."""
    found: dict[str, Any] = _merged(parent, child)
    found["quantities"] = child.get("quantities", parent["quantities"])
    if "sweep" in child:
        found |= {"sweep": child["sweep"], "variants": {}}
    found = {name: block for name, block in found.items() if block or name in child}
    if isinstance(variants := child.get("variants"), dict):  # one that says nothing is the parent's of its name
        found.pop("sweep", None)
        found["variants"] = {name: overlay or parent["variants"].get(name, {}) for name, overlay in variants.items()}
    return found


def _taken(folder: Path, blocks: Any) -> Any:  # noqa: ANN401 - YAML
    """Blocks laid over those of the configurations that their ``config`` names.

    Raises:
        KeditError: There is no such file.
    """
    if not isinstance(blocks, Mapping) or "config" not in blocks:
        return blocks
    found: dict[str, Any] = {}
    given = [blocks["config"]] if isinstance(blocks["config"], str) else blocks["config"]
    if not isinstance(given, list):
        msg = f"{folder}: expected config to be a file, or a list of them, got {given!r}"
        raise KeditError(msg)
    for name in given:
        if why := wrong_file(folder / str(name)):
            raise KeditError(why)
        content = yaml.safe_load((folder / str(name)).read_text(encoding="utf-8"))
        found = _merged(found, {block: content[block] for block in TAKEN if block in content})
    merged: dict[str, Any] = _merged(found, {name: block for name, block in blocks.items() if name != "config"})
    return merged


def _nested(keys: Sequence[str], value: Any) -> Any:  # noqa: ANN401 - YAML
    """A value under a chain of keys."""
    return {keys[0]: _nested(keys[1:], value)} if keys else value


def _merged(one: Any, other: Any) -> Any:  # noqa: ANN401 - YAML
    """One tree with another laid over it; a model of another class replaces the first one's settings."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return other
    if "class_path" in other and other["class_path"] != one.get("class_path"):
        return dict(other)
    return {**one, **{key: _merged(one.get(key), value) for key, value in other.items()}}


def _variant(experiment: Mapping[str, Any], name: str) -> dict[str, Any]:
    if name not in experiment["variants"]:
        msg = f"variants: there is no {name!r}; the experiment has {', '.join(experiment['variants'])}"
        raise KeditError(msg)
    overlay: dict[str, Any] = experiment["variants"][name]
    return overlay


def _configuration(place: Path, wanted: Mapping[str, Any]) -> Path:
    """Write a run's configuration where there is none.

    Raises:
        KeditError: There is another one.
    """
    file, text = place / "fit.yaml", yaml.safe_dump(dict(wanted), sort_keys=False, allow_unicode=True)
    if file.is_file():
        if why := wrong_file(file):
            raise KeditError(why)
        there, here = (flat(yaml.safe_load(one)) for one in (file.read_text(encoding="utf-8"), text))
        differs = [key for key in {**there, **here} if there.get(key) != here.get(key) and key != "trainer.save_dir"]
        if differs:
            key = differs[0]
            msg = (
                f"{place} holds a run of another configuration ({key}: {there.get(key)} there, {here.get(key)} here): "
                "move it away, or give another --save_dir"
            )
            raise KeditError(msg)
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    write_beside(file, lambda path: path.write_text(text, encoding="utf-8"))
    return file


def flat(tree: Any, above: str = "") -> dict[str, Any]:  # noqa: ANN401 - YAML
    """The leaves of a tree by their dotted keys.

    >>> flat({"model": {"layers": [1]}, "data": None})
    {'model.layers': [1], 'data': None}
    """
    if not isinstance(tree, Mapping) or not tree:
        return {above: tree}
    found: dict[str, Any] = {}
    for name, inner in tree.items():
        found |= flat(inner, f"{above}.{name}".lstrip("."))
    return found
