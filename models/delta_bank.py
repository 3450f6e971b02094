"""A bank that is one matrix a head, written by the gated delta rule (arXiv 2412.06464; parallel form: 2406.06484)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

from models.stream import Span


class DeltaState(NamedTuple):
    """Matrices that map keys to values, float32: those that tokens read, and those being written in the chunk so far.

    Attributes:
        committed: (b, h, d, d) as the chunk began.
        running: (b, h, d, d) with the chunk's tokens so far; the same numbers as `committed` after a chunk's end.
        recent: (b, taps − 1, width) projected to keys, the last tokens of the document; zeros where there are fewer.
    """

    committed: Tensor
    running: Tensor
    recent: Tensor


class DeltaBank(nn.Module):
    """S ← α S (I − β k kᵀ) + β v kᵀ for every pooled token: what S held for the key k fades by 1 − β and v moves in.

    Keys and queries are of length 1: a write then changes S along k alone and never makes what is stored grow, and a
    read S q with the query on a stored key gives back the value itself, as large as when it was written, so it needs no scale.
    Tokens read S as it was when their chunk began, whatever the chunk has written since.

    Keys are convolved over the last tokens, channel by channel (arXiv 2412.06464), so that a value can be stored under what
    the token before it named; without that, a layer binds each token to itself alone.

    The state takes 2 · width² / heads + (taps − 1) · width float32 numbers a row: h matrices of d × d, committed and
    running, and the tokens that the convolution looks back at.

    Args:
        width: channels.
        heads: of width / heads channels each.
        decay: whether α may be below 1.
        half_lives: tokens after which a head's memory has halved at the start of training, by decay alone and with the
            gate's input at zero: spread evenly in the logarithm from the first head to the last, many chunks each.
        strength: β at the start of training, with the gate's input at zero. Keys at random overwrite each other too: of
            a value, exp(−β n / d) is left after n writes, so that β = ½ would leave little after a chunk of 4 d tokens.
        taps: tokens that a key is made of, its own the last; 1 is no convolution.

    Raises:
        ValueError: for heads that don't divide the width, or gates that can't begin where they are asked to.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        decay: bool = True,
        half_lives: tuple[float, float] = (2.0**11, 2.0**16),
        strength: float = 0.05,
        taps: int = 4,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"DeltaBank: {heads} heads don't divide a width of {width}")
        if not 0 < strength < 1:
            raise ValueError(f"DeltaBank: strength is {strength}, not between 0 and 1")
        if min(half_lives) <= 0:
            raise ValueError(f"DeltaBank: half_lives are {tuple(half_lives)}, not above 0")
        if taps < 1:
            raise ValueError(f"DeltaBank: taps is {taps}, not at least 1")
        self.heads, self.taps = heads, taps
        self.convolution = nn.Parameter(torch.empty(taps, width).uniform_(-1, 1) * taps**-0.5) if taps > 1 else None
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.write_gate = nn.Linear(width, heads, bias=False)
        self.write_gate_bias = nn.Parameter(torch.full((heads,), math.log(strength / (1 - strength))))
        self.decay_gate = nn.Linear(width, heads, bias=False) if decay else None
        if decay:
            first, last = (math.log(tokens) for tokens in half_lives)
            rate = math.log(2) / torch.linspace(first, last, heads, dtype=torch.float64).exp()  # −log α
            self.decay_gate_bias = nn.Parameter(rate.expm1().log().float())  # softplus of it is the rate

    def gate_parameters(self) -> list[nn.Parameter]:
        """What a higher learning rate is for, beside the fusion."""
        return [self.write_gate_bias] if self.decay_gate is None else [self.write_gate_bias, self.decay_gate_bias]

    def initial(self, rows: int, device: torch.device | str | None = None) -> DeltaState:
        """Nothing stored."""
        size = self.query.in_features // self.heads
        none = torch.zeros(rows, self.heads, size, size, device=device)
        return DeltaState(none, none, torch.zeros(rows, self.taps - 1, self.query.in_features, device=device))

    def forward(self, x: Tensor, state: DeltaState, span: Span) -> tuple[Tensor, DeltaState]:
        """See `models.bank.Bank`."""
        kind = torch.promote_types(x.dtype, torch.float32)
        shape = (self.heads, x.shape[-1] // self.heads)
        key, value = self.key_value(x).unflatten(-1, (2, *shape)).to(kind).unbind(-3)  # (b, k, t, h, d)
        query = self.query(x) if span.reads else None
        with torch.autocast(x.device.type, enabled=False):
            strength, log_decay = self.gates(x.to(kind))
            strength, log_decay = (gate * span.pooled[..., None] for gate in (strength, log_decay))  # β = 0, α = 1
            # A piece that begins no document goes on from what the chunk's earlier pieces wrote, also before the first
            # commit; where a document began, the chunk's last one isn't the bank's.
            first = span.continues[:, :1] | ~span.restarts[:, None]
            continues = torch.cat((first, span.continues[:, 1:]), 1)
            key, recent = self._convolved(key, state.recent, span.pooled, continues)
            writes = [part.transpose(2, 3) for part in (_unit(key), value, strength, log_decay)]  # (b, k, h, t, …)
            states = delta_chunks(state.running.to(kind), writes[0], writes[1], writes[2], writes[3], continues)
            committed = state.committed.to(kind)
            if query is None:
                read = torch.zeros_like(value)
            else:
                before = torch.stack((committed, *states[:-1]), 1)  # (b, k, h, d, d)
                query = _unit(query.unflatten(-1, shape).to(kind)) * span.recalls[..., None, None]
                read = torch.einsum("bkhij,bkthj->bkthi", before, query)
        return read, DeltaState(states[-1] if span.commits else committed, states[-1], recent)

    def _convolved(self, key: Tensor, recent: Tensor, pooled: Tensor, continues: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (b, k, t, h, d), each with those of its document before it, and what the next ones will look back at."""
        if self.convolution is None:
            return key, recent
        weight, (b, k, t, heads, size) = self.convolution.to(key.dtype), key.shape
        tokens = torch.cat((recent.to(key.dtype), (key * pooled[..., None, None]).reshape(b, k * t, -1)), 1)
        memory = (~continues).cumsum(1)  # numbers the memories that chunks write to
        memory = memory[..., None].expand(b, k, t).flatten(1)
        written = torch.cat((torch.zeros_like(recent[..., 0], dtype=memory.dtype), memory), 1)
        convolved = torch.zeros_like(tokens[:, : k * t])
        for tap, scale in enumerate(weight):
            reached = slice(tap, tap + k * t)
            convolved = convolved + scale * tokens[:, reached] * (written[:, reached] == memory)[..., None]
        back = self.taps - 1
        left = tokens[:, -back:] * (written[:, -back:] == memory[:, -1:])[..., None]
        return convolved.view(b, k, t, heads, size), left

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(*, c) → β and log α, each (*, h), in the dtype of x: bfloat16 couldn't tell an α of 0.9997 from 1."""
        strength = (linear(x, self.write_gate.weight.to(x.dtype)) + self.write_gate_bias.to(x.dtype)).sigmoid()
        if self.decay_gate is None:
            return strength, torch.zeros_like(strength)
        return strength, logsigmoid(-linear(x, self.decay_gate.weight.to(x.dtype)) - self.decay_gate_bias.to(x.dtype))


def delta_reference(
    state: Tensor, key: Tensor, value: Tensor, strength: Tensor, log_decay: Tensor, continues: Tensor
) -> list[Tensor]:
    """The gated delta rule as it is defined, token by token.

    Args:
        state: (b, h, d, d) what the first chunk begins with.
        key, value: (b, k, h, t, d) of k chunks.
        strength, log_decay: (b, k, h, t) β and log α.
        continues: (b, k) bool: False where the chunk begins with zero instead of what the one before left.

    Returns:
        What each of the k chunks left, (b, h, d, d).
    """
    states = []
    for chunk in range(key.shape[1]):
        state = torch.where(continues[:, chunk, None, None, None], state, 0)
        for token in range(key.shape[3]):
            k, v = key[:, chunk, :, token, :, None], value[:, chunk, :, token, :, None]  # (b, h, d, 1)
            beta, alpha = strength[:, chunk, :, token, None, None], log_decay[:, chunk, :, token, None, None].exp()
            state = alpha * (state - beta * (state @ k) @ k.mT) + beta * v @ k.mT
        states.append(state)
    return states


def delta_chunks(
    state: Tensor,
    key: Tensor,
    value: Tensor,
    strength: Tensor,
    log_decay: Tensor,
    continues: Tensor,
    block: int = 64,
) -> list[Tensor]:
    """`delta_reference` with up to `block` tokens at once: one batched triangular solve, then a scan over blocks.

    Token t adds u_t k_tᵀ to the state, u_t = β_t (v_t − α_t S_{t−1} k_t). With S written out as the decayed sum of what it
    began with and of the earlier additions, (I + A) U = β (V − γ K S₀ᵀ), where A_ti = β_t (γ_t / γ_i) k_t·k_i for i < t and
    γ_t is the product of α up to t. U is linear in S₀, which alone isn't known before the scan.
    """
    blocks = -(-key.shape[3] // block)  # of a chunk
    if blocks > 1:
        key, value, strength, log_decay = (_cut(part, blocks, block) for part in (key, value, strength, log_decay))
        inner = torch.ones_like(continues)[..., None].expand(-1, -1, blocks - 1)
        continues = torch.cat((continues[..., None], inner), -1).flatten(1)
    # Sums of log α after i up to t, added up anew for each i: differences of one running sum would cancel.
    between = log_decay[..., None].expand(*log_decay.shape, log_decay.shape[-1]).tril(-1).cumsum(-2)  # (…, t, i)
    since = log_decay.cumsum(-1)[..., None].exp()  # (…, t, 1)
    beta = strength[..., None]
    coupling = beta * between.exp() * (key @ key.mT)  # no more than its part below the diagonal is looked at
    right = torch.cat((beta * value, beta * since * key), -1)
    added, erased = torch.linalg.solve_triangular(coupling, right, upper=False, unitriangular=True).chunk(2, -1)
    kept = between[..., -1, :, None].exp() * key  # (b, k, h, t, d)
    states = []
    for index in range(key.shape[1]):
        state = torch.where(continues[:, index, None, None, None], state, 0)
        update = added[:, index] - erased[:, index] @ state.mT  # U
        state = since[:, index, :, -1:] * state + update.mT @ kept[:, index]
        states.append(state)
    return states[blocks - 1 :: blocks]


def _cut(x: Tensor, blocks: int, block: int) -> Tensor:
    """(b, k, h, t, …) → (b, k · blocks, h, block, …); zeros, which write and fade nothing, fill up the last."""
    missing = x.new_zeros(*x.shape[:3], blocks * block - x.shape[3], *x.shape[4:])
    return torch.cat((x, missing), 3).unflatten(3, (blocks, block)).transpose(2, 3).flatten(1, 2)


def _unit(x: Tensor) -> Tensor:
    """Of length 1; the small number keeps the gradient of a vanishing vector finite."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
