"""Scenes and comparisons for the tests of Waymo's formats."""

import torch

from datamodules.scene import FeatureType, Scene
from datamodules.synthetic_scenes import synthetic_scene
from datamodules.waymo_scenario import read_scenario, write_scenario

GRID = 1024
"""Coordinates in 1/1024 m: within 8 km they are float32, so formats of float32 hold them exactly."""


def small_scene(seed: int = 0, **changes) -> Scene:
    """A scene as a reader gives it: some agents come and go, headings aren't wrapped, features of every type."""
    scene = synthetic_scene(seed, agents=6, later=2, crossings=1, turns=1)
    kinds = torch.tensor([kind.value for kind in FeatureType])
    extra = torch.arange(len(kinds))
    sizes = torch.where(kinds == FeatureType.STOP_SIGN, 1, 2 + extra)
    last = scene.feature_starts[-1]
    scene = scene._replace(
        times=torch.arange(91, dtype=torch.float64) / 10,
        feature_ids=torch.cat((scene.feature_ids, 1000 + extra)),
        feature_types=torch.cat((scene.feature_types, kinds)),
        feature_starts=torch.cat((scene.feature_starts, last + sizes.cumsum(0))),
        points=torch.cat((scene.points, 50 * torch.randn(int(sizes.sum()), 3))),
        **changes,
    )
    origin = torch.tensor([4096.5, -2048.25, 31.125], dtype=torch.float64)
    on_grid = {name: (GRID * getattr(scene, name)).round() / GRID for name in ("positions", "points", "light_stops")}
    return read_scenario(write_scenario(scene._replace(origin=origin, **on_grid)))


def differences(one: Scene, two: Scene) -> list[str]:
    """Names of the fields that aren't equal in value, dtype and shape."""
    return [
        name
        for name, a, b in zip(Scene._fields, one, two, strict=True)
        if not (a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
    ]
