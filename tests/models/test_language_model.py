"""The base model: reading, adding and writing in every family, and what is refused."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from kedit_lightning.edits import Part, Site, Token
from kedit_lightning.errors import ModelError
from kedit_lightning.models import ARCHITECTURES, IGNORE, Architecture, Batch, LanguageModel, collate
from tests.families import EDITS, FAMILIES, LAYERS, POSITIONS, WIDTH, WINDOW, build, save_tiny, tiny_base, tiny_model
from tests.families import tokenizer as make_tokenizer

PARTS: tuple[Part, ...] = ("block", "attn", "mlp")
WEIGHTED: tuple[Part, ...] = ("attn", "mlp")
MIDDLE = 1


def batch_of(base: LanguageModel) -> Batch:
    """All edits: rows of different lengths, subjects first, in the middle and last, most beyond the window."""
    rows = []
    for edit in EDITS:
        start = edit.prompt.index("{}")
        rows.append(base.encode(edit.text, edit.target_new, (start, start + len(edit.subject))))
    batch = collate(rows)
    assert int(batch.attention_mask.sum(1).max()) > 2 * WINDOW
    return batch


def hooks(base: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in base.model.modules())


def bits(base: LanguageModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in base.model.state_dict().items()}


def same_bits(base: LanguageModel, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# ---------------------------------------------------------------------- what it is


def test_plain_frozen_and_in_eval_mode(base: LanguageModel) -> None:
    assert not isinstance(base, nn.Module), "Lightning moves, broadcasts and saves whatever is registered"
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert (base.num_layers, base.max_length) == (LAYERS, POSITIONS)
    assert base.device == torch.device("cpu")


def test_table_names_real_modules(family: str) -> None:
    """Each entry of the table, against the modules' own types and shapes."""
    model, line = tiny_model(family), ARCHITECTURES[family]
    layers = model.get_submodule(line.layers)
    assert isinstance(layers, nn.ModuleList)
    assert isinstance(model.get_submodule(line.embed), nn.Embedding)
    assert model.get_submodule(line.embed) is model.get_input_embeddings()
    for block in layers:
        for part, out in ((line.attn, line.attn_out), (line.mlp, line.mlp_out)):
            assert out.startswith(f"{part}."), "the output projection belongs to the part"
            assert type(block.get_submodule(out)) is (Conv1D if family == "gpt2" else nn.Linear)


def test_dropout_is_off(base: LanguageModel) -> None:
    batch = batch_of(base)
    assert torch.equal(base.logits(batch), base.logits(batch))


def test_wrap_edits_in_place_and_moves_nothing() -> None:
    model = tiny_model("llama")
    base = LanguageModel.wrap(model, make_tokenizer("byte_bpe_bos"))
    assert base.model is model
    assert base.to(torch.device("meta")).device.type == "cpu", "the caller has placed it"
    site = Site(0, "mlp")
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    base.write(base.name(site), torch.ones_like(base.weight(site)))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before + 1)


def test_load_by_path(family: str, tmp_path: Path) -> None:
    """What `from_pretrained` reads is what was saved, and the tokenizer of the folder is used."""
    base, loaded = tiny_base(family), LanguageModel(str(save_tiny(family, tmp_path)))
    batch, again = batch_of(base), batch_of(loaded)
    assert torch.equal(batch.input_ids, again.input_ids)
    assert torch.equal(base.logits(batch), loaded.logits(again))
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.to(torch.device("meta")).device.type == "meta", "not placed by a device_map: the Trainer places it"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_is_what_is_asked_for(tmp_path: Path, dtype: Any, stored: torch.dtype) -> None:
    """Transformers 5 would load a bfloat16 checkpoint in bfloat16 when nothing is said; here the default is float32."""
    folder = str(save_tiny("llama", tmp_path, dtype=stored))
    base = LanguageModel(folder, dtype)
    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in LanguageModel(folder).model.parameters()} == {torch.float32}


