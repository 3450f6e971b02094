"""Scene pictures: real files of the right kind, the same for the same input, showing what they claim, or nothing at all."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.scene import Scene
from datamodules.synthetic_scenes import synthetic_scene
from tasks.baselines import constant_velocity
from tasks.scene_animations import animate_rollouts
from tasks.scene_canvas import INK, SDC, Boxes, Canvas, zebra
from tasks.scene_pictures import Keys, draw_attention, draw_rollouts


@pytest.fixture(scope="module")
def scene() -> Scene:
    return synthetic_scene(4)


@pytest.fixture(scope="module")
def rollouts(scene):
    return constant_velocity(scene, 8)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count(image, colour, tolerance=24):
    """Pixels near a colour '#rrggbb'."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((abs(image - wanted).max(-1) < tolerance).sum())


def test_a_picture_is_a_png_and_the_same_each_time(scene, rollouts, tmp_path):
    one = draw_rollouts(scene, *rollouts, tmp_path / "one.png", dpi=60)
    two = draw_rollouts(scene, *rollouts, tmp_path / "deeper" / "two.png", dpi=60)
    assert one.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert one.read_bytes() == two.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deeper", "one.png"]


def test_the_car_and_the_fan_are_seen(scene, rollouts, tmp_path):
    states, index = rollouts
    full = pixels(draw_rollouts(scene, states, index, tmp_path / "full.png", dpi=80))
    still = scene.positions[index, 10][:, None, None].expand(-1, 8, 80, -1)
    stopped = torch.cat((still, states[..., 3:]), dim=-1)
    none = pixels(draw_rollouts(scene, stopped, index, tmp_path / "none.png", dpi=80))
    legend = count(pixels(draw_rollouts(empty(scene), states[:0], index[:0], tmp_path / "bare.png", dpi=80)), SDC)
    assert count(full, SDC) > legend
    assert (full != none).any(-1).sum() > 200


def empty(scene):
    """The scene with nobody valid at the current step but far away."""
    return scene._replace(valid=torch.zeros_like(scene.valid))


def test_moving_the_whole_scene_moves_nothing_in_the_picture(scene, rollouts, tmp_path):
    states, index = rollouts
    shift = torch.tensor([256.0, -512.0, 0.0])  # exact in float32 to 2⁻¹⁴ m
    moved = scene._replace(
        positions=scene.positions + shift, points=scene.points + shift, light_stops=scene.light_stops + shift
    )
    there = torch.cat((states[..., :3] + shift, states[..., 3:]), dim=-1)
    one = pixels(draw_rollouts(scene, states, index, tmp_path / "one.png", dpi=60))
    two = pixels(draw_rollouts(moved, there, index, tmp_path / "two.png", dpi=60))
    assert (abs(one - two).max(-1) > 8).mean() < 1e-3  # antialiasing sees 2⁻¹⁴ m


