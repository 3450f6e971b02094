"""How probable recorded values are under what simulations of the same scene did: smoothed histograms an object."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Histogram:
    """`bins` equal bins over [low, high], values outside counted in the end bins, `pseudocount` added to each bin."""

    low: float
    high: float
    bins: int
    pseudocount: float = 0.1

    def log_likelihood(self, logged: Tensor, simulated: Tensor, count_undefined: bool = True) -> Tensor:
        """Log probability of each logged value's bin under the simulated values of the same object.

        Args:
            logged: (e, s) values.
            simulated: (e, n) values.
            count_undefined: whether NaN counts as a simulated value of the last bin; otherwise it is left out.

        Returns:
            (e, s) float64.
        """
        inner = torch.linspace(self.low, self.high, self.bins + 1, dtype=simulated.dtype, device=simulated.device)[1:-1]
        # NaN sorts behind every edge, so it falls in the last bin.
        place = torch.bucketize(simulated.contiguous(), inner, right=True)
        row = torch.arange(len(simulated), device=simulated.device)[:, None]
        flat = place + self.bins * row
        if not count_undefined:
            flat = flat[~simulated.isnan()]
        counts = torch.bincount(flat.flatten(), minlength=self.bins * len(simulated)).view(-1, self.bins).double()
        counts += self.pseudocount
        log_probability = (counts / counts.sum(-1, keepdim=True)).log()
        return log_probability.gather(1, torch.bucketize(logged.contiguous(), inner, right=True))


@dataclass(frozen=True)
class Bernoulli:
    """Two bins, False and True, with `pseudocount` added to each."""

    pseudocount: float = 0.001

    def log_likelihood(self, logged: Tensor, simulated: Tensor) -> Tensor:
        """Log probability of each logged value under the simulated ones of the same object.

        Args:
            logged: (e,) bool.
            simulated: (e, n) bool.

        Returns:
            (e,) float64.
        """
        matching = (simulated == logged[:, None]).sum(-1).double()
        return ((matching + self.pseudocount) / (simulated.shape[-1] + 2 * self.pseudocount)).log()


def mean_where(values: Tensor, valid: Tensor) -> Tensor:
    """() mean over the valid entries; NaN where there are none."""
    return torch.where(valid, values, 0).sum() / valid.sum()
