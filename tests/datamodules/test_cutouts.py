"""Laws of the cut-outs: splits share no drawing, every one is drawn, sizes are those of the levels."""

import shutil
from itertools import combinations

import numpy as np
import pytest
from cutout_sources import sources_or_skip

from datamodules.cutouts import CLASS_NAMES, CLASSES, FONT, PHOTOGRAPHS, SPLITS, CutOuts, coverage, photograph_wheel
from datamodules.embedded_source import SourceError


@pytest.fixture(scope="module")
def sources():
    return sources_or_skip()


@pytest.fixture(scope="module")
def cutouts(sources):
    return {split: CutOuts(sources, split) for split in SPLITS}


def premultiplied(picture):
    """(32, 32, 4), 0 … 1, whatever the shape of the picture."""
    pixels = np.asarray(picture.resize((32, 32)), float) / 255
    return np.concatenate((pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]), -1)


def test_every_character_and_photograph_belongs_to_one_class_and_split():
    characters = [character for splits in CLASSES.values() for split in SPLITS for character in splits[split]]
    assert len(characters) == len(set(characters))
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["val"])
    for name, splits in CLASSES.items():
        assert len(splits["train"]) >= 14, name
        assert len(splits["val"]) >= 4, name


def test_every_cutout_is_in_the_font_and_unlike_the_others(cutouts):
    absent = premultiplied(cutouts["train"].picture("\U0010fffd", 96))
    drawn = {}
    for split in SPLITS:
        for characters in cutouts[split].characters:
            drawn |= {character: premultiplied(cutouts[split].picture(character, 96)) for character in characters}
    assert all(np.abs(picture - absent).mean() > 0.05 for picture in drawn.values())
    assert len({picture.tobytes() for picture in drawn.values()}) == len(drawn)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_no_drawing_is_met_again_in_validation_not_even_mirrored(cutouts, name):
    label = CLASS_NAMES.index(name)
    seen, unseen = (
        [premultiplied(cutouts[split].picture(character, 96)) for character in cutouts[split].characters[label]]
        for split in SPLITS
    )
    for one in unseen:
        for other in seen:
            # Neighbouring hours of the clock differ by 0.009 of the range, mirror images by 0.005: resampling.
            assert min(np.abs(one - other).mean(), np.abs(one - other[:, ::-1]).mean()) > 0.007


def test_classes_look_unlike_each_other(cutouts):
    """The mean picture of a class tells unseen cut-outs better than chance; a network will do better than that."""
    means = [np.mean([premultiplied(cutouts["train"].picture(c, 48)) for c in group], 0) for group in train(cutouts)]
    hits = [
        label == np.argmin([np.square(premultiplied(cutouts["val"].picture(c, 48)) - mean).mean() for mean in means])
        for label, group in enumerate(cutouts["val"].characters)
        for c in group
    ]
    assert np.mean(hits) > 0.6


def train(cutouts):
    return cutouts["train"].characters


@pytest.mark.parametrize(("side", "level"), [(20.0, 48), (48.0, 48), (48.5, 96), (192.0, 192), (500.0, 192)])
def test_pictures_have_the_side_of_their_level_and_are_cropped(cutouts, side, level):
    for character in "😂🚗🐄":
        picture = cutouts["val"].picture(character, side)
        assert max(picture.size) == level
        alpha = coverage(picture)
        assert alpha.shape == (picture.height, picture.width)
        assert 0.9 < alpha.max() <= 1.0
        assert all(edge.max() > 0 for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]))


def test_a_large_picture_shrinks_to_the_small_one(cutouts):
    for first, second in combinations((48, 96, 192), 2):
        for character in "😎🧡🏰":
            small, large = (cutouts["val"].picture(character, level) for level in (first, second))
            difference = premultiplied(small) - premultiplied(large.resize(small.size))
            assert np.abs(difference).mean() < 0.02  # the filters differ


def test_the_wheel_of_photographs_is_the_one_that_the_glyph_set_pins():
    assert photograph_wheel().name == "scikit-image"


@pytest.mark.parametrize("lost", [f"font/{FONT}", "photographs/coins.png"])
def test_a_missing_or_broken_file_is_named(sources, tmp_path, lost):
    folder = tmp_path / "sources"
    shutil.copytree(sources, folder)
    (folder / lost).write_bytes(b"nothing")
    with pytest.raises(SourceError, match=lost.rpartition("/")[2]):
        CutOuts(folder, "train")
    (folder / lost).unlink()
    with pytest.raises(SourceError, match=r"delete .* and run again"):
        CutOuts(folder, "train")
