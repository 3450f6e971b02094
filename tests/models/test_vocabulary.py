"""k-disks: what the tokens cover, what they are closed under, and what files of them may hold."""

import pytest
import torch
from safetensors.torch import save_file

from models import vocabulary
from models.motion_head import BOXES
from models.poses import box_corners, compose, mirror
from models.vocabulary import FAMILIES, build, join, load, sampled, sampled_segments, save


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def segments(code=0, count=3000):
    return sampled_segments(FAMILIES[code], count, generator())


def distances(tokens, motions, code):
    """(s, n) mean corner distances between the ends of motions and tokens."""
    box = torch.tensor(BOXES[code])
    corners = box_corners(motions[:, -1], box)[:, None], box_corners(tokens[:, -1], box)
    return (corners[0] - corners[1]).norm(dim=-1).mean(-1)


@pytest.mark.parametrize("code", [0, 1, 2])
@pytest.mark.parametrize("mirrored", [False, True])
def test_every_motion_is_near_a_token_when_tokens_suffice(code, mirrored):
    tokens = build(segments(code), code, 10_000, 0.2, generator(), mirrored)
    # A motion was within the tolerance of the drawn one, and so was the mean, whatever was removed: twice the tolerance.
    # The mean of the headings adds its own bend, of the order of the tolerance squared.
    assert distances(tokens, segments(code)[:, 1:], code).amin(-1).max() < 2 * 0.2 + 0.02


def test_the_size_bounds_the_tokens():
    assert len(build(segments(), 0, 50, 0.05, generator())) == 50
    assert len(build(segments(), 0, 1, 0.05, generator())) == 1


def test_the_first_token_stands_still():
    for tokens in (build(segments(), 0, 20, 0.05, generator()), build(segments(1), 1, 20, 0.05, generator(), True)):
        assert (tokens[0] == 0).all()
        assert (tokens[1:].abs().amax((1, 2)) > 0).all()


def test_no_motion_at_all_leaves_standing_still():
    tokens = build(torch.zeros(0, 6, 3), 2, 10, 0.05, generator())
    assert tokens.shape == (1, 5, 3)
    assert (tokens == 0).all()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_mirrored_tokens_are_closed_under_exchange_of_left_and_right(code):
    tokens = build(segments(code), code, 300, 0.1, generator(), mirrored=True)
    other = mirror(tokens)
    assert all((each == tokens).all((1, 2)).any() for each in other)
    plain = build(segments(code), code, 300, 0.1, generator())
    assert not all((each == plain).all((1, 2)).any() for each in mirror(plain))


def test_segments_may_lie_in_any_frame():
    moved = compose(torch.tensor([30.0, -40.0, 2.0], dtype=torch.float64), segments().double())
    tokens = build(segments().double(), 0, 100, 0.1, generator())
    torch.testing.assert_close(build(moved, 0, 100, 0.1, generator()), tokens, atol=1e-9, rtol=0)


def test_equal_seeds_give_equal_tokens_and_others_do_not():
    first, again, other = (build(segments(), 0, 60, 0.1, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_disk_is_stored_as_its_mean():
    motions = torch.zeros(3, 6, 3)
    motions[:, :, 0] = torch.tensor([5.00, 5.02, 9.0])[:, None] * torch.arange(6) / 5
    tokens = build(motions, 0, 10, 0.05, generator())
    torch.testing.assert_close(tokens[:, -1, 0].sort().values, torch.tensor([0.0, 5.01, 9.0]))


def test_turns_through_the_back_average_to_the_back():
    motions = torch.zeros(2, 6, 3)
    motions[:, 5, 2] = torch.tensor([3.13, -3.13])
    tokens = build(motions, 1, 10, 0.1, generator())
    assert len(tokens) == 2
    assert abs(tokens[1, -1, 2]) > 3.14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 6, 3), 3, 8, 0.05), "unknown class 3"),
        ((torch.zeros(4, 6, 3), -1, 8, 0.05), "unknown class -1"),
        ((torch.zeros(4, 5, 3), 0, 8, 0.05), r"\(4, 5, 3\), expected \(s, 6, 3\)"),
        ((torch.zeros(4, 6, 3), 0, 0, 0.05), "size 0"),
        ((torch.zeros(4, 6, 3), 0, 8, 0.0), "tolerance 0.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments, generator())


def test_the_sampled_vocabulary_is_the_same_every_time_and_wherever_tensors_are_made():
    expected = sampled(40, (0.5, 0.2, 0.3), seed=3, pool=2000)
    vocabulary._sampled.cache_clear()
    with torch.device("meta"):
        again = sampled(40, [0.5, 0.2, 0.3], seed=3, pool=2000)
    assert again.motions.device.type == "cpu"
    assert again.motions is not expected.motions
    assert torch.equal(again.motions, expected.motions)
    assert expected.motions.shape == (3, 40, 5, 3)
    with pytest.raises(ValueError, match="tolerances"):
        sampled(40, (0.5,))


def test_sampled_motions_stay_within_what_their_family_says():
    for family in FAMILIES:
        motions = sampled_segments(family, 5000, generator())
        assert (motions[:, 0] == 0).all()
        assert motions[:, -1, 0].max() < 0.5 * (family.speed + 2 * family.acceleration)
        backwards = (motions[:, -1, 0] < -0.02).float().mean()
        assert 0.3 * family.reversing < backwards < 2 * family.reversing


def test_a_file_gives_back_what_was_saved(tmp_path):
    made = join([build(segments(code), code, 5 + code, 0.1, generator()) for code in range(3)], (0.1, 0.1, 0.1))
    assert made.counts.tolist() == [5, 6, 7]
    assert (made.motions[0, 5:] == 0).all()
    save(made, tmp_path / "v.safetensors", "sampled")
    found = load(tmp_path / "v.safetensors")
    assert torch.equal(found.motions, made.motions)
    assert torch.equal(found.counts, made.counts)
    assert found.tolerances == made.tolerances
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def test_files_that_are_no_vocabulary_are_refused_by_name(tmp_path):
    with pytest.raises(OSError, match=r"absent.*no such"):
        load(tmp_path / "absent")
    text = tmp_path / "text.safetensors"
    text.write_text("not tensors")
    with pytest.raises(ValueError, match=r"text\.safetensors: not a vocabulary"):
        load(text)
    good = {"format": "1", "counts": "[4, 4, 4]", "tolerances": "[0.05, 0.05, 0.05]"}
    motions = torch.zeros(3, 4, 5, 3)
    for name, tensors, metadata, message in (
        ("format", {"motions": motions}, {**good, "format": "9"}, "format is '9'"),
        ("shape", {"motions": motions[:2]}, good, r"shape \(2, 4, 5, 3\)"),
        ("scalar", {"motions": torch.tensor(1.0)}, good, r"shape \(\)"),
        ("counts", {"motions": motions}, {**good, "counts": "[4, 5, 4]"}, r"counts are \[4, 5, 4\]"),
        ("list", {"motions": motions}, {**good, "counts": "[4, 5"}, "not a vocabulary"),
        ("missing", {"motions": motions}, {"format": "1"}, "not a vocabulary"),
        ("nan", {"motions": motions / 0}, good, "finite"),
        ("tensor", {"other": motions}, good, "not a vocabulary"),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert path.name in str(caught.value)
