"""The segmentation task: the truth scores 1 at any size, windows and scales change nothing that is local, padding never
counts."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from quiet_trainer import trainer
from torch import nn
from torch.utils.data import DataLoader

from datamodules.ade20k import Sample, collate
from tasks.segmentation import Segmentation

CLASSES = 5  # the last never occurs
SIZES = ((12, 16), (20, 8), (16, 16), (8, 12))  # of the classes in the files


class Reads(nn.Module):
    """A segmenter that reads the class of each pixel from its brightness, pixel by pixel, and counts what it is asked.

    Args:
        wrong: class → the class that is answered for it.
    """

    def __init__(self, wrong=None, num_classes=CLASSES):
        super().__init__()
        self.num_classes = num_classes
        self.answers = torch.tensor([(wrong or {}).get(label, label) for label in range(CLASSES)])
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.seen, self.activated = [], 0

    def forward(self, images, targets=None):
        if targets is not None:
            known = targets != 255
            return {
                "cross_entropy": (self.scale - targets[known].float().mean()).square() * images.amax(),
                "auxiliary": 0.4 * self.scale.square(),
            }
        self.seen.append(tuple(images.shape[-2:]))
        labels = self.answers[images[:, 0].round().long().clamp(0, CLASSES - 1)]
        return nn.functional.one_hot(labels, CLASSES).movedim(-1, 1).float()

    def activate(self, scores):
        self.activated += 1
        return scores.softmax(1)


def blocks(size, number):
    """Classes (h, w) uint8 in blocks of four pixels, 255 in one of them; no two sets of classes alike."""
    height, width = size
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, CLASSES - 1, (height // 4, width // 4), generator=generator)
    labels[0, -1] = 255
    return labels.repeat_interleave(4, 0).repeat_interleave(4, 1).to(torch.uint8)


def sample(number, scale=1.0):
    """An image that shows its classes, `scale` times the size they have in the file."""
    classes = blocks(SIZES[number], number)
    size = [round(scale * side) for side in SIZES[number]]
    shown = nn.functional.interpolate(classes[None, None].float(), size=size, mode="nearest")[0]
    return Sample(torch.where(shown == 255, 4.0, shown).expand(3, -1, -1), classes, f"image{number}")


def loader(scales=(1.0,), batch_size=4):
    samples = [sample(number, scales[number % len(scales)]) for number in range(len(SIZES))]
    return DataLoader(samples, batch_size=batch_size, collate_fn=collate)


def task_of(model=None, **changes):
    optimizer = partial(torch.optim.SGD, lr=0.1)
    return Segmentation(model or Reads(), optimizer, **{"num_classes": CLASSES, "weight_decay": 0.0, **changes})


# halves and doubles keep blocks of four pixels apart; the models' scores are brought to the size of the file
@pytest.mark.parametrize("scales", [(1.0,), (0.5,), (2.0,), (0.5, 1.0, 2.0)], ids=["file", "half", "double", "several"])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_truth_scores_one(tmp_path, stage, scales):
    task = task_of()
    measure = getattr(trainer(tmp_path), stage)
    prefix = {"validate": "val", "test": "test"}[stage]
    (metrics,) = measure(task, loader(scales), verbose=False)
    assert metrics == {f"{prefix}/{name}": 1.0 for name in ("miou", "pixel_accuracy", "mean_accuracy")}
    assert task.class_scores[:4] == [1.0] * 4
    assert math.isnan(task.class_scores[4])
    assert [tuple(answer.shape) for answer in task.last_prediction] == list(SIZES)
    assert measure(task, loader(scales, batch_size=1), verbose=False) == [metrics]


def told(wrong):
    """Scores by numpy, of all pixels of all images together."""
    true = np.concatenate([blocks(size, number).flatten().numpy() for number, size in enumerate(SIZES)])
    true = true[true != 255]
    found = np.array([wrong.get(label, label) for label in true])
    unions = [((true == label) | (found == label)).sum() for label in range(CLASSES)]
    shares = [
        ((true == label) & (found == label)).sum() / union if union else math.nan for label, union in enumerate(unions)
    ]
    return shares, float((true == found).mean())


def test_scores_are_of_the_set_and_not_of_its_images(tmp_path):
    wrong = {1: 2, 3: 4}
    task = task_of(Reads(wrong))
    (metrics,) = trainer(tmp_path).test(task, loader((2.0, 1.0), batch_size=3), verbose=False)
    shares, accuracy = told(wrong)
    assert task.class_scores == pytest.approx(shares, abs=1e-12, nan_ok=True)
    assert 0 < np.nanmean(shares) < 1
    assert metrics["test/miou"] == pytest.approx(np.nanmean(shares), abs=1e-6)  # logged as float32
    assert metrics["test/pixel_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    task.model.answers = Reads().answers
    (again,) = trainer(tmp_path).test(task, loader(), verbose=False)  # begun anew
    assert again["test/miou"] == again["test/pixel_accuracy"] == 1.0


def test_padding_is_neither_shown_nor_counted():
    batch = next(iter(loader((0.5, 2.0))))
    for number, (size, target_size) in enumerate(zip(batch.sizes.tolist(), batch.target_sizes.tolist(), strict=True)):
        batch.images[number, :, size[0] :] = batch.images[number, :, :, size[1] :] = math.nan
        batch.targets[number, target_size[0] :] = batch.targets[number, :, target_size[1] :] = 3
    task = task_of()
    task.measure(batch)
    assert task.model.seen == [tuple(size) for size in batch.sizes.tolist()]
    expected = sum(int((blocks(size, number) != 255).sum()) for number, size in enumerate(SIZES))
    assert int(task.intersection_over_union.pixels.sum()) == expected
    assert float(task.intersection_over_union.compute()["miou"]) == 1.0


@pytest.mark.parametrize(("crop", "stride"), [(8, 4), ((12, 8), (5, 7)), (64, 64)])
def test_windows_of_a_model_that_sees_single_pixels_equal_the_whole(crop, stride):
    windowed, whole = task_of(crop=crop, stride=stride), task_of()
    images = torch.rand(2, 3, 27, 22) * 4
    torch.testing.assert_close(windowed.scores(images), whole.scores(images), rtol=1e-6, atol=1e-6)
    expected = (crop, crop) if isinstance(crop, int) else crop
    assert set(windowed.model.seen) == {expected}
    assert whole.model.seen == [(27, 22)]


def test_windows_are_met_in_evaluation(tmp_path):
    task = task_of(Reads({1: 2}), crop=8, stride=[4, 4])
    trainer(tmp_path).test(task, loader((2.0,)), verbose=False)
    assert set(task.model.seen) == {(8, 8)}
    assert task.class_scores == pytest.approx(told({1: 2})[0], abs=1e-12, nan_ok=True)


def test_scales_and_mirror_images_are_averaged_after_activation():
    images = sample(0).image[None]
    plain, mirrored, scaled = task_of(), task_of(flip=True), task_of(ratios=[0.5, 1.0, 2.0], flip=True)
    alone = plain.scores(images)
    assert plain.model.activated == 0
    torch.testing.assert_close(mirrored.scores(images), alone.softmax(1))  # mirrored back in place
    assert mirrored.model.activated == 2
    averaged = scaled.scores(images)
    assert scaled.model.activated == 6
    assert scaled.model.seen == [(6, 8)] * 2 + [(12, 16)] * 2 + [(24, 32)] * 2
    torch.testing.assert_close(averaged.sum(1), torch.ones(1, 12, 16))  # probabilities still
    inside = alone.argmax(1)[0, 1:3, 1:3]
    assert torch.equal(averaged.argmax(1)[0, 1:3, 1:3], inside)


def test_windows_slide_over_every_scale():
    task = task_of(ratios=(1.0, 2.0), crop=(8, 8), stride=(8, 8))
    task.scores(sample(0).image[None])
    assert set(task.model.seen) == {(8, 8)}
    assert task.model.activated == 2


@pytest.mark.parametrize("given", [{"crop": 8}, {"stride": 4}])
def test_a_crop_needs_its_stride(given):
    with pytest.raises(ValueError, match=r"task\.crop=\w+ and task\.stride=\w+ go together"):
        task_of(**given)


def test_losses_are_logged_by_name_and_lowered_by_training(tmp_path):
    task, data = task_of(), loader()
    before = sum(task.loss(next(iter(data))).values()).item()
    fitting = trainer(tmp_path, max_epochs=3)
    fitting.fit(task, data)
    names = {name for name in fitting.logged_metrics if name.startswith("train/")}
    assert names == {"train/cross_entropy", "train/auxiliary"}
    assert sum(task.loss(next(iter(data))).values()).item() < before


def test_nan_stops_before_the_weights(tmp_path):
    data = list(loader(batch_size=2))
    data[1].images[0, 0, 0, 0] = math.nan
    task = task_of()
    with pytest.raises(FloatingPointError, match=r"loss is nan \(cross_entropy=nan, auxiliary=0\.\d+\) .*step 1"):
        trainer(tmp_path, max_epochs=1).fit(task, DataLoader(data, batch_size=None))
    assert task.model.scale.isfinite()


def test_other_class_counts_are_refused():
    with pytest.raises(ValueError, match=r"the model tells 7 classes, the data has 5: set model\.num_classes"):
        task_of(Reads(num_classes=7))
