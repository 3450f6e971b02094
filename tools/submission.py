"""Packs rollouts into an archive for the Waymo Open Sim Agents Challenge, and checks such archives.

python -m tools.submission build --rollouts FILE... --metadata FILE.json --out submission.tar.gz
python -m tools.submission validate submission.tar.gz --scenes FOLDER
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from datamodules.protos.submission_pb2 import ScenarioRollouts, SimAgentsChallengeSubmission
from datamodules.waymo_extra import json_format
from tasks.rollout_file import RolloutFile, Rollouts
from tools.scene_source import EMBEDDED, FILES, embedded_window, scenes_of_files
from tools.submission_check import (
    REQUIRED,
    ROLLOUTS_FIELD,
    SHARDS,
    Faults,
    Report,
    Simulated,
    check_archive,
    check_metadata,
    delimited,
)

NAME = "submission.binproto"
# The bytes of trajectories hardly shrink; a higher level only takes time.
COMPRESSION = 1


def read_metadata(path: str | Path) -> SimAgentsChallengeSubmission:
    """The submission's own fields from a JSON object with the names of Waymo's proto.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it is no such object, or lacks a required field; names the field.
    """
    try:
        content = json.loads(Path(path).read_text())
        message = json_format.ParseDict(content, SimAgentsChallengeSubmission())
    except (json.JSONDecodeError, UnicodeDecodeError, json_format.ParseError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not metadata of a submission ({error})") from error
    if message.scenario_rollouts:
        raise ValueError(f"{path}: scenario_rollouts come from the rollout files, not from metadata")
    message.submission_type = SimAgentsChallengeSubmission.SIM_AGENTS_SUBMISSION
    faults = Faults()
    check_metadata(message, str(path), faults)
    if faults.total:
        raise ValueError("; ".join(faults.texts))
    return message


def scenario_message(rollouts: Rollouts) -> ScenarioRollouts:
    """Rollouts of one scenario as the message of the challenge."""
    message = ScenarioRollouts(scenario_id=rollouts.scenario_id)
    identities = rollouts.agent_ids.tolist()
    for rollout in range(rollouts.states.shape[1]):
        joint = message.joint_scenes.add()
        for identity, path in zip(identities, rollouts.states[:, rollout], strict=True):
            x, y, z, heading = path.T.tolist()
            joint.simulated_trajectories.add(object_id=identity, center_x=x, center_y=y, center_z=z, heading=heading)
    return message


def _write_shard(path: Path, metadata: bytes, rollouts: Iterable[Rollouts]) -> None:
    with path.open("wb") as file:
        file.write(metadata)
        for one in rollouts:
            file.write(delimited(ROLLOUTS_FIELD, scenario_message(one).SerializeToString()))


def write_archive(
    path: Path, metadata: SimAgentsChallengeSubmission, files: Sequence[RolloutFile], shards: int = SHARDS
) -> int:
    """Write all scenarios of the files, in the order of their ids, as shards; one shard lies on disk at a time.

    Returns:
        How many scenarios there are.

    Raises:
        ValueError: if two files hold the same scenario.
    """
    place: dict[str, RolloutFile] = {}
    for file in files:
        for identity in file.scenario_ids:
            if identity in place:
                raise ValueError(f"scenario {identity} is in {place[identity].path} and in {file.path}")
            place[identity] = file
    identities = sorted(place)
    own_fields = metadata.SerializeToString()

    def rollouts(first: int, last: int) -> Iterator[Rollouts]:
        return (place[identity][identity] for identity in identities[first:last])

    with (
        tempfile.TemporaryDirectory(dir=path.parent) as folder,
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=COMPRESSION, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for shard in range(shards):
            bounds = shard * len(identities) // shards, (shard + 1) * len(identities) // shards
            part = Path(folder, f"{NAME}-{shard:05d}-of-{shards:05d}")
            _write_shard(part, own_fields, rollouts(*bounds))
            info = tarfile.TarInfo(part.name)
            info.size = part.stat().st_size
            with part.open("rb") as content:
                archive.addfile(info, content)
            part.unlink()
    return len(identities)


def build(out: Path, metadata: Path, rollouts: Sequence[Path], scenes: str | None, limit: int) -> int:
    """Write the archive under another name, check it, and only then give it its name."""
    if not out.name.endswith(".tar.gz"):
        raise ValueError(f"{out}: the challenge takes a file whose name ends in .tar.gz")
    message = read_metadata(metadata)
    files = [RolloutFile(path) for path in rollouts]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".submission-") as folder:
        draft = Path(folder, out.name)
        write_archive(draft, message, files)
        report = _check(draft, scenes, limit)
        if report.faults.total:
            print(f"{out}: not written", file=sys.stderr)
            return _tell(out, report, scenes)
        os.replace(draft, out)
    return _tell(out, report, scenes)


def _check(path: Path, scenes: str | None, limit: int) -> Report:
    if scenes is None:
        return check_archive(path, limit=limit)
    if scenes == EMBEDDED:
        return check_archive(path, embedded_objects(), limit=limit)
    known = {scene.scenario_id: Simulated.of_scene(scene) for scene in scenes_of_files(Path(scenes))}
    return check_archive(path, known.get, set(known), limit=limit)


def embedded_objects() -> Callable[[str], Simulated | None]:
    """Scenario id → objects of an embedded window; None where there is no such window."""

    @functools.cache
    def objects(name: str) -> Simulated | None:
        try:
            return Simulated.of_scene(embedded_window(name, predict=0))
        except ValueError:
            return None

    return objects


def _tell(path: Path, report: Report, scenes: str | None) -> int:
    faults = report.faults
    if faults.total:
        for text in faults.texts:
            print(f"fault: {text}", file=sys.stderr)
        kinds = ", ".join(f"{count} × {kind}" for kind, count in faults.counts.most_common())
        hidden = faults.total - len(faults.texts)
        print(
            f"{path}: {faults.total} faults ({kinds})" + (f", {hidden} not listed" if hidden else ""), file=sys.stderr
        )
        return 2
    unchecked = "" if scenes else "; whether all objects are there was not checked, give --scenes"
    print(
        f"{path}: no fault in {len(report.scenario_ids)} scenarios, {report.objects} objects, {report.shards} shards{unchecked}"
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where all is well, 2 with the faults on stderr where it isn't."""
    parser = argparse.ArgumentParser(prog="python -m tools.submission", description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="pack rollouts; nothing is written if they have faults")
    building.add_argument("--rollouts", type=Path, nargs="+", required=True, help="files that tasks.rollout_file wrote")
    building.add_argument("--metadata", type=Path, required=True, help=f"JSON object with {', '.join(REQUIRED)}")
    building.add_argument("--out", type=Path, required=True, help="the archive, NAME.tar.gz")
    validating = commands.add_parser("validate", help="list the faults of an archive")
    validating.add_argument("archive", type=Path)
    for each in (building, validating):
        each.add_argument("--scenes", help=f"'embedded', or {FILES}, to check the objects")
        each.add_argument("--limit", type=int, default=50, help="faults to list (default 50)")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "build":
            return build(chosen.out, chosen.metadata, chosen.rollouts, chosen.scenes, chosen.limit)
        return _tell(chosen.archive, _check(chosen.archive, chosen.scenes, chosen.limit), chosen.scenes)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
