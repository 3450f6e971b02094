"""Small chunked-memory models with weights large enough that every path matters."""

from functools import partial

import torch
from torch import nn

from models.delta_bank import DeltaBank
from models.fifo_bank import FifoBank, MeanPool
from models.fusion import ScalarFusion, TokenFusion
from models.memory_lm import MemoryLM
from rotary import Rotary
from rotary.frequencies import Geometric
from rotary.scaling import DynamicNTK, Truncate

ROTARY = partial(Rotary, Geometric(1e4))
FIFO = partial(FifoBank, slots=4, writers=2)
VARIANTS = {
    "memory": {},
    "paper": {
        "carry": False,
        "blocks": True,
        "fusion": ScalarFusion,
        "bank": partial(FifoBank, slots=4, pool=MeanPool),
    },
    "xl": {"bank": None},
    "local": {"bank": None, "carry": False},
    "no_chunked_path": {"window": None},
    "token_fusion_evicted": {"fusion": TokenFusion, "bank": partial(FifoBank, slots=4, writers=2, chained=False)},
    "delta": {"bank": DeltaBank},
    "truncated_rotary": {"rotary": partial(Rotary, Geometric(1e4), Truncate(0.7))},
    "length_dependent_rotary": {"rotary": partial(Rotary, Geometric(1e4), DynamicNTK(4.0, 8))},
    "no_rotary": {"rotary": None, "tied": True},
}
BOS = 3


def model(seed=0, **others) -> MemoryLM:
    """20 tokens, of which 3 begins a document; two layers, four heads, chunks of 8."""
    torch.manual_seed(seed)
    given = {
        "vocabulary": 20,
        "bos": BOS,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "chunk": 8,
        "window": 3,
        "hidden": 64,
        "rotary": ROTARY,
        "bank": FIFO,
    }
    made = MemoryLM(**{**given, **others})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def text(rows=2, length=61, seed=1, documents=True):
    """Random tokens; with `documents`, some of them begin one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 20, (rows, length), generator=generator)
    return tokens if documents else torch.where(tokens == BOS, 4, tokens)


def read_in_pieces(made, tokens, sizes, state=None):
    """Logits of the pieces, end to end, and the last state."""
    outputs = []
    for piece in tokens.split(sizes, dim=1):
        logits, state = made(piece, state)
        outputs.append(logits)
    return torch.cat(outputs, 1), state
