"""What memory is asked for before anything is done: the arithmetic, against bytes counted by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kedit_lightning.edits import Site
from kedit_lightning.errors import KeditError
from kedit_lightning.models import LanguageModel, memory
from kedit_lightning.models.key_statistics import Identity, KeyStatistics
from kedit_lightning.models.memory import needed, require

SITES = [Site(0, "mlp"), Site(1, "mlp"), Site(1, "attn")]
K, D, A = 128, 32, 32
"""Widths of the tiny GPT-2: of the MLP's keys, of values, of the attention's keys."""
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SOLVE, EACH = 8 * 3 * K * K, 8 * (3 * K + 4 * D)


@pytest.fixture
def moments() -> dict[Site, KeyStatistics]:
    widths = (K, K, A)
    return {site: KeyStatistics(torch.eye(k), 10 * k) for site, k in zip(SITES, widths, strict=True)}


def on_gpu(base: LanguageModel, monkeypatch: pytest.MonkeyPatch, free: int) -> Any:
    """The base model as if it were on a GPU with so much memory."""
    monkeypatch.setattr(memory, "free_memory", lambda device: free if device.type == "cuda" else 2**40)
    return SimpleNamespace(weight=base.weight, device=GPU)


def test_factors_that_are_due_are_counted(gpt2_base: LanguageModel, moments: dict[Site, KeyStatistics]) -> None:
    assert needed(gpt2_base, SITES, 1) == {CPU: (SOLVE, EACH)}
    everything = SOLVE + 8 * (2 * K * K + A * A)
    assert needed(gpt2_base, SITES, 1, moments=moments) == {CPU: (everything, EACH)}
    # With more edits than the key is wide the whole system is solved, and C never factorised.
    assert needed(gpt2_base, SITES, A, moments=moments) == {CPU: (SOLVE + 8 * 2 * K * K, EACH)}
    assert needed(gpt2_base, SITES, K, moments=moments) == {CPU: (SOLVE, EACH)}
    moments[SITES[0]].factor()  # this one is there already
    assert needed(gpt2_base, SITES, 1, moments=moments) == {CPU: (everything - 8 * K * K, EACH)}
    moments[SITES[1]].null_space(2.0)  # and this one used otherwise
    assert needed(gpt2_base, SITES, 1, moments=moments) == {CPU: (SOLVE + 8 * A * A, EACH)}
    moments[SITES[2]] = Identity(A)
    assert needed(gpt2_base, SITES, 1, kept=2, moments=moments) == {CPU: (SOLVE + 16 * (2 * K * K + A * A), EACH)}


def test_on_a_gpu_keys_and_factors_while_there_is_room(
    gpt2_base: LanguageModel, moments: dict[Site, KeyStatistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, factor = 4 * (2 * K + A + 3 * D), 8 * K * K
    base = on_gpu(gpt2_base, monkeypatch, 7 * factor)
    assert needed(base, SITES, 1, moments=moments) == {  # the second factor of that width has no room any more
        CPU: (SOLVE + factor, EACH),
        GPU: (factor + 8 * A * A, keys),
    }
    base = on_gpu(gpt2_base, monkeypatch, 20 * factor)
    assert needed(base, SITES, 1, moments=moments)[GPU] == (2 * factor + 8 * A * A, keys)
    base = on_gpu(gpt2_base, monkeypatch, 0)
    assert needed(base, SITES, 1, moments=moments)[GPU] == (0, keys)


def test_more_edits_than_a_gpu_has_room_for(gpt2_base: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    base = on_gpu(gpt2_base, monkeypatch, 4 * (2 * K + A + 3 * D) * 7)
    require(base, SITES, 7)
    with pytest.raises(KeditError, match=r"8 edits .* are free on cuda: set data\.batch_size to at most 7$"):
        require(base, SITES, 8)
