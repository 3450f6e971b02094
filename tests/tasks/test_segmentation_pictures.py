"""Pictures of segmentations, read back pixel by pixel: which colour lies where, and which classes are named."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from datamodules.ade20k import Sample, collate
from tasks.image_sheets import LEGEND_ROW, class_colours
from tasks.segmentation_pictures import CAPTION, COLUMN, MARGIN, OPACITY, SegmentationPictures, overlay

NAMES = [f"class {number}" for number in range(20)]
COLOUR = torch.tensor([0.8, 0.4, 0.2])
GREY = float(COLOUR @ torch.tensor([0.299, 0.587, 0.114]))
COLOURS = class_colours(20)


def sample(height, width, classes, name="one"):
    mean, deviation = torch.tensor((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))[..., None, None]
    image = (COLOUR[:, None, None].expand(3, height, width) - mean) / deviation
    return Sample(image, classes, name)


def halves(height, width, left, right):
    classes = torch.full((height, width), left, dtype=torch.uint8)
    classes[:, width // 2 :] = right
    return classes


def drawn(folder, samples, predictions, images=6):
    """The page, with the callback run as an evaluation does."""
    callback = SegmentationPictures(folder, images)
    trainer = SimpleNamespace(is_global_zero=True, sanity_checking=False, datamodule=SimpleNamespace(class_names=NAMES))
    task = SimpleNamespace(last_prediction=predictions)
    callback.on_test_batch_end(trainer, task, None, collate(samples), 0)
    callback.on_test_epoch_end(trainer, task)
    assert [file.name for file in folder.iterdir()] == ["segmentations.png"]
    return np.asarray(Image.open(folder / "segmentations.png").convert("RGB")).astype(float) / 255


def painted(label):
    return OPACITY * COLOURS[label] + (1 - OPACITY) * GREY


def panel(page, number, width=400):
    left = MARGIN + number * (width + MARGIN)
    return page[MARGIN + CAPTION : MARGIN + CAPTION + 300, left : left + width]


def share(pixels, colour):
    return (np.abs(pixels - np.asarray(colour)) < 0.01).all(-1).mean()


def test_colours_lie_where_the_classes_do(tmp_path):
    """A file of 150 x 200, an image of 75 x 100, panels of 300 x 400; the rest of a half is what its name covers."""
    target, prediction = halves(150, 200, 3, 255), halves(150, 200, 3, 7).long()
    page = drawn(tmp_path, [sample(75, 100, target)], [prediction])
    image, truth, found = (panel(page, number) for number in range(3))
    assert share(image, COLOUR) == 1
    assert share(truth[:, :200], painted(3)) > 0.95
    assert share(truth[:, 200:], COLOUR) > 0.95  # no class: the photograph as it was
    assert share(found[:, :200], painted(3)) > 0.95
    assert share(found[:, 200:], painted(7)) > 0.95
    assert share(found[:, 195:200], painted(3)) == 1
    assert share(found[:, 200:205], painted(7)) == 1


def test_the_legend_names_the_classes_present(tmp_path):
    target, prediction = halves(150, 200, 3, 255), halves(150, 200, 3, 7).long()
    page = drawn(tmp_path, [sample(75, 100, target)], [prediction])
    top = MARGIN + CAPTION + 300 + MARGIN
    legend = page[top : top + LEGEND_ROW]
    for label in range(20):
        patch = (np.abs(legend - COLOURS[label]) < 0.01).all(-1)
        assert (patch.sum() > 100) == (label in (3, 7)), label
    for number, label in enumerate((3, 7)):
        corner = legend[4:11, MARGIN + number * COLUMN + 4 : MARGIN + number * COLUMN + 10]
        assert share(corner, COLOURS[label]) == 1
        beside = legend[:, MARGIN + number * COLUMN + 20 : MARGIN + (number + 1) * COLUMN - 4]
        assert beside.min() < 0.4, "no name"


def test_names_are_written_on_large_regions_alone(tmp_path):
    plain = torch.zeros(150, 200, dtype=torch.uint8)
    prediction = plain.long()
    prediction[70:80, 90:110] = 5  # 0.7 % of the image
    page = drawn(tmp_path, [sample(75, 100, plain)], [prediction])
    found = panel(page, 2)
    written = 1 - share(found, painted(0)) - share(found, painted(5))
    assert 0 < written < 0.03
    assert share(found[140:160, 180:220], painted(5)) > 0.3  # part of it may lie below the name of class 0


def test_padding_of_a_batch_doesnt_show(tmp_path):
    small = sample(75, 100, halves(150, 200, 3, 4), "small")
    large = sample(90, 120, halves(180, 240, 1, 2), "large")
    predictions = [halves(150, 200, 3, 7).long(), halves(180, 240, 1, 2).long()]
    (tmp_path / "alone").mkdir()
    (tmp_path / "both").mkdir()
    alone = drawn(tmp_path / "alone", [small], predictions[:1])
    both = drawn(tmp_path / "both", [small, large], predictions)
    for number in range(3):
        assert np.array_equal(panel(alone, number), panel(both, number))


def test_an_overlay_mixes_grey_with_the_colour_of_a_class():
    picture = torch.rand(3, 5, 6)
    classes = torch.randint(0, 20, (5, 6))
    classes[0] = 255
    result = overlay(picture, classes, torch.tensor(COLOURS))
    assert torch.equal(result[:, 0], picture[:, 0])
    flat = overlay(torch.zeros(3, 5, 6), classes, torch.tensor(COLOURS))
    for row, column in ((1, 0), (3, 4), (4, 5)):
        expected = OPACITY * COLOURS[classes[row, column]]
        np.testing.assert_allclose(flat[:, row, column], expected, atol=1e-6)
        shade = float(picture[:, row, column] @ torch.tensor([0.299, 0.587, 0.114]))
        np.testing.assert_allclose(result[:, row, column], expected + (1 - OPACITY) * shade, atol=1e-6)


def test_as_many_images_as_asked_for(tmp_path):
    samples = [sample(75, 100, halves(150, 200, number, 9), str(number)) for number in range(3)]
    page = drawn(tmp_path, samples, [each.classes.long() for each in samples], images=2)
    assert page.shape[0] == 2 * MARGIN + 2 * (300 + CAPTION + MARGIN) + LEGEND_ROW


def test_an_image_without_any_class_is_drawn(tmp_path):
    nothing = torch.full((150, 200), 255, dtype=torch.uint8)
    page = drawn(tmp_path, [sample(75, 100, nothing)], [torch.zeros(150, 200, dtype=torch.int64)])
    assert share(panel(page, 1), COLOUR) == 1


def test_a_prediction_of_another_size_than_the_file_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="size of tensor"):
        drawn(tmp_path, [sample(75, 100, halves(150, 200, 3, 4))], [torch.zeros(75, 100, dtype=torch.int64)])
