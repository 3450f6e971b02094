"""Two processes with strands of their own end with the weights of one process that reads them all: DDP and FSDP2, over gloo."""

import pytest
import torch
from test_commands import run

from datamodules.embedded_source import SourceError
from datamodules.text import Text
from datamodules.text_shakespeare import Shakespeare
from datamodules.tokens import Bytes

pytestmark = pytest.mark.slow

COMMON = [
    "task=lm",
    "model=lm_ci",
    "datamodule.limit_tokens=2048",
    "segment=32",
    "epochs=2",
    "optimizer@task.optimizer=adamw",
    "task.optimizer.lr=1e-3",
    "trainer.accelerator=cpu",
    "threads=1",
]


def weights(path):
    return torch.load(path / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    tokens = Bytes()
    try:
        Text(Shakespeare(), tokens, tokens.size, tokens.bos).prepare_data()
    except SourceError as error:
        pytest.skip(f"Shakespeare's works cannot be fetched: {error}")
    path = tmp_path_factory.mktemp("alone")
    run("train.py", *COMMON, "datamodule.batch_size=4", f"hydra.run.dir={path}")
    return path


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_equal_one(alone, tmp_path, trainer):
    """16 steps an epoch, each but the first read on from the state before: a state that ranks shared, lost or mixed up would
    show in every weight."""
    two = [f"trainer={trainer}", "trainer.devices=2", "datamodule.batch_size=2", f"hydra.run.dir={tmp_path}"]
    run("train.py", *COMMON, *two)
    expected, found = weights(alone), weights(tmp_path)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        # Adam divides by the root of the squared gradient: rounding in a small gradient moves its weight, and gates at 1e-2
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
