"""The scenes that rollouts belong to: by scenario id from Waymo's files or shards, or windows of the embedded ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from datamodules.embedded_scenes import load_embedded
from datamodules.scene import Scene
from datamodules.scene_shards import SUFFIX, SceneShards, read_index, read_place
from datamodules.tfrecord import TFRecordFile
from datamodules.waymo_example import read_any
from datamodules.windows import MostTravelled, window, wrap_headings
from tools.waymo_to_shards import sources_of

EMBEDDED = "embedded"
FILES = "a TFRecord file (Scenario or tf.Example), a shard, or a folder of either"


def scenes_of_files(path: Path) -> Iterator[Scene]:
    """All scenarios of a TFRecord file of either kind or of a shard, or of a folder of them, one after another.

    Raises:
        OSError: if there are none.
        ValueError: if one is damaged; names file, record and object.
    """
    if path.is_dir() and any(path.glob(f"*{SUFFIX}")):
        yield from SceneShards(path)
        return
    if path.suffix == SUFFIX:
        for place in read_index(path)[0]:
            yield read_place(path, place)
        return
    for file in sources_of(path):
        for number, record in enumerate(TFRecordFile(file)):
            try:
                yield read_any(record)
            except ValueError as error:
                raise ValueError(f"{file}: record {number}: {error}") from error


def embedded_window(name: str, predict: int) -> Scene:
    """The window that `name`, SCENARIO@STEP, stands for, its headings wrapped; the agents that move farthest predicted.

    Raises:
        ValueError: if there is no such window.
    """
    scenario, at, start = name.partition("@")
    known = {scene.scenario_id: scene for scene in load_embedded(extra=True)}
    if scenario not in known or not at or not start.isdigit():
        raise ValueError(f"{name}: not SCENARIO@STEP of the embedded scenarios {', '.join(known)}")
    return window(wrap_headings(known[scenario]), int(start), to_predict=MostTravelled(predict))


def find_scenes(source: str, scenario_ids: Iterable[str], predict: int = 8) -> Iterator[Scene]:
    """The scenes of these ids, each once, in the order of the source.

    Args:
        source: "embedded", or what `scenes_of_files` reads.
        scenario_ids: which to find.
        predict: embedded scenes have no agents marked to be predicted; so many that move farthest are.

    Raises:
        OSError: if the source isn't there.
        ValueError: if a scenario is missing or damaged.
    """
    wanted = set(scenario_ids)
    if source == EMBEDDED:
        for name in sorted(wanted):
            yield embedded_window(name, predict)
        return
    for scene in scenes_of_files(Path(source)):
        if scene.scenario_id in wanted:
            wanted.remove(scene.scenario_id)
            yield scene
            if not wanted:
                return
    if wanted:
        raise ValueError(f"{source}: lacks {len(wanted)} of the scenarios asked for, such as {min(wanted)}")
