"""Whether a model tells exactly what it read before: by token, by whole answer, and by where the answer lay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from tasks.metrics.bits_per_byte import IGNORED


class Recall(Metric):
    """Exact match of the most likely tokens with the targets.

    `compute()` gives float64 scalars: `accuracy`, the share of rows with every target right; `token_accuracy`, the share
    of targets; and `DEPTH/accuracy` by the middle of a bin of depth, such as `0.25/accuracy`, where rows fell into it.
    Shares of nothing are NaN.

    A row that comes in several segments counts where its targets lie, so these must lie in one of them; a segment
    without targets changes nothing.

    Args:
        bins: of equal width over the depths 0 … 1.
        kwargs: of torchmetrics.Metric.

    Raises:
        ValueError: bins is not at least 1.
    """

    higher_is_better = True
    full_state_update = False
    right_tokens: Tensor
    tokens: Tensor
    right_rows: Tensor
    rows: Tensor
    right_by_depth: Tensor
    rows_by_depth: Tensor

    def __init__(self, bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bins < 1:
            raise ValueError(f"bins={bins}: needs at least 1")
        self.bins = bins
        for name in ("right_tokens", "tokens", "right_rows", "rows"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("right_by_depth", "rows_by_depth"):
            self.add_state(name, torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, predictions: Tensor, targets: Tensor, depth: Tensor) -> None:
        """Adds a batch.

        Args:
            predictions: (b, t) int64, the most likely token.
            targets: (b, t) int64, −100 where ignored.
            depth: (b,) where in the text the answer lies, 0 … 1; NaN, which no bin counts, where that means nothing.

        Raises:
            ValueError: shapes differ, or a depth lies outside 0 … 1.
        """
        if predictions.shape != targets.shape or depth.shape != targets.shape[:1]:
            shapes = ", ".join(str(tuple(each.shape)) for each in (predictions, targets, depth))
            raise ValueError(f"predictions, targets and depth must be (b, t), (b, t) and (b,), got {shapes}")
        if ((depth < 0) | (depth > 1)).any():
            raise ValueError(f"depth must lie in 0 … 1, got {depth.tolist()}")
        asked = targets != IGNORED
        right = asked & (predictions == targets)
        answered = asked.any(1)
        whole = answered & (right == asked).all(1)
        self.right_tokens += right.sum()
        self.tokens += asked.sum()
        self.right_rows += whole.sum()
        self.rows += answered.sum()
        placed = answered & ~depth.isnan()
        bins = depth.nan_to_num().mul(self.bins).long().clamp(max=self.bins - 1)  # depth 1 belongs to the last bin
        self.right_by_depth.index_add_(0, bins, (whole & placed).double())
        self.rows_by_depth.index_add_(0, bins, placed.double())

    def compute(self) -> dict[str, Tensor]:
        shares = {"accuracy": self.right_rows / self.rows, "token_accuracy": self.right_tokens / self.tokens}
        by_depth = self.right_by_depth / self.rows_by_depth
        for index in self.rows_by_depth.nonzero().flatten().tolist():
            shares[f"{round((index + 0.5) / self.bins, 3):g}/accuracy"] = by_depth[index]
        return shares
