"""Phases that a module makes of its frequencies and keeps, for as long as no gradient and no change asks for new ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

Phases = TypeVar("Phases")


class KeepsPhases(nn.Module):
    """A module with one set of kept phases, outside the state dict."""

    _kept: tuple[tuple[Hashable, ...], Any, Tensor] | None = None

    def phases_of(self, frequencies: Tensor, where: Hashable, build: Callable[[], Phases]) -> Phases:
        """What `build` makes: anew where a gradient needs it or under `torch.compile`, else kept.

        Args:
            frequencies: what the phases are made of; kept phases go when their memory, device or version changes.
            where: the positions they are made for, by which they are kept too.
            build: makes the phases of both.
        """
        if torch.compiler.is_compiling() or frequencies.is_inference():
            return build()
        if frequencies.requires_grad and (self.training or torch.is_grad_enabled()):
            self._kept = None  # an optimiser may step next, and fused ones leave `_version` as it was
            return build()
        key = (where, frequencies.device, frequencies.data_ptr(), frequencies._version)
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                # the alias keeps the memory taken, so that no other tensor can come to answer to this key
                self._kept = (key, build(), frequencies.detach())
        return self._kept[1]

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; forgets the phases that were kept."""
        self._kept = None
        return super().train(mode)
