"""The suffix forward against the full one: values, gradients, what is run and what is left behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kedit_lightning.data.prompts import edit_batch
from kedit_lightning.edits import Part, Site, Token
from kedit_lightning.errors import ModelError
from kedit_lightning.models import Batch, LanguageModel
from kedit_lightning.models.full import Forwards, FullForward
from kedit_lightning.models.suffix import GROUP_COSTS, SuffixForward
from tests.families import EDITS, LAYERS, WIDTH, WINDOW, build, tiny_base
from tests.families import tokenizer as make_tokenizer
from tests.models.test_language_model import OTHERS, bits, hooks, same_bits

TEMPLATES = [["{}"], ["The old door. {}", "Every morning there are some letters. {}"]]
PARTS: tuple[Part, ...] = ("mlp", "attn", "block")
FIRST, LAST, END = Token.SUBJECT_FIRST, Token.SUBJECT_LAST, Token.PROMPT_LAST
TWO = {Site(1, "mlp"): LAST, Site(2, "attn"): END}


def rows_of(base: LanguageModel) -> Batch:
    """Subjects first, inside and last, several edits in several contexts, suffixes and prefixes beyond the window."""
    rows = edit_batch(base, EDITS, TEMPLATES).rows
    start, length = rows.at[LAST], rows.attention_mask.sum(1)
    assert int(start.min()) <= 3
    assert int(start.max()) > 2 * WINDOW
    assert int((length - start).max()) > WINDOW
    assert len(set((length - start).tolist())) > 4
    return rows


def positions(rows: Batch, tokens: Mapping[Site, Token]) -> dict[Site, Tensor]:
    return {site: rows.at[token] for site, token in tokens.items()}


def vectors_for(rows: Batch, tokens: Mapping[Site, Token], seed: int = 0) -> dict[Site, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.randn(len(rows), WIDTH, generator=generator).requires_grad_() for site in tokens}


def places(rows: Batch, tokens: Mapping[Site, Token]) -> tuple[Tensor, Tensor]:
    """Every target position, and the sites' tokens in each row."""
    line, position = torch.nonzero(rows.labels >= 0, as_tuple=True)
    at = positions(rows, tokens).values()
    return torch.cat([line, torch.arange(len(rows)).repeat(len(at))]), torch.cat([position, *at])


def logits_and_gradients(forward: FullForward, added: dict[Site, Tensor], at: tuple[Tensor, Tensor]) -> list[Tensor]:
    logits = forward.logits(added, at)
    loss = logits.float().log_softmax(-1)[:, 7].sum()
    return [logits.detach(), *torch.autograd.grad(loss, list(added.values()))]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        assert wanted.norm() > 1e-3
        assert (got - wanted).norm() <= tolerance * wanted.norm()


def check_logits(base: LanguageModel, tokens: Mapping[Site, Token], tolerance: float = 1e-5) -> None:
    """Suffix equals full, with vectors that change the logits of every row, and without."""
    rows = rows_of(base)
    full, suffix = (kind(base, rows, positions(rows, tokens)) for kind in (FullForward, SuffixForward))
    added, at = vectors_for(rows, tokens), places(rows, tokens)
    expected = logits_and_gradients(full, added, at)
    close(logits_and_gradients(suffix, added, at), expected, tolerance)
    plain = suffix.logits({}, at)
    close([plain], [full.logits({}, at)], tolerance)
    moved = torch.zeros(len(rows)).index_add(0, at[0], (plain - expected[0]).float().square().sum(1))
    assert moved.min() > 1e-3
    assert all(gradient.norm(dim=1).min() > 0 for gradient in expected[1:])


# ---------------------------------------------------------------------- equality


@pytest.mark.parametrize("part", PARTS)
def test_one_site(base: LanguageModel, part: Part) -> None:
    """After the last block only the head is left."""
    for layer, token in ((0, LAST), (1, LAST), (1, END), (LAYERS - 1, LAST), (LAYERS - 1, END)):
        check_logits(base, {Site(layer, part): token})


def test_two_sites_at_two_tokens(base: LanguageModel) -> None:
    check_logits(base, TWO)


@pytest.mark.parametrize("tokens", [{Site(0): FIRST}, TWO, {Site(2, "block"): LAST}])
def test_bfloat16(base: LanguageModel, tokens: dict[Site, Token]) -> None:
    """Two orders of summation differ by bfloat16's own rounding, and by no more than that."""
    base.model.to(torch.bfloat16)  # type: ignore[arg-type]
    check_logits(base, tokens, tolerance=0.03)


