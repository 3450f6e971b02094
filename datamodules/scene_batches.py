"""Pads viewed scenes to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.batches import SceneBatch
from datamodules.scene import Scene
from datamodules.scene_frames import SceneView, ViewedScene, view


def collate_scenes(viewed: Sequence[ViewedScene]) -> SceneBatch:
    """Makes one batch of scenes, padded to the most agents and the most map pieces among them, at least one of each.

    Raises:
        ValueError: if the scenes differ in steps or in their current step.
    """
    first = viewed[0].scene
    for row in viewed:
        if (row.scene.steps, row.scene.current) != (first.steps, first.current):
            raise ValueError(
                f"scene {row.scene.scenario_id} has {row.scene.steps} steps, the current one {row.scene.current}; scene "
                f"{first.scenario_id} in the same batch has {first.steps} and {first.current}"
            )

    def padded(name: str, fill: int = 0) -> Tensor:
        return _padded([getattr(row, name) for row in viewed], fill)

    pieces = torch.tensor([len(row.map_pose) for row in viewed])
    poses = padded("map_pose")
    return SceneBatch(
        agent_pose=padded("agent_pose"),
        agent_velocity=padded("agent_velocity"),
        agent_valid=padded("agent_valid"),
        agent_height=padded("agent_height"),
        agent_size=padded("agent_size"),
        agent_type=padded("agent_type"),
        agent_trains=padded("agent_trains"),
        agent_index=padded("agent_index", -1),
        map_pose=poses,
        map_points=padded("map_points"),
        map_type=padded("map_type"),
        map_light=padded("map_light"),
        map_valid=torch.arange(poses.shape[1]) < pieces[:, None],
        frame=torch.stack([row.frame for row in viewed]),
        scenes=tuple(row.scene for row in viewed),
    )


def scene_batch(scenes: Sequence[Scene], settings: SceneView | None = None) -> SceneBatch:
    """Views scenes and makes one batch of them."""
    settings = settings or SceneView(observed=None)
    return collate_scenes([view(scene, settings) for scene in scenes])


def _padded(rows: Sequence[Tensor], fill: int) -> Tensor:
    longest = max(1, *map(len, rows))
    out = rows[0].new_full((len(rows), longest, *rows[0].shape[1:]), fill)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return out
