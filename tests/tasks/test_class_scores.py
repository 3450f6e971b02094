"""The table of classes after an evaluation: best first, whole or not at all, without classes that have no truth."""

import csv
import math
from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from datamodules.ade20k import Sample, collate
from tasks.class_scores import ClassScores
from tasks.segmentation import Segmentation


def ended(folder, names, scores, rank_zero=True, stage="test"):
    trainer = SimpleNamespace(is_global_zero=rank_zero, datamodule=SimpleNamespace(class_names=names))
    task = SimpleNamespace(class_score="ap", class_scores=scores)
    callback = ClassScores(folder)
    (callback.on_test_end if stage == "test" else callback.on_validation_end)(trainer, task)


def rows(folder):
    with (folder / "classes.csv").open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("stage", ["test", "validation"])
def test_classes_are_listed_best_first_without_the_absent(tmp_path, capsys, stage):
    names = ["wall", "building, edifice", 'the "sky"', "floor"]
    ended(tmp_path / "new", names, [0.25, 0.87654321, math.nan, 0.0], stage=stage)
    assert rows(tmp_path / "new") == [
        ["class", "ap"],
        ["building, edifice", "0.876543"],
        ["wall", "0.25"],
        ["floor", "0.0"],
    ]
    assert f"classes: {tmp_path}/new/classes.csv" in capsys.readouterr().out
    ended(tmp_path / "new", names, [math.nan, math.nan, 1.0, math.nan], stage=stage)
    assert rows(tmp_path / "new") == [["class", "ap"], ['the "sky"', "1.0"]]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["classes.csv"]


def test_one_rank_writes(tmp_path):
    ended(tmp_path, ["wall"], [0.5], rank_zero=False)
    assert not list(tmp_path.iterdir())


def test_names_that_are_not_one_a_class_leave_the_old_table(tmp_path):
    ended(tmp_path, ["wall"], [0.5])
    with pytest.raises(ValueError, match="longer than argument 1"):
        ended(tmp_path, ["wall"], [0.5, 0.25])
    assert rows(tmp_path)[1:] == [["wall", "0.5"]]


class Data(pl.LightningDataModule):
    """One image: three of its four pixels are of the first class, one of the second."""

    class_names = ("wall", "sky", "lamp")

    def test_dataloader(self):
        sample = Sample(torch.zeros(3, 2, 2), torch.tensor([[0, 0], [0, 1]], dtype=torch.uint8), "a")
        return DataLoader([sample], collate_fn=collate)

    val_dataloader = test_dataloader


class OneClass(nn.Module):
    num_classes = 3

    def forward(self, images):
        return torch.tensor([1.0, 0, 0])[:, None, None].expand(len(images), 3, *images.shape[-2:])


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_a_trainer_writes_what_the_task_scored(tmp_path, stage):
    task = Segmentation(OneClass(), partial(torch.optim.SGD, lr=1.0), num_classes=3)
    callbacks = [ClassScores(tmp_path)]
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=callbacks)
    getattr(trainer, stage)(task, datamodule=Data(), verbose=False)
    assert rows(tmp_path) == [["class", "iou"], ["wall", "0.75"], ["sky", "0.0"]]  # lamps are neither seen nor told
