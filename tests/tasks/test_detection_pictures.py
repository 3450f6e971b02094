"""Pictures of detections, read back pixel by pixel: where edges lie, which boxes are drawn, and which images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from datamodules.batches import Boxes, DetectionBatch
from models.dense import Detections
from tasks.detection_pictures import CAPTION, CELL, MARGIN, DetectionPictures, draw_detections, found
from tasks.image_sheets import class_colours, fitted, perceived, photograph

NAMES = ("clock", "umbrella", "tree")
GREY = 0.5


def normalised(colours):
    mean, deviation = torch.tensor((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))[..., None, None]
    return (colours - mean) / deviation


def grey(height=105, width=120):
    return normalised(torch.full((3, height, width), GREY))


def truth(boxes=(), image_id=7):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    count = len(boxes)
    return Boxes(
        boxes, torch.zeros(count, dtype=torch.int64), torch.ones(count), torch.zeros(count, dtype=torch.bool),
        image_id, (105, 120),
    )  # fmt: skip


def detections(*rows):
    """Rows of label, score, x1, y1, x2, y2."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, 2:], table[:, 1], table[:, 0].long())


def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(float) / 255


def drawn(tmp_path, *images, threshold=0.4):
    return read(draw_detections(images, NAMES, tmp_path / "sheet.png", threshold))


def is_colour(pixels, colour):
    return (np.abs(pixels - colour) < 0.03).all(-1)


def test_edges_lie_where_the_box_does(tmp_path):
    """105 x 120 pixels are drawn 4 times as large, with 2 pixels of stroke on each edge."""
    box = (30, 25, 90, 80)
    sheet = drawn(tmp_path, found(grey(), (105, 120), truth(), detections((1, 0.9, *box))))
    top, left = MARGIN + CAPTION, MARGIN
    assert fitted(105, 120, CELL) == (420, 480)
    edge = is_colour(sheet, class_colours(3)[1])
    x1, y1, x2, y2 = (4 * side + offset for side, offset in zip(box, (left, top, left, top), strict=True))
    for column in (x1, x2):
        assert edge[y1 + 30 : y2 - 5, column - 1 : column + 1].all()
    for row in (y1, y2):
        assert edge[row - 1 : row + 1, x1 + 100 : x2 - 5].all()
    inside = sheet[y1 + 5 : y2 - 5, x1 + 5 : x2 - 5]
    assert np.abs(inside - GREY).max() < 0.01
    below = sheet[y2 + 5 : top + 420, left : left + 480]
    assert np.abs(below - GREY).max() < 0.01


def test_padding_is_cut_away_and_boxes_stay(tmp_path):
    padded = torch.zeros(3, 140, 200)
    padded[:, :105, :120] = grey()
    box = detections((2, 0.8, 10, 20, 50, 60))
    alone = drawn(tmp_path, found(grey(), (105, 120), truth(), box))
    assert np.array_equal(alone, drawn(tmp_path, found(padded, (105, 120), truth(), box)))


def test_only_scores_from_the_threshold_on_are_drawn(tmp_path):
    rows = (0, 0.7, 10, 10, 40, 40), (1, 0.4, 50, 50, 90, 90), (2, 0.39, 60, 10, 100, 40)
    sheet = drawn(tmp_path, found(grey(), (105, 120), truth(), detections(*rows)))
    present = [is_colour(sheet, colour).sum() > 100 for colour in class_colours(3)]
    assert present == [True, True, False]
    assert np.array_equal(sheet, drawn(tmp_path, found(grey(), (105, 120), truth(), detections(*rows[:2]))))


