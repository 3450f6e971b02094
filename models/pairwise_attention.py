"""Query-centric relative pose encoding (QCNet, CVPR 2023), densely: an MLP of every pair's distance, bearing and relative
heading is added to keys and values. The baseline whose memory grows with N² that rotary poses are measured against."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.pose_attention import Keys, Visible, split_heads

_METRES = 10.0  # brings distances to the order of one
_STEPS = 4.0  # and time differences
_PAIRS = 2**19  # pairs at once where no gradient is wanted


class RawPoses(nn.Module):
    """Poses as they are: pair terms are built from them anew for every query.

    Args:
        heads, head_dim: of the attention, which don't matter here.
    """

    def __init__(self, *, heads: int, head_dim: int) -> None:
        super().__init__()

    def forward(self, pose: Tensor) -> Tensor:
        """(*b, n, 3 | 4), unchanged."""
        return pose


def pair_features(query: Tensor, key: Tensor) -> Tensor:
    """What a query sees of a key's pose, unchanged by rigid motions and by whole turns of any heading.

    Args:
        query, key: (*b, q, 3 | 4) and (*b, n, 3 | 4) x, y, heading[, time].

    Returns:
        (*b, q, n, 6 | 7): logarithmic and linear distance, cos and sin of the bearing, cos and sin of the relative heading
        [, time difference]. The bearing of an equal place is zero in both.
    """
    delta = key[..., None, :, :] - query[..., :, None, :]
    distance = delta[..., :2].norm(dim=-1)
    heading = query[..., :, None, 2]
    ahead = heading.cos() * delta[..., 0] + heading.sin() * delta[..., 1]
    left = heading.cos() * delta[..., 1] - heading.sin() * delta[..., 0]
    far = distance.clamp(min=1e-6)  # metres: a micrometre has no direction
    columns = [distance.log1p(), distance / _METRES, ahead / far, left / far, delta[..., 2].cos(), delta[..., 2].sin()]
    if query.shape[-1] == 4:
        columns.append(delta[..., 3] / _STEPS)
    return torch.stack(columns, dim=-1)


class PairwiseAttention(nn.Module):
    """k_ij = k_j + r^k_ij and v_ij = v_j + r^v_ij, with r_ij an MLP of the pair's relative pose. Same interface as
    `RotaryAttention`; its phases are the poses themselves (`RawPoses`).

    Args:
        width: channels of tokens, in and out, and of the MLP.
        heads, head_dim: heads and channels of a head.
        timed: poses have a time; the MLP reads its difference.
    """

    def __init__(self, *, width: int, heads: int, head_dim: int, timed: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query = nn.Linear(width, heads * head_dim)
        self.key_value = nn.Linear(width, 2 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)
        self.pair = nn.Sequential(
            nn.Linear(7 if timed else 6, width), nn.GELU(), nn.Linear(width, 2 * heads * head_dim)
        )
        self.extra_parameters = sum(parameter.numel() for parameter in self.pair.parameters())

    def keys(self, x: Tensor, place: Tensor | None) -> Keys:
        """Content keys and values of tokens (*b, n, c), with their poses (*b, n, 3 | 4)."""
        key, value = split_heads(self.key_value(x), 2 * self.heads).chunk(2, dim=-3)
        return Keys(key, value, place)

    def forward(self, x: Tensor, place: Tensor | None, keys: Keys, seen: Visible | None = None) -> Tensor:
        """As `RotaryAttention.forward`, with poses (*b, q, 3 | 4) for `place`.

        Raises:
            ValueError: queries or keys come without poses.
        """
        if place is None or keys.place is None:
            raise ValueError("PairwiseAttention needs the poses of queries and keys, got None")
        query = split_heads(self.query(x), self.heads)
        rows = x.shape[-2]
        if not torch.is_grad_enabled():
            rows = max(1, min(rows, _PAIRS // max(1, math.prod(x.shape[:-2]) * keys.key.shape[-2])))
        parts = []
        for start in range(0, x.shape[-2], rows):
            asked = slice(start, start + rows)
            bias = None
            if seen is not None:
                bias = seen.bias if seen.bias.shape[-2] == 1 else seen.bias[..., asked, :]
            parts.append(self._attend(query[..., asked, :], place[..., asked, :], keys, bias))
        out = self.out(torch.cat(parts, dim=-2))
        return out if seen is None else torch.where(seen.some, out, 0.0)

    def _attend(self, query: Tensor, place: Tensor, keys: Keys, bias: Tensor | None) -> Tensor:
        assert keys.place is not None
        features = pair_features(place, keys.place).to(query.dtype)
        pair = self.pair(features).unflatten(-1, (2 * self.heads, self.head_dim))  # (*b, q, n, 2h, d)
        pair_key, pair_value = pair.chunk(2, dim=-2)
        logits = query @ keys.key.mT + torch.einsum("...hqd,...qnhd->...hqn", query, pair_key)
        logits = logits * self.head_dim**-0.5
        if bias is not None:
            shade = bias.unsqueeze(-3)
            logits = logits.masked_fill(~shade, float("-inf")) if shade.dtype == torch.bool else logits + shade
        weights = logits.softmax(-1)
        attended = weights @ keys.value + torch.einsum("...hqn,...qnhd->...hqd", weights, pair_value)
        return attended.transpose(-3, -2).flatten(-2)  # (*b, q, h · d)