def test_boxes_point_where_they_head(scene):
    page = Canvas(scene, 20.0)
    boxes = Boxes(page.panels[0], ["#123456"], torch.tensor([True]))
    boxes.move(torch.tensor([[3.0, 4.0, 0.0, torch.pi / 2]]), torch.tensor([[5.0, 2.0, 1.5]]))
    body = boxes.bodies.get_paths()[0].vertices[:4]
    assert np.allclose(sorted(map(tuple, body.round(6))), [(2, 1.5), (2, 6.5), (4, 1.5), (4, 6.5)])
    tip = boxes.wedges.get_paths()[0].vertices[0]
    assert np.allclose(tip, (3, 4 + 0.46 * 5))
    assert boxes.bodies.get_edgecolor()[0][:3] == pytest.approx([int(INK[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def test_a_box_of_no_size_leaves_nothing(scene):
    page = Canvas(scene, 20.0)
    page.canvas.draw()
    before = np.asarray(page.canvas.buffer_rgba()).copy()
    boxes = Boxes(page.panels[0], [SDC], torch.tensor([True]))
    there = torch.cat((scene.positions[scene.sdc, 10], torch.zeros(1)))[None]
    boxes.move(there, torch.zeros(1, 3))
    page.canvas.draw()
    assert np.array_equal(np.asarray(page.canvas.buffer_rgba()), before)
    boxes.move(there, torch.ones(1, 3))
    page.canvas.draw()
    assert not np.array_equal(np.asarray(page.canvas.buffer_rgba()), before)


def test_panels_show_metres_at_equal_scale(scene):
    page = Canvas(scene, 25.0, panels=2)
    page.canvas.draw()
    for axes in page.panels:
        assert np.ptp(axes.get_xlim()) == pytest.approx(50)
        box = axes.get_window_extent()
        assert box.width == pytest.approx(box.height)


def test_stripes_of_a_crossing_lie_across_its_length():
    crossing = np.array([[0, 0], [0, 3], [12, 3], [12, 0]], dtype=float)
    stripes = zebra(crossing)
    assert len(stripes) == 10
    assert all(np.ptp(stripe[:, 0]) == pytest.approx(0.6) for stripe in stripes)
    assert all(np.ptp(stripe[:, 1]) == pytest.approx(3) for stripe in stripes)
    triangle = crossing[:3]
    assert zebra(triangle)[0] is triangle


def test_a_scene_with_neither_map_nor_lights_is_drawn(scene, rollouts, tmp_path):
    steps, none = scene.steps, torch.zeros(0, dtype=torch.int64)
    bare = scene._replace(
        feature_ids=none,
        feature_types=none,
        feature_starts=torch.zeros(1, dtype=torch.int64),
        points=torch.zeros(0, 3),
        light_lanes=none,
        light_states=torch.zeros(steps, 0, dtype=torch.int64),
        light_stops=torch.zeros(steps, 0, 3),
        light_valid=torch.zeros(steps, 0, dtype=torch.bool),
    )
    assert draw_rollouts(bare, *rollouts, tmp_path / "bare.png", dpi=50).stat().st_size > 1000


def test_attention_colours_the_key_that_is_looked_at(scene, tmp_path):
    query = scene.sdc
    origin = scene.positions[query, scene.current]
    places = origin + torch.tensor([[10.0, 0, 0], [-10.0, 0, 0]])
    made = []
    for weights in ([0.9, 0.1], [0.1, 0.9]):
        keys = [Keys("map pieces", places[:, :2], torch.tensor(weights))]
        made.append(pixels(draw_attention(scene, query, keys, tmp_path / "a.png", extent=30, dpi=80)))
    changed = (made[0] != made[1]).any(-1).nonzero()[1]
    middle = changed.min() / 2 + changed.max() / 2
    left, right = ((changed < middle).sum(), (changed > middle).sum())
    assert min(left, right) > 20  # a disc left and a disc right have changed
    agents = Keys("agents", places, torch.tensor([0.5, 0.5]))
    assert draw_attention(scene, query, [keys[0], agents], tmp_path / "both.png", dpi=50).is_file()


def test_attention_that_cannot_be_is_refused(scene, tmp_path):
    place, path = torch.zeros(2, 2), tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"map: positions \(2, 2\) and weights \(3,\) differ"):
        draw_attention(scene, scene.sdc, [Keys("map", place, torch.ones(3))], path)
    with pytest.raises(ValueError, match="weights must be finite"):
        draw_attention(scene, scene.sdc, [Keys("map", place, torch.tensor([0.5, float("nan")]))], path)
    with pytest.raises(ValueError, match="agent 9999 isn't valid"):
        draw_attention(scene, 9999, [Keys("map", place, torch.ones(2))], path)
    assert not list(tmp_path.iterdir())


def test_broken_input_names_the_object_and_leaves_no_file(scene, rollouts, tmp_path):
    states, index = rollouts
    broken = states.clone()
    broken[1, 2, 3, 0] = float("nan")
    name = int(scene.agent_ids[index[1]])
    with pytest.raises(ValueError, match=f"scenario {scene.scenario_id}: object {name} has a state"):
        draw_rollouts(scene, broken, index, tmp_path / "a.png")
    with pytest.raises(ValueError, match="indices for states of"):
        draw_rollouts(scene, states, index[:-1], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"must end in \.png"):
        draw_rollouts(scene, states, index, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="extent must be positive"):
        draw_rollouts(scene, states, index, tmp_path / "a.png", extent=0.0)
    with pytest.raises(ValueError, match="rollouts 0 … 7, not \\[8\\]"):
        animate_rollouts(scene, states, index, tmp_path / "a.gif", rollouts=(8,))
    with pytest.raises(ValueError, match=r"are \.gif or \.mp4"):
        animate_rollouts(scene, states, index, tmp_path / "a.webp")
    assert not list(tmp_path.iterdir())


def test_an_animation_moves_at_the_speed_of_life(scene, rollouts, tmp_path):
    path = animate_rollouts(scene, *rollouts, tmp_path / "a.gif", rollouts=(0, 7), stride=10, dpi=30)
    with Image.open(path) as film:
        assert film.format == "GIF"
        assert film.n_frames == 10  # steps 0, 10, …, 90
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            assert film.info["duration"] == 1000
            frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert all((one != two).any() for one, two in zip(frames[1:], frames[:-1], strict=True))
    assert frames[0].shape[1] > 2.5 * frames[0].shape[0]  # the log and two rollouts
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


def test_without_a_recorded_future_there_is_no_log_to_show(scene, rollouts, tmp_path):
    cut = scene._replace(
        times=scene.times[:11],
        **{k: getattr(scene, k)[:, :11] for k in ("positions", "sizes", "headings", "velocities", "valid")},
        **{k: getattr(scene, k)[:11] for k in ("light_states", "light_stops", "light_valid")},
    )
    with Image.open(animate_rollouts(cut, *rollouts, tmp_path / "a.gif", stride=45, dpi=40)) as film:
        assert film.width < 1.1 * film.height


def test_a_missing_ffmpeg_is_named_with_its_remedy(scene, rollouts, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"needs the program ffmpeg on PATH; install it .* or write a \.gif"):
        animate_rollouts(scene, *rollouts, tmp_path / "a.mp4")


def test_a_failing_ffmpeg_leaves_no_file_and_says_why(scene, rollouts, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no such encoder >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    with pytest.raises(OSError, match="ffmpeg failed: no such encoder"):
        animate_rollouts(scene, *rollouts, tmp_path / "a.mp4", stride=30, dpi=40)
    assert [p.name for p in tmp_path.iterdir()] == ["bin"]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg on PATH")
def test_an_mp4_can_be_played(scene, rollouts, tmp_path):
    path = animate_rollouts(scene, *rollouts, tmp_path / "a.mp4", stride=10, dpi=31)
    assert path.read_bytes()[4:8] == b"ftyp"
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "framemd5", "-"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len([line for line in lines if not line.startswith("#")]) == 10
