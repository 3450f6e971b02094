"""The laws of segmentation transforms: images and classes move together, what has no class stays so, draws are torch's."""

import colorsys

import matplotlib.colors
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from datamodules.segmentation_transforms import (
    CappedCrop,
    EvalTransform,
    PhotometricDistortion,
    TrainTransform,
    resized,
)

GREYS = torch.tensor([20, 80, 140, 200])
NONE = 255


def scene(height=90, width=130, side=18):
    """Squares of four classes and of none, each of one grey, so that an image tells its classes."""
    blocks = torch.randint(0, 5, (-(-height // side), -(-width // side)))
    classes = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]
    greys = torch.cat((GREYS, torch.tensor([255])))[classes]
    image = Image.fromarray(greys.to(torch.uint8)[..., None].expand(-1, -1, 3).numpy())
    return image, classes.where(classes < 4, NONE).to(torch.uint8)


def shown(image):
    """A normalised image as 0 … 255."""
    mean, deviation = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return 255 * (image * deviation[:, None, None] + mean[:, None, None])


def told_by(image):
    """Classes (h, w) that the greys of an undistorted image tell, and where all neighbours have the same grey."""
    grey = shown(image).mean(0)
    classes = (grey[..., None] - torch.cat((GREYS, torch.tensor([255])))).abs().argmin(-1)
    near = torch.nn.functional.pad(grey[None], (1, 1, 1, 1), mode="replicate")
    most, least = (sign * torch.nn.functional.max_pool2d(sign * near, 3, 1)[0] for sign in (1, -1))
    return classes.where(classes < 4, NONE), most - least < 1


def train(**changes):
    return TrainTransform(**({"short_side": 64, "crop_size": 48, "distortion": None} | changes))


@pytest.mark.parametrize("scales", [(0.5, 0.5), (1.0, 1.0), (0.5, 2.0), (2.0, 2.0)], ids=str)
def test_image_and_classes_move_together(scales):
    transform = train(scales=scales, crop_size=(40, 48))
    seen = 0
    for _ in range(20):
        image, classes = transform(*scene())
        assert image.dtype == torch.float32
        assert classes.dtype == torch.uint8
        assert image.shape[1:] == classes.shape
        told, plain = told_by(image)
        assert torch.equal(told[plain], classes.long()[plain])
        seen += int(plain.sum())
    assert seen > 1000


def test_borders_of_classes_lie_where_those_of_the_image_do():
    """Shrunk and grown by odd factors: a pixel more than half white has the class of white."""
    columns = torch.arange(130) >= 47
    image = Image.fromarray(columns.mul(255).to(torch.uint8).expand(90, 130)[..., None].expand(-1, -1, 3).numpy())
    for side in (45, 30, 64, 71, 180):
        transform = train(short_side=side, scales=(1.0, 1.0), crop_size=400, flip=0.0)
        pixels, classes = transform(image, columns.to(torch.uint8).expand(90, 130))
        middle = shown(pixels).mean(0)[20]
        border = float((middle < 127.5).sum())
        assert abs(border - float((classes[20] == 0).sum())) <= 1  # interpolated edges and nearest pixels round apart
        assert abs(border - 47 * side / 90) <= 1


def test_classes_are_never_blended():
    image, classes = scene()
    present = set(classes.unique().tolist())
    transform = train(scales=(0.5, 2.0), distortion=PhotometricDistortion())
    for _ in range(10):
        assert set(transform(image, classes)[1].unique().tolist()) <= present


def test_what_has_no_class_stays_so():
    image, classes = scene()
    for _ in range(5):
        cropped = train(scales=(0.5, 2.0))(image, torch.full_like(classes, NONE))[1]
        assert (cropped == NONE).all()


def test_both_mirror_images_come_and_nothing_else_is_mirrored():
    image, classes = scene(64, 64)
    transform = train(crop_size=64, scales=(1.0, 1.0))
    outcomes = [transform(image, classes)[1] for _ in range(40)]
    mirrored = [torch.equal(outcome, classes.flip(-1)) for outcome in outcomes]
    assert all(m or torch.equal(o, classes) for m, o in zip(mirrored, outcomes, strict=True))
    assert 8 <= sum(mirrored) <= 32  # 20 expected, deviation 3.2


def test_sizes_are_drawn_evenly_between_the_scales():
    image, classes = scene(60, 80)
    transform = train(short_side=40, crop_size=1000, scales=(0.5, 2.0))
    sides = torch.tensor([min(transform(image, classes)[1].shape) for _ in range(300)]).double()
    assert 20 <= sides.min() < 23
    assert 77 < sides.max() <= 80
    assert sides.mean().item() == pytest.approx(50, abs=4)  # deviation of the mean is 1


@pytest.mark.parametrize(
    ("height", "width", "side", "expected"),
    [(300, 400, 150, (150, 200)), (400, 300, 150, (200, 150)), (100, 1000, 50, (20, 200)), (7, 7, 512, (512, 512))],
)
def test_the_long_side_stays_within_four_times_the_short_one(height, width, side, expected):
    assert resized(height, width, side) == expected


def test_the_same_seed_draws_the_same():
    image, classes = scene()
    transform = train(scales=(0.5, 2.0), distortion=PhotometricDistortion())

    def draws(seed):
        torch.manual_seed(seed)
        return [transform(image, classes) for _ in range(3)]

    for first, second in zip(draws(1), draws(1), strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    assert any(a[1].shape != b[1].shape or not torch.equal(a[1], b[1]) for a, b in zip(draws(1), draws(2), strict=True))


def test_crops_hold_no_class_beyond_the_cap():
    """Class 0 but for a corner, so that few crops are varied: all are found in enough tries, few in none."""
    classes = torch.zeros(100, 100, dtype=torch.uint8)
    classes[:50, :50] = 1
    classes[80:, :] = NONE  # doesn't count, in share or number
    image = classes[None].expand(3, -1, -1)
    for tries, expected in ((0, 0.3), (200, 1.0)):
        crop = CappedCrop((20, 20), cap=0.75, tries=tries)
        varied = 0
        for _ in range(60):
            pixels, kept = crop(image, classes)
            assert kept.shape == (20, 20)
            assert torch.equal(pixels[0], kept)
            counts = [int((kept == label).sum()) for label in (0, 1)]
            varied += min(counts) > 0 and max(counts) < 0.75 * sum(counts)
        assert varied == 60 if expected == 1.0 else varied < 30


def test_a_crop_of_one_class_is_taken_after_all():
    classes = torch.zeros(30, 30, dtype=torch.uint8)
    assert CappedCrop((10, 10))(classes[None], classes)[1].shape == (10, 10)


def test_crops_come_from_everywhere_up_to_the_edges():
    place = torch.arange(12 * 9).reshape(12, 9)
    crop = CappedCrop((10, 8), cap=1.0)
    corners = {int(crop(place[None], place)[1][0, 0]) for _ in range(200)}
    assert corners == {9 * top + left for top in range(3) for left in range(2)}


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.3, 1.5, 100.0])
def test_saturation_is_that_of_hsv(factor):
    image = torch.rand(3, 16, 16, dtype=torch.float64)
    image[:, 0, 0], image[:, 0, 1] = 0.0, 0.4  # black and grey have no saturation to change
    hsv = matplotlib.colors.rgb_to_hsv(image.permute(1, 2, 0).numpy())
    hsv[..., 1] = np.clip(hsv[..., 1] * factor, 0, 1)
    expected = torch.from_numpy(matplotlib.colors.hsv_to_rgb(hsv)).permute(2, 0, 1)
    torch.testing.assert_close(PhotometricDistortion.saturated(image, factor), expected, atol=1e-9, rtol=0)


def test_each_change_alone_is_what_it_is_called():
    image = 0.25 + 0.5 * torch.rand(3, 8, 8)
    off = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0.0}
    changed = {name: 0 for name in off}
    for name, value in (
        ("brightness", 0.2),
        ("contrast", (0.5, 0.5)),
        ("saturation", (0.5, 0.5)),
        ("hue", 0.1),
    ):
        distort = PhotometricDistortion(**(off | {name: value}))
        for _ in range(40):
            result = distort(image)
            if torch.allclose(result, image, atol=2e-3):  # hue goes through HSV and back
                continue
            changed[name] += 1
            if name == "brightness":
                shift = result - image
                assert shift.std() < 1e-6
                assert shift.mean().abs() <= 0.2
            elif name == "contrast":
                torch.testing.assert_close(result, image / 2)
            elif name == "saturation":
                torch.testing.assert_close(result.amax(0), image.amax(0))
                torch.testing.assert_close(result.amax(0) - result.amin(0), (image.amax(0) - image.amin(0)) / 2)
            else:
                before, after = (colorsys.rgb_to_hsv(*side[:, 3, 3].tolist()) for side in (image, result))
                assert before[1:] == pytest.approx(after[1:], abs=1e-3)
                assert min(abs(before[0] - after[0]), 1 - abs(before[0] - after[0])) <= 0.101
    assert all(8 <= count <= 32 for count in changed.values()), changed  # each half the time


def test_distorted_colours_stay_colours():
    distort = PhotometricDistortion()
    for _ in range(30):
        result = distort(torch.rand(3, 8, 8))
        assert result.min() >= 0
        assert result.max() <= 1


def test_evaluation_resizes_the_image_and_leaves_the_classes():
    image, classes = scene(90, 130)
    pixels, kept = EvalTransform(image_size=45)(image, classes)
    assert pixels.shape == (3, 45, 65)
    assert torch.equal(kept, classes)
    pixels, _ = EvalTransform(image_size=90)(image, classes)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    torch.testing.assert_close(shown(pixels), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"crop_size": 0}, "crop_size=0", id="crop"),
        pytest.param({"short_side": 0}, "train_short_side=0", id="side"),
        pytest.param({"scales": (2.0, 0.5)}, "scales=", id="scales"),
        pytest.param({"category_cap": 0.0}, "category_cap=0.0", id="cap"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        train(**changes)
