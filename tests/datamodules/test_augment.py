"""The ImageNet image recipes against timm, PIL and their own stated geometry."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import auto_augment_policy_3a, posterize
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from datamodules.augment import EvalTransform, RandAugment, ThreeAugment, posterize_or_black
from datamodules.batches import ImageBatch
from datamodules.mixing import MixedCollate, collate

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a colour ramp: no two regions, channels or mirrorings look alike."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 160, width)[None, :, None] * np.array([1.0, 0.6, 0.3])
    return Image.fromarray((ramp + generator.uniform(0, 90, (height, width, 3))).astype(np.uint8))


def steps_of(transform: object) -> list[object]:
    return list(transform.steps.transforms)  # type: ignore[attr-defined]


def test_three_augment_keeps_the_order_of_deit_iii() -> None:
    names = [type(step).__name__ for step in steps_of(ThreeAugment(image_size=(32, 32)))]
    expected = "RandomResizedCrop RandomHorizontalFlip RandomChoice ColorJitter ToTensor Normalize"
    assert names == expected.split()


def test_three_augment_picks_exactly_one_operation_a_third_of_the_time_each() -> None:
    random.seed(0)
    torch.manual_seed(0)
    image = photo(12, 12)
    choose = steps_of(ThreeAugment(image_size=(12, 12)))[2]
    grey = np.asarray(ImageOps.grayscale(image).convert("RGB"))
    solarised = np.asarray(ImageOps.solarize(image, 128))
    counts: Counter[str] = Counter()
    for _ in range(3000):
        result = np.asarray(choose(image))  # type: ignore[operator]
        if np.array_equal(result, grey):
            counts["grey"] += 1
        elif np.array_equal(result, solarised):
            counts["solarised"] += 1
        else:  # a blur alone keeps colours and flattens noise; solarised and blurred would be brighter on the left
            assert abs(result.mean() - np.asarray(image).mean()) < 4
            counts["blurred"] += 1
    assert sum(counts.values()) == 3000
    for name in ("grey", "solarised", "blurred"):
        assert abs(counts[name] / 3000 - 1 / 3) < 0.04, counts  # 4.6 standard deviations


def test_three_augment_operations_equal_those_of_timm() -> None:
    image = photo(40, 30)
    grey, solarise, blur = steps_of(ThreeAugment(image_size=(8, 8)))[2].transforms  # type: ignore[attr-defined]
    timm_solarise, timm_grey, timm_blur = (policy[0] for policy in auto_augment_policy_3a({"magnitude_std": 0}))
    assert np.array_equal(solarise(image), timm_solarise(image))
    assert np.array_equal(grey(image), timm_grey(image))
    random.seed(5)
    ours = [np.asarray(blur(image)) for _ in range(5)]
    random.seed(5)
    theirs = [np.asarray(image_with_one_draw(timm_blur, image)) for _ in range(5)]
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def image_with_one_draw(operation: object, image: Image.Image) -> Image.Image:
    """timm's operation itself, without the wrapper that draws whether to apply it."""
    return operation.aug_fn(image, *operation.level_fn(operation.magnitude, {}))  # type: ignore[attr-defined]


def test_three_augment_crops_between_a_twelfth_and_the_whole_area() -> None:
    torch.manual_seed(0)
    crop = steps_of(ThreeAugment(image_size=(8, 8)))[0]
    assert isinstance(crop, transforms.RandomResizedCrop)
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    areas = []
    for _ in range(300):
        _, _, height, width = crop.get_params(torch.empty(3, 200, 200), list(crop.scale), list(crop.ratio))
        areas.append(height * width / 200**2)
    assert 0.075 < min(areas) < 0.15
    assert 0.9 < max(areas) <= 1.0


def test_rand_augment_is_the_recipe_of_swin() -> None:
    steps = steps_of(RandAugment(image_size=(32, 48)))
    names = [type(step).__name__ for step in steps]
    expected = "RandomResizedCropAndInterpolation RandomHorizontalFlip RandAugment MaybeToTensor Normalize"
    assert names == [*expected.split(), "RandomErasing"]  # and no ColorJitter
    erasing = steps[-1]
    assert isinstance(erasing, RandomErasing)
    assert (erasing.probability, erasing.per_pixel, erasing.min_count, erasing.max_count) == (0.25, True, 1, 1)
    policy = steps[2]
    assert policy.num_layers == 2  # type: ignore[attr-defined]
    operations = policy.ops  # type: ignore[attr-defined]
    assert {operation.magnitude for operation in operations} == {9}
    assert {operation.magnitude_std for operation in operations} == {0.5}


