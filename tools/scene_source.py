"""The scenes that rollouts belong to: by scenario id from Scenario files, or the embedded ones and windows of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from datamodules.embedded_scenes import load_embedded
from datamodules.scene import Scene
from datamodules.tfrecord import TFRecordFile
from datamodules.waymo_scenario import read_scenario
from datamodules.windows import MostTravelled, window, wrap_headings

EMBEDDED = "embedded"


def tfrecord_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder in the order of their names.

    Raises:
        OSError: if there are none.
    """
    if path.is_file():
        return [path]
    files = sorted(each for each in path.glob("*") if each.is_file() and "tfrecord" in each.name)
    if not files:
        raise FileNotFoundError(f"{path}: neither a file nor a folder of files with 'tfrecord' in their names")
    return files


def scenes_of_files(path: Path) -> Iterator[Scene]:
    """All scenarios of a TFRecord file, or of a folder of them, one after another.

    Raises:
        OSError: if there are none.
        ValueError: if one is damaged; names file, record and object.
    """
    for file in tfrecord_files(path):
        for number, record in enumerate(TFRecordFile(file)):
            try:
                yield read_scenario(record)
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
        source: "embedded", a TFRecord file of Scenarios, or a folder of them.
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
