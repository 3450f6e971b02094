"""A DataLoader that goes on inside an interrupted epoch: the batches already trained on are skipped unread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler


class _Skipping(Sampler[list[int]]):
    def __init__(self, sampler: Sampler[Any], batch_size: int, drop_last: bool) -> None:
        self.sampler = sampler  # Lightning calls its set_epoch
        self.batches = BatchSampler(sampler, batch_size, drop_last)
        self.skip = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        return islice(iter(self.batches), skip, None)


class EpochSteps(Sampler[Any]):
    """(epoch, step) in order, for datasets that make a batch from them; Lightning calls `set_epoch`.

    Args:
        steps: of an epoch.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that epoch's."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, step) for step in range(self.steps))


def only(items: list[Any]) -> Any:
    """The one item, which is a batch already."""
    (item,) = items
    return item


class ResumableLoader(DataLoader[Any]):
    """Batches of a dataset with indices; Lightning saves and restores how many the epoch has given.

    The order must follow from the epoch alone, as with `DistributedSampler`. A resumed epoch sees the remaining images in
    the same order; random augmentation draws anew.

    Args:
        dataset: with `__getitem__`.
        sampler: indices of an epoch.
        batch_size: images a batch.
        collate_fn: items → batch.
        drop_last: leave out an incomplete last batch.
        others: of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Sampler[Any],
        batch_size: int,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        **others: Any,
    ) -> None:
        self._skipping = _Skipping(sampler, batch_size, drop_last)
        self._given = 0
        super().__init__(dataset, batch_sampler=self._skipping, collate_fn=collate_fn, **others)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._given = self._skipping.skip
        for batch in super().__iter__():
            self._given += 1
            yield batch
        self._given = 0

    def state_dict(self) -> dict[str, int]:
        """Batches given in the epoch under way; none of the next once the last was given."""
        return {"batches": self._given % max(1, len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip that many at the start of the next epoch."""
        self._skipping.skip = state["batches"]
