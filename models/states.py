"""States of language models, as trees of NamedTuples and tuples with tensors at the leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def mapped(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with every tensor changed."""
    if isinstance(state, Tensor):
        return change(state)
    if state is None or isinstance(state, (int, float, bool)):
        return state
    parts = [mapped(part, change) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def leaves(state: Any) -> Iterator[Tensor]:
    """Every tensor of the tree."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from leaves(part)


def detach(state: Any) -> Any:
    """The same numbers without their history: what truncated backpropagation keeps between steps."""
    return mapped(state, Tensor.detach)


def nbytes(state: Any) -> int:
    """Bytes of all tensors."""
    return sum(leaf.nbytes for leaf in leaves(state))


def shapes(state: Any) -> list[tuple[int, ...]]:
    """The shape of every tensor."""
    return [tuple(leaf.shape) for leaf in leaves(state)]


def rows(state: Any) -> int:
    """Rows of the batch that the state belongs to."""
    return next(leaves(state)).shape[0]
