"""Two processes on half the batch each end with the weights of one process on the whole: DDP and FSDP2, over gloo."""

from pathlib import Path

import folder
import pytest
import torch
from test_commands import run

pytestmark = pytest.mark.slow


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    images = folder.write(tmp_path_factory.mktemp("images"))
    path = tmp_path_factory.mktemp("alone")
    run("train.py", *folder.overrides(images), f"hydra.run.dir={path}")
    return images, path


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_equal_one(alone, tmp_path, trainer):
    images, path = alone
    two = [f"trainer={trainer}", "trainer.devices=2", "datamodule.batch_size=4", f"hydra.run.dir={tmp_path}"]
    run("train.py", *folder.overrides(images), *two)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {
        ".hydra",
        "csv",
        "tensorboard",
    }  # one folder for both ranks
    expected, found = weights(path), weights(tmp_path)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