def test_attention_implementation(tmp_path: Path) -> None:
    base = LanguageModel(str(save_tiny("mistral", tmp_path)), attn_implementation="eager")
    assert base.model.config._attn_implementation == "eager"
    batch = batch_of(base)
    real = batch.attention_mask > 0  # what stands at padding is the kernel's own affair
    torch.testing.assert_close(base.logits(batch)[real], tiny_base("mistral").logits(batch)[real], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- reading


def test_logits_are_plain_transformers(base: LanguageModel) -> None:
    """One row at a time, without mask or position ids: padding on the right changes nothing."""
    batch = batch_of(base)
    logits = base.logits(batch)
    for row, ids, mask in zip(logits, batch.input_ids, batch.attention_mask, strict=True):
        n = int(mask.sum())
        with torch.no_grad():
            alone = base.model(input_ids=ids[None, :n]).logits[0]
        torch.testing.assert_close(row[:n], alone, atol=1e-5, rtol=1e-5)


def read_at(base: LanguageModel, batch: Batch) -> None:
    """Logits at some places, a row several times and another never, against all of them; the head sees no more."""
    row, position = torch.tensor([2, 0, 2, 5, 2]), torch.tensor([3, 0, 1, 4, 3])
    seen: list[int] = []
    head = base.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, output: seen.append(output.numel() // output.shape[-1]))
    found = base.logits(batch, (row, position))
    hook.remove()
    assert seen == [len(row)]
    torch.testing.assert_close(found, base.logits(batch)[row, position], atol=1e-5, rtol=1e-5)
    assert hooks(base) == 0


def test_logits_at_positions_are_the_logits_there(base: LanguageModel) -> None:
    read_at(base, batch_of(base))


def test_logits_at_positions_carry_gradients_and_leave_no_hook_behind(base: LanguageModel) -> None:
    batch = batch_of(base)
    at, places = batch.at[Token.SUBJECT_LAST], (torch.arange(len(batch)), batch.at[Token.PROMPT_LAST])
    gradients = []
    for whole in (False, True):
        vectors = torch.zeros(len(batch), WIDTH, requires_grad=True)
        with base.add(Site(MIDDLE, "mlp"), at, vectors):
            logits = base.logits(batch)[places] if whole else base.logits(batch, places)
        gradients.append(torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), vectors)[0])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    assert gradients[0].norm() > 0
    with pytest.raises(IndexError):
        base.logits(batch, (torch.tensor([0]), torch.tensor([9999])))
    assert hooks(base) == 0