def test_true_boxes_are_dashed(tmp_path):
    sheet = drawn(tmp_path, found(grey(), (105, 120), truth([(20, 30, 100, 90)]), detections()))
    row = sheet[MARGIN + CAPTION + 120, MARGIN + 80 : MARGIN + 400]
    stroke = np.abs(row - GREY).max(-1) > 0.1
    assert 0.3 < stroke.mean() < 0.7
    assert (stroke[1:] & ~stroke[:-1]).sum() > 15  # dashes and gaps of 8 pixels on 320
    inside = sheet[MARGIN + CAPTION + 130 : MARGIN + CAPTION + 350, MARGIN + 90 : MARGIN + 390]
    assert np.abs(inside - GREY).max() < 0.01


def test_photographs_keep_their_colours():
    colours = torch.rand(3, 12, 16)
    torch.testing.assert_close(photograph(normalised(colours), (12, 16)), colours, atol=1e-5, rtol=0)


def test_classes_have_stable_colours_that_differ():
    every = class_colours(150)
    assert np.array_equal(class_colours(11), every[:11])
    assert ((every >= 0) & (every <= 1)).all()
    places = perceived(every)
    apart = np.linalg.norm(places[:, None] - places, axis=-1) + np.eye(150)
    # 0.02 is about the least difference one sees side by side
    assert apart.min() > 0.05
    assert apart[:12, :12].min() > 0.2


class Rig:
    """A trainer and a task that measured batches of two."""

    def __init__(self, first=True, checking=False):
        data = SimpleNamespace(class_names=NAMES)
        self.trainer = SimpleNamespace(is_global_zero=first, sanity_checking=checking, datamodule=data)

    def measured(self, number):
        images = torch.stack((grey(), grey()))
        targets = tuple(truth(image_id=2 * number + index) for index in range(2))
        task = SimpleNamespace(last_detections=[detections((0, 0.9, 10, 10, 50, 50)), detections()])
        return task, DetectionBatch(images, torch.tensor([[105, 120]] * 2), targets)

    def run(self, callback, batches, stage="test"):
        for number in range(batches):
            task, batch = self.measured(number)
            getattr(callback, f"on_{stage}_batch_end")(self.trainer, task, None, batch, number)
        getattr(callback, f"on_{stage}_epoch_end")(self.trainer, task)


@pytest.mark.parametrize("stage", ["test", "validation"])
def test_the_first_images_are_drawn_as_soon_as_there_are_enough(tmp_path, stage, monkeypatch):
    callback = DetectionPictures(tmp_path, images=3)
    seen = []
    monkeypatch.setattr(
        "tasks.detection_pictures.draw_detections", lambda images, names, path, threshold: seen.append(images) or path
    )
    rig = Rig()
    rig.run(callback, 4, stage)
    assert [[image.truth.image_id for image in images] for images in seen] == [[0, 1, 2]]
    rig.run(callback, 2, stage)  # the next epoch draws anew
    assert len(seen) == 2


def test_fewer_images_are_drawn_at_the_end(tmp_path, capsys):
    Rig().run(DetectionPictures(tmp_path, images=8), 1)
    assert [file.name for file in tmp_path.iterdir()] == ["detections.png"]
    assert Image.open(tmp_path / "detections.png").size[0] == 3 * MARGIN + 2 * 480
    assert "picture: " in capsys.readouterr().out


def test_an_epoch_starts_anew(tmp_path):
    callback = DetectionPictures(tmp_path, images=8)
    rig = Rig()
    rig.run(callback, 1, "validation")
    first = read(tmp_path / "detections.png")
    (tmp_path / "detections.png").unlink()
    rig.run(callback, 1, "validation")
    assert np.array_equal(read(tmp_path / "detections.png"), first)


@pytest.mark.parametrize("rig", [Rig(first=False), Rig(checking=True)], ids=["other_rank", "sanity_check"])
def test_others_draw_nothing(tmp_path, rig):
    rig.run(DetectionPictures(tmp_path), 2, "validation")
    assert not list(tmp_path.iterdir())


def test_none_and_fewer_than_none(tmp_path):
    Rig().run(DetectionPictures(tmp_path, images=0), 2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="DetectionPictures: images=-1"):
        DetectionPictures(tmp_path, images=-1)
