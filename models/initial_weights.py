"""How the weights of a language model begin."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def normal(model: nn.Module, width: int, endings: Sequence[nn.Linear]) -> None:
    """Normal weights of deviation 0.02 at a width of 768, more where a model is narrower, as 1 / √width; zero biases.

    A model of 64 channels that begins with 0.02 learns to use its memory hundreds of steps later, if at all.

    Args:
        model: whose linear layers and embeddings are drawn anew.
        width: channels of its residual stream.
        endings: the layers that write to that stream; theirs are smaller, by the root of how many there are.
    """
    deviation = 0.02 * (768 / width) ** 0.5
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    for ending in endings:
        nn.init.normal_(ending.weight, std=deviation / len(endings) ** 0.5)
