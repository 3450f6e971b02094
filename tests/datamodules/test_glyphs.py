"""Laws of the glyph set: splits share no source, scenes know no resolution, the cache vouches for its arrays."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.embedded_source import SourceError, cache_folder
from datamodules.glyph_rendering import SceneRenderer
from datamodules.glyph_scenes import CLASS_NAMES, Scene, SceneSettings, draw_scene
from datamodules.glyph_sources import FAMILIES, PHOTOGRAPHS, SPLITS, Split, prepare_sources, split_sources
from datamodules.glyph_store import open_rendered, render_once
from datamodules.glyphs import Glyphs

SETTINGS = SceneSettings()


@pytest.fixture(scope="module")
def sources() -> Path:
    return prepare_sources(cache_folder())


@pytest.fixture
def cache(tmp_path: Path, sources: Path) -> Path:
    (tmp_path / "glyphs").mkdir()
    (tmp_path / "glyphs" / sources.name).symlink_to(sources, target_is_directory=True)
    return tmp_path


def small(cache: Path, image_size: int | tuple[int, int] = 24, seed: int = 0) -> Glyphs:
    return Glyphs(image_size, batch_size=10, train_size=20, val_size=20, test_size=20, seed=seed, cache=cache)


def scenes(sources: Path, split: Split, count: int) -> tuple[SceneRenderer, list[Scene]]:
    files = split_sources(sources, split)
    seed = (0, SPLITS.index(split))
    drawn = [draw_scene(i, seed, len(files.fonts), len(files.photographs), SETTINGS) for i in range(count)]
    return SceneRenderer(files, SETTINGS), drawn


def test_no_family_and_no_photograph_stands_in_two_splits(sources: Path) -> None:
    for one, other in combinations(SPLITS, 2):
        assert not set(FAMILIES[one]) & set(FAMILIES[other])
        assert not set(PHOTOGRAPHS[one]) & set(PHOTOGRAPHS[other])
        digests = [
            {path.read_bytes() for files in split_sources(sources, split).fonts.values() for path in files}
            for split in (one, other)
        ]
        assert not digests[0] & digests[1]


def test_classes_are_balanced_and_batches_are_typed(cache: Path) -> None:
    data = small(cache)
    data.setup("test")
    batches = list(data.test_dataloader())
    counts = torch.bincount(torch.cat([batch.targets for batch in batches]), minlength=data.num_classes)
    assert counts.tolist() == [2] * len(CLASS_NAMES)
    assert batches[0].images.shape == (10, 3, 24, 24)
    assert batches[0].images.dtype == torch.float32
    assert batches[0].targets.dtype == torch.int64


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(
    cache: Path, tmp_path: Path, sources: Path
) -> None:
    first, again, other = small(cache), small(cache), small(cache, seed=1)
    first.setup("test")
    path = first.rendered("test").path(cache)
    kept = np.array(first.datasets["test"].images)
    path.unlink()
    again.setup("test")
    other.setup("test")
    np.testing.assert_array_equal(kept, again.datasets["test"].images)
    assert (kept != other.datasets["test"].images).any()


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_at_high_resolution_shrinks_to_the_scene_at_low_resolution(sources: Path, split: Split) -> None:
    renderer, drawn = scenes(sources, split, 20)
    for scene in drawn:
        low = renderer.render(scene, 32, 32).astype(float)
        high = np.asarray(Image.fromarray(renderer.render(scene, 128, 128)).reduce(4)).astype(float)
        assert np.abs(low - high).mean() < 6.0  # of 255; the resampling filters differ
        assert np.corrcoef(low.ravel(), high.ravel())[0, 1] > 0.95


def test_high_resolution_adds_detail_that_enlarging_does_not_bring(sources: Path) -> None:
    renderer, drawn = scenes(sources, "test", 20)

    def sharpness(image: np.ndarray) -> float:
        return float(np.abs(np.diff(image.astype(float), axis=1)).max())

    native = [sharpness(renderer.render(scene, 96, 96)) for scene in drawn]
    enlarged = [
        sharpness(
            np.asarray(Image.fromarray(renderer.render(scene, 32, 32)).resize((96, 96), Image.Resampling.BICUBIC))
        )
        for scene in drawn
    ]
    assert np.mean(native) > 1.2 * np.mean(enlarged)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32)])
def test_a_longer_image_shows_the_same_scene_in_its_middle(sources: Path, height: int, width: int) -> None:
    renderer, drawn = scenes(sources, "val", 20)
    for scene in drawn:
        square = renderer.render(scene, 32, 32).astype(float)
        longer = renderer.render(scene, height, width).astype(float)
        assert longer.shape == (height, width, 3)
        top, left = (height - 32) // 2, (width - 32) // 2
        assert np.abs(longer[top : top + 32, left : left + 32] - square).mean() < 3.0


def test_non_square_batches(cache: Path) -> None:
    data = small(cache, (24, 36))
    data.setup("fit")
    assert next(iter(data.train_dataloader())).images.shape == (10, 3, 24, 36)
    assert next(iter(data.val_dataloader())).images.shape == (10, 3, 24, 36)


def test_scales_and_places_vary() -> None:
    drawn = [draw_scene(i, (0, 0), 5, 3, SETTINGS) for i in range(200)]
    sizes = [scene.glyph.size for scene in drawn]
    assert SETTINGS.size[0] <= min(sizes) < 0.55
    assert 0.85 < max(sizes) <= SETTINGS.size[1]
    assert np.std([scene.glyph.centre for scene in drawn]) > 0.05


def test_glyphs_stand_out_from_their_background(sources: Path) -> None:
    renderer, drawn = scenes(sources, "train", 40)
    for scene in drawn:
        glyph = replace(scene.glyph, size=1e-3, centre=(9.0, 9.0))  # out of sight
        background = renderer.render(replace(scene, distractors=(), glyph=glyph), 48, 48).astype(float)
        picture = renderer.render(replace(scene, distractors=()), 48, 48).astype(float)
        assert np.abs(picture - background).max() > 255 * SETTINGS.contrast / 2


def test_an_altered_array_is_refused(cache: Path) -> None:
    data = small(cache)
    data.setup("test")
    path = data.rendered("test").path(cache)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SourceError, match="does not match"):
        small(cache).setup("test")


def test_a_missing_font_is_named(cache: Path, tmp_path: Path, sources: Path) -> None:
    folder = tmp_path / "partial"
    shutil.copytree(sources / "photographs", folder / "photographs")
    with pytest.raises(SourceError, match="open-sans is missing"):
        split_sources(folder, "test")


def test_cached_arrays_need_no_sources(cache: Path, sources: Path) -> None:
    small(cache).setup("test")
    (cache / "glyphs" / sources.name).unlink()
    prepare_sources.cache_clear()
    again = small(cache)
    again.setup("test")
    assert len(again.datasets["test"]) == 20


def test_of_several_that_start_at_once_one_renders(cache: Path, sources: Path) -> None:
    rendered = small(cache).rendered("val")
    messages: list[str] = []
    with ThreadPoolExecutor(3) as pool:
        started = [pool.submit(render_once, rendered, cache, lambda: sources, messages.append) for _ in range(3)]
        paths = {future.result() for future in started}
    assert len(messages) == 1
    assert open_rendered(paths.pop(), rendered).shape == (20, 24, 24, 3)
    assert not list((cache / "glyphs").glob("*.part"))


def test_training_batches_follow_torch_generator(cache: Path) -> None:
    data = small(cache)
    data.setup("fit")
    batches = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        batches.append(next(iter(data.train_dataloader())).images)
    torch.testing.assert_close(batches[0], batches[1], rtol=0, atol=0)
    assert not torch.equal(batches[0], batches[2])
