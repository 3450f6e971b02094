"""Rollouts of a traffic scene in motion, side by side with the log, as GIF or MP4."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.collections import LineCollection
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from datamodules.scene import Scene
from tasks.scene_canvas import Boxes, Canvas, Layer, agent_legend, colours_of
from tasks.scene_pictures import PAST, check_rollouts

TRAIL = 15  # steps of the past that an agent draws behind it


class Panel:
    """One run of a scene: its boxes and their trails, to be shown at any step.

    Args:
        page: the page, and which of its panels this is.
        place: number of the panel.
        name: what stands above it.
        states: (a, t, 4) from step 0 of the scene, so that history comes first.
        valid: (a, t) bool.
        index: (a,) agents of the scene.
        sizes: (a, 3), metres.
    """

    def __init__(
        self, page: Canvas, place: int, name: str, states: Tensor, valid: Tensor, index: Tensor, sizes: Tensor
    ) -> None:
        axes = page.panels[place]
        self.states, self.valid, self.sizes = states, valid, sizes
        page.name(place, name)
        scored = torch.isin(index, page.scene.scored())
        self.boxes = Boxes(axes, colours_of(page.scene, index), scored)
        self.trails = LineCollection([], colors=PAST, linewidths=1.4, alpha=0.7, zorder=Layer.SIGN)
        axes.add_collection(self.trails, autolim=False)
        self.track = states[..., :2].double().masked_fill(~valid[..., None], float("nan")).numpy()

    def show(self, step: int) -> tuple[Artist, ...]:
        """The artists, brought to `step`; agents that aren't valid there have no size."""
        now = self.valid[:, step]
        self.boxes.move(self.states[:, step], self.sizes * now[:, None])
        self.trails.set_segments(list(self.track[now.numpy(), max(0, step - TRAIL) : step + 1]))
        return (self.trails, *self.boxes.artists)


def animate_rollouts(
    scene: Scene,
    states: Tensor,
    index: Tensor,
    path: str | Path,
    *,
    rollouts: Sequence[int] = (0,),
    extent: float = 60.0,
    stride: int = 2,
    dpi: int = 80,
) -> Path:
    """The log and some rollouts, side by side and at the speed of life, from step 0 of the scene.

    Args:
        scene: the scenario, in whose coordinates `states` are. Without a recorded future only the rollouts are shown.
        states: (a, r, t, 4) x, y, z, heading of the steps after the current one.
        index: (a,) agents of the scene.
        path: ends in .gif, or in .mp4, which needs the program ffmpeg; written whole or not at all.
        rollouts: numbers of those to show.
        extent: metres from the self-driving car at the current step to the sides of a panel.
        stride: steps of 0.1 s from frame to frame.
        dpi: dots an inch; a panel is 5 inches wide.

    Raises:
        ValueError: shapes that don't fit, a state that isn't finite, a rollout that isn't there, stride or extent ≤ 0,
            another suffix.
        OSError: ffmpeg is missing or fails.
    """
    check_rollouts(scene, states, index)
    path = Path(path)
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"{path}: animations are .gif or .mp4")
    if stride < 1:
        raise ValueError(f"{path}: stride must be at least one step, got {stride}")
    missing = [r for r in rollouts if not 0 <= r < states.shape[1]]
    if missing or not rollouts:
        raise ValueError(f"{path}: scenario {scene.scenario_id} has rollouts 0 … {states.shape[1] - 1}, not {missing}")
    if path.suffix.lower() == ".mp4" and shutil.which("ffmpeg") is None:
        raise OSError(f"{path}: MP4 needs the program ffmpeg on PATH; install it (apt install ffmpeg) or write a .gif")
    last = scene.current + states.shape[2]
    replayed = scene.steps > last
    page = Canvas(scene, extent, panels=len(rollouts) + replayed, side=5.0, strip=0.0)
    panels = _panels(page, states, index, rollouts, replayed)
    met = (page.visible(scene.positions) & scene.valid).any(1).nonzero().flatten()
    clock = page.title(f"Scenario {scene.scenario_id}", " ")
    clock.set_animated(True)
    page.legend([*agent_legend(scene, met), *page.map_legend(scene.current)])
    steps = list(range(0, last + 1, stride))
    frames = _frames(page, panels, clock, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix.lower()}")
    page.figure.set_dpi(dpi)
    try:
        if path.suffix.lower() == ".gif":
            _write_gif(frames, partial, 100 * stride)
        else:
            _write_mp4(frames, partial, 10 / stride)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _panels(page: Canvas, states: Tensor, index: Tensor, rollouts: Sequence[int], replayed: bool) -> list[Panel]:
    scene, current = page.scene, page.scene.current
    log = torch.cat((scene.positions, scene.headings[..., None]), dim=-1)
    sizes = scene.sizes[:, current].clone()
    unborn = ~scene.valid[:, current]
    first = scene.valid.to(torch.int8).argmax(1)
    sizes[unborn] = scene.sizes[unborn, first[unborn]]
    made = []
    if replayed:
        everyone = torch.arange(scene.agents)
        made.append(Panel(page, 0, "log", log, scene.valid, everyone, sizes))
    history, seen = log[index, : current + 1], scene.valid[index, : current + 1]
    valid = torch.cat((seen, torch.ones(states.shape[0], states.shape[2], dtype=torch.bool)), dim=1)
    for rollout in rollouts:
        run = torch.cat((history, states[:, rollout].to(history.dtype)), dim=1)
        made.append(Panel(page, len(made), f"rollout {rollout}", run, valid, index, sizes[index]))
    return made