def test_rand_augment_survives_its_greatest_strength() -> None:
    recipe = RandAugment(image_size=(16, 16), policy="rand-m10-inc1", erasing=0.0)
    operations = steps_of(recipe)[2].ops  # type: ignore[attr-defined]
    image = photo(20, 20)
    for operation in operations:
        operation.prob = 1.0
        assert operation(image).size == image.size
    assert np.asarray(posterize_or_black(image, 0)).max() == 0
    assert np.array_equal(np.asarray(posterize_or_black(image, 2)), np.asarray(posterize(image, 2)))


@pytest.mark.parametrize("recipe", [ThreeAugment, RandAugment])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_training_recipes_give_the_size_asked_for_and_travel_to_workers(recipe: type, size: tuple[int, int]) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    transform = pickle.loads(pickle.dumps(recipe(image_size=size)))
    results = [transform(photo(50, 37, seed)) for seed in range(8)]
    assert all(result.shape == (3, *size) and result.dtype == torch.float32 for result in results)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize(("crop_ratio", "resized"), [(1.0, 32), (0.875, 36)])
def test_evaluation_resizes_then_cuts_the_centre(crop_ratio: float, resized: int) -> None:
    image = photo(90, 60)
    result = EvalTransform(image_size=(32, 32), crop_ratio=crop_ratio)(image)
    scaled = image.resize((resized * 90 // 60, resized), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 32) // 2, (scaled.height - 32) // 2
    pixels = np.asarray(scaled.crop((left, top, left + 32, top + 32)))
    expected = (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - MEAN) / DEVIATION
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("crop_ratio", [1.0, 0.875])
@pytest.mark.parametrize("photo_size", [(90, 60), (60, 90), (20, 20)])
def test_evaluation_at_a_size_that_is_not_square_keeps_the_aspect(
    crop_ratio: float, photo_size: tuple[int, int]
) -> None:
    width, height = photo_size
    brightness = 255 // max(photo_size)  # a step from one source row or column to the next
    rows = np.broadcast_to(np.arange(height)[:, None], (height, width))
    columns = np.broadcast_to(np.arange(width)[None, :], (height, width))
    position = Image.fromarray((brightness * np.stack((rows, columns, rows), axis=-1)).astype(np.uint8))
    result = EvalTransform(image_size=(24, 48), crop_ratio=crop_ratio)(position)
    assert result.shape == (3, 24, 48)
    pixels = (result * DEVIATION + MEAN) * 255 / brightness
    step_down = float((pixels[0, 22] - pixels[0, 1]).mean() / 21)  # source rows an output row
    step_right = float((pixels[1, :, 46] - pixels[1, :, 1]).mean() / 45)  # source columns an output column
    expected = min(width / int(48 / crop_ratio), height / int(24 / crop_ratio))
    assert step_down == pytest.approx(expected, rel=0.05)
    assert step_right == pytest.approx(expected, rel=0.05)


def test_normalisation_is_that_of_imagenet() -> None:
    grey = Image.new("RGB", (40, 40), (128, 128, 128))
    expected = torch.tensor([(128 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225])
    torch.testing.assert_close(EvalTransform(image_size=(8, 8), crop_ratio=1.0)(grey)[:, 4, 4], expected)


def samples(count: int) -> list[tuple[torch.Tensor, int]]:
    return [(torch.full((3, 16, 16), float(label)), label) for label in range(count)]


def test_collate_keeps_integer_classes() -> None:
    batch = collate(samples(4))
    assert isinstance(batch, ImageBatch)
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.targets.dtype == torch.int64
    assert batch.targets.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
def test_mixed_targets_weigh_the_classes_as_the_pixels_do(alphas: tuple[float, float]) -> None:
    np.random.seed(1)
    mix = MixedCollate(num_classes=4, mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    for _ in range(20):
        images, targets = mix(samples(4))
        assert targets.dtype == torch.float32
        assert targets.shape == (4, 4)
        torch.testing.assert_close(targets.sum(-1), torch.ones(4))
        # Pixels hold their class number, so their mean is the class number expected under the target.
        torch.testing.assert_close(images.mean((1, 2, 3)), targets @ torch.arange(4.0), atol=1e-4, rtol=0)


def test_label_smoothing_reaches_every_class() -> None:
    targets = MixedCollate(num_classes=10, label_smoothing=0.1)(samples(4)).targets
    assert float(targets.min()) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(targets.sum(-1), torch.ones(4))


def test_mixing_with_nothing_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="mix=null"):
        MixedCollate(num_classes=4, mixup_alpha=0.0, cutmix_alpha=0.0)
