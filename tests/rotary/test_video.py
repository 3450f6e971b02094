"""Worked position tables of text and vision streams, and the identities behind them."""

import pytest
import torch

from rotary import Rotary, rotate
from rotary.frequencies import Geometric
from rotary.video import Text, Vision, mrope, video_rope, vrope

ONE = [Text(3), Vision(2, 2, 3), Text(2)]
TWO = [Text(2), Vision(1, 2, 3), Text(1), Vision(2, 2, 2), Text(1)]


def table(text):
    """Rows of numbers, bars ignored; "3x6" is six threes."""
    rows = []
    for line in text.strip().splitlines():
        row = []
        for word in line.replace("|", " ").split():
            value, _, count = word.partition("x")
            row += [float(value)] * int(count or 1)
        rows.append(row)
    return torch.tensor(rows)


GOLDEN = {
    "mrope": (
        lambda: mrope(ONE),
        """0 1 2 | 3x6 | 4x6 | 6 7
           0 1 2 | 3x3 4x3 | 3x3 4x3 | 6 7
           0 1 2 | 3 4 5 3 4 5 | 3 4 5 3 4 5 | 6 7""",
        8,
    ),
    "vrope": (
        lambda: vrope(ONE),
        """0 1 2 | 3 4 5 4 5 6 | 7 8 9 8 9 10 | 11 12
           0 1 2 | 4 5 6 3 4 5 | 8 9 10 7 8 9 | 11 12
           0 1 2 | 6 5 4 5 4 3 | 10 9 8 9 8 7 | 11 12
           0 1 2 | 5 4 3 6 5 4 | 9 8 7 10 9 8 | 11 12""",
        13,
    ),
    "video_rope released": (
        lambda: video_rope(ONE),
        """0 1 2 | 3x6 | 5x6 | 6 7
           0 1 2 | 3x3 4x3 | 5x3 6x3 | 6 7
           0 1 2 | 2 3 4 2 3 4 | 4 5 6 4 5 6 | 6 7""",
        8,
    ),
    "video_rope paper": (
        lambda: video_rope(ONE, released=False),
        """0 1 2 | 3x6 | 5x6 | 7 8
           0 1 2 | 2x3 3x3 | 4x3 5x3 | 7 8
           0 1 2 | 1.5 2.5 3.5 1.5 2.5 3.5 | 3.5 4.5 5.5 3.5 4.5 5.5 | 7 8""",
        9,
    ),
    "hope 0.5": (
        lambda: video_rope(ONE, stride=0.5),
        """0 1 2 | 3x6 | 3.5x6 | 4.5 5.5
           0 1 2 | 3x3 4x3 | 3.5x3 4.5x3 | 4.5 5.5
           0 1 2 | 2 3 4 2 3 4 | 2.5 3.5 4.5 2.5 3.5 4.5 | 4.5 5.5""",
        6.5,
    ),
    "hope 1.5": (
        lambda: video_rope(ONE, stride=1.5),
        """0 1 2 | 3x6 | 4.5x6 | 5.5 6.5
           0 1 2 | 3x3 4x3 | 4.5x3 5.5x3 | 5.5 6.5
           0 1 2 | 2 3 4 2 3 4 | 3.5 4.5 5.5 3.5 4.5 5.5 | 5.5 6.5""",
        7.5,
    ),
    "mrope of two": (
        lambda: mrope(TWO),
        """0 1 | 2x6 | 5 | 6x4 7x4 | 8
           0 1 | 2x3 3x3 | 5 | 6 6 7 7 6 6 7 7 | 8
           0 1 | 2 3 4 2 3 4 | 5 | 6 7 6 7 6 7 6 7 | 8""",
        9,
    ),
    "video_rope of two": (
        lambda: video_rope(TWO),
        """0 1 | 2x6 | 3 | 4x4 6x4 | 7
           0 1 | 2x3 3x3 | 3 | 4 4 5 5 6 6 7 7 | 7
           0 1 | 1 2 3 1 2 3 | 3 | 4 5 4 5 6 7 6 7 | 7""",
        8,
    ),
    "vrope of two, released": (
        lambda: vrope(TWO, released_order=True),
        """0 1 | 2 3 4 3 4 5 | 6 | 7 8 8 9 10 11 11 12 | 13
           0 1 | 4 3 2 5 4 3 | 6 | 8 7 9 8 11 10 12 11 | 13
           0 1 | 3 4 5 2 3 4 | 6 | 8 9 7 8 11 12 10 11 | 13
           0 1 | 5 4 3 4 3 2 | 6 | 9 8 8 7 12 11 11 10 | 13""",
        14,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_worked_streams(name):
    make, expected, after = GOLDEN[name]
    positions, following = make()
    assert torch.equal(positions.T, table(expected))
    assert following == after


def test_a_decoder_counts_on_from_the_next_position():
    """HoPE's distance between the next position and the number of tokens, for each stride."""
    for stride, behind in ((0.5, -10.5), (0.75, -10.25), (1.0, -10.0), (1.5, -9.5)):
        positions, following = video_rope(ONE, stride=stride)
        assert following - len(positions) == behind
        onward, _ = video_rope([Text(4)], start=following)
        longer, _ = video_rope([*ONE[:-1], Text(6)], stride=stride)
        assert torch.equal(longer[-4:], onward)


SHAPES = [(1, 1, 1), (1, 4, 5), (3, 2, 3), (16, 9, 16), (2, 1, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", [0, 11])
def test_corner_streams(shape, start):
    """Sums of opposite corners, ranges of frames, uniqueness, and the step to the text (arXiv 2502.11664)."""
    frames, height, width = shape
    positions, after = vrope([Vision(*shape)], start)
    v = positions.view(frames, height, width, 4)
    span = height + width - 1
    base = start + span * torch.arange(frames).view(-1, 1, 1)
    for pair in (v[..., 0] + v[..., 2], v[..., 1] + v[..., 3]):
        assert (pair == 2 * base + height + width - 2).all()
    for frame in range(frames):
        for stream in v[frame].flatten(0, 1).T:
            assert stream.min() == start + span * frame
            assert stream.max() == start + span * frame + span - 1
    assert after == start + span * frames
    assert len(positions.unique(dim=0)) == len(positions)
    corners = v[-1, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (((after - corners) == 1).any(-1)).all()


def test_flips_swap_corner_streams():
    v = vrope([Vision(2, 3, 4)])[0].view(2, 3, 4, 4)
    assert torch.equal(v.flip(2), v[..., [3, 2, 1, 0]])
    assert torch.equal(v.flip(1), v[..., [1, 0, 3, 2]])


def test_one_row_has_two_kinds_of_stream():
    w = torch.arange(4.0)
    assert torch.equal(vrope([Vision(1, 1, 4)])[0], torch.stack((w, w, 3 - w, 3 - w), dim=-1))
    assert torch.equal(vrope([Vision(1, 1, 4)], released_order=True)[0], torch.stack((w, 3 - w, w, 3 - w), dim=-1))


@pytest.mark.parametrize(
    ("layout", "corners"),
    [
        (vrope, [0.7439, 0.7439, 0.7439, 0.7439]),
        (mrope, [0.7004, 0.7890, 0.7890, 0.8776]),
        (video_rope, [0.8207, 0.8379, 0.8379, 0.8551]),
    ],
)
def test_attention_of_the_next_word_to_the_corners(layout, corners):
    """An 8 × 8 frame and one text token, q = k = ones, each stream given every frequency: VRoPE is flat."""
    positions, _ = layout([Vision(1, 8, 8), Text(1)])
    layer = Rotary(Geometric(1e4), head_dim=64)
    away = (positions[-1] - positions[:-1]).double()  # (64, streams)
    logits = torch.stack([layer(stream[:, None])[0].cos().mean(-1) for stream in away.T]).mean(0).view(8, 8)
    assert logits[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == pytest.approx(corners, abs=1e-4)
    uneven = max((logits - logits.flip(dims)).abs().mean().item() for dims in ((0,), (1,), (0, 1)))
    assert (uneven < 1e-12) == (layout is vrope)


@pytest.mark.parametrize("case", [("mrope", mrope), ("vrope", vrope), ("video_rope", video_rope), ("hope", video_rope)])
def test_streams_may_start_anywhere(build, case):
    layer, layout = build(case[0]), case[1]
    q, k = torch.randn(2, 17, 128, dtype=torch.float64).unbind(0)
    scores = []
    for start in (0, 37):
        phase = layer(layout(ONE, start)[0].double())[0]
        scores.append(rotate(q, phase) @ rotate(k, phase).mT)
    torch.testing.assert_close(*scores, rtol=0, atol=1e-10)


def test_strides_of_each_video():
    both, _ = video_rope(TWO, stride=[9.0, 0.5])
    assert torch.equal(both, video_rope(TWO, stride=0.5)[0])  # the first is an image: its stride has no effect
    assert not torch.equal(both, video_rope(TWO, stride=[0.5, 9.0])[0])


def test_what_is_refused():
    with pytest.raises(ValueError, match="frames, height and width"):
        mrope([Vision(0, 2, 2)])
    with pytest.raises(ValueError, match="1 strides for 2 vision segments"):
        video_rope(TWO, stride=[1.0])
    with pytest.raises(ValueError, match="strides must be positive"):
        video_rope(TWO, stride=0.0)
