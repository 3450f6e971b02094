"""The datamodule of all synthetic families: rows drawn anew for every batch, from seeds that say which batch it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, cast

import numpy as np
import pytorch_lightning as lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import TokenBatch
from datamodules.embedded_source import SourceError
from datamodules.resumable import EpochSteps, ResumableLoader, only
from datamodules.synthetic.sample import Family, Sample
from datamodules.text_documents import SPLITS, Split


def token_batch(sample: Sample) -> TokenBatch:
    """A sample as whole rows; a target is one byte where it is text, else none."""
    tokens, targets = torch.from_numpy(sample.tokens), torch.from_numpy(sample.targets)
    rows, length = tokens.shape
    return TokenBatch(
        tokens=tokens,
        targets=targets,
        position=torch.arange(length).expand(rows, length).contiguous(),
        bytes=((targets != -100) & sample.text).long(),
        fresh=torch.ones(rows, dtype=torch.bool),
        depth=torch.from_numpy(sample.depth),
        references=sample.references,
    )


def segment_of(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    """Columns start … stop − 1 of whole rows; only the first are fresh, references go with the first target."""
    asked = (batch.targets != -100).any(0).nonzero()[:, 0]  # columns
    answers = len(asked) > 0 and start <= int(asked[0]) < stop
    return TokenBatch(
        tokens=batch.tokens[:, start:stop],
        targets=batch.targets[:, start:stop],
        position=batch.position[:, start:stop],
        bytes=batch.bytes[:, start:stop],
        fresh=batch.fresh if start == 0 else torch.zeros_like(batch.fresh),
        depth=batch.depth,
        references=batch.references if answers else (),
    )


def unasked(batch: TokenBatch) -> TokenBatch:
    """The same rows without a target."""
    targets, nothing = torch.full_like(batch.targets, -100), torch.zeros_like(batch.bytes)
    return batch._replace(targets=targets, bytes=nothing, references=())


class TrainingBatches(Dataset[TokenBatch]):
    """Batches by (epoch, step); all ranks draw the same length and different rows.

    Args:
        family: the problem.
        rows: rows a batch.
        lengths: those to draw from.
        steps: batches an epoch.
        seed: of everything.
        rank: of this process.
    """

    def __init__(self, family: Family, rows: int, lengths: Sequence[int], steps: int, seed: int, rank: int) -> None:
        self.family = family
        self.rows = rows
        self.lengths = lengths
        self.steps = steps
        self.seed = seed
        self.rank = rank

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: tuple[int, int]) -> TokenBatch:
        words = (self.seed, SPLITS.index("train"), *index)
        drawn = np.random.default_rng(np.random.SeedSequence(words)).integers(len(self.lengths))
        rng = np.random.default_rng(np.random.SeedSequence((*words, self.rank)))
        return token_batch(self.family(rng, self.rows, self.lengths[int(drawn)]))


class HeldOutBatches(Dataset[TokenBatch]):
    """Batches of whole rows, the same every time, read by (batch, first column).

    The batch read last is kept, so that its segments are cut from one draw. Batches behind the last are there to read, so
    that all ranks take as many steps, but ask nothing.

    Args:
        family: the problem.
        batches: those that ask.
        rows: rows a batch.
        length: tokens a row.
        segment: tokens of a segment, at most.
        split: "val" or "test".
        seed: of everything.
    """

    def __init__(
        self, family: Family, batches: int, rows: int, length: int, segment: int, split: Split, seed: int
    ) -> None:
        self.family = family
        self.batches = batches
        self.rows = rows
        self.length = length
        self.segment = segment
        self.split = split
        self.seed = seed
        self._kept: tuple[int, TokenBatch] | None = None

    def __getitem__(self, index: tuple[int, int]) -> TokenBatch:
        number, start = index
        if self._kept is None or self._kept[0] != number:
            rng = np.random.default_rng(np.random.SeedSequence((self.seed, SPLITS.index(self.split), 0, number, 0)))
            batch = token_batch(self.family(rng, self.rows, self.length))
            check_uncut(batch.targets, self.segment)
            self._kept = number, batch if number < self.batches else unasked(batch)
        whole = self._kept[1]
        return segment_of(whole, start, min(start + self.segment, self.length))


def check_uncut(targets: Tensor, segment: int) -> None:
    """Whether a row's targets (b, t) lie in one segment each, as who counts whole answers takes for granted.

    Raises:
        ValueError: they don't.
    """
    length, asked = targets.shape[1], targets != -100
    pieces = (torch.arange(length) // segment).expand_as(targets)
    if (pieces.where(asked, -1).amax(1) > pieces.where(asked, length).amin(1)).any():
        raise ValueError(
            f"datamodule.segment={segment} cuts answers in rows of datamodule.eval_length={length}; "
            "set datamodule.segment=null, or one that holds them"
        )


def held_out_family(family: Family, split: Split) -> Family:
    """The family for a held-out split; see `Family`."""
    change = getattr(family, "for_split", None)
    return family if change is None else change(split)


class SyntheticText(lightning.LightningDataModule):
    """Rows of a synthetic family as `TokenBatch`es; every row is a document of its own.

    Training draws a length for each batch; validation and test are the same rows every time and whatever the training's
    seed, on any number of ranks, which share the batches out. Where rows are made of documents, those of validation and
    test are made of held-out ones.

    Args:
        family: the problem.
        vocabulary: for configs to read; the family's.
        bos: for configs to read: the token that begins a document, None where the family has none.
        batch_size: rows a training batch and rank.
        length: tokens of a training row, or (least, greatest).
        multiple: drawn lengths are multiples of this.
        steps: training batches an epoch and rank.
        eval_length: tokens of a held-out row; None takes the greatest in training.
        eval_batches: held-out batches over all ranks.
        eval_batch_size: rows of a held-out batch; None takes `batch_size`.
        segment: hand held-out rows over in pieces of this many tokens, one batch after another; None leaves them whole, as
            targets in more than one piece need it.
        num_workers: loader processes of training.
        seed: of training rows, 0 … 2³² − 1.
        eval_seed: of held-out rows, likewise.

    Raises:
        ValueError: a number out of its range, another vocabulary than the family's, lengths that the family refuses, or a
            segment that cuts answers.
        OSError, SourceError: what the family is made of cannot be had.
    """

    def __init__(
        self,
        family: Family,
        vocabulary: int,
        bos: int | None = None,
        batch_size: int = 32,
        length: int | Sequence[int] = 256,
        multiple: int = 1,
        steps: int = 100,
        eval_length: int | None = None,
        eval_batches: int = 8,
        eval_batch_size: int | None = None,
        segment: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        eval_seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "multiple": multiple, "steps": steps, "eval_batches": eval_batches}
        given = {"eval_length": eval_length, "eval_batch_size": eval_batch_size, "segment": segment}
        for name, count in (counts | {name: n for name, n in given.items() if n is not None}).items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"datamodule.{name} is {count}, expected a whole number, at least 1")
        for name, given_seed in {"seed": seed, "eval_seed": eval_seed}.items():
            if not isinstance(given_seed, int) or not 0 <= given_seed < 2**32:
                raise ValueError(f"datamodule.{name} is {given_seed}, expected a whole number, 0 … {2**32 - 1}")
        if not isinstance(num_workers, int) or num_workers < 0:
            raise ValueError(f"datamodule.num_workers is {num_workers}, expected a whole number, at least 0")
        if vocabulary != family.vocabulary:
            raise ValueError(
                f"datamodule.vocabulary is {vocabulary}, but {type(family).__name__} has {family.vocabulary} tokens"
            )
        if bos is not None and not 0 <= bos < vocabulary:
            raise ValueError(f"datamodule.bos is {bos}, expected null or a token, 0 … {vocabulary - 1}")
        self.family = family
        self.vocabulary = vocabulary
        self.bos = bos
        self.batch_size = batch_size
        self.lengths = _lengths(length, multiple)
        self.steps = steps
        self.eval_length = eval_length or self.lengths[-1]
        self.eval_batches = eval_batches
        self.eval_batch_size = eval_batch_size or batch_size
        self.segment = segment or self.eval_length
        self.num_workers = num_workers
        self.seed = seed
        self.eval_seed = eval_seed
        # The first two tell whether lengths between fit as well: a family that wants even ones refuses one of them.
        tried = {self.eval_length: "eval_length"} | dict.fromkeys([*self.lengths[:2], self.lengths[-1]], "length")
        for tokens, name in tried.items():
            try:
                family(np.random.default_rng(seed), 1, tokens)
            except SourceError:
                raise
            except ValueError as error:
                raise ValueError(f"datamodule.{name} of {tokens} tokens doesn't fit: {error}") from None
        if self.segment < self.eval_length:
            self._held_out_batches("val")[0, 0]  # refuses a segment that cuts answers

    def train_dataloader(self) -> DataLoader[TokenBatch]:
        """Returns batches of this rank, drawn anew each epoch; a resumed epoch goes on where it was cut."""
        rank, _ = self._rank_and_world()
        batches = TrainingBatches(self.family, self.batch_size, self.lengths, self.steps, self.seed, rank)
        return ResumableLoader(
            cast("Dataset[Any]", batches),
            EpochSteps(self.steps),
            batch_size=1,  # an item is a batch already
            collate_fn=only,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader[TokenBatch]:
        """Returns the validation batches of this rank, in order."""
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader[TokenBatch]:
        """Returns the test batches of this rank, in order."""
        return self._held_out("test")

    def _held_out(self, split: Split) -> DataLoader[TokenBatch]:
        rank, world = self._rank_and_world()
        if self.eval_batches < world:
            raise ValueError(f"datamodule.eval_batches is {self.eval_batches}, too few for {world} ranks")
        each = -(-self.eval_batches // world)
        order = list(product(range(rank, each * world, world), range(0, self.eval_length, self.segment)))
        # in this process, for segments of a batch are cut from one draw
        batches = self._held_out_batches(split)
        return DataLoader(batches, sampler=cast("Any", order), batch_size=1, collate_fn=only)

    def _held_out_batches(self, split: Split) -> HeldOutBatches:
        family, rows = held_out_family(self.family, split), self.eval_batch_size
        return HeldOutBatches(family, self.eval_batches, rows, self.eval_length, self.segment, split, self.eval_seed)

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _lengths(length: int | Sequence[int], multiple: int) -> Sequence[int]:
    ends = [length, length] if isinstance(length, int) else list(length)
    if len(ends) != 2 or not all(isinstance(end, int) for end in ends) or not 1 <= ends[0] <= ends[1]:
        raise ValueError(f"datamodule.length is {length}, expected a whole number or [least, greatest], at least 1")
    lengths = range(-(-ends[0] // multiple) * multiple, ends[1] + 1, multiple)
    if not lengths:
        raise ValueError(f"datamodule.length is {length}, which holds no multiple of datamodule.multiple={multiple}")
    return lengths