def _frames(page: Canvas, panels: Sequence[Panel], clock: Text, steps: Sequence[int]) -> Iterator[np.ndarray]:
    """(h, w, 4) uint8 each. The map is drawn once and copied under every frame."""
    page.canvas.draw()
    ground = page.canvas.copy_from_bbox(page.figure.bbox)
    for step in steps:
        page.canvas.restore_region(ground)
        for axes, panel in zip(page.panels, panels, strict=True):
            lights = page.lights(axes, min(step, page.scene.steps - 1))
            for artist in (*panel.show(step), *lights):
                axes.draw_artist(artist)
            for light in lights:
                light.remove()
        clock.set_text(f"{(step - page.scene.current) / 10:+.1f} s")
        page.figure.draw_artist(clock)
        yield np.asarray(page.canvas.buffer_rgba()).copy()


def _write_gif(frames: Iterator[np.ndarray], path: Path, milliseconds: int) -> None:
    images = [Image.fromarray(frame).convert("RGB") for frame in frames]
    sample = [images[0], images[len(images) // 2], images[-1]]
    strip = Image.new("RGB", (images[0].width, sum(image.height for image in sample)))
    for row, image in enumerate(sample):
        strip.paste(image, (0, row * image.height))
    palette = strip.quantize(255)  # one for all frames, so that colours don't flicker
    flat = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    flat[0].save(path, save_all=True, append_images=flat[1:], duration=milliseconds, loop=0, optimize=False)


def _write_mp4(frames: Iterator[np.ndarray], path: Path, rate: float) -> None:
    command: list[str] = []
    program: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryFile() as said:
        for frame in frames:
            even = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]  # yuv420p halves both sides
            if program is None:
                size = f"{even.shape[1]}x{even.shape[0]}"
                command = ["ffmpeg", "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgba", "-s", size]
                command += ["-r", f"{rate:g}", "-i", "-", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
                program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said)
            assert program.stdin is not None
            try:
                program.stdin.write(even.tobytes())
            except BrokenPipeError:  # its own words follow
                break
        if program is None or program.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            program.stdin.close()
        if program.wait():
            said.seek(0)
            raise OSError(f"{path}: ffmpeg failed: {said.read().decode(errors='replace').strip()[-300:]}")