@pytest.mark.parametrize("other", OTHERS)
def test_family_given_by_its_paths(other: str) -> None:
    architecture, settings = OTHERS[other]
    base = LanguageModel.wrap(build(other, **settings), make_tokenizer("byte_bpe"), architecture)
    for tokens in (TWO, {Site(2, "block"): LAST}):
        check_logits(base, tokens)


@pytest.mark.parametrize("windowed", ["mistral", "qwen2", "phi3", "gemma2"])
def test_windows_bite(windowed: str) -> None:
    """The rows tell a windowed model from the same one without windows, so a window that is dropped would show."""
    base = tiny_base(windowed)
    base.model.set_attn_implementation("eager")  # the other kernel than in the other tests, but for Gemma
    check_logits(base, TWO)
    rows = rows_of(base)
    at = places(rows, TWO)
    suffix = SuffixForward(base, rows, positions(rows, TWO))
    with_windows, added = suffix.logits({}, at), vectors_for(rows, TWO)
    changed = suffix.logits(added, at)
    # The kept keys and values are those of the windows; only the mask of the suffix is asked for anew.
    with mock.patch.object(base.model.config, "sliding_window", 10_000):
        assert (suffix.logits({}, at) - with_windows).norm() > 1e-2 * with_windows.norm()
        assert (suffix.logits(added, at) - changed).norm() > 1e-2 * changed.norm()


def test_some_of_the_sites_or_none(gpt2_base: LanguageModel) -> None:
    """What is left out counts as zero."""
    rows, added = rows_of(gpt2_base), vectors_for(rows_of(gpt2_base), TWO)
    at = places(rows, TWO)
    suffix = SuffixForward(gpt2_base, rows, positions(rows, TWO))
    for site in TWO:
        zero = {other: torch.zeros(len(rows), WIDTH) for other in TWO if other != site}
        close([suffix.logits({site: added[site]}, at)], [suffix.logits({site: added[site]} | zero, at)], 1e-6)


def test_rows_that_all_start_at_once(base: LanguageModel) -> None:
    """At the first token there is nothing to keep; one row has no padding."""
    rows = rows_of(base)
    for some in (rows, rows.select(torch.tensor([3]))):
        start = torch.zeros(len(some), dtype=torch.long)
        at = torch.arange(len(some)), some.at[END]
        added = vectors_for(some, {Site(1): LAST})
        full, suffix = (kind(base, some, {Site(1): start}) for kind in (FullForward, SuffixForward))
        close(logits_and_gradients(suffix, added, at), logits_and_gradients(full, added, at))


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("last", [None, 2])
def test_read_ends_at_a_middle_layer(base: LanguageModel, part: Part, last: int | None) -> None:
    rows, tokens = rows_of(base), {Site(1, part): LAST}
    wanted = {Site(1, part): rows.at[LAST], Site(2, "attn"): rows.at[END], Site(2, "block"): rows.at[END]}
    if part == "mlp":
        wanted[Site(0, "block")] = rows.at[END]  # enters the first layer that is run
    added, found = vectors_for(rows, tokens), []
    for kind in (FullForward, SuffixForward):
        read = kind(base, rows, positions(rows, tokens), last).read(added, wanted)
        assert set(read) == set(wanted)
        weighted = sum((read[site].sin() * (i + 1)).sum() for i, site in enumerate(wanted))
        assert isinstance(weighted, Tensor)
        gradients = torch.autograd.grad(weighted, list(added.values()))
        found.append([*(read[site].detach() for site in wanted), *gradients])
    close(found[1], found[0])
    plain = SuffixForward(base, rows, positions(rows, tokens), last).read({}, wanted)
    moved = (plain[Site(2, "block")] - found[0][2]).norm(dim=1)
    apart = rows.at[END] - rows.at[LAST]
    assert moved[apart < WINDOW].min() > 1e-3
    assert (apart[apart < WINDOW] > 0).any()


def test_read_with_sites_up_to_the_last_layer(gpt2_base: LanguageModel) -> None:
    """The last vector may be added behind the last position that is read."""
    rows = rows_of(gpt2_base)
    added, wanted = vectors_for(rows, TWO), {Site(2, "block"): rows.at[LAST]}
    full, suffix = (kind(gpt2_base, rows, positions(rows, TWO), 2) for kind in (FullForward, SuffixForward))
    close(list(suffix.read(added, wanted).values()), list(full.read(added, wanted).values()))


# ---------------------------------------------------------------------- what is run


