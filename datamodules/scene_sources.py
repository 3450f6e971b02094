"""Where driving scenes come from: data sets of `Scene`s of 91 steps, the embedded recordings, made-up traffic, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torch.utils.data import ConcatDataset, Dataset

from datamodules.embedded_scenes import load_embedded
from datamodules.scene import Scene
from datamodules.synthetic_scenes import synthetic_scene
from datamodules.windows import STEPS, MostTravelled, window, without_lights, wrap_headings

SceneSource = Dataset[Scene]
_TEST = 0  # the embedded scene of another place
HELD_OUT = 96  # last steps of every other scene, for validation


def embedded_starts(steps: int, split: Literal["train", "val"], stride: int) -> range:
    """First steps of the windows of a recording of `steps` steps; no step is in windows of both splits."""
    if split == "train":
        return range(0, steps - HELD_OUT - STEPS + 1, stride)
    return range(steps - HELD_OUT, steps - STEPS + 1, stride)


class EmbeddedWindows(Dataset[Scene]):
    """Windows of the embedded recordings (docs/data_scenes.md).

    "train" is what lies before the last 96 steps of the second and third recording, "val" what lies within them: the same
    places, later. "test" is the first recording, another place. Agents to predict are the `predicted` that travel most.

    Args:
        split: "train", "val" or "test".
        stride: steps between the starts of windows.
        predicted: agents to predict of each window, at most.
        wrap: wrap the headings, which are recorded unwrapped.
        hold_lights: hold the lights of the recording's first step, all that is recorded of them, for later windows too;
            by default only the window that starts there has lights.
        extra: add the short fourth recording to "test"; a further download.
        cache: the cache folder where it is not the usual one.

    Raises:
        SourceError: if the recordings cannot be fetched or are altered.
        ValueError: if the split is unknown.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"],
        stride: int = 1,
        predicted: int = 8,
        wrap: bool = False,
        hold_lights: bool = False,
        extra: bool = False,
        cache: str | Path | None = None,
    ) -> None:
        if split not in ("train", "val", "test"):
            raise ValueError(f"split {split!r} of the embedded scenes is unknown; there are train, val and test")
        scenes = load_embedded(extra, cache)
        if split == "test":
            chosen = [scene for place, scene in enumerate(scenes) if place in (_TEST, 3)]
            pairs = [(scene, start) for scene in chosen for start in range(0, scene.steps - STEPS + 1, stride)]
        else:
            pairs = [(scene, at) for scene in scenes[1:3] for at in embedded_starts(scene.steps, split, stride)]
        self.windows = [self._cut(scene, start, predicted, wrap, hold_lights) for scene, start in pairs]

    @staticmethod
    def _cut(scene: Scene, start: int, predicted: int, wrap: bool, hold_lights: bool) -> Scene:
        cut = window(scene, start, to_predict=MostTravelled(predicted))
        cut = cut if hold_lights or start == 0 else without_lights(cut)
        return wrap_headings(cut) if wrap else cut

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Scene:
        return self.windows[index]


class SyntheticScenes(Dataset[Scene]):
    """`synthetic_scene`s of consecutive seeds, made when asked for.

    Args:
        count: how many.
        first_seed: seed of the first; splits must not overlap.
        agents: least and greatest number of agents, drawn by seed; or one number.
        turns: see `synthetic_scene`.

    Raises:
        ValueError: the numbers of agents are no range.
    """

    def __init__(self, count: int, first_seed: int = 0, agents: int | Sequence[int] = (8, 48), turns: int = 0) -> None:
        least, most = (agents, agents) if isinstance(agents, int) else agents
        if not 1 <= least <= most:
            raise ValueError(f"synthetic scenes: agents={agents}, expected at least 1, the least number first")
        self.count, self.first_seed, self.turns = count, first_seed, turns
        self.least, self.most = least, most

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.count:
            raise IndexError(index)
        seed = self.first_seed + index
        # A multiplier prime to most ranges spreads the sizes over neighbouring seeds.
        agents = self.least + seed * 7919 % (self.most - self.least + 1)
        return synthetic_scene(seed, agents=agents, turns=self.turns)


def mixed(sources: Sequence[Callable[[], SceneSource]]) -> SceneSource:
    """Opens several sources as one."""
    return ConcatDataset([open_source() for open_source in sources])
