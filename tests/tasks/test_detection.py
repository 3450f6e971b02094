"""The detection task: the truth scores 1, anything else what pycocotools says in pixels of the files; losses and NaN."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from quiet_trainer import trainer
from torch import nn
from torch.utils.data import DataLoader

from datamodules.batches import Boxes
from datamodules.padding import DetectionCollate
from models.dense import Detections
from tasks.detection import Detection, in_file_pixels

CLASSES = 5  # the last two never occur
SIZES = ((24, 32), (40, 28), (32, 32), (36, 20), (28, 40), (20, 24))  # as batches have them
FILES = ((30, 40), (100, 70), (32, 32), (270, 100), (91, 130), (15, 18))  # larger, smaller, of other shape
COUNTS = (3, 5, 0, 4, 6, 2)


class Remembers(nn.Module):
    """A detector that knows each image by its brightness and answers with what it was told to find there."""

    def __init__(self, answers, num_classes=CLASSES):
        super().__init__()
        self.num_classes = num_classes
        self.answers = answers
        self.shift = nn.Parameter(torch.tensor(1.0))

    def forward(self, images, sizes, targets=None):
        if targets is not None:
            distance = torch.stack([(target.boxes - self.shift).square().sum() for target in targets]).mean()
            return {"boxes": distance * images.amax(), "classes": 0.5 * self.shift.square()}
        assert torch.equal(sizes.amax(0), torch.tensor(images.shape[-2:]))
        return [self.answers[round(float(image[0, 0, 0]))] for image in images]


def truth(number, boxes, labels, size, original):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    extents = boxes[:, 2:] - boxes[:, :2]
    areas = 0.7 * extents.prod(1) * (original[0] * original[1]) / (size[0] * size[1])  # of a mask, in the file
    return Boxes(boxes, torch.as_tensor(labels), areas, torch.zeros(len(boxes), dtype=torch.bool), number, original)


def drawn(size, count):
    """Boxes (count, 4) inside an image, at no round pixels."""
    height, width = size
    corners = torch.rand(count, 2, 2).sort(1).values  # (count, [first, second], [x, y])
    corners[:, 1] = torch.maximum(corners[:, 1], corners[:, 0] + 0.15).clamp(max=1)
    corners[:, 0] = torch.minimum(corners[:, 0], corners[:, 1] - 0.15)
    return (corners * torch.tensor([width, height])).flatten(1)


@pytest.fixture
def truths():
    """The first holds one object of each class that occurs, the third none, the last but one a crowd."""
    labels = [torch.tensor([0, 1, 2]), *(torch.randint(0, 3, (count,)) for count in COUNTS[1:])]
    boxes = [drawn(size, count) for size, count in zip(SIZES, COUNTS, strict=True)]
    boxes[3][:2] = torch.tensor([[0, 0, 20, 36], [1, 2, 19, 35]])  # large in the file
    made = [truth(number, *each) for number, each in enumerate(zip(boxes, labels, SIZES, FILES, strict=True))]
    made[4].crowd[-1] = True
    return made


def known(target):
    return Detections(target.boxes, torch.linspace(0.9, 0.1, len(target.boxes)), target.labels)


def loader(truths, batch_size=3):
    items = [(torch.full((3, *SIZES[target.image_id]), float(target.image_id)), target) for target in truths]
    return DataLoader(items, batch_size=batch_size, collate_fn=DetectionCollate())


def task_of(model, **changes):
    return Detection(model, partial(torch.optim.SGD, lr=1e-5), **{"num_classes": CLASSES, **changes})


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_truth_scores_one(truths, tmp_path, stage):
    task = task_of(Remembers([known(target) for target in truths]))
    measure = getattr(trainer(tmp_path), stage)
    (metrics,) = measure(task, loader(truths), verbose=False)
    prefix = {"validate": "val", "test": "test"}[stage]
    assert {metrics[f"{prefix}/{name}"] for name in ("ap", "ap50", "ap75", "ar_100")} == {1.0}
    assert task.class_scores[:3] == [1.0] * 3
    assert all(math.isnan(score) for score in task.class_scores[3:])
    assert [len(found.boxes) for found in task.last_detections] == list(COUNTS[3:])
    assert torch.equal(task.last_detections[1].boxes, truths[4].boxes)  # in the batch's pixels
    (again,) = measure(task, loader(truths, batch_size=1), verbose=False)  # begun anew, padded otherwise
    assert again == pytest.approx(metrics, nan_ok=True)


def found_nearly(target):
    """Moved boxes, some under another class, and two of nothing."""
    boxes = torch.cat([target.boxes + torch.randn_like(target.boxes), drawn(SIZES[target.image_id], 2)])
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    labels = torch.cat([target.labels, torch.randint(0, CLASSES, (2,))])
    changed = torch.rand(len(labels)) < 0.2
    return Detections(boxes, torch.rand(len(boxes)), torch.where(changed, (labels + 1) % 3, labels))


def of_file(boxes, number):
    (height, width), (rows, columns) = SIZES[number], FILES[number]
    boxes = boxes.double().numpy() * np.array([columns / width, rows / height] * 2)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()  # x, y, width, height


def side(rows):
    made = COCO()
    made.dataset = {
        "images": [{"id": number} for number in range(len(SIZES))],
        "categories": [{"id": label} for label in range(CLASSES)],
        "annotations": [{"id": number, "iscrowd": 0, **row} for number, row in enumerate(rows, 1)],
    }
    made.createIndex()
    return made


def judged(truths, answers):
    """pycocotools' scores of boxes brought to the pixels of the files by numpy."""
    true, found = [], []
    for target, answer in zip(truths, answers, strict=True):
        number = target.image_id
        columns = target.labels.tolist(), of_file(target.boxes, number), target.areas.tolist(), target.crowd.tolist()
        true += [
            {"image_id": number, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
            for label, box, area, crowd in zip(*columns, strict=True)
        ]
        rows = zip(answer.labels.tolist(), of_file(answer.boxes, number), answer.scores.tolist(), strict=True)
        found += [
            {"image_id": number, "category_id": label, "bbox": box, "area": box[2] * box[3], "score": score}
            for label, box, score in rows
        ]
    judge = COCOeval(side(true), side(found), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    return {name: value if value > -1 else math.nan for name, value in zip(names, judge.stats, strict=False)}


def test_what_was_found_is_judged_in_pixels_of_the_files(truths, tmp_path):
    answers = [found_nearly(target) for target in truths]
    task = task_of(Remembers(answers))
    (metrics,) = trainer(tmp_path).test(task, loader(truths), verbose=False)
    expected = judged(truths, answers)
    # in the batch's pixels nothing would be medium or large
    assert all(0 < expected[f"ap_{size}"] < 1 for size in ("small", "medium", "large"))
    assert 0 < expected["ap"] < expected["ap50"] < 1
    # logged as float32
    assert {name: metrics[f"test/{name}"] for name in expected} == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_what_is_found_where_nothing_is_counts_against_the_detector(tmp_path):
    full, empty = truth(0, [[4, 4, 20, 20]], [1], SIZES[0], FILES[0]), truth(2, [], [], SIZES[2], FILES[2])
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    wrong = Detections(full.boxes, torch.tensor([0.9]), full.labels)
    scores = {}
    for name, answer in (("silent", nothing), ("wrong", wrong)):
        task = task_of(Remembers({0: known(full)._replace(scores=torch.tensor([0.5])), 2: answer}))
        (metrics,) = trainer(tmp_path).test(task, loader([full, empty]), verbose=False)
        scores[name] = metrics["test/ap"]
    # one of two is right wherever it is found; COCO's 101 recalls all have the precision there
    assert scores == pytest.approx({"silent": 1.0, "wrong": 0.5}, abs=1e-6)


def test_a_set_without_objects_has_no_score(truths, tmp_path):
    empty = truth(2, [], [], SIZES[2], FILES[2])
    task = task_of(Remembers({2: known(truths[0])}))
    (metrics,) = trainer(tmp_path).test(task, loader([empty]), verbose=False)
    assert math.isnan(metrics["test/ap"])
    assert all(math.isnan(score) for score in task.class_scores)


def test_boxes_come_to_the_pixels_of_the_file_without_rounding():
    boxes = torch.tensor([[0, 0, 1333, 800], [333.25, 100, 666.5, 200]])
    moved = in_file_pixels(boxes, torch.tensor([800, 1333]), (427, 640))
    assert moved.dtype == torch.float64
    expected = torch.tensor([[0, 0, 640, 427], [160, 53.375, 320, 106.75]], dtype=torch.float64)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)
    assert in_file_pixels(boxes[:0], torch.tensor([800, 1333]), (427, 640)).shape == (0, 4)


def test_losses_are_logged_by_name_and_lowered_by_training(truths, tmp_path):
    model = Remembers([])
    task = task_of(model, weight_decay=0.0)
    data = loader(truths[1:])
    batch = next(iter(data))
    before = sum(task.loss(batch).values()).item()
    fitting = trainer(tmp_path, max_epochs=2)
    fitting.fit(task, data)
    assert {"train/boxes", "train/classes"} == {name for name in fitting.logged_metrics if name.startswith("train/")}
    assert sum(task.loss(batch).values()).item() < before


def test_nan_stops_before_the_weights(truths, tmp_path):
    data = list(loader(truths[1:], batch_size=2))
    data[1].images[0, 0, 0, 0] = math.nan
    task = task_of(Remembers([]))
    with pytest.raises(FloatingPointError, match=r"loss is nan \(boxes=nan, classes=0\.\d+\) at epoch 0, step 1"):
        trainer(tmp_path, max_epochs=1).fit(task, DataLoader(data, batch_size=None))
    assert task.model.shift.isfinite()


def test_other_class_counts_are_refused():
    with pytest.raises(ValueError, match=r"the model tells 7 classes, the data has 5: set model\.num_classes"):
        task_of(Remembers([], num_classes=7))