def count(base: LanguageModel, call: Any, part: Part = "attn") -> dict[int, int]:
    """Tokens that run through each block's last linear map of a part during a call."""
    seen: dict[int, int] = {}

    def watch(layer: int, key: Tensor) -> None:
        seen[layer] = seen.get(layer, 0) + key.numel() // key.shape[-1]

    watched = [
        base.linear(Site(layer, part)).register_forward_hook(lambda _, args, __, layer=layer: watch(layer, args[0]))
        for layer in range(base.num_layers)
    ]
    call()
    for hook in watched:
        hook.remove()
    return seen


@pytest.fixture
def one_group() -> Iterator[None]:
    with mock.patch.dict(GROUP_COSTS, cpu=10**6):
        yield


@pytest.mark.usefixtures("one_group")
@pytest.mark.parametrize("part", PARTS)
def test_only_what_can_change_is_run(base: LanguageModel, part: Part) -> None:
    """In the first layer what comes after the vectors, in the last what is read."""
    rows, tokens = rows_of(base), {Site(1, part): LAST}
    b, t = rows.input_ids.shape
    suffixes = rows.attention_mask.sum(1) - rows.at[LAST]
    full, suffix = (kind(base, rows, positions(rows, tokens)) for kind in (FullForward, SuffixForward))
    at = torch.arange(b), rows.attention_mask.sum(1) - 1
    q = b * int(suffixes.max())
    for mine in ("attn", "mlp"):
        assert count(base, lambda: full.logits({}, at), mine) == dict.fromkeys(range(LAYERS), b * t)
        first = {} if part == "block" or mine == "attn" or part == "mlp" else {1: q}
        assert count(base, lambda: suffix.logits({}, at), mine) == first | {2: q, 3: b}
    wanted = {Site(3, "attn"): rows.at[LAST]}
    assert count(base, lambda: suffix.read({}, wanted)) == {2: b, 3: b}, "one token a row"


@pytest.mark.usefixtures("one_group")
def test_rows_that_are_not_read_do_not_run(base: LanguageModel) -> None:
    rows = rows_of(base)
    suffix = SuffixForward(base, rows, positions(rows, {Site(1): LAST}))
    some = torch.tensor([3, 11, 3])
    at = some, torch.stack([rows.at[LAST][3], rows.at[LAST][11], rows.at[END][3]])
    q = 1 + int((at[1] - rows.at[LAST][some]).max())
    assert count(base, lambda: suffix.logits({}, at)) == {2: 2 * q, 3: 2 * 2}
    full = FullForward(base, rows, positions(rows, {Site(1): LAST}))
    added = vectors_for(rows, {Site(1): LAST})
    close(logits_and_gradients(suffix, added, at), logits_and_gradients(full, added, at))


def test_groups_of_similar_length(base: LanguageModel) -> None:
    """Rows run beside rows of like length, in whatever order they came, and the head once for all."""
    rows = rows_of(base)
    b, suffixes = len(rows), rows.attention_mask.sum(1) - rows.at[LAST]
    head: list[int] = []
    hook = base.model.get_output_embeddings().register_forward_hook(lambda _, args, __: head.append(args[0].shape[1]))
    with mock.patch.dict(GROUP_COSTS, cpu=0):
        suffix = SuffixForward(base, rows, positions(rows, {Site(1): LAST}))
        at = torch.arange(b), rows.attention_mask.sum(1) - 1
        assert count(base, lambda: suffix.logits({}, at))[2] == int(suffixes.sum()) < b * int(suffixes.max())
        assert head == [b]
        hook.remove()
        check_logits(base, {Site(1): LAST})


def test_edits_side_by_side_keep_their_rows(base: LanguageModel) -> None:
    """Updates that hold in an edit's own rows alone, in groups, in rows that are read and at tokens that are read."""
    rows = rows_of(base)
    rows = replace(rows, owner=torch.arange(len(rows)) % 3 - 1)
    generator = torch.Generator().manual_seed(0)
    for edit, layer, part in product((0, 1), (0, 2, 3), ("attn", "mlp")):
        name = base.name(Site(layer, part))
        out, inner = base.weight(name).shape
        left, right = torch.randn(out, 1, generator=generator), torch.randn(inner, 1, generator=generator)
        base.side_by_side.write(edit, name, left, right)
    with mock.patch.dict(GROUP_COSTS, cpu=0):
        full, suffix = (kind(base, rows, positions(rows, {Site(1): LAST})) for kind in (FullForward, SuffixForward))
    added, every = vectors_for(rows, {Site(1): LAST}), torch.arange(len(rows))
    for at in (places(rows, {Site(1): LAST}), (every[5:7], rows.at[END][5:7])):
        close(logits_and_gradients(suffix, added, at), logits_and_gradients(full, added, at))
    base.side_by_side.clear()
    assert (suffix.logits({}, at) - full.logits({}, at)).norm() > 1e-3, "updates show, what is kept was made with them"


