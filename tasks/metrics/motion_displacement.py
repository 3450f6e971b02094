"""minADE and minFDE of motion forecasting (arXiv 2104.10133): the error of the best of up to six joint futures."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.metrics.motion_tracks import Groups


def displacements(trajectories: Tensor, groups: Groups) -> Tensor:
    """(m, k, n, 16) distance in metres between (m, k, n, 16, 2) predictions and the recorded positions."""
    return (trajectories.double() - groups.positions[:, None]).norm(dim=-1)


def _minimum(errors: Tensor, measured: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    # A group counts only if every one of its agents was measured.
    counted = (measured | ~member).all(-1)
    joint = (errors * member[:, None]).sum(-1) / member.sum(-1)[:, None]
    return torch.where(counted, joint.amin(1), 0.0), counted


def min_average(errors: Tensor, groups: Groups, step: int) -> tuple[Tensor, Tensor]:
    """minADE up to the predicted step: the mean over an agent's valid steps, over the group's agents, the least of k.

    Args:
        errors: (m, k, n, 16) metres.
        groups: the recorded tracks.
        step: index of the last predicted step that counts.

    Returns:
        (m,) metres, and (m,) bool that is False where an agent of the group has no valid step (the value is 0 then).
    """
    valid = groups.valid[..., : step + 1]
    total = torch.where(valid[:, None], errors[..., : step + 1], 0.0).sum(-1)
    return _minimum(total / valid.sum(-1).clamp(min=1)[:, None], valid.any(-1), groups.member)


def min_final(errors: Tensor, groups: Groups, step: int) -> tuple[Tensor, Tensor]:
    """minFDE at the predicted step; arguments and results as in `min_average`, a group counts if all are valid there."""
    valid = groups.valid[..., step]
    return _minimum(torch.where(valid[:, None], errors[..., step], 0.0), valid, groups.member)
