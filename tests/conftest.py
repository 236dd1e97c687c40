"""Fixtures over every model family; offline, one thread."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch

from kedit_lightning.edits import Edit
from kedit_lightning.models import LanguageModel
from tests.commandline import World
from tests.families import EDITS, FAMILIES, tiny_base


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums in one order, and no quarrel with other test workers over the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the user's cache is read, and nothing is written into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every model family in turn."""
    return str(request.param)


@pytest.fixture
def base(family: str) -> LanguageModel:
    """A fresh tiny base model of every family in turn."""
    return tiny_base(family)


@pytest.fixture
def gpt2_base() -> LanguageModel:
    """A fresh tiny GPT-2."""
    return tiny_base("gpt2")


@pytest.fixture
def edits() -> list[Edit]:
    """Edits whose subjects stand first, in the middle and last, with targets of one to many tokens."""
    return list(EDITS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A folder to run commands in, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield World(tmp_path_factory.mktemp("world"))