@pytest.mark.usefixtures("one_group")
def test_layers_above_the_last_are_never_run(base: LanguageModel) -> None:
    rows, forwards = rows_of(base), []
    b, t = rows.input_ids.shape
    build_one = lambda: forwards.append(SuffixForward(base, rows, {Site(0, "block"): rows.at[LAST]}, 2))  # noqa: E731
    assert count(base, build_one) == dict.fromkeys(range(3), b * t)
    wanted = {Site(2, "block"): rows.at[END]}
    q = int((rows.at[END] - rows.at[LAST]).max()) + 1
    assert count(base, lambda: forwards[0].read({}, wanted)) == {1: b * q, 2: b}
    assert count(base, lambda: forwards[0].read({}, {Site(1): rows.at[END]})) == {1: b}
    assert count(base, lambda: FullForward(base, rows, {}).read({}, wanted)) == dict.fromkeys(range(3), b * t)


def test_first_pass_keeps_no_graph(gpt2_base: LanguageModel) -> None:
    """Not even where the weights would have gradients."""
    rows = rows_of(gpt2_base)
    added = vectors_for(rows, TWO)
    gpt2_base.model.requires_grad_(True)
    suffix = SuffixForward(gpt2_base, rows, positions(rows, TWO))
    gpt2_base.model.requires_grad_(False)
    assert not suffix.logits({}, places(rows, TWO)).requires_grad
    assert suffix.logits(added, places(rows, TWO)).requires_grad


# ---------------------------------------------------------------------- what is left behind


def test_calls_do_not_interfere(base: LanguageModel) -> None:
    """Twice the same bits, other calls, backward passes and another forward in between."""
    rows = rows_of(base)
    at, added, other = places(rows, TWO), vectors_for(rows, TWO), vectors_for(rows, TWO, seed=1)
    suffix = SuffixForward(base, rows, positions(rows, TWO))
    before = logits_and_gradients(suffix, added, at)
    one = suffix.logits(other, at)
    suffix.read(other, {Site(3, "block"): rows.at[END]})
    SuffixForward(base, rows, {Site(0): rows.at[FIRST]}).logits({}, at)
    assert all(map(torch.equal, logits_and_gradients(suffix, added, at), before))
    assert torch.autograd.grad(one.sum(), list(other.values()))[0].norm() > 0, "a graph outlives later calls"


def untouched(base: LanguageModel) -> bool:
    own = [name for name, module in base.model.named_modules() if "forward" in vars(module)]
    frozen = not any(parameter.requires_grad for parameter in base.model.parameters())
    return not own and not hooks(base) and frozen and not any(module.training for module in base.model.modules())


