"""Pictures of traffic scenes as PNG: sampled futures over the map, and where the attention of one agent goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from datamodules.scene import AgentType, Scene
from tasks.scene_canvas import INK, SDC, TYPES, Boxes, Canvas, Layer, agent_legend, colours_of

TIME = LinearSegmentedColormap.from_list("time", colormaps["plasma"](np.linspace(0.05, 0.85, 64)))
PAST, OTHER = "#5a5a5a", "#b4b4b0"


def save(figure: Figure, path: str | Path, dpi: int) -> Path:
    """Write a PNG whole or not at all.

    Raises:
        ValueError: the name doesn't end in .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are PNG, the name must end in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, dpi=dpi, format="png", metadata={"Software": None})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_rollouts(scene: Scene, states: Tensor, index: Tensor) -> None:
    """ValueError, naming the scenario and the object, unless states (a, r, t, 4) are finite and belong to `index` (a,)."""
    name = f"scenario {scene.scenario_id}"
    if states.ndim != 4 or states.shape[-1] != 4 or 0 in states.shape[1:3]:
        raise ValueError(f"{name}: states are {tuple(states.shape)}, not (agents, rollouts, steps, 4)")
    if index.shape != states.shape[:1]:
        raise ValueError(f"{name}: {tuple(index.shape)} indices for states of {states.shape[0]} agents")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < scene.agents:
        raise ValueError(
            f"{name}: indices lie in {int(index.min())} … {int(index.max())}, it has {scene.agents} agents"
        )
    broken = (~states.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"{name}: object {int(scene.agent_ids[index[broken[0]]])} has a state that isn't finite")


def logged(scene: Scene) -> np.ndarray:
    """(a, t, 2) logged positions, NaN where they aren't valid, so that lines break there."""
    return scene.positions[..., :2].double().masked_fill(~scene.valid[..., None], float("nan")).numpy()


def draw_rollouts(
    scene: Scene,
    states: Tensor,
    index: Tensor,
    path: str | Path,
    *,
    agents: Tensor | None = None,
    extent: float = 60.0,
    dpi: int = 150,
) -> Path:
    """Sampled futures of some agents over the map, with the log, as PNG.

    Args:
        scene: the scenario, in whose coordinates `states` are.
        states: (a, r, t, 4) x, y, z, heading of r rollouts.
        index: (a,) agents of the scene.
        path: ends in .png; written whole or not at all.
        agents: indices of those whose futures are drawn; `scene.scored()` if None.
        extent: metres from the self-driving car to the sides of the picture.
        dpi: dots an inch; the page is about 8.5 inches wide.

    Raises:
        ValueError: shapes that don't fit, a state that isn't finite, extent ≤ 0, another suffix.
    """
    check_rollouts(scene, states, index)
    page = Canvas(scene, extent)
    axes, current = page.panels[0], scene.current
    here = scene.simulated()
    marked = torch.isin(index, scene.scored() if agents is None else agents)
    steps = states.shape[2]
    start = scene.positions[index, current][marked][:, None, None, :2]  # the fan begins at the agent
    fans = torch.cat((start.expand(-1, states.shape[1], 1, -1), states[marked, ..., :2]), dim=2).double()
    if len(fans):
        pieces = torch.stack((fans[:, :, :-1], fans[:, :, 1:]), dim=-2)  # (a, r, t, 2, 2)
        late_last = pieces.transpose(0, 2).flatten(0, 2).numpy()
        strokes = LineCollection(list(late_last), cmap=TIME, zorder=Layer.SAMPLE, linewidths=1.3, alpha=0.4)
        strokes.set_array(np.repeat(np.arange(1, steps + 1) / 10, len(late_last) // steps))
        axes.add_collection(strokes, autolim=False)
    boxes = Boxes(axes, colours_of(scene, here), torch.isin(here, index[marked]))
    boxes.move(
        torch.cat((scene.positions, scene.headings[..., None]), dim=-1)[here, current], scene.sizes[here, current]
    )
    track = logged(scene)
    for agent in here.tolist():
        if agent in index[marked].tolist():
            x, y = track[agent, current : current + steps + 1].T
            axes.plot(x, y, color=INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=Layer.LOG)
        x, y = track[agent, : current + 1].T
        axes.plot(x, y, color=PAST, linewidth=1.6, alpha=0.8, zorder=Layer.SIGN)
    page.lights(axes, current)
    page.colour_bar(TIME, 0.0, steps / 10, "seconds ahead (sampled)")
    rollouts = f"{states.shape[1]} rollout{'s' * (states.shape[1] != 1)}"
    count = f"{int(marked.sum())} of {len(here)} agents, outlined"
    page.title(f"Scenario {scene.scenario_id}", f"{rollouts} × {steps / 10:g} s of {count}")
    page.legend([
        *agent_legend(scene, here[page.visible(scene.positions[here, current])]),
        Line2D([], [], color=PAST, linewidth=1.6, label="logged past"),
        Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (4, 2)), label="logged future"),
        *page.map_legend(current),
    ])  # fmt: skip
    return save(page.figure, path, dpi)


