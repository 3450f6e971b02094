"""A first-in-first-out memory of pooled chunks, gated as a recurrent network is (after arXiv 2507.00453)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.stream import Span


class FifoState(NamedTuple):
    """g groups of r slots, and what the r writers have pooled of the chunk so far, as sums of an online softmax.

    m · c + r · (c + 2) floats a row, m = g · r.

    Attributes:
        memory: (b, g, r, c) float32.
        writes: (b,) int64 chunks written since the bank was cleared; group writes mod g is overwritten next.
        peak: (b, r) float32 the largest logit so far, −∞ before the first.
        mass: (b, r) float32 sum of exp(logit − peak).
        sums: (b, r, c) float32 sum of exp(logit − peak) · token.
    """

    memory: Tensor
    writes: Tensor
    peak: Tensor
    mass: Tensor
    sums: Tensor


def ages(writes: Tensor, groups: int) -> Tensor:
    """How many writes ago each group was written: (…,) → (…, g) int64, meaningless where it never was."""
    return (writes[..., None] - 1 - torch.arange(groups, device=writes.device)) % groups


def gated(partner: Tensor, candidate: Tensor, gate: Tensor) -> Tensor:
    """(1 − gate) · partner + gate · candidate."""
    return torch.lerp(partner, candidate, gate)


def recall(logits: Tensor, null: Tensor) -> Tensor:
    """Softmax over slots beside a null slot, which takes a share too: where no slot is written the shares are exactly zero.

    Args:
        logits: (*b, m) of the slots, −∞ for one that isn't written.
        null: (*b,) of the null slot.

    Returns:
        Shares of the slots, (*b, m).
    """
    return torch.cat((null[..., None], logits), -1).softmax(-1)[..., 1:]


class AttentionPool(nn.Module):
    """Learned writers, each a query that attends over the tokens of a chunk.

    Args:
        width: channels.
        writers: r.
    """

    def __init__(self, width: int, writers: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(writers, width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(…, t, c) float32 → logits (…, r, t): of r queries, fewer than tokens, so that those are projected."""
        return (self.query.float() @ self.key.weight.float() * x.shape[-1] ** -0.5) @ x.mT

    def summary(self, x: Tensor) -> Tensor:
        """Values of what was pooled, (…, r, c) float32, which is what pooling the values gives."""
        return functional.linear(x, self.value.weight.float())


class MeanPool(nn.Module):
    """r copies of the mean: the pooling without parameters."""

    def __init__(self, width: int, writers: int) -> None:
        super().__init__()
        self.writers = writers

    def forward(self, x: Tensor) -> Tensor:
        """(…, t, c) float32 → logits (…, r, t), all zero."""
        return x.new_zeros(*x.shape[:-2], self.writers, x.shape[-2])

    def summary(self, x: Tensor) -> Tensor:
        """The mean itself."""
        return x


