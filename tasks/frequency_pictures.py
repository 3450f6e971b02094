"""What a language model does with its frequencies, in an evaluation: a picture and a table by layer, head and pair."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.turn import Turn
from rotary import Rotary, first_negative
from rotary.bound import padded
from rotary.diagnostics import frequency_centroid, frequency_contributions
from tasks.scene_pictures import save

FARTHEST = 2**16  # distances at which a head is asked whether it still prefers similar keys


class HeadUse(NamedTuple):
    """What one head does: the numbers of a row of frequency_use.csv."""

    layer: str
    head: int
    centroid: float  # of its shares, 0 for high frequencies alone
    first_negative: int | None  # distance at which Σ share_i cos(m θ_i) < 0; None if none below FARTHEST


class FrequencyPictures(pl.Callback):
    """Draws how much of the logits each pair of channels makes, head by head (arXiv 2410.06205).

    In the first batches of a validation or test run, `frequency_use.png` and `frequency_use.csv` are made of the queries and
    keys that reach every `Turn` of the model: the mean over causal pairs of tokens of what a pair of channels adds. A
    model without rotary positions gets neither.

    Args:
        folder: where they go.
        batches: how many are looked at; 0 for none.
        rows: of a call's sequences, how many at most.
    """

    def __init__(self, folder: str | Path, batches: int = 1, rows: int = 8) -> None:
        if batches < 0 or rows < 1:
            raise ValueError(f"FrequencyPictures: needs batches ≥ 0 and rows ≥ 1, got {batches} and {rows}")
        self.folder, self.batches, self.rows = Path(folder), batches, rows
        self.sums: dict[str, Tensor] = {}  # layer: (h, d/2), contributions summed over what was seen
        self.frequencies: dict[str, Tensor] = {}  # layer: (h|1, d/2), as scaled in the latest call
        self._seen = 0
        self._task: pl.LightningModule | None = None
        self._handles: list[RemovableHandle] = []

    def listen(self, model: nn.Module) -> None:
        """Hook every `Turn` of the model that has a rotary over one axis."""
        self.sums, self.frequencies, self._seen = {}, {}, 0
        for name, module in model.named_modules():
            if isinstance(module, Turn) and module.rotary is not None and module.rotary.axes == 1:
                hook = self._hook(name, module.rotary)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def stop(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, name: str, rotary: Rotary) -> Any:
        @torch.compiler.disable
        def hear(turn: Turn, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if getattr(self._task, "aside", False):  # reads something again in another way
                return
            order = ("queries", "keys", "query_position", "key_position")
            given = {**dict(zip(order, arguments, strict=False)), **named}
            self.hear(name, rotary, *(given[argument] for argument in order))

        return hear

    @torch.no_grad()
    def hear(
        self, name: str, rotary: Rotary, queries: Tensor, keys: Tensor, query_position: Tensor, key_position: Tensor
    ) -> None:
        """Add a call of a `Turn`, whose arguments these are, to the sums of its layer."""
        length = key_position.amax() + 1 if rotary.scaling.dynamic else None
        seen = key_position[:, 0] <= query_position  # (t, s)
        q, k = (x.reshape(-1, *x.shape[-3:])[: self.rows].float() for x in (queries, keys))
        with torch.autocast(q.device.type, enabled=False):
            phases = rotary(query_position, length), rotary(key_position, length)
            total = frequency_contributions(q, k, phases[0], phases[1], seen) * (len(q) * seen.sum())
        self.sums[name] = self.sums.get(name, 0) + total.double().cpu()
        self.frequencies[name] = padded(rotary.scaled(length).detach().cpu()[:, 0], q.shape[-1] // 2)

    def shares(self) -> dict[str, Tensor]:
        """Layer by layer (h, d/2) float64, rows summing to 1; zeros where no logit was other than 0."""
        return {name: total / total.sum(-1, keepdim=True).clamp(min=1e-300) for name, total in self.sums.items()}

    def uses(self) -> list[HeadUse]:
        """A row for every head of every layer."""
        found = []
        for name, share in self.shares().items():
            frequencies = self.frequencies[name].expand(len(share), -1)
            for head, (row, theta) in enumerate(zip(share, frequencies, strict=True)):
                first = first_negative(theta, FARTHEST, row)
                found.append(HeadUse(name, head, float(frequency_centroid(row)), first if first < FARTHEST else None))
        return found

    def draw(self) -> None:
        """Write frequency_use.png and frequency_use.csv, if anything was heard."""
        shares = self.shares()
        if not shares:
            return
        picture = save(
            share_figure(shares, next(iter(self.frequencies.values()))[0]), self.folder / "frequency_use.png", dpi=120
        )
        table = picture.with_suffix(".csv")
        partial = table.with_name(f".{table.name}.{os.getpid()}.partial")
        try:
            with partial.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(HeadUse._fields)
                writer.writerows((u.layer, u.head, f"{u.centroid:.6f}", u.first_negative) for u in self.uses())
            os.replace(partial, table)
        finally:
            partial.unlink(missing_ok=True)
        print(f"frequencies: {picture}")

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.batches and trainer.is_global_zero and trainer.state.fn is not TrainerFn.FITTING:
            model, self._task = pl_module.model, pl_module
            self.listen(model if isinstance(model, nn.Module) else pl_module)

    def _batch_end(self) -> None:
        self._seen += 1
        if self._handles and self._seen >= self.batches:
            self.stop()

    def _end(self) -> None:
        self.stop()
        self.draw()
        self.sums = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_batch_end(self, *_: Any, **named: Any) -> None:
        self._batch_end()

    def on_test_batch_end(self, *_: Any, **named: Any) -> None:
        self._batch_end()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.stop()


def wavelength_name(frequency: float) -> str:
    """2π / θ in tokens with two or three digits, k and M for thousands and millions, ∞ for a pair at rest."""
    if not frequency:
        return "∞"
    wavelength = 2 * math.pi / abs(frequency)
    for size, sign in ((1e6, "M"), (1e3, "k")):
        if wavelength >= size:
            return f"{wavelength / size:.{0 if wavelength >= 10 * size else 1}f}{sign}"
    return f"{wavelength:.3g}"


def share_figure(shares: dict[str, Tensor], frequencies: Tensor) -> Figure:
    """Layers × heads against pairs of channels.

    Args:
        shares: (h, r) of each layer, in order.
        frequencies: (r,) radians per token, whose wavelengths are written below.
    """
    rows = torch.cat(list(shares.values())).numpy()
    names = [wavelength_name(theta) for theta in frequencies.tolist()]
    figure = Figure(figsize=(8.0, 1.6 + max(1.2, 0.14 * len(rows))), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    ends = np.cumsum([len(share) for share in shares.values()])
    starts = np.concatenate(([0], ends[:-1]))
    axes.set_yticks((starts + ends - 1) / 2, list(shares))
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=0.8)
    ticks = np.unique(np.linspace(0, rows.shape[-1] - 1, min(rows.shape[-1], 9)).round().astype(int))
    axes.set_xticks(ticks, [f"{t}\n{names[t]}" for t in ticks])
    axes.set_xlabel("pair of channels, wavelength in tokens")
    axes.set_ylabel("layer, a row a head")
    figure.colorbar(image, ax=axes, label="share of |q·k|")
    return figure
