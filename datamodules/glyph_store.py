"""Keeps rendered glyph scenes as one memory-mapped array per split and resolution, with a sidecar that vouches for it."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from filelock import FileLock

from datamodules.embedded_source import SourceError, sha256_of
from datamodules.glyph_rendering import SceneRenderer
from datamodules.glyph_scenes import CLASS_NAMES, SceneSettings, draw_scene
from datamodules.glyph_sources import SPLITS, Split, sources_digest, split_sources

_VERSION = 1  # Raise it when the same scenes would be drawn or rendered otherwise.


@dataclass(frozen=True)
class RenderedSplit:
    """What identifies a rendered array.

    Attributes:
        split: which fonts and photographs are used.
        height: pixels from top to bottom.
        width: pixels from left to right.
        count: number of scenes; the first scenes of a longer array are the same.
        seed: seed of the data set.
        settings: how varied the scenes are.
    """

    split: Split
    height: int
    width: int
    count: int
    seed: int
    settings: SceneSettings

    def facts(self) -> dict[str, object]:
        """Returns all that the pixels depend on, ready for JSON."""
        facts = {"version": _VERSION, "sources": sources_digest(), "class_names": list(CLASS_NAMES), **asdict(self)}
        return json.loads(json.dumps(facts))

    def path(self, cache: Path) -> Path:
        """Returns where the array lies; another set of facts has another path."""
        digest = sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()[:12]
        return cache / "glyphs" / f"{self.split}-{self.height}x{self.width}-{digest}.npy"


def render_once(
    rendered: RenderedSplit, cache: Path, source_folder: Callable[[], Path], progress: Callable[[str], None] = print
) -> Path:
    """Renders a split unless the cache holds it; of several processes one renders and the others wait.

    Args:
        rendered: what to render.
        cache: the cache folder.
        source_folder: gives the folder of fonts and photographs; called only if something must be rendered.
        progress: receives one line before rendering.

    Returns:
        The path of the array: uint8, shape (count, height, width, 3).
    """
    path = rendered.path(cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not (path.exists() and path.with_suffix(".json").exists()):
            progress(
                f"rendering {rendered.count} glyph scenes at {rendered.height}x{rendered.width} ({rendered.split})"
            )
            _render(rendered, path, source_folder())
    return path


def open_rendered(path: Path, rendered: RenderedSplit) -> np.ndarray:
    """Opens a rendered array read-only after checking it against its sidecar.

    Returns:
        A memory-mapped array, uint8, shape (count, height, width, 3).

    Raises:
        SourceError: if a file is missing, or the array is not the one that the sidecar describes.
    """
    sidecar = path.with_suffix(".json")
    try:
        facts = json.loads(sidecar.read_text())
        digest = sha256_of(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: array or sidecar cannot be read ({error}); delete both and run again") from error
    if facts.pop("sha256", None) != digest or facts != rendered.facts():
        raise SourceError(f"{path}: does not match {sidecar.name}; delete both and run again")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def labels_of(count: int) -> np.ndarray:
    """Returns the class indices of the first ``count`` scenes of any split, int64, shape (count,)."""
    return np.arange(count, dtype=np.int64) % len(CLASS_NAMES)


def _render(rendered: RenderedSplit, path: Path, source_folder: Path) -> None:
    sources = split_sources(source_folder, rendered.split)
    renderer = SceneRenderer(sources, rendered.settings)
    seed = (rendered.seed, SPLITS.index(rendered.split))
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        shape = (rendered.count, rendered.height, rendered.width, 3)
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        for index in range(rendered.count):
            scene = draw_scene(index, seed, len(sources.fonts), len(sources.photographs), rendered.settings)
            array[index] = renderer.render(scene, rendered.height, rendered.width)
        array.flush()
        del array
        sidecar = temporary.with_suffix(".sidecar")
        sidecar.write_text(json.dumps({**rendered.facts(), "sha256": sha256_of(temporary)}, indent=1))
        os.replace(temporary, path)
        os.replace(sidecar, path.with_suffix(".json"))
    finally:
        temporary.unlink(missing_ok=True)