class FifoBank(nn.Module):
    """Each chunk is pooled to r vectors, gated against the newest slots, and takes the place of the oldest.

    Memory, gates and softmax are float32 under any autocast. No position reaches the memory but a learned bias by age.

    Args:
        width: channels of the tokens and of a slot.
        heads: h, which divides width.
        slots: m.
        writers: r slots that one chunk writes; divides m.
        pool: makes the pooling from `width` and `writers`.
        chained: gate against the newest slots, so that what was written once is handed on; if not, against those that
            are overwritten.
        gate_bias: the gate's at the start. At −1 three quarters of the partner are kept; at +1 a model learns to hand
            values on several times more slowly (docs/results/language.md).

    Raises:
        ValueError: the heads don't divide the width, or the writers the slots.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        slots: int,
        writers: int = 1,
        pool: Callable[[int, int], nn.Module] = AttentionPool,
        chained: bool = True,
        gate_bias: float = -1.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"bank: {heads} heads don't divide a width of {width}")
        if slots < 1 or writers < 1 or slots % writers:
            raise ValueError(f"bank: {writers} writers don't divide {slots} slots")
        self.width, self.heads, self.writers, self.groups = width, heads, writers, slots // writers
        self.chained, self.gate_bias = chained, gate_bias
        self.query = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.null = nn.Parameter(torch.zeros(heads, width // heads))
        self.age_bias = nn.Parameter(torch.zeros(heads, self.groups))
        self.pool: Any = pool(width, writers)
        self.candidate = nn.Linear(width, width)
        self.gate = nn.Linear(2 * width, width)

    def reset_gates(self) -> None:
        """Open the gate as far as `gate_bias` says; an initialiser of linear layers calls it last."""
        nn.init.constant_(self.gate.bias, self.gate_bias)

    def gate_parameters(self) -> list[nn.Parameter]:
        """What a higher learning rate is for, beside the fusion."""
        return [self.null, self.age_bias, self.gate.bias]

    def initial(self, rows: int, device: torch.device | str | None = None) -> FifoState:
        zeros = torch.zeros(rows, self.groups, self.writers, self.width, device=device)
        writes = torch.zeros(rows, dtype=torch.int64, device=device)
        peak = torch.full((rows, self.writers), -math.inf, device=device)
        return FifoState(zeros, writes, peak, torch.zeros_like(peak), torch.zeros_like(zeros[:, 0]))

    def forward(self, x: Tensor, state: FifoState, span: Span) -> tuple[Tensor, FifoState]:
        pooled = self._pooled(x, state, span)
        memories, writes = state.memory[:, None], state.writes[:, None]  # before each of the k chunks
        if span.commits:
            memories, writes, last = self._written(state, pooled[2] / pooled[1][..., None], span)
            following = last
        else:
            peak, mass, sums = (part[:, 0] for part in pooled)
            following = FifoState(state.memory, state.writes, peak, mass, sums)
        if not span.reads:
            return x.new_zeros(*x.shape[:-1], self.heads, self.width // self.heads), following
        return self._read(x, memories, writes, span.recalls), following

    def _read(self, x: Tensor, memories: Tensor, writes: Tensor, recalls: Tensor) -> Tensor:
        queries = self.query(x).float().unflatten(-1, (self.heads, -1))  # (b, k, t, h, d)
        queries = queries * queries.shape[-1] ** -0.5
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.norm.weight.float(), self.norm.bias.float()
            slots = functional.layer_norm(memories.flatten(2, 3), (self.width,), weight, bias)  # (b, k, m, c)
            bias = self.age_bias.float()[:, ages(writes, self.groups)].movedim(0, -2)  # (b, k, h, g)
            empty = torch.arange(self.groups, device=x.device) >= writes[..., None, None]
            bias = bias.masked_fill(empty, -math.inf).repeat_interleave(self.writers, -1)
            null = (queries * self.null.float()).sum(-1)
            attend = self._by_queries if 2 * x.shape[-2] <= slots.shape[-2] else self._by_slots
            return attend(queries, slots, bias, null) * recalls[..., None, None]

    def _by_slots(self, queries: Tensor, slots: Tensor, bias: Tensor, null: Tensor) -> Tensor:
        """Project the slots to keys and values."""
        projected = functional.linear(slots, self.key_value.weight.float())
        keys, values = projected.unflatten(-1, (2, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)  # (b, k, h, m, d)
        logits = queries.transpose(-2, -3) @ keys.mT + bias[..., None, :]  # (b, k, h, t, m)
        return (recall(logits, null.mT) @ values).transpose(-2, -3)

    def _by_queries(self, queries: Tensor, slots: Tensor, bias: Tensor, null: Tensor) -> Tensor:
        """The same where queries are fewer than slots: project those, and what they have read, instead."""
        of_key, of_value = self.key_value.weight.float().unflatten(0, (2, self.heads, -1))  # (h, d, c) each
        queries, shape = queries.flatten(0, 2), queries.shape[:-1]
        asked = (queries.transpose(0, 1) @ of_key).transpose(0, 1).reshape(*shape, -1)  # (b, k, t, h, c)
        logits = (asked.flatten(2, 3) @ slots.mT).unflatten(2, shape[2:]) + bias[:, :, None]  # (b, k, t, h, m)
        read = (recall(logits, null).flatten(2, 3) @ slots).reshape(-1, self.heads, self.width)
        return (read.transpose(0, 1) @ of_value.mT).transpose(0, 1).unflatten(0, shape[:-1])

    def _pooled(self, x: Tensor, state: FifoState, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """Peak and mass (b, k, r) and sums (b, k, r, c) of the chunks so far."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            logits = self.pool(x)
            logits = logits.masked_fill(~span.pooled[:, :, None], -math.inf)
            highest = logits.detach().amax(-1)  # finite: a span's last token is always pooled
            if x.shape[1] > 1:  # whole chunks, of which nothing was read before
                weights = (logits - highest[..., None]).exp()
                return highest, weights.sum(-1), weights @ x
            before = state.peak.masked_fill(span.restarts[:, None], -math.inf)[:, None]
            peak = torch.maximum(before, highest)
            weights, kept = (logits - peak[..., None]).exp(), (before - peak).exp()
            mass = state.mass[:, None] * kept + weights.sum(-1)
            return peak, mass, state.sums[:, None] * kept[..., None] + weights @ x

    def _written(self, state: FifoState, tokens: Tensor, span: Span) -> tuple[Tensor, Tensor, FifoState]:
        """Of pooled tokens (b, k, r, c), the memories and counts before each chunk, (b, k, …), and the state at the end."""
        memory, writes = state.memory, state.writes
        row, slot = torch.arange(len(writes), device=writes.device), torch.arange(self.groups, device=writes.device)
        memories, counts = [], []
        with torch.autocast(tokens.device.type, enabled=False):
            summaries = self.pool.summary(tokens)
            weight, bias = self.candidate.weight.float(), self.candidate.bias.float()
            candidates = functional.linear(summaries, weight, bias).tanh()  # (b, k, r, c)
            of_summary, of_partner = self.gate.weight.float().chunk(2, dim=1)
            opens = functional.linear(summaries, of_summary, self.gate.bias.float())
            for index in range(summaries.shape[1]):
                memories.append(memory)
                counts.append(writes)
                continues = span.continues[:, index]
                writes = writes * continues
                memory = memory * continues[:, None, None, None]
                target = writes % self.groups
                partner = memory[row, (writes - 1) % self.groups if self.chained else target]  # (b, r, c)
                absent = writes == 0 if self.chained else writes < self.groups
                gate = (opens[:, index] + functional.linear(partner, of_partner)).sigmoid()
                gate = torch.where(absent[:, None, None], 1.0, gate)
                new = gated(partner, candidates[:, index], gate)
                memory = torch.where((slot == target[:, None])[..., None, None], new[:, None], memory)
                writes = writes + 1
        empty = self.initial(len(writes), writes.device)
        return torch.stack(memories, 1), torch.stack(counts, 1), empty._replace(memory=memory, writes=writes)
