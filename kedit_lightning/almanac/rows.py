"""Documents packed into rows of tokens for training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from kedit_lightning.almanac.corpus import Corpus, Mixture, Weights
from kedit_lightning.almanac.tokenizer import WordEncoder, train_tokenizer
from kedit_lightning.almanac.world import Subject, World


class Rows(NamedTuple):
    """A batch of b rows of t tokens with m places for the subjects they mention, of at most f facts each.

    Attributes:
        ids: Token ids of shape ``(b, t)``.
        weights: Weight of each token in the loss, zero on padding, ``(b, t)``.
        names: Whether a token belongs to the name of a subject, ``(b, t)``.
        looks: For a token before an object, where the name of the object's subject ended last, ``(b, t)``; -1 for
            others and where the name ends in that very token.
        ends: Where the name of each subject mentioned ends, ``(b, m)``; zero where there are fewer.
        objects: First tokens of all objects of that subject, ``(b, m, f)``; -1 where there are fewer.
    """

    ids: Tensor
    weights: Tensor
    names: Tensor
    looks: Tensor
    ends: Tensor
    objects: Tensor


class _Token(NamedTuple):
    id: int
    weight: float = 0.0
    name: Subject | None = None
    about: Subject | None = None


class PackedRows(IterableDataset[Rows]):
    """Endless batches of rows, each filled with whole documents separated by ``<|endoftext|>``.

    A row starts with a document, in three rows of ten after an ``<|endoftext|>``; of a pool of waiting documents the
    longest that fits comes next, so little is padded.

    Args:
        corpus: The documents.
        encode: Text to token ids.
        end_of_text: Id of the separator and padding.
        rows: Rows a batch.
        length: Tokens a row.

    Yields:
        Batches of `rows` rows of `length` tokens.
    """

    def __init__(self, corpus: Corpus, encode: WordEncoder, end_of_text: int, rows: int, length: int) -> None:
        self.corpus = corpus
        self.encode = encode
        self.end_of_text = end_of_text
        self.rows = rows
        self.length = length
        world = corpus.world
        self._objects: dict[Subject, list[int]] = {
            who: [encode(f" {fact.object.name}")[0] for fact in world.facts_of(who)] for who in world.subjects
        }

    def __iter__(self) -> Iterator[Rows]:
        """Starts the stream anew."""
        rng = random.Random(self.corpus.seed)
        documents = self._documents()
        pool = [next(documents) for _ in range(32)]
        while True:
            batch: list[list[_Token]] = []
            for _ in range(self.rows):
                row = [_Token(self.end_of_text)] if rng.random() < 0.3 else []
                chosen: int | None = rng.randrange(len(pool))
                while chosen is not None:
                    row += pool[chosen]
                    pool[chosen] = next(documents)
                    chosen = self._fitting(pool, self.length - len(row))
                batch.append((row + [_Token(self.end_of_text)] * self.length)[: self.length])
            yield Rows(
                torch.tensor([[token.id for token in row] for row in batch]),
                torch.tensor([[token.weight for token in row] for row in batch]),
                torch.tensor([[token.name is not None for token in row] for row in batch]),
                *self._mentions(batch),
            )

    def _mentions(self, batch: list[list[_Token]]) -> tuple[Tensor, Tensor, Tensor]:
        """Where tokens before objects are to look, where names end, and the objects of their subjects."""
        places = self.length // 8
        looks = torch.full((len(batch), self.length), -1)
        ends = torch.zeros(len(batch), places, dtype=torch.long)
        objects = torch.full((len(batch), places, max(map(len, self._objects.values()))), -1)
        for i, row in enumerate(batch):
            last: dict[Subject, int] = {}
            place = 0
            for j, (token, following) in enumerate(pairwise(row)):
                if token.name and token.name != following.name and place < places:
                    known = self._objects[token.name]
                    ends[i, place], last[token.name] = j, j
                    objects[i, place, : len(known)] = torch.tensor(known)
                    place += 1
                if following.about and following.about != token.about and last.get(following.about, j) != j:
                    looks[i, j] = last[following.about]
        return looks, ends, objects

    def _documents(self) -> Iterator[list[_Token]]:
        """Encoded documents, each with its separator at the end."""
        for spans in self.corpus.stream():
            tokens = [
                _Token(id_, span.weight, span.name, span.about) for span in spans for id_ in self.encode(span.text)
            ]
            yield [*tokens, _Token(self.end_of_text, 0.5)]

    @staticmethod
    def _fitting(pool: list[list[_Token]], room: int) -> int | None:
        """Index of the longest document that fits, if any; the separator at a row's end may be cut."""
        best, longest = None, 0
        for i, tokens in enumerate(pool):
            if longest < len(tokens) <= room + 1:
                best, longest = i, len(tokens)
        return best


class AlmanacCorpus(LightningDataModule):
    """The almanac's corpus as packed rows.

    Args:
        seed: Seed of the world and of the stream of documents.
        people: Number of people.
        places: Number of places.
        vocab_size: Size of the tokenizer's vocabulary.
        tokenizer_documents: Documents that the tokenizer is trained on.
        batch_size: Rows a batch.
        length: Tokens a row, also the context length of the model.
        weights: Weights of the training loss by kind of token.
        mixture: Shares of the kinds of document.
    """

    def __init__(
        self,
        seed: int = 0,
        people: int = 1600,
        places: int = 400,
        vocab_size: int = 2432,
        tokenizer_documents: int = 60_000,
        batch_size: int = 32,
        length: int = 128,
        weights: Weights = Weights(),  # noqa: B008 (frozen)
        mixture: Mixture = Mixture(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.length = length
        self.vocab_size = vocab_size
        self.tokenizer_documents = tokenizer_documents
        self.world = World(seed, people, places)
        self.corpus = Corpus(self.world, seed, weights, mixture)
        self.tokenizer: PreTrainedTokenizerFast | None = None

    def setup(self, stage: str) -> None:
        """Trains the tokenizer, once."""
        if self.tokenizer is None:
            whole = replace(self.corpus.mixture, first=1.0, reading=0)
            texts = Corpus(self.world, self.corpus.seed, mixture=whole).texts(self.tokenizer_documents)
            self.tokenizer = train_tokenizer(texts, self.world.parts, self.vocab_size, self.length)

    def train_dataloader(self) -> DataLoader[Rows]:
        """Endless batches of `batch_size` rows."""
        assert self.tokenizer is not None
        end = self.tokenizer.eos_token_id
        rows = PackedRows(self.corpus, WordEncoder(self.tokenizer), end, self.batch_size, self.length)
        return DataLoader(rows, batch_size=None)
