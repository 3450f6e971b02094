"""Language modelling over streams: truncated backpropagation through the state, bits per byte, and what the memory is worth."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric

from datamodules.batches import TokenBatch
from models.fusion import Fusion
from models.generate import generate
from models.states import detach
from rotary.bound import advice
from tasks.base import Task
from tasks.metrics.bits_per_byte import BitsPerByte
from tasks.metrics.contained import contained
from tasks.metrics.loss_by_position import LossByPosition
from tasks.metrics.recall import Recall

IGNORED = -100


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of logits (b, t, v) against targets (b, t), in nats, zero where a target is −100: (b, t) float32."""
    return functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)


class Decoder(Protocol):
    """Tokens back to text."""

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes of ids (n,)."""


class Language(Task[TokenBatch]):
    """Trains a language model that carries a state from batch to batch.

    The state of a step enters the next one detached, so gradients reach back over one batch: its chunks are the K of
    truncated backpropagation. Training, validation and test have states of their own; each epoch begins anew.

    Args:
        model: tokens (b, t), state → logits (b, t, vocabulary), state. Where its `streams` is False, every training batch
            begins anew.
        backward_chunks: K, chunks that a gradient goes back through; None for all those of a batch.
        gate_rate: how many times the common learning rate the model's `gate_parameters` take.
        problem: what asks for exact answers, if anything does; then shares of rows that are right are told, too.
        mutes: in a test, read everything a second time with the memory answering zero.
        answers: turns tokens into text, and lets the model write its answers in a test, in which the references of a
            problem are looked for; None leaves that out.
        others: of `Task`.

    Raises:
        ValueError: a gate_rate without a schedule, or backward_chunks that the model can't have.
    """

    aside = False  # while a test reads something again in another way, for callbacks that watch the model

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        backward_chunks: int | None = None,
        gate_rate: float = 10.0,
        problem: str | None = None,
        mutes: bool = True,
        answers: Decoder | None = None,
        **others: Any,
    ) -> None:
        super().__init__(model, *args, **others)
        gates: set[str] = getattr(model, "gate_parameters", set)()
        if gates and gate_rate != 1 and self.schedule is None:
            raise ValueError("task.gate_rate acts through the schedule: set task.schedule, or gate_rate=1")
        if backward_chunks is not None and (backward_chunks < 1 or not hasattr(model, "chunk")):
            raise ValueError(
                f"task.backward_chunks={backward_chunks} needs a number of chunks, and a model that has them"
            )
        self.backward_chunks, self.gate_rate, self.problem = backward_chunks, gate_rate, problem
        self.mutes, self.answers = mutes, answers
        self._states: dict[str, Any] = {}
        self.bits, self.muted_bits = BitsPerByte(), BitsPerByte()
        self.recall, self.contained = Recall(), MeanMetric()
        self.by_position, self.by_chunk = LossByPosition(), LossByPosition()
        self.shares = nn.ModuleList(MeanMetric() for _ in self.fusions())

    def fusions(self) -> list[Fusion]:
        """The fusions of layers that have a memory."""
        blocks = [block for block in self.model.modules() if getattr(block, "bank", None) is not None]
        return [cast(Fusion, block.fusion) for block in blocks]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Decayed, spared, and the gates among both at `gate_rate` times their learning rate."""
        names: set[str] = getattr(self.model, "gate_parameters", set)()
        gates = {id(parameter) for name, parameter in self.model.named_parameters() if name in names}
        groups = []
        for group in super().parameter_groups():
            for chosen, scale in ((False, 1.0), (True, self.gate_rate)):
                parameters = [parameter for parameter in group["params"] if (id(parameter) in gates) == chosen]
                if parameters:
                    groups.append({**group, "params": parameters, "lr_scale": scale})
        return groups

    def on_fit_start(self) -> None:
        super().on_fit_start()
        streams = getattr(self.model, "streams", True)
        if streams and self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches must be 1: batches follow each other in the text, so that the state "
                "would move within a step; raise datamodule.batch_size instead"
            )
        if self.global_rank != 0:
            return
        for rotary in self.model.rotaries():  # type: ignore[operator]
            warning = advice(rotary, cast(int, self.model.reach))
            if warning is not None:
                warnings.warn(warning, stacklevel=1)

    def on_train_epoch_start(self) -> None:
        self._states.pop("train", None)

    def on_train_batch_start(self, batch: TokenBatch, index: int) -> None:
        chunk = getattr(self.model, "chunk", None)
        if index == 0 and self.current_epoch == 0 and self.shares and batch.tokens.shape[1] <= cast(int, chunk):
            warnings.warn(
                f"a training step of {batch.tokens.shape[1]} tokens is no longer than a chunk of {chunk}: what the memory "
                "writes is read by later chunks alone, so its writers learn nothing; raise chunks, or the problem's "
                "datamodule.length, or choose a model of smaller chunks",
                stacklevel=1,
            )

    def on_validation_epoch_start(self) -> None:
        self._states.pop("val", None)

    def on_test_epoch_start(self) -> None:
        for name in ("test", "muted"):
            self._states.pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._states.clear()

    def batch_size(self, batch: TokenBatch) -> int:
        """The targets that count."""
        return int((batch.targets != IGNORED).sum())

    def read(self, batch: TokenBatch, stream: str, *, reads: bool = True) -> tuple[Tensor, Any]:
        """Logits (b, t, v) of a batch, read on from where `stream` stands, and the state it was read from.

        Where nothing was read yet, as in a run that is resumed inside an epoch, rows that go on begin with an empty state.

        Raises:
            ValueError: some rows begin anew and others go on.
        """
        begins = bool(batch.fresh.all())
        if not begins and bool(batch.fresh.any()):
            raise ValueError("a batch mixes rows that begin anew with rows that go on")
        before = None if begins else self._states.get(stream)
        logits, state = [], before
        for piece in batch.tokens.split(self._pieces(batch.tokens.shape[1], before, stream), dim=1):
            told, state = self.model(piece, state, reads=reads)
            logits.append(told)
            state = detach(state)
        if stream != "train" or getattr(self.model, "streams", True):
            self._states[stream] = state
        return torch.cat(logits, 1), before

    def _pieces(self, tokens: int, before: Any, stream: str) -> list[int]:
        """Tokens between which training detaches the state: K chunks each, the one under way included."""
        if self.backward_chunks is None or stream != "train":
            return [tokens]
        chunk = cast(int, self.model.chunk)
        begun = 0 if before is None else before.stream.current.shape[1]
        ends = range(self.backward_chunks * chunk - begun, tokens, self.backward_chunks * chunk)
        return [end - start for start, end in pairwise((0, *ends, tokens))]

    def loss(self, batch: TokenBatch) -> Mapping[str, Tensor]:
        logits, _ = self.read(batch, "train")
        losses = token_losses(logits, batch.targets)
        return {"loss": losses.sum() / (batch.targets != IGNORED).sum().clamp(min=1)}

    def measure(self, batch: TokenBatch) -> Mapping[str, Any]:
        testing = self.trainer.testing
        stream = "test" if testing else "val"
        hooks = [self._watch(fusion, metric) for fusion, metric in zip(self.fusions(), self.shares, strict=True)]
        logits, before = self.read(batch, stream)
        for hook in hooks:
            hook.remove()
        losses = token_losses(logits, batch.targets)
        self.bits.update(losses, batch.targets, batch.bytes)
        if self.problem is not None:
            self.recall.update(logits.argmax(-1), batch.targets, batch.depth)
        if testing:
            self.by_position.update(losses, batch.targets, batch.position)
            chunk = getattr(self.model, "chunk", None)
            if chunk is not None:
                begun = 0 if before is None else before.stream.current.shape[1]
                places = (torch.arange(losses.shape[1], device=losses.device) + begun) % chunk
                self.by_chunk.update(losses, batch.targets, places.expand_as(losses))
            self.aside = True
            if self.mutes and self.shares:
                muted, _ = self.read(batch, "muted", reads=False)
                self.muted_bits.update(token_losses(muted, batch.targets), batch.targets, batch.bytes)
            if self.answers is not None and batch.references:
                self._look_for_answers(batch, before, self.answers)
            self.aside = False
        return {}

    def _watch(self, fusion: Fusion, metric: Any) -> Any:
        return fusion.register_forward_hook(lambda module, inputs, output: metric.update(output[..., -1].mean()))

    def _look_for_answers(self, batch: TokenBatch, before: Any, decoder: Decoder) -> None:
        """Greedy continuation of every prompt, as long as the answers; the share of references in it."""
        asked = (batch.targets != IGNORED).any(0).nonzero().flatten()
        prompt, count = int(asked[0]) + 1, int(asked[-1] - asked[0]) + 1
        logits, state = self.model(batch.tokens[:, :prompt], before)
        written = torch.stack(list(generate(self.model, logits[:, -1], state, count, temperature=0.0)), 1)
        for row, references in zip(written.cpu().numpy(), batch.references, strict=True):
            text = decoder.decode(row).decode("utf-8", "replace")
            self.contained.update(contained(text, references))

    def _scores(self) -> dict[str, Any]:
        """What an epoch of measuring amounts to, beside the loss; the metrics begin anew."""
        scores: dict[str, Any] = {}
        named = {"": self.bits, "without_memory_": self.muted_bits}
        for prefix, metric in named.items():
            if metric.update_called:
                scores |= {prefix + name: value for name, value in metric.compute().items()}
        scores |= self.recall.compute() if self.recall.update_called else {}
        for prefix, places in (("loss_at_", self.by_position), ("loss_in_chunk_at_", self.by_chunk)):
            if places.update_called:
                scores |= {prefix + label: value for label, value in places.compute().items()}
        if self.by_position.update_called:
            scores["loss_at_end"] = list(self.by_position.compute().values())[-1]
        shares = cast("list[MeanMetric]", list(self.shares))
        for layer, share in enumerate(shares):
            if share.update_called:
                scores[f"memory_share_{layer}"] = share.compute()
        if self.contained.update_called:
            scores["contained"] = self.contained.compute()
        metrics = (self.bits, self.muted_bits, self.recall, self.by_position, self.by_chunk, self.contained, *shares)
        for each in metrics:
            each.reset()
        return scores

    def on_validation_epoch_end(self) -> None:
        scores = {f"val/{name}": value for name, value in self._scores().items()}
        self.log_dict(scores, prog_bar=True, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self._scores().items()}, sync_dist=True)
