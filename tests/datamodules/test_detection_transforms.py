"""Detection transforms: boxes move with pixels, areas and crowds stay with their boxes, sizes are the recipe's."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from datamodules.batches import Boxes
from datamodules.detection_transforms import DetrAugment, LargeScaleJitter, RandomCropWithin, ResizeForTest
from datamodules.padding import DetectionCollate, pad_together

SIDES = (96, 112, 128)
TRANSFORMS = {
    "detr": DetrAugment(short_sides=SIDES, long_side=200, crop_short_sides=(80, 100), crop=(60, 90)),
    "jitter": LargeScaleJitter(side=160, scale=(0.4, 2.0)),
    "test": ResizeForTest(image_size=120),
}


def boxes_of(rows, height, width, crowd=None):
    boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    count = len(boxes)
    crowd = torch.zeros(count, dtype=torch.bool) if crowd is None else crowd
    return Boxes(boxes, torch.arange(count), 100.0 + torch.arange(count), crowd, 7, (height, width))


def pixels_of(image):
    """(h, w, 3) in 0 … 1."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return image.permute(1, 2, 0) * std + mean


def drawn(rows, height, width):
    """Black, with the rectangles in red, green and blue."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for channel, (x1, y1, x2, y2) in enumerate(rows):
        pixels[y1:y2, x1:x2, channel] = 255
    return Image.fromarray(pixels)


def extent(bright):
    """x1, y1, x2, y2 of what is bright, to parts of a pixel, or None: the edges of a convex shape of one brightness."""
    if bright.max() < 0.5:
        return None
    rows, columns = bright.amax(1), bright.amax(0)
    sides = []
    for line in (columns, rows):
        inside = (line >= 0.5).nonzero().flatten()
        sides.append((float(inside[0]), float(inside[-1]) + 1))
    return torch.tensor([sides[0][0], sides[1][0], sides[0][1], sides[1][1]])


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("height", "width"), [(90, 140), (150, 100)])
def test_boxes_move_with_pixels(name, height, width):
    rows = [(10, 20, 60, 45), (30, 50, 44, 88), (70, 5, 98, 80)]
    crowd = torch.tensor([False, True, False])
    boxes = boxes_of(rows, height, width, crowd)
    lost = 0
    for seed in range(40):
        torch.manual_seed(seed)
        image, now = TRANSFORMS[name](drawn(rows, height, width), boxes)
        assert type(image) is type(now.boxes) is torch.Tensor
        assert (image.dtype, now.boxes.dtype) == (torch.float32, torch.float32)
        assert (now.image_id, now.original) == (7, (height, width))
        assert torch.equal(now.areas, 100.0 + now.labels)
        assert torch.equal(now.crowd, crowd[now.labels])
        limit = torch.tensor([image.shape[2], image.shape[1]]).repeat(2)
        assert ((now.boxes >= 0) & (now.boxes <= limit)).all()
        pixels = pixels_of(image)
        found = dict(zip(now.labels.tolist(), now.boxes, strict=True))
        for label in range(3):
            there = extent(pixels[..., label])
            if label in found and there is not None:
                # Half a pixel where the edge is blurred by the resize, half where it falls between pixels.
                torch.testing.assert_close(there, found[label], atol=1.0, rtol=0)
            elif label in found:  # so thin that it has no pixel of its own
                assert (found[label][2:] - found[label][:2]).min() < 1.5
            else:
                lost += 1
                assert there is None or (there[2:] - there[:2]).min() <= 2
    assert (lost > 0) == (name != "test"), "crops must lose some box, and evaluation none"


def test_a_flip_twice_is_none():
    flip = DetrAugment(short_sides=[48], long_side=200, crop_probability=0.0, flip_probability=1.0)
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 70, 3), dtype=np.uint8))
    boxes = boxes_of([(1.25, 2.5, 30, 40), (60, 0, 70, 48)], 48, 70)
    image, once = flip(source, boxes)
    mirror = Image.fromarray((pixels_of(image) * 255).round().byte().numpy())
    assert np.array_equal(mirror, np.asarray(source)[:, ::-1])
    assert once.boxes.tolist() == [[40, 2.5, 68.75, 40], [0, 0, 10, 48]]
    image, twice = flip(mirror, once)
    assert np.array_equal((pixels_of(image) * 255).round().byte().numpy(), np.asarray(source))
    assert torch.equal(twice.boxes, boxes.boxes)


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (480, 640, 800, (800, 1066)),
        (640, 427, 800, (1199, 800)),
        (300, 1000, 800, (400, 1333)),
        (500, 500, 96, (96, 96)),
        (100, 640, 96, (25, 160)),
    ],
)
def test_evaluation_has_coco_sizes_and_keeps_every_box(height, width, size, expected):
    boxes = boxes_of(
        [(0, 0, 0.5, 0.5), (3, 3, 3.2, 90), (0, 0, width, height)], height, width, torch.tensor([0, 1, 0]).bool()
    )
    image, now = ResizeForTest(image_size=size)(Image.new("RGB", (width, height)), boxes)
    assert image.shape == (3, *expected)
    scale = torch.tensor([expected[1] / width, expected[0] / height]).repeat(2)
    torch.testing.assert_close(now.boxes, boxes.boxes * scale)
    assert (now.labels.tolist(), now.crowd.tolist()) == ([0, 1, 2], [False, True, False])


def test_longest_may_equal_the_short_side():
    image, _ = ResizeForTest(image_size=64, longest=1.0)(Image.new("RGB", (100, 50)), boxes_of([], 50, 100))
    assert image.shape == (3, 32, 64)


def test_images_are_normalised_as_imagenet():
    image, _ = ResizeForTest(image_size=10)(Image.new("RGB", (10, 10), (255, 0, 51)), boxes_of([], 10, 10))
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(IMAGENET_DEFAULT_MEAN)) / torch.tensor(
        IMAGENET_DEFAULT_STD
    )
    torch.testing.assert_close(image[:, 5, 5], expected, atol=1e-6, rtol=0)


def test_sizes_are_drawn_as_the_recipe_says():
    """Every short side as often, half of the images cropped."""
    detr = DetrAugment(short_sides=SIDES, long_side=200, crop_short_sides=[50], crop=(20, 40))
    shapes = [tuple(detr(Image.new("RGB", (64, 48)), boxes_of([], 48, 64))[0].shape[1:]) for _ in range(600)]
    assert all(max(shape) <= 200 for shape in shapes)
    whole = [shape for shape in shapes if shape in {(side, side * 64 // 48) for side in SIDES}]
    # Binomial: 300 ± 12 uncropped, and a third of them ± 8 of each size; five deviations either way.
    assert 240 < len(whole) < 360
    for side in SIDES:
        assert len(whole) / 3 - 42 < sum(min(shape) == side for shape in whole) < len(whole) / 3 + 42


def test_defaults_are_those_of_detr():
    torch.manual_seed(1)
    shapes = [DetrAugment()(Image.new("RGB", (640, 480)), boxes_of([], 480, 640))[0].shape[1:] for _ in range(12)]
    assert {min(shape) for shape in shapes if max(shape) < 1333} <= set(range(480, 801, 32))
    assert max(max(shape) for shape in shapes) <= 1333
    assert len({min(shape) for shape in shapes}) > 3


def test_the_crop_reaches_every_size_and_place():
    crop = RandomCropWithin(4, 6)
    params = [crop.make_params([Image.new("RGB", (9, 5))]) for _ in range(400)]
    assert {each["height"] for each in params} == {4, 5}  # no higher than the image
    assert {each["width"] for each in params} == {4, 5, 6}
    assert {each["left"] for each in params if each["width"] == 5} == {0, 1, 2, 3, 4}
    assert {each["top"] for each in params if each["height"] == 5} == {0}
    assert crop.make_params([Image.new("RGB", (3, 2))]) == {"top": 0, "left": 0, "height": 2, "width": 3}


def test_jitter_spans_its_range_and_stays_in_its_square():
    jitter = LargeScaleJitter(side=100, scale=(0.1, 2.0))
    sides = [max(jitter(Image.new("RGB", (60, 30)), boxes_of([], 30, 60))[0].shape) for _ in range(300)]
    assert min(sides) < 20
    assert max(sides) == 100
    # Factors above 1 fill the square: 10 of 19, with a deviation of 8.6 in 300.
    assert 115 < sum(side == 100 for side in sides) < 201


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_image_without_objects_stays_without(name):
    image, now = TRANSFORMS[name](Image.new("RGB", (60, 50)), boxes_of([], 50, 60))
    assert image.shape[0] == 3
    assert [tuple(each.shape) for each in now[:4]] == [(0, 4), (0,), (0,), (0,)]
    assert [each.dtype for each in now[:4]] == [torch.float32, torch.int64, torch.float32, torch.bool]


@pytest.mark.parametrize("name", ["detr", "jitter"])
def test_draws_follow_torch(name):
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))

    def draws(seed):
        torch.manual_seed(seed)
        return [TRANSFORMS[name](source, boxes_of([(5, 5, 60, 50)], 60, 80)) for _ in range(6)]

    first, again, other = draws(0), draws(0), draws(1)
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1].boxes, b[1].boxes) for a, b in zip(first, again, strict=True)
    )
    assert any(a[0].shape != b[0].shape for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: DetrAugment(short_sides=[900], long_side=800), "short side 900, long side 800"),
        (lambda: DetrAugment(short_sides=[0]), "short side 0"),
        (lambda: DetrAugment(crop=(600, 384)), r"crop=\(600, 384\)"),
        (lambda: LargeScaleJitter(scale=(2.0, 0.1)), r"scale=\(2\.0, 0\.1\)"),
        (lambda: LargeScaleJitter(side=0), r"crop=\(0, 0\)"),
        (lambda: ResizeForTest(image_size=100, longest=0.5), "short side 100, long side 50"),
    ],
    ids=["short above long", "no side", "crop", "scale", "square", "longest"],
)
def test_arguments_out_of_range(make, fragment):
    with pytest.raises(ValueError, match=fragment):
        make()


@pytest.mark.parametrize(("multiple", "shape"), [(1, (30, 50)), (32, (32, 64))])
def test_padding_is_zero_and_to_the_right_and_below(multiple, shape):
    images = [torch.rand(3, 30, 20) + 1, torch.rand(3, 10, 50) + 1]
    padded, sizes = pad_together(images, multiple)
    assert padded.shape == (2, 3, *shape)
    assert sizes.tolist() == [[30, 20], [10, 50]]
    assert sizes.dtype == torch.int64
    for image, place in zip(images, padded, strict=True):
        assert torch.equal(place[:, : image.shape[1], : image.shape[2]], image)
        assert (place != 0).sum() == image.numel()
    boxes = (boxes_of([], 1, 1), boxes_of([(0, 0, 1, 1)], 1, 1))
    batch = DetectionCollate(multiple)(list(zip(images, boxes, strict=True)))
    assert torch.equal(batch.images, padded)
    assert batch.targets == boxes
