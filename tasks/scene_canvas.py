"""The page that scene pictures are drawn on: a map at true scale with its lights, boxes with headings, and legends."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from torch import Tensor

from datamodules.scene import AgentType, FeatureType, LightState, Scene
from models.poses import box_corners, compose

GROUND, INK, SDC = "#f2f1ec", "#2b2b2b", "#d81e3a"
TYPES = {
    AgentType.VEHICLE: ("vehicle", "#3f6fa3"),
    AgentType.PEDESTRIAN: ("pedestrian", "#8a4fa0"),
    AgentType.CYCLIST: ("cyclist", "#12887a"),
    AgentType.OTHER: ("other", "#7a6a58"),
    AgentType.UNSET: ("other", "#7a6a58"),
}
LIGHTS = {
    LightState.UNKNOWN: ("unknown", "#9b9b9b"),
    LightState.ARROW_STOP: ("stop", "#e02b20"),
    LightState.STOP: ("stop", "#e02b20"),
    LightState.FLASHING_STOP: ("stop", "#e02b20"),
    LightState.ARROW_CAUTION: ("caution", "#f5a700"),
    LightState.CAUTION: ("caution", "#f5a700"),
    LightState.FLASHING_CAUTION: ("caution", "#f5a700"),
    LightState.ARROW_GO: ("go", "#1fa34a"),
    LightState.GO: ("go", "#1fa34a"),
}
SURFACES = {  # lanes are stroked as wide as they are: name, colour, metres
    FeatureType.LANE_UNDEFINED: ("lane", "#d5d5d2", 3.7),
    FeatureType.LANE_SURFACE: ("lane", "#d5d5d2", 3.7),
    FeatureType.LANE_FREEWAY: ("freeway", "#c8c9cc", 3.7),
    FeatureType.LANE_BIKE: ("bike lane", "#cfdccb", 1.8),
}
WHITE, YELLOW = "#ffffff", "#d9a300"
LINES: dict[FeatureType, tuple[str, bool, bool]] = {  # colour, broken, double
    FeatureType.LINE_UNKNOWN: (WHITE, False, False),
    FeatureType.LINE_BROKEN_WHITE: (WHITE, True, False),
    FeatureType.LINE_SOLID_WHITE: (WHITE, False, False),
    FeatureType.LINE_DOUBLE_WHITE: (WHITE, False, True),
    FeatureType.LINE_BROKEN_YELLOW: (YELLOW, True, False),
    FeatureType.LINE_BROKEN_DOUBLE_YELLOW: (YELLOW, True, True),
    FeatureType.LINE_SOLID_YELLOW: (YELLOW, False, False),
    FeatureType.LINE_DOUBLE_YELLOW: (YELLOW, False, True),
    FeatureType.LINE_PASSING_DOUBLE_YELLOW: (YELLOW, True, True),
}
EDGE = "#77756f"
EDGES = {FeatureType.EDGE_BOUNDARY: 1.3, FeatureType.EDGE_UNKNOWN: 1.3, FeatureType.EDGE_MEDIAN: 0.9}  # points
WEDGE = torch.tensor(((0.46, 0.0), (0.08, 0.36), (0.08, -0.36)), dtype=torch.float64)  # of length and width
_BORDER, _STRIP, _TOP, _BOTTOM, _PANEL = 0.2, 0.72, 0.55, 0.62, 7.2  # inches


class Layer(IntEnum):
    """What lies on what, from below. The log is drawn over the samples, which would hide it."""

    SURFACE = 1
    CROSSING = 2
    LINE = 3
    EDGE = 4
    SIGN = 5
    SAMPLE = 6
    LOG = 7
    BOX = 8
    LIGHT = 9
    NOTE = 10


class Canvas:
    """One page of square panels side by side, each showing the map around a point at equal scale on both axes.

    Args:
        scene: whose map is drawn.
        extent: metres from the centre of a panel to its sides.
        centre: (2,) metres; the self-driving car at the current step if None.
        panels: how many.
        side: inches of a panel.
        strip: inches right of the panels, for colour bars.
        tints: colours of the map are mixed with white by this share, so that what is drawn on it stands out.

    Raises:
        ValueError: extent isn't positive.
    """

    def __init__(
        self,
        scene: Scene,
        extent: float,
        *,
        centre: Tensor | None = None,
        panels: int = 1,
        side: float = _PANEL,
        strip: float = _STRIP,
        tints: float = 0.0,
    ) -> None:
        if not extent > 0:
            raise ValueError(f"scenario {scene.scenario_id}: extent must be positive metres, got {extent}")
        self.scene, self.extent, self.side, self.strip, self.tints = scene, extent, side, strip, tints
        middle = scene.positions[scene.sdc, scene.current, :2] if centre is None else centre[:2]
        self.centre = middle.double().numpy()
        width = panels * side + (panels + 1) * _BORDER + strip
        height = side + _TOP + _BOTTOM
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        self.panels = [
            self.figure.add_axes(
                ((_BORDER + i * (side + _BORDER)) / width, _BOTTOM / height, side / width, side / height)
            )
            for i in range(panels)
        ]
        self.points_per_metre = 72 * side / (2 * extent)
        for axes in self.panels:
            axes.set(xticks=[], yticks=[], facecolor=self.tint(GROUND), aspect="equal")
            axes.set_xlim(self.centre[0] - extent, self.centre[0] + extent)
            axes.set_ylim(self.centre[1] - extent, self.centre[1] + extent)
            for spine in axes.spines.values():
                spine.set(color="#bdbdb8", linewidth=0.8)
            self._map(axes)
            self._scale_bar(axes)

    def tint(self, colour: str) -> str:
        """The colour mixed with white."""
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return "#" + "".join(f"{round(c + (255 - c) * self.tints):02x}" for c in (red, green, blue))

    def features(self, *kinds: FeatureType) -> list[np.ndarray]:
        """The polylines (p, 2) of these kinds that come near the panel."""
        starts, xy = self.scene.feature_starts.tolist(), self.scene.points[:, :2].double().numpy()
        found = []
        for j in torch.isin(self.scene.feature_types, torch.tensor(kinds)).nonzero().flatten().tolist():
            line = xy[starts[j] : starts[j + 1]]
            if len(line) and (abs(line - self.centre).max(1) < 1.5 * self.extent + 10).any():
                found.append(line)
        return found

    def _map(self, axes: Axes) -> None:
        def stroke(lines: Sequence[np.ndarray], z: float, colour: str, points: float, dashes: object = "solid") -> None:
            if lines:
                axes.add_collection(
                    LineCollection(
                        lines,
                        colors=self.tint(colour),
                        linewidths=points,
                        linestyles=dashes,
                        zorder=z,
                        capstyle="round",
                    ),
                    autolim=False,
                )

        def fill(polygons: Sequence[np.ndarray], z: float, colour: str, **style: Any) -> None:
            if polygons:
                made = PolyCollection(polygons, facecolors=self.tint(colour), linewidths=0, zorder=z, **style)
                axes.add_collection(made, autolim=False)

        metre = self.points_per_metre
        fill(self.features(FeatureType.DRIVEWAY), Layer.SURFACE - 0.2, "#dedcd6")
        for kind, (_, colour, metres) in SURFACES.items():
            stroke(self.features(kind), Layer.SURFACE, colour, metres * metre)
        fill(
            self.features(FeatureType.SPEED_BUMP),
            Layer.CROSSING,
            "#e8d9a8",
            hatch="////",
            edgecolor=self.tint("#c9b26a"),
        )
        crossings = self.features(FeatureType.CROSSWALK)
        fill(crossings, Layer.CROSSING, "#c4c4c1")
        fill([stripe for crossing in crossings for stripe in zebra(crossing)], Layer.CROSSING + 0.1, "#fafafa")
        thin = float(np.clip(0.15 * metre, 0.5, 1.6))
        dash = (0, (1.5 * metre / thin, 2.5 * metre / thin))  # metres on, metres off
        for kind, (colour, broken, double) in LINES.items():
            lines = self.features(kind)
            stroke(lines, Layer.LINE, colour, 3 * thin if double else thin, dash if broken else "solid")
            if double:
                stroke(lines, Layer.LINE + 0.1, SURFACES[FeatureType.LANE_SURFACE][1], thin)
        for kind, points in EDGES.items():
            stroke(self.features(kind), Layer.EDGE, EDGE, points)
        signs = self.features(FeatureType.STOP_SIGN)
        if signs:
            x, y = np.concatenate(signs).T
            axes.plot(
                x, y, linestyle="", marker=(8, 0, 22.5), markersize=8, color=self.tint("#c62828"),
                markeredgecolor="white", markeredgewidth=0.8, zorder=Layer.SIGN,
            )  # fmt: skip

    def _scale_bar(self, axes: Axes) -> None:
        length = max((n for n in (1, 2, 5, 10, 20, 50, 100, 200) if n <= self.extent / 2), default=self.extent / 2)
        x, y = 0.035, 0.035  # of the panel
        width = length / (2 * self.extent)
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
        axes.text(
            x + width / 2, y + 0.012, f"{length:g} m", ha="center", va="bottom", fontsize=8, color=INK,
            transform=axes.transAxes, zorder=Layer.NOTE, bbox=box,
        )  # fmt: skip
        axes.plot([x, x + width], [y, y], color=INK, linewidth=2, transform=axes.transAxes, zorder=Layer.NOTE + 1)

    def lights(self, axes: Axes, step: int) -> list[Line2D]:
        """The lights that `step` tells of, as discs at their stop points."""
        drawn = []
        for j in self.scene.light_valid[step].nonzero().flatten().tolist():
            x, y = self.scene.light_stops[step, j, :2].tolist()
            colour = LIGHTS[LightState(int(self.scene.light_states[step, j]))][1]
            drawn += axes.plot(
                x,
                y,
                marker="o",
                markersize=7,
                color=colour,
                markeredgecolor=INK,
                markeredgewidth=1.1,
                zorder=Layer.LIGHT,
            )
        return drawn

    def colour_bar(self, colours: Colormap, least: float, most: float, label: str, row: int = 0, rows: int = 1) -> None:
        """A bar right of the panels, `row` of `rows` from above."""
        width, height = self.figure.get_size_inches()
        part = self.side / rows
        bottom = _BOTTOM + (rows - 1 - row) * part + 0.15 * part
        bar = self.figure.add_axes(
            ((width - self.strip + 0.02) / width, bottom / height, 0.16 / width, 0.7 * part / height)
        )
        made = self.figure.colorbar(ScalarMappable(Normalize(least, most), colours), cax=bar)
        made.set_label(label, fontsize=9, color=INK)
        made.ax.tick_params(labelsize=8, color="#9b9b9b", labelcolor=INK)
        made.outline.set_visible(False)

    def name(self, panel: int, text: str) -> None:
        """A name in the corner of a panel."""
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        self.panels[panel].text(
            0.03, 0.97, text, ha="left", va="top", fontsize=10, color=INK, zorder=Layer.NOTE, bbox=box,
            transform=self.panels[panel].transAxes,
        )  # fmt: skip

    def title(self, left: str, right: str = "") -> Text:
        """The line above the panels; what stands right can be altered."""
        width, height = self.figure.get_size_inches()
        y = 1 - 0.2 / height
        self.figure.text(_BORDER / width, y, left, ha="left", va="top", fontsize=12, weight="bold", color=INK)
        return self.figure.text(
            1 - self.strip / width - _BORDER / width, y, right, ha="right", va="top", fontsize=9, color="#5a5a5a"
        )

    def legend(self, handles: Sequence[Line2D | Patch]) -> None:
        """Below the panels, centred, in rows."""
        width, height = self.figure.get_size_inches()
        rows = -(-len(handles) // max(1, int((width - self.strip) / 1.25)))
        self.figure.legend(
            handles=list(handles), loc="center", bbox_to_anchor=((width - self.strip) / 2 / width, 0.5 * _BOTTOM / height),
            ncols=-(-len(handles) // max(rows, 1)), fontsize=8.5, frameon=False, labelcolor=INK, handlelength=1.6,
            columnspacing=1.4, handletextpad=0.6,
        )  # fmt: skip

    def map_legend(self, step: int) -> list[Line2D | Patch]:
        """Handles of what the map shows and a legend must tell: lane kinds, signs and lights that are near."""
        handles: list[Line2D | Patch] = [Line2D([], [], color=self.tint(EDGE), linewidth=1.3, label="road edge")]
        if not any(self.features(kind) for kind in EDGES):
            handles = []
        for kind in (FeatureType.LANE_FREEWAY, FeatureType.LANE_BIKE):
            if self.features(kind):
                handles.append(Patch(color=SURFACES[kind][1], label=SURFACES[kind][0]))
        if self.features(FeatureType.STOP_SIGN):
            handles.append(_dot("stop sign", "#c62828", (8, 0, 22.5), "white"))
        here = self.scene.light_valid[step] & self.visible(self.scene.light_stops[step])
        shown = {LIGHTS[LightState(s)] for s in self.scene.light_states[step][here].tolist()}
        handles += [_dot(f"light: {name}", colour, "o", INK) for name, colour in sorted(shown)]
        return handles

    def visible(self, positions: Tensor) -> Tensor:
        """Which positions (…, 2 or 3) lie in the panel."""
        return ((positions[..., :2].double() - torch.from_numpy(self.centre)).abs() < self.extent).all(-1)


def zebra(polygon: np.ndarray, stripe: float = 0.6) -> list[np.ndarray]:
    """The light stripes of a crossing: polygon (p, 2), counted off along the longer sides; itself if it has not four."""
    corners = polygon[:-1] if len(polygon) == 5 and np.allclose(polygon[0], polygon[-1]) else polygon
    if len(corners) != 4:
        return [polygon]
    if np.linalg.norm(corners[1] - corners[0]) < np.linalg.norm(corners[2] - corners[1]):
        corners = np.roll(corners, -1, axis=0)
    a, b, c, d = corners  # the long sides are a → b and d → c
    count = max(1, round(float(np.linalg.norm(b - a)) / stripe))
    at = np.arange(count + 1)[:, None] / count
    one, other = a + at * (b - a), d + at * (c - d)
    return [np.stack((one[i], one[i + 1], other[i + 1], other[i])) for i in range(0, count, 2)]


class Boxes:
    """Boxes with a wedge at the front that tells the heading, coloured by type; an outline marks scored agents.

    Args:
        axes: where to.
        colours: a colour an agent.
        marked: (a,) bool, which are outlined in black.
    """

    def __init__(self, axes: Axes, colours: Sequence[str], marked: Tensor) -> None:
        order = marked.to(torch.int8).argsort(stable=True)  # outlined boxes last, on top
        self.order = order
        tones = [colours[i] for i in order.tolist()]
        outline = [INK if m else "#ffffff" for m in marked[order].tolist()]
        widths = [1.1 if m else 0.5 for m in marked[order].tolist()]
        self.widths = np.array(widths)
        self.bodies = PolyCollection([], facecolors=tones, edgecolors=outline, zorder=Layer.BOX)
        self.wedges = PolyCollection([], facecolors="#ffffff", linewidths=0, alpha=0.9, zorder=Layer.BOX + 0.1)
        self.artists = (self.bodies, self.wedges)
        for artist in self.artists:
            axes.add_collection(artist, autolim=False)

    def move(self, states: Tensor, sizes: Tensor) -> None:
        """Show them at states (a, 4) with sizes (a, 3). A box of size 0 is not seen."""
        pose, box = states[self.order][:, [0, 1, 3]].double(), sizes[self.order, :2].double()
        length = box[:, 0].numpy()
        bare = (length == 0) | ((length < 2.5) & (self.widths < 1))  # people would be all outline
        self.bodies.set_linewidth(np.where(bare, 0.0, self.widths).tolist())
        self.bodies.set_verts(list(box_corners(pose, box).numpy()))
        tips = torch.cat((WEDGE * box[:, None], torch.zeros(len(box), 3, 1)), dim=-1)
        self.wedges.set_verts(list(compose(pose[:, None], tips)[..., :2].numpy()))


def colours_of(scene: Scene, index: Tensor) -> list[str]:
    """A colour an agent: the self-driving car's own, else its type's."""
    kinds = scene.agent_types.tolist()
    return [SDC if i == scene.sdc else TYPES[AgentType(kinds[i])][1] for i in index.tolist()]


def agent_legend(scene: Scene, index: Tensor) -> list[Line2D | Patch]:
    """Handles of the agents among `index`: the self-driving car, then the types that occur."""
    others = {TYPES[AgentType(k)] for k in scene.agent_types[index[index != scene.sdc]].tolist()}
    handles: list[Line2D | Patch] = [Patch(facecolor=SDC, edgecolor=INK, label="self-driving car")]
    return handles + [Patch(facecolor=colour, label=name) for name, colour in sorted(others, reverse=True)]


def _dot(label: str, colour: str, marker: object, edge: str) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, markersize=7, color=colour, markeredgecolor=edge, label=label)  # type: ignore[arg-type]
