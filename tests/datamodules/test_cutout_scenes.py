"""Laws of composed scenes: masks are what changed over the photograph, objects stay visible, seeds decide all."""

from dataclasses import replace

import numpy as np
import pytest
from cutout_sources import sources_or_skip

from datamodules.cutout_scenes import SceneSettings, compose_scene, compose_scenes, deal_labels
from datamodules.cutouts import CLASS_NAMES, CutOuts

SETTINGS = SceneSettings()


@pytest.fixture(scope="module")
def cutouts():
    return CutOuts(sources_or_skip(), "val")


@pytest.fixture(scope="module")
def scenes(cutouts):
    return list(compose_scenes(cutouts, 40, "val", 0, SETTINGS))


def test_the_same_seed_gives_the_same_scenes_and_another_seed_or_split_others(cutouts, scenes):
    for first, again in zip(scenes, compose_scenes(cutouts, 40, "val", 0, SETTINGS), strict=True):
        assert first.labels == again.labels
        for one, other in zip(first[:3], again[:3], strict=True):
            np.testing.assert_array_equal(one, other)
    for split, seed in (("val", 1), ("train", 0)):
        for other in compose_scenes(cutouts, 5, split, seed, SETTINGS):
            assert not any(np.array_equal(other.image, scene.image) for scene in scenes)


@pytest.mark.parametrize("count", [1, 7, 500])
def test_classes_are_dealt_evenly(count):
    dealt = deal_labels(count, "train", 0, SETTINGS)
    counts = np.bincount([label for labels in dealt for label in labels], minlength=len(CLASS_NAMES))
    assert len(dealt) == count
    assert counts.max() - counts.min() <= 1
    assert sum(not labels for labels in dealt) == round(SETTINGS.empty * count)
    assert max(len(labels) for labels in dealt) <= SETTINGS.objects


def test_masks_are_where_the_photograph_is_covered(cutouts):
    inside = []
    for seed in range(20):
        scene = compose_scene(cutouts, (0, 4, 8, 1), np.random.default_rng(seed), SETTINGS)
        bare = compose_scene(cutouts, (), np.random.default_rng(seed), SETTINGS)  # the same photograph
        change = np.abs(scene.image.astype(int) - bare.image).max(-1)
        assert not bare.objects.any()
        assert not bare.rim.any()
        # Each of four objects may cover 5 % of such a pixel.
        assert change[(scene.objects == 0) & ~scene.rim].max() <= 4 * (0.05 * 255 + 1)
        inside.append((change[scene.objects > 0] > 13).mean())
    assert np.mean(inside) > 0.9  # an object may have the colour of what it covers


def test_objects_lie_in_order_and_stay_visible(cutouts):
    labels = (0, 1, 2, 3, 4, 5)
    for seed in range(10):
        steps = [
            compose_scene(cutouts, labels[:number], np.random.default_rng(seed), SETTINGS)
            for number in range(1, len(labels) + 1)
        ]
        for number, step in enumerate(steps, 1):
            whole, left_over = (step.objects == number), (steps[-1].objects == number)
            assert not (left_over & ~whole).any()  # later objects only take away
            assert left_over.sum() >= SETTINGS.visible * whole.sum() > 0


def test_rims_are_thin_and_hold_both_sides(scenes):
    for scene in scenes:
        windows = np.lib.stride_tricks.sliding_window_view(scene.rim, (5, 5))
        assert not windows.all((-1, -2)).any()
    shares = [scene.rim[scene.objects > 0].mean() for scene in scenes if scene.labels]
    assert 0 < np.mean(shares) < 0.1
    assert any((scene.rim & (scene.objects == 0)).any() for scene in scenes)


def test_sizes_shapes_and_areas_vary(scenes):
    areas = np.array([(scene.objects == k).sum() for scene in scenes for k in range(1, len(scene.labels) + 1)])
    small, large = (areas < 32**2).mean(), (areas > 96**2).mean()
    assert 0.05 < small < 0.4
    assert 0.05 < large < 0.4
    heights, widths = zip(*(scene.objects.shape for scene in scenes), strict=True)
    assert SETTINGS.side[0] <= min(heights + widths)
    assert max(heights + widths) <= SETTINGS.side[1]
    ratios = np.divide(heights, widths)
    assert ratios.min() < 0.85
    assert ratios.max() > 1.15


def test_scenes_are_typed(scenes):
    for scene in scenes:
        assert scene.image.dtype == np.uint8
        assert scene.image.shape == (*scene.objects.shape, 3)
        assert scene.rim.dtype == bool
        assert set(np.unique(scene.objects)) <= {0, *range(1, len(scene.labels) + 1)}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"side": (320, 224)}, "side="),
        ({"size": (0.5, 100.0)}, "size="),
        ({"size": (150.0, 200.0)}, "size="),
        ({"objects": 0}, "objects="),
        ({"empty": 1.0}, "empty="),
        ({"visible": 0.0}, "visible="),
        ({"window": (0.5, 1.5)}, "window="),
        ({"gain": 0.9}, "gain="),
    ],
    ids=lambda value: str(value).strip("{}") if isinstance(value, dict) else None,
)
def test_settings_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        SceneSettings(**options)


def test_a_scene_without_room_is_refused(cutouts):
    crowded = replace(SETTINGS, side=(64, 64), size=(32.0, 32.0), visible=1.0, objects=40)
    with pytest.raises(ValueError, match="no place for 40 objects"):
        compose_scene(cutouts, (4,) * 40, np.random.default_rng(0), crowded)