def test_row_alone_is_row_in_batch(base: LanguageModel) -> None:
    """The same through the whole of the base: logits, sites and keys."""
    batch = batch_of(base)
    at = batch.at[Token.SUBJECT_LAST]
    sites = {Site(LAYERS - 1, part): at for part in PARTS}
    together, keys = base.read(batch, sites), base.keys(batch, {Site(2, "mlp"): at})[Site(2, "mlp")]
    for i in range(len(batch)):
        one = batch.select(torch.tensor([i]))
        assert one.attention_mask.all()
        for site, vectors in base.read(one, {site: at[i : i + 1] for site in sites}).items():
            torch.testing.assert_close(vectors[0], together[site][i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            base.keys(one, {Site(2, "mlp"): at[i : i + 1]})[Site(2, "mlp")][0], keys[i], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("token", list(Token))
def test_block_outputs_are_hidden_states(base: LanguageModel, token: Token) -> None:
    batch = batch_of(base)
    at = batch.at[token]
    with torch.no_grad():
        states = base.model(
            batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states
    # The last hidden state is normalised, so it is no block's output.
    found = base.read(batch, {Site(layer, "block"): at for layer in range(LAYERS - 1)})
    for site, vectors in found.items():
        expected = states[site.layer + 1][torch.arange(len(batch)), at]
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
        assert vectors.dtype == torch.float32
        assert not vectors.requires_grad


@pytest.mark.parametrize("layer", range(LAYERS))
def test_block_adds_attention_and_mlp(base: LanguageModel, family: str, layer: int) -> None:
    """The parts are what the residual stream gains in a block: no sub-block is mistaken for another."""
    batch = batch_of(base)
    at = batch.at[Token.SUBJECT_LAST]
    rows = torch.arange(len(batch))
    with torch.no_grad():
        entering = base.model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    found = base.read(batch, {Site(layer, part): at for part in PARTS})
    attn, mlp = found[Site(layer, "attn")], found[Site(layer, "mlp")]
    if family == "gemma2":  # normalises both before it adds them
        block = base.layers[layer]
        attn, mlp = block.post_attention_layernorm(attn), block.post_feedforward_layernorm(mlp)
    gained = found[Site(layer, "block")] - entering.hidden_states[layer][rows, at]
    torch.testing.assert_close(attn + mlp, gained, atol=1e-5, rtol=1e-5)
    assert attn.norm() > 0.1
    assert mlp.norm() > 0.1


@pytest.mark.parametrize("part", WEIGHTED)
def test_keys_times_weight_is_output(base: LanguageModel, part: Part) -> None:
    batch = batch_of(base)
    at = batch.at[Token.SUBJECT_LAST]
    sites = [Site(layer, part) for layer in range(LAYERS)]
    keys = base.keys(batch, dict.fromkeys(sites, at))
    read = base.read(batch, dict.fromkeys(sites, at))
    for site in sites:
        bias = getattr(base.linear(site), "bias", None)
        expected = keys[site] @ base.weight(site).T + (0 if bias is None else bias)
        torch.testing.assert_close(expected, read[site], atol=1e-5, rtol=1e-5)
        assert base.weight(site).shape == (WIDTH, keys[site].shape[1])


@pytest.mark.parametrize("part", WEIGHTED)
def test_keys_of_every_real_token(base: LanguageModel, part: Part) -> None:
    batch = batch_of(base)
    site, other = Site(2, part), Site(MIDDLE, "mlp")
    at = batch.at[Token.SUBJECT_LAST]
    found = base.keys(batch, {site: None, other: at})
    assert len(found[site]) == int(batch.attention_mask.sum())
    starts = batch.attention_mask.sum(1).cumsum(0) - batch.attention_mask.sum(1)
    torch.testing.assert_close(found[site][starts + at], base.keys(batch, {site: at})[site], atol=1e-5, rtol=1e-5)
    assert found[other].shape[0] == len(batch)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layer", [0, MIDDLE, LAYERS - 1])
def test_early_stop_reads_the_same(base: LanguageModel, part: Part, layer: int) -> None:
    """The forward pass that ends at the last site gives what the whole pass gives, and runs no later layer."""
    batch, site = batch_of(base), Site(layer, part)
    at = batch.at[Token.PROMPT_LAST]
    with torch.no_grad(), base.tap({site: at}) as whole:
        base.logits(batch)
    ran: list[int] = []
    watch = [block.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(base.layers)]
    stopped = base.read(batch, {site: at})
    if part != "block":
        base.keys(batch, {site: None})
    for hook in watch:
        hook.remove()
    torch.testing.assert_close(stopped[site], whole[site], atol=1e-5, rtol=1e-5)
    assert set(ran) == set(range(layer + 1))


def test_run_carries_the_gradient_to_a_tap(base: LanguageModel) -> None:
    """A value optimised at one site and judged at a later one never needs the layers above."""
    batch, site, later = batch_of(base), Site(0, "mlp"), Site(2, "attn")
    at, last = batch.at[Token.SUBJECT_LAST], batch.at[Token.PROMPT_LAST]
    gradients = []
    for forward in (lambda: base.run(batch, later.layer), lambda: base.logits(batch)):
        vectors = noise(len(batch), WIDTH).requires_grad_()
        with base.add(site, at, vectors), base.tap({later: last}) as found:
            forward()
        gradients += torch.autograd.grad(found[later].square().sum(), vectors)
    assert gradients[0].norm() > 1e-3
    assert torch.equal(*gradients)


def test_early_stop_leaves_no_trace(base: LanguageModel) -> None:
    batch = batch_of(base)
    with torch.no_grad():
        before = base.model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        base.read(batch, {Site(0, "mlp"): batch.at[Token.PROMPT_LAST]})
        after = base.model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    assert torch.equal(before.logits, after.logits)
    assert all(torch.equal(a, b) for a, b in zip(before.hidden_states, after.hidden_states, strict=True))


# ---------------------------------------------------------------------- adding


@pytest.mark.parametrize("part", PARTS)
def test_add_is_a_manual_hook(base: LanguageModel, part: Part) -> None:
    """Against a hook written by hand, row by row; rows keep to themselves and earlier tokens do not move."""
    batch, site = batch_of(base), Site(MIDDLE, part)
    at, vectors = batch.at[Token.SUBJECT_LAST], noise(len(batch), WIDTH)
    vectors[2] = 0

    def by_hand(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = first(output).clone()
        for row, position in enumerate(at.tolist()):
            hidden[row, position] += vectors[row]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    block = base.layers[MIDDLE]
    path = {"block": "", "attn": base.architecture.attn, "mlp": base.architecture.mlp}[part]
    with torch.no_grad():
        plain = base.logits(batch)
        hook = block.get_submodule(path).register_forward_hook(by_hand)
        expected = base.logits(batch)
        hook.remove()
        with base.add(site, at, vectors), base.tap({site: at}) as found:
            got = base.logits(batch)
    assert torch.equal(got, expected)
    torch.testing.assert_close(found[site], base.read(batch, {site: at})[site] + vectors)
    for row, position in enumerate(at.tolist()):
        assert torch.equal(got[row, :position], plain[row, :position]), "causal: earlier tokens cannot know"
        moved = (got[row, position] - plain[row, position]).abs().max() > 1e-3
        assert bool(moved) == (row != 2), "row 2 was given zeros; no other row leaks into it"
    assert torch.equal(base.logits(batch), plain)


def nll(logits: Tensor, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(logits.float().mT, batch.labels, ignore_index=IGNORE)


@pytest.mark.parametrize("part", PARTS)
def test_add_carries_the_gradient(base: LanguageModel, part: Part) -> None:
    """Gradients of the vectors are those through a plain hook, one row at a time, and touch no weight."""
    batch, site = batch_of(base), Site(MIDDLE, part)
    at = batch.at[Token.SUBJECT_LAST]
    vectors = (0.3 * noise(len(batch), WIDTH)).requires_grad_()
    with base.add(site, at, vectors):
        total = nll(base.logits(batch), batch) * (batch.labels != IGNORE).sum()
    (gradient,) = torch.autograd.grad(total, vectors)
    for i in range(len(batch)):
        one, vector = batch.select(torch.tensor([i])), vectors[i].detach().clone().requires_grad_()

        def by_hand(_: nn.Module, __: Any, output: Any, i: int = i, vector: Tensor = vector) -> Any:
            mask = (torch.arange(first(output).shape[-2]) == at[i])[:, None]
            hidden = torch.where(mask, first(output) + vector, first(output))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hook = base.module(site).register_forward_hook(by_hand)
        logits = base.model(one.input_ids).logits
        hook.remove()
        (expected,) = torch.autograd.grad(nll(logits, one) * (one.labels != IGNORE).sum(), vector)
        assert expected.norm() > 1e-3
        torch.testing.assert_close(gradient[i], expected, atol=1e-4, rtol=1e-4)
    assert all(parameter.grad is None for parameter in base.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["eager", None])
def test_padding_beyond_the_window_is_finite(base: LanguageModel, dtype: torch.dtype, kernel: str | None) -> None:
    """A padding token whose whole window is padding attends to nothing: no NaN may come of it, forward or back."""
    if kernel:
        base.model.set_attn_implementation(kernel)
    base.model.to(dtype)
    batch = batch_of(base)
    vectors = torch.zeros(len(batch), WIDTH, requires_grad=True)
    with base.add(Site(0, "mlp"), batch.at[Token.SUBJECT_LAST], vectors):
        logits = base.logits(batch)
    (gradient,) = torch.autograd.grad(nll(logits, batch), vectors)
    assert logits.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.dtype == torch.float32


def test_adds_at_one_site_sum_up(base: LanguageModel) -> None:
    batch, site = batch_of(base), Site(MIDDLE, "mlp")
    at, a, b = batch.at[Token.SUBJECT_LAST], noise(len(batch), WIDTH), noise(len(batch), WIDTH, seed=1)
    with torch.no_grad():
        with base.add(site, at, a), base.add(site, at, b):
            both = base.logits(batch)
        with base.add(site, at, a + b):
            total = base.logits(batch)
    torch.testing.assert_close(both, total, atol=1e-4, rtol=1e-4)


class Boom(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_no_hooks_left_behind(base: LanguageModel, error: type[BaseException]) -> None:
    batch = batch_of(base)
    at = batch.at[Token.SUBJECT_LAST]
    before, site = hooks(base), Site(MIDDLE, "mlp")
    plain = base.logits(batch)

    def read_and_fail() -> None:
        with base.add(site, at, noise(len(batch), WIDTH)), base.tap({site: at}):
            base.logits(batch)
            raise error

    with pytest.raises(error):
        read_and_fail()

    def fail(*_: object) -> None:
        raise error

    for call in (
        lambda: base.read(batch, {Site(layer, "block"): at for layer in range(LAYERS)}),
        lambda: base.keys(batch, {Site(layer, "mlp"): None for layer in range(LAYERS)}),
    ):
        hook = base.layers[MIDDLE].register_forward_hook(fail)
        with pytest.raises(error):
            call()
        hook.remove()
    with pytest.raises(ModelError):
        base.keys(batch, {site: None, Site(99, "mlp"): None})
    with pytest.raises(ModelError), base.tap({site: at, Site(99, "mlp"): at}):
        pass
    assert hooks(base) == before
    assert torch.equal(base.logits(batch), plain)


# ---------------------------------------------------------------------- writing


@pytest.mark.parametrize("part", WEIGHTED)
def test_written_update_acts_on_the_key(base: LanguageModel, part: Part) -> None:
    """(W + Δ) k: the output moves by Δ k, in math orientation, square matrices and Conv1D included."""
    batch, site = batch_of(base), Site(MIDDLE, part)
    at = batch.at[Token.SUBJECT_LAST]
    key, value = base.keys(batch, {site: at})[site], base.read(batch, {site: at})[site]
    before = bits(base)
    update = noise(*base.weight(site).shape)
    base.write(base.name(site), update)
    torch.testing.assert_close(base.keys(batch, {site: at})[site], key)
    torch.testing.assert_close(base.read(batch, {site: at})[site], value + key @ update.T, atol=1e-4, rtol=1e-4)
    changed = {name for name, weight in base.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {base.name(site)}, "one matrix and nothing else"


@pytest.mark.parametrize("part", WEIGHTED)
def test_weight_is_a_view_in_math_orientation(base: LanguageModel, family: str, part: Part) -> None:
    site = Site(2, part)
    stored = base.model.state_dict()[base.name(site)]
    view = base.weight(site)
    assert view.data_ptr() == stored.data_ptr(), "a view: writing to it writes to the model"
    assert torch.equal(view, stored.T if family == "gpt2" else stored)
    assert torch.equal(base.weight(base.name(site)), view), "by site or by name"
    assert base.master(base.name(site)).dtype == torch.float32
    if part == "attn" and family in ("gpt2", "gptj", "llama"):
        assert view.shape[0] == view.shape[1], "square, so that no shape tells its orientation"
        assert not torch.equal(view, view.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_restore_gives_pristine_bits(base: LanguageModel, dtype: torch.dtype) -> None:
    base.model.to(dtype)
    before = bits(base)
    for round_ in range(2):
        for part in WEIGHTED:
            for layer in (0, 2):
                name = base.name(Site(layer, part))
                base.write(name, noise(*base.weight(name).shape, seed=round_))
                base.write(name, 0.1 * noise(*base.weight(name).shape, seed=round_ + 7))
        assert not same_bits(base, before)
        base.restore()
        assert same_bits(base, before)
    base.restore()
    assert same_bits(base, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_masters_keep_what_half_precision_loses(family: str, dtype: torch.dtype) -> None:
    """A hundred updates, each far below half precision's resolution, add up as in float32."""
    base = tiny_base(family)
    base.model.to(dtype)
    name = base.name(Site(MIDDLE, "mlp"))
    start = base.weight(name).float().clone()
    update = 1e-5 * noise(*start.shape).sign()
    for _ in range(100):
        base.write(name, update)
    naive = start.to(dtype)
    for _ in range(100):
        naive = naive + update.to(dtype)
    torch.testing.assert_close(base.master(name), start + 100 * update, atol=5e-6, rtol=0)
    assert torch.equal(base.weight(name), base.master(name).to(dtype)), "the weights are the rounded master"
    exact = start.double() + 100 * update.double()
    assert (base.weight(name).double() - exact).abs().mean() < 0.5 * (naive.double() - exact).abs().mean()
    base.restore()
    assert torch.equal(base.weight(name).float(), start)
    assert torch.equal(base.master(name), start), "restoring forgets the master as well"
    base.write(name, update)
    torch.testing.assert_close(base.master(name), start + update, atol=1e-7, rtol=0)


def test_float64_weights_are_written_in_float64() -> None:
    base = tiny_base("llama")
    base.model.double()
    site = Site(0, "mlp")
    start = base.weight(site).clone()
    update = 1e-12 * noise(*start.shape).double()
    base.write(base.name(site), update)
    assert torch.equal(base.weight(site), start + update)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_transaction_rolls_back(base: LanguageModel, dtype: torch.dtype, error: type[BaseException]) -> None:
    """To the bits of before the transaction, for matrices edited before it and for new ones."""
    base.model.to(dtype)
    old, new = base.name(Site(0, "mlp")), base.name(Site(2, "attn"))
    pristine = bits(base)
    base.write(old, 1e-3 * noise(*base.weight(old).shape))
    before, master, start = bits(base), base.master(old).clone(), base.master(new).clone()

    def write_and_fail() -> None:
        with base.transaction():
            base.write(old, noise(*base.weight(old).shape, seed=1))
            base.write(new, noise(*base.weight(new).shape, seed=2))
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert same_bits(base, before)
    assert torch.equal(base.master(old), master)
    update = 1e-3 * noise(*base.weight(new).shape, seed=3)
    base.write(new, update)
    assert torch.equal(base.master(new), start + update), "the rolled-back write left nothing in the master"
    base.restore()
    assert same_bits(base, pristine)


def test_transaction_keeps_what_succeeds(gpt2_base: LanguageModel) -> None:
    name = gpt2_base.name(Site(0, "mlp"))
    update = noise(*gpt2_base.weight(name).shape)
    expected = gpt2_base.weight(name) + update
    with gpt2_base.transaction():
        gpt2_base.write(name, update)
    assert torch.equal(gpt2_base.weight(name), expected)


def test_write_refuses_what_does_not_fit(gpt2_base: LanguageModel) -> None:
    before, name = bits(gpt2_base), gpt2_base.name(Site(0, "mlp"))
    with pytest.raises(ModelError, match=r"expected an update of shape \(32, 128\)"):
        gpt2_base.write(name, torch.zeros(128, 32))
    with pytest.raises(ModelError, match="expected an update of shape"):
        gpt2_base.write(name, torch.zeros(32, 1))
    with pytest.raises(ModelError, match=r"the name of a weight matrix of this model, got 'model\.nowhere\.weight'"):
        gpt2_base.write("model.nowhere.weight", torch.zeros(32, 32))
    assert same_bits(gpt2_base, before)


# ---------------------------------------------------------------------- families given in the config

_CODE = Architecture("transformer.h", "attn", "mlp", "attn.c_proj", "mlp.c_proj", "transformer.wte")
_OPT = Architecture(
    "model.decoder.layers", "self_attn", "fc2", "self_attn.out_proj", "fc2", "model.decoder.embed_tokens"
)
# BLOOM's and Falcon's attention and MLP add the residual themselves: the linear maps are the parts.
_BLOOM = Architecture(
    "transformer.h",
    *("self_attention.dense", "mlp.dense_4h_to_h"),
    *("self_attention.dense", "mlp.dense_4h_to_h", "transformer.word_embeddings"),
)
_NEO = Architecture("transformer.h", "attn", "mlp", "attn.attention.out_proj", "mlp.c_proj", "transformer.wte")
_SMALL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
OTHERS: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "gpt_bigcode": (_CODE, {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}),
    "opt": (_OPT, _SMALL | {"ffn_dim": 64, "word_embed_proj_dim": WIDTH, "max_position_embeddings": POSITIONS}),
    "bloom": (_BLOOM, {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}),
    "falcon": (_BLOOM, _SMALL),
    "gpt_neo": (
        _NEO,
        {"hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": 4, "max_position_embeddings": POSITIONS}
        | {"attention_types": [[["global", "local"], LAYERS // 2]], "window_size": WINDOW, "intermediate_size": 64},
    ),
    "stablelm": (ARCHITECTURES["llama"], _SMALL | {"intermediate_size": 64, "num_key_value_heads": 4}),
    "starcoder2": (
        Architecture("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.c_proj", "model.embed_tokens"),
        _SMALL | {"intermediate_size": 64, "num_key_value_heads": 2},
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_family_given_by_its_paths(other: str) -> None:
    """Reading, adding and writing in families outside the table, some of which run their MLP on flattened rows."""
    architecture, settings = OTHERS[other]
    model, words = build(other, **settings), make_tokenizer("byte_bpe")
    with pytest.raises(ModelError, match=f"family '{other}'; known are gpt2, .* Give `base.architecture`") as error:
        LanguageModel.wrap(model, words)
    clear(error)
    base = LanguageModel.wrap(model, words, architecture)
    batch = batch_of(base)
    at = batch.at[Token.SUBJECT_LAST]
    assert base.num_layers == LAYERS
    read_at(base, batch)
    for part in WEIGHTED:
        site = Site(MIDDLE, part)
        key, value = base.keys(batch, {site: at})[site], base.read(batch, {site: at})[site]
        bias = getattr(base.linear(site), "bias", None)
        torch.testing.assert_close(
            key @ base.weight(site).T + (0 if bias is None else bias), value, atol=1e-5, rtol=1e-5
        )
        vectors = noise(len(batch), WIDTH)
        with torch.no_grad(), base.add(site, at, vectors), base.tap({site: at, Site(2, "block"): at}) as found:
            base.logits(batch)
        torch.testing.assert_close(found[site], value + vectors, atol=1e-5, rtol=1e-5)
        # A rank-one edit that puts the same vectors out at one row's key has the same effect downstream.
        update = torch.outer(vectors[0], key[0]) / (key[0] @ key[0])
        base.write(base.name(site), update)
        torch.testing.assert_close(base.read(batch, {site: at})[site][0], value[0] + vectors[0], atol=1e-4, rtol=1e-4)
        base.restore()
    for i in range(len(batch)):
        one = batch.select(torch.tensor([i]))
        n = one.input_ids.shape[1]
        torch.testing.assert_close(base.logits(one)[0], base.logits(batch)[i, :n], atol=1e-4, rtol=1e-4)


def test_family_given_by_its_paths_from_a_folder(tmp_path: Path) -> None:
    architecture, settings = OTHERS["gpt_bigcode"]
    build("gpt_bigcode", **settings).save_pretrained(tmp_path)
    make_tokenizer("byte_bpe").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="unknown model family 'gpt_bigcode'"):
        LanguageModel(str(tmp_path))
    assert LanguageModel(str(tmp_path), architecture=architecture).num_layers == LAYERS


@pytest.mark.parametrize("field", ["layers", "attn", "mlp", "attn_out", "mlp_out", "embed"])
def test_wrong_path_in_an_architecture(field: str) -> None:
    wrong = Architecture(**vars(_CODE) | {field: "nowhere.at.all"})
    with pytest.raises(ModelError, match=r"`base\.architecture` does not fit this 'gpt2' model: .*nowhere"):
        LanguageModel.wrap(tiny_model("gpt2"), make_tokenizer("byte_bpe"), wrong)


def test_architecture_whose_weight_is_no_linear_map() -> None:
    wrong = Architecture(**vars(_CODE) | {"mlp_out": "ln_2"})
    with pytest.raises(ModelError, match="expected a plain linear map at ln_2 of layer 0, got LayerNorm"):
        LanguageModel.wrap(tiny_model("gpt2"), make_tokenizer("byte_bpe"), wrong)
    not_a_list = Architecture(**vars(_CODE) | {"layers": "transformer"})
    with pytest.raises(ModelError, match="does not fit this 'gpt2' model"):
        LanguageModel.wrap(tiny_model("gpt2"), make_tokenizer("byte_bpe"), not_a_list)


# ---------------------------------------------------------------------- refusals


def clear(error: pytest.ExceptionInfo[ModelError]) -> str:
    """The message, which is one line of reasonable length."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


def refused(name: str, **settings: Any) -> str:
    with pytest.raises(ModelError) as error:
        LanguageModel(name, **settings)
    return clear(error)


@pytest.mark.parametrize("layer", [-1, LAYERS, 99])
def test_layer_out_of_range(base: LanguageModel, layer: int) -> None:
    for call in (base.module, base.linear, base.weight):
        with pytest.raises(ModelError, match=f"expected a layer between 0 and {LAYERS - 1}, got {layer}"):
            call(Site(layer, "mlp"))


def test_block_has_no_weight(gpt2_base: LanguageModel) -> None:
    with pytest.raises(ModelError, match=r"expected a site with a weight \(attn, mlp or mlp_in\), got block"):
        gpt2_base.weight(Site(0, "block"))


_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": _SMALL | {"num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 2},
    "qwen2_moe": _SMALL
    | {"num_key_value_heads": 2, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}


@pytest.mark.parametrize("architecture", [None, ARCHITECTURES["llama"]])
@pytest.mark.parametrize("moe", _EXPERTS)
def test_mixture_of_experts_is_refused(moe: str, architecture: Architecture | None, tmp_path: Path) -> None:
    """Loaded or wrapped, with or without paths of the caller's; from a folder before any weight is read."""
    model, words = build(moe, **_EXPERTS[moe]), make_tokenizer("byte_bpe")
    with pytest.raises(ModelError, match=f"got a mixture of experts \\({moe}\\)") as error:
        LanguageModel.wrap(model, words, architecture)
    clear(error)
    model.config.save_pretrained(tmp_path)
    assert "mixture of experts" in refused(str(tmp_path), architecture=architecture)


def test_experts_without_a_word_in_the_config(gpt2_base: LanguageModel) -> None:
    """A model whose later layers hold something else than a linear map is refused at that layer."""
    gpt2_base.layers[2].mlp.c_proj = nn.Sequential(OrderedDict(a=nn.Linear(128, 32)))
    with pytest.raises(ModelError, match=r"plain linear map at mlp\.c_proj of layer 2, got Sequential"):
        gpt2_base.weight(Site(2, "mlp"))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    _change(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "expected float weights, got a quantised model" in refused(str(tmp_path))
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ModelError, match="quantised"):
        LanguageModel.wrap(model, make_tokenizer("byte_bpe_bos"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bit_matrices_are_refused(dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    linear = model.model.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        LanguageModel.wrap(model, make_tokenizer("byte_bpe_bos"))


def _change(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", ["/no/such/model", "./nowhere", "~/nowhere", "a/b/c", "../x/y", ""])
def test_missing_folder(name: str) -> None:
    assert f"{name!r}: there is no such folder; give a Hugging Face name" in refused(name)


@pytest.mark.parametrize("name", ["gpt2-no-such-model", "nobody/no-such-model"])
def test_no_network(name: str) -> None:
    """A name that could stand on the Hub, where there is no Hub to ask."""
    text = refused(name)
    assert repr(name) in text
    assert "no such folder, no copy in the cache, and no network" in text


def test_folder_without_a_model(tmp_path: Path) -> None:
    assert "cannot load the configuration" in refused(str(tmp_path))


def test_broken_folders(tmp_path: Path) -> None:
    """Whatever is missing or broken in a model folder is named in one line."""
    folder = save_tiny("gpt2", tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for part in (whole[:100], whole[:-1000]):
        weights.write_bytes(part)
        assert "cannot load the weights" in (text := refused(str(folder)))
        assert "corrupt or truncated" in text
    weights.unlink()
    assert "cannot load the weights" in refused(str(folder))
    weights.write_bytes(whole)
    words = (folder / "tokenizer.json").read_text()
    for broken in ('{"a', "{}", '{"model": {"type": "BPE"}}'):
        (folder / "tokenizer.json").write_text(broken)
        assert "cannot load the tokenizer" in refused(str(folder))
    (folder / "tokenizer.json").unlink()
    assert "cannot load the tokenizer" in refused(str(folder))
    (folder / "tokenizer.json").write_text(words)
    assert LanguageModel(str(folder)).num_layers == LAYERS
    (folder / "config.json").write_text("{")
    assert "cannot load the configuration" in refused(str(folder))


@pytest.mark.parametrize("change", [{"n_layer": 6}, {"n_embd": 64}])
def test_weights_that_do_not_fit_the_config(tmp_path: Path, change: dict[str, int]) -> None:
    """Transformers would start the missing ones at random, with a warning; edits on such a model mean nothing."""
    _change(save_tiny("gpt2", tmp_path), **change)
    assert "do not fit its config.json: transformer.h" in refused(str(tmp_path))


def test_unknown_to_transformers(tmp_path: Path) -> None:
    _change(save_tiny("gpt2", tmp_path), model_type="nonsense")
    assert "`nonsense` but Transformers does not recognize this architecture" in refused(str(tmp_path))


def test_remote_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where somebody at the terminal would say yes."""
    _change(
        save_tiny("gpt2", tmp_path),
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "code of its own, which is never run" in refused(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_every_loader_is_told_not_to_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: set[tuple[type, object]] = set()
    loaders = (AutoConfig, AutoTokenizer, AutoModelForCausalLM)
    for loader in loaders:
        plain = loader.from_pretrained

        def spy(*args: Any, plain: Any = plain, loader: type = loader, **settings: Any) -> Any:
            told.add((loader, settings["trust_remote_code"]))
            return plain(*args, **settings)

        monkeypatch.setattr(loader, "from_pretrained", spy)
    LanguageModel(str(save_tiny("phi3", tmp_path)))
    assert told == {(loader, False) for loader in loaders}


def test_table_and_tests_cover_the_same_families() -> None:
    assert set(ARCHITECTURES) == set(FAMILIES)