class Keys(NamedTuple):
    """What one query attends to: a name for the legend, positions (n, 2 or more) in the scene, weights (n,) ≥ 0."""

    name: str
    positions: Tensor
    weights: Tensor


def draw_attention(
    scene: Scene,
    query: int,
    keys: Sequence[Keys],
    path: str | Path,
    *,
    extent: float = 60.0,
    dpi: int = 150,
) -> Path:
    """Where one agent looks: discs on the keys, their area and colour by weight, over a paled map, as PNG.

    Args:
        scene: the scenario.
        query: index of the agent that looks, valid at the current step; the picture is centred on it.
        keys: one or two kinds, such as map pieces and agents, each a softmax of its own with its own colours.
        path: ends in .png; written whole or not at all.
        extent: metres from the agent to the sides of the picture.
        dpi: dots an inch.

    Raises:
        ValueError: no such agent at the current step, another number of kinds, shapes that don't fit, weights that are
            negative or not finite.
    """
    name = f"scenario {scene.scenario_id}"
    here = scene.simulated()
    if query not in here.tolist():
        raise ValueError(f"{name}: agent {query} isn't valid at the current step")
    if not 1 <= len(keys) <= 2:
        raise ValueError(f"{name}: draw_attention takes one or two kinds of key, got {len(keys)}")
    for kind in keys:
        if kind.weights.shape != kind.positions.shape[:1] or kind.positions.ndim != 2:
            raise ValueError(
                f"{name}: {kind.name}: positions {tuple(kind.positions.shape)} and weights {tuple(kind.weights.shape)} differ"
            )
        if not (kind.weights.isfinite() & (kind.weights >= 0)).all():
            raise ValueError(f"{name}: {kind.name}: weights must be finite and not negative")
    page = Canvas(scene, extent, centre=scene.positions[query, scene.current], tints=0.45)
    axes = page.panels[0]
    tones = [page.tint(SDC) if i == scene.sdc else OTHER for i in here.tolist()]
    boxes = Boxes(axes, tones, here == query)
    states = torch.cat((scene.positions, scene.headings[..., None]), dim=-1)
    boxes.move(states[here, scene.current], scene.sizes[here, scene.current])
    origin = scene.positions[query, scene.current, :2].double().numpy()
    for row, (kind, scale) in enumerate(zip(keys, ("GnBu", "YlOrRd"), strict=False)):
        colours = LinearSegmentedColormap.from_list(scale, colormaps[scale](np.linspace(0.3, 1.0, 64)))
        most = max(float(kind.weights.max()) if len(kind.weights) else 0.0, 1e-12)
        order = kind.weights.argsort()
        xy, share = kind.positions[order, :2].double().numpy(), (kind.weights[order].double() / most).numpy()
        if row == 1:  # a fan of rays would hide the many map pieces, but reads well for the few agents
            rays = [np.stack((origin, end)) for end in xy]
            axes.add_collection(
                LineCollection(rays, colors=colours(share), linewidths=2.5 * share, alpha=0.7, zorder=Layer.BOX - 0.2),
                autolim=False,
            )
        axes.scatter(
            xy[:, 0], xy[:, 1], s=6 + 110 * share, c=share, cmap=colours, vmin=0, vmax=1, alpha=0.85,
            edgecolors="white", linewidths=0.5, zorder=Layer.SAMPLE if row == 0 else Layer.BOX + 0.5,
        )  # fmt: skip
        page.colour_bar(colours, 0.0, 100 * most, f"% of the attention to {kind.name}", row, len(keys))
    axes.plot(
        *origin, marker="o", markersize=22, markerfacecolor="none", color=INK, markeredgewidth=1.6, zorder=Layer.NOTE
    )
    page.lights(axes, scene.current)
    kind_name = TYPES[AgentType(int(scene.agent_types[query]))][0]
    page.title(f"Scenario {scene.scenario_id}", f"attention of {kind_name} {int(scene.agent_ids[query])}, circled")
    others = [Patch(facecolor=OTHER, label="other agents"), *page.map_legend(scene.current)]
    page.legend([Patch(facecolor=page.tint(SDC), label="self-driving car"), *others])
    return save(page.figure, path, dpi)