def test_model_is_left_as_it_was(base: LanguageModel) -> None:
    rows, before = rows_of(base), bits(base)
    plain = base.logits(rows)
    suffix = SuffixForward(base, rows, positions(rows, TWO))
    added = vectors_for(rows, TWO)
    logits_and_gradients(suffix, added, places(rows, TWO))
    suffix.read(added, {Site(2, "block"): rows.at[END]})
    assert untouched(base)
    with (
        mock.patch.object(base.module(Site(3, "mlp")), "forward", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        suffix.logits(added, places(rows, TWO))
    with (
        mock.patch.object(base.module(Site(3, "mlp")), "forward", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        SuffixForward(base, rows, positions(rows, TWO))
    assert untouched(base)
    assert same_bits(base, before)
    assert torch.equal(base.logits(rows), plain)


@pytest.mark.usefixtures("one_group")
def test_a_forward_that_stood_on_the_block_stands_again(gpt2_base: LanguageModel) -> None:
    """A device map gives blocks a forward of their own."""
    rows, block = rows_of(gpt2_base), gpt2_base.layers[0]
    own = mock.Mock(side_effect=block.forward)
    block.forward = own
    suffix = SuffixForward(gpt2_base, rows, {Site(2): rows.at[LAST]})
    suffix.logits({}, places(rows, {Site(2): LAST}))
    assert block.forward is own
    assert own.call_count == 1, "by the first pass only"


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("tokens", [{Site(0): FIRST}, TWO])
def test_narrowed_to_some_rows(base: LanguageModel, tokens: dict[Site, Token]) -> None:
    """What was kept serves, in any order; the weights are not asked again."""
    rows, forwards = rows_of(base), Forwards(SuffixForward)
    whole = forwards(base, rows, positions(rows, tokens))
    whole.logits(vectors_for(rows, tokens), places(rows, tokens))
    lines = torch.arange(len(rows) - 1, 0, -2)
    some = rows.select(lines)
    added, at = vectors_for(some, tokens), places(some, tokens)
    expected = logits_and_gradients(SuffixForward(base, some, positions(some, tokens)), added, at)
    with mock.patch.object(LanguageModel, "run", side_effect=AssertionError("a first pass")):
        narrowed = forwards(base, some, positions(some, tokens))
    close(logits_and_gradients(narrowed, added, at), expected)
    close(
        logits_and_gradients(narrowed, added, at),
        logits_and_gradients(FullForward(base, some, positions(some, tokens)), added, at),
    )
    few = some.select(torch.arange(2))
    with mock.patch.object(LanguageModel, "run", side_effect=AssertionError("a first pass")):
        again = forwards(base, few, positions(few, tokens))
    added, at = vectors_for(few, tokens), places(few, tokens)
    close(
        logits_and_gradients(again, added, at),
        logits_and_gradients(FullForward(base, few, positions(few, tokens)), added, at),
    )


@pytest.mark.parametrize("change", ["row", "owner", "site", "last"])
def test_rows_that_were_not_there_are_run_anew(gpt2_base: LanguageModel, change: str) -> None:
    rows, forwards = rows_of(gpt2_base), Forwards(SuffixForward)
    forwards(gpt2_base, rows.select(torch.arange(4)), positions(rows.select(torch.arange(4)), TWO))
    some, tokens, last = rows.select(torch.tensor([0, 4 if change == "row" else 1])), TWO, None
    if change == "owner":
        some = replace(some, owner=some.owner + 7)
    elif change == "site":
        tokens = {Site(1, "mlp"): LAST, Site(2, "mlp"): END}
    elif change == "last":
        last = gpt2_base.num_layers - 2
    with mock.patch.object(LanguageModel, "run", autospec=True, side_effect=LanguageModel.run) as run:
        forwards(gpt2_base, some, positions(some, tokens), last)
    assert run.called


def test_positions_outside_the_suffix_are_refused(gpt2_base: LanguageModel) -> None:
    rows = rows_of(gpt2_base)
    start, end = rows.at[LAST], rows.attention_mask.sum(1) - 1
    suffix = SuffixForward(gpt2_base, rows, {Site(1): start})
    every = torch.arange(len(rows))
    suffix.logits({}, (every, start))
    suffix.logits({}, (every, end))
    for row, position in ((3, int(start[3]) - 1), (5, int(end[5]) + 1), (0, -1)):
        sentence = rf"positions of row {row} from {start[row]}, .* to its last, {end[row]}; got {position}"
        at = end.clone()
        at[row] = position
        with pytest.raises(ValueError, match=sentence):
            suffix.logits({}, (every, at))
        with pytest.raises(ValueError, match=sentence):
            suffix.read({}, {Site(3): at})


def test_layers_that_are_not_run_are_refused(gpt2_base: LanguageModel) -> None:
    rows = rows_of(gpt2_base)
    suffix = SuffixForward(gpt2_base, rows, {Site(1, "block"): rows.at[LAST]}, 2)
    for site in (Site(0, "block"), Site(1, "mlp"), Site(3, "attn")):
        with pytest.raises(ValueError, match="expected sites from where vectors are added up to layer 2"):
            suffix.read({}, {site: rows.at[END]})
    with pytest.raises(ValueError, match="up to layer 2 to be read, as was said at construction, got logits"):
        suffix.logits({}, (torch.tensor([0]), rows.at[END][:1]))
    with pytest.raises(ModelError, match="expected a layer between"):
        SuffixForward(gpt2_base, rows, {Site(1): rows.at[LAST]}, LAYERS)


def test_models_without_a_plain_cache_are_refused(gpt2_base: LanguageModel) -> None:
    """As where a layer reads another's keys and values, or keeps a state instead."""
    rows, update = rows_of(gpt2_base), DynamicCache.update

    def forgetful(self: DynamicCache, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        return (keys, values) if layer == 3 else update(self, keys, values, layer, *args)

    with mock.patch.object(DynamicCache, "update", forgetful), pytest.raises(ModelError, match="`forward: full`"):
        SuffixForward(gpt2_base, rows, {Site(1): rows.at[LAST]})
    assert untouched(gpt2_base)
