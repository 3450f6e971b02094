"""Finds the faults of a Sim Agents submission archive before Waymo's server does, and names scenario and object of each."""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from datamodules.protos.submission_pb2 import JointScene, ScenarioRollouts, SimAgentsChallengeSubmission
from datamodules.scene import Scene
from datamodules.waymo_extra import DecodeError

SHARDS = 150
ROLLOUTS = 32
STEPS = 80
REQUIRED = (
    "account_name",
    "unique_method_name",
    "uses_lidar_data",
    "uses_camera_data",
    "uses_public_model_pretraining",
    "num_model_parameters",
    "acknowledge_complies_with_closed_loop_requirement",
)
VALUES = ("center_x", "center_y", "center_z", "heading")
SHARD_NAME = re.compile(r"(?:\./)?[^/]+\.binproto-(\d{5})-of-(\d{5})")
PARAMETERS = re.compile(r"\d+[A-Z]")
# In 0.1 s nothing gets this far: whoever starts farther away was written in other coordinates than the file's.
START_DISTANCE = 20.0
# A scenario's rollouts take 40 kB an object, a submission's own fields a page of text; a longer field is damage.
MOST_BYTES = 1 << 29
MOST_METADATA = 1 << 20
ROLLOUTS_FIELD = SimAgentsChallengeSubmission.DESCRIPTOR.fields_by_name["scenario_rollouts"].number


class Simulated(NamedTuple):
    """The objects of a scenario that must be simulated: (a,) ids, ascending, and (a, 2) where they are now, in metres."""

    ids: np.ndarray
    places: np.ndarray

    @classmethod
    def of_scene(cls, scene: Scene) -> Simulated:
        """The agents of a scene that are valid at its current step, in the coordinates of its file."""
        index = scene.simulated()
        index = index[scene.agent_ids[index].argsort()]
        places = scene.positions[index, scene.current, :2].double() + scene.origin[:2]
        return cls(scene.agent_ids[index].numpy(), places.numpy())


@dataclass
class Faults:
    """What is wrong: counts of every kind, and the first `limit` texts."""

    limit: int = 50
    counts: Counter[str] = field(default_factory=Counter)
    texts: list[str] = field(default_factory=list)

    def add(self, kind: str, where: str, text: str) -> None:
        """Note a fault of a kind; `where` names shard, scenario and object."""
        self.counts[kind] += 1
        if len(self.texts) < self.limit:
            self.texts.append(f"{where}: {text}")

    @property
    def total(self) -> int:
        """How many there are."""
        return self.counts.total()


@dataclass
class Report:
    """What `check_archive` found: the faults, and how much was looked at."""

    faults: Faults
    shards: int = 0
    objects: int = 0
    scenario_ids: set[str] = field(default_factory=set)


class _Reader:
    """Top-level fields of a protobuf message from a stream, so that one scenario is in memory at a time."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream

    def _exactly(self, count: int) -> bytes:
        if count > MOST_BYTES:
            raise DecodeError(f"a field of {count} bytes")
        data = self.stream.read(count)
        if len(data) != count:
            raise DecodeError("the message is cut short")
        return data

    def _varint(self) -> int | None:
        """None at the end of the stream."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.stream.read(1)
            if not byte:
                if shift:
                    raise DecodeError("the message is cut short")
                return None
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value
        raise DecodeError("a varint has more than ten bytes")

    def fields(self) -> Iterator[tuple[int, bytes, bytes]]:
        """(number, whole field, its content where it has a length)."""
        while (tag := self._varint()) is not None:
            head, wire = _encode(tag), tag & 7
            if wire == 0:
                value = self._varint()
                if value is None:
                    raise DecodeError("the message is cut short")
                yield tag >> 3, head + _encode(value), b""
            elif wire == 2:
                length = self._varint()
                if length is None:
                    raise DecodeError("the message is cut short")
                content = self._exactly(length)
                yield tag >> 3, head + _encode(length) + content if tag >> 3 != ROLLOUTS_FIELD else b"", content
            elif wire in (1, 5):
                yield tag >> 3, head + self._exactly(8 if wire == 1 else 4), b""
            else:
                raise DecodeError(f"wire type {wire} isn't one of a submission")


def _encode(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def delimited(number: int, content: bytes) -> bytes:
    """A field with a length, as it stands in a message."""
    return _encode(number << 3 | 2) + _encode(len(content)) + content


def check_metadata(message: SimAgentsChallengeSubmission, where: str, faults: Faults) -> None:
    """Notes what a submission's own fields lack."""
    if message.submission_type != SimAgentsChallengeSubmission.SIM_AGENTS_SUBMISSION:
        faults.add(
            "submission_type", where, f"submission_type is {message.submission_type}, not SIM_AGENTS_SUBMISSION (1)"
        )
    set_fields = {field.name: value for field, value in message.ListFields()}
    for name, value in set_fields.items():  # what isn't UTF-8 comes as bytes
        if any(isinstance(part, bytes) for part in (value if name in ("authors", "public_model_names") else (value,))):
            faults.add("metadata", where, f"{name} isn't UTF-8 text")
            return
    for name in REQUIRED:
        if name not in set_fields or set_fields[name] == "":
            faults.add("metadata", where, f"required metadata {name} isn't set")
    if set_fields.get("acknowledge_complies_with_closed_loop_requirement") is False:
        faults.add("metadata", where, "acknowledge_complies_with_closed_loop_requirement is false")
    if message.num_model_parameters and not PARAMETERS.fullmatch(message.num_model_parameters):
        faults.add(
            "metadata",
            where,
            f"num_model_parameters {message.num_model_parameters!r} isn't an integer and a suffix, as 7M",
        )
    if message.account_name and "@" not in message.account_name:
        faults.add("metadata", where, f"account_name {message.account_name!r} isn't an e-mail address")
    if message.uses_public_model_pretraining and not message.public_model_names:
        faults.add("metadata", where, "uses_public_model_pretraining is true, public_model_names is empty")


def _check_joint(joint: JointScene, where: str, simulated: Simulated | None, faults: Faults) -> None:
    seen: set[int] = set()
    for trajectory in joint.simulated_trajectories:
        identity = trajectory.object_id
        who = f"{where}, object {identity}"
        if not trajectory.HasField("object_id"):
            faults.add("object_id", who, "object_id isn't set")
        if identity in seen:
            faults.add("duplicate object", who, "occurs twice")
        seen.add(identity)
        lengths = {name: len(getattr(trajectory, name)) for name in VALUES}
        wrong = {name: length for name, length in lengths.items() if length != STEPS}
        if wrong:
            found = ", ".join(f"{length} of {name}" for name, length in wrong.items())
            faults.add("steps", who, f"{found} instead of {STEPS} steps")
        else:
            states = np.array([getattr(trajectory, name) for name in VALUES])
            finite = np.isfinite(states)
            if not finite.all():
                name, step = np.argwhere(~finite)[0]
                faults.add("not finite", who, f"{VALUES[name]} is {states[name, step]} at step {step}")
            elif simulated is not None:
                _check_start(states[:2, 0], identity, who, simulated, faults)
    if simulated is None:
        return
    required = set(simulated.ids.tolist())
    for identity in sorted(required - seen):
        faults.add("missing object", f"{where}, object {identity}", "is missing; it is valid at step 10")
    for identity in sorted(seen - required):
        faults.add("extra object", f"{where}, object {identity}", "isn't to be simulated; it is not valid at step 10")


def _check_start(place: np.ndarray, identity: int, who: str, simulated: Simulated, faults: Faults) -> None:
    at = int(np.searchsorted(simulated.ids, identity))
    if at < len(simulated.ids) and simulated.ids[at] == identity:
        distance = float(np.hypot(*(place - simulated.places[at])))
        if distance > START_DISTANCE:
            faults.add("coordinates", who, f"starts {distance:.0f} m from where it was recorded 0.1 s before")


def check_scenario(rollouts: ScenarioRollouts, shard: str, simulated: Simulated | None, faults: Faults) -> None:
    """Notes what is wrong with the rollouts of one scenario."""
    where = f"{shard}, scenario {rollouts.scenario_id or '(no id)'}"
    if not rollouts.scenario_id:
        faults.add("scenario_id", where, "scenario_id isn't set")
    if len(rollouts.joint_scenes) != ROLLOUTS:
        faults.add("rollouts", where, f"{len(rollouts.joint_scenes)} rollouts instead of {ROLLOUTS}")
    for number, joint in enumerate(rollouts.joint_scenes):
        _check_joint(joint, f"{where}, rollout {number}", simulated, faults)


def _check_shard(
    stream: IO[bytes], shard: str, simulated: Callable[[str], Simulated | None] | None, report: Report
) -> bytes:
    """Returns the metadata as bytes."""
    metadata, faults = b"", report.faults
    try:
        for number, whole, content in _Reader(stream).fields():
            if number != ROLLOUTS_FIELD:
                metadata += whole
                if len(metadata) > MOST_METADATA:
                    raise DecodeError(f"more than {MOST_METADATA} bytes beside the scenarios")
                continue
            rollouts = ScenarioRollouts.FromString(content)
            identity = rollouts.scenario_id
            if isinstance(identity, bytes):
                raise DecodeError(f"scenario_id {identity!r} isn't UTF-8 text")
            required = simulated(identity) if simulated else None
            if simulated and required is None:
                faults.add("unknown scenario", f"{shard}, scenario {identity}", "isn't one of the given scenes")
            if identity in report.scenario_ids:
                faults.add("duplicate scenario", f"{shard}, scenario {identity}", "occurs twice")
            report.scenario_ids.add(identity)
            report.objects += max((len(joint.simulated_trajectories) for joint in rollouts.joint_scenes), default=0)
            check_scenario(rollouts, shard, required, faults)
        check_metadata(SimAgentsChallengeSubmission.FromString(metadata), shard, faults)
    except DecodeError as error:
        faults.add("message", shard, f"not a SimAgentsChallengeSubmission ({error})")
    return metadata


def _archive_fault(path: Path) -> str | None:
    with path.open("rb") as file:
        magic = file.read(265)
    if magic[:2] != b"\x1f\x8b":
        kind = (
            "an uncompressed tar" if magic[257:262] == b"ustar" else "a zip" if magic[:2] == b"PK" else "no gzip file"
        )
        return f"is {kind}; the server takes a gzip-compressed tar"
    if not path.name.endswith(".tar.gz"):
        return "its name doesn't end in .tar.gz"
    return None


def check_archive(
    path: str | Path,
    simulated: Callable[[str], Simulated | None] | None = None,
    expected: set[str] | None = None,
    shards: int = SHARDS,
    limit: int = 50,
) -> Report:
    """Read a submission archive as a stream, scenario by scenario.

    Args:
        path: a `.tar.gz` of shards named NAME.binproto-00000-of-00150.
        simulated: scenario id → the objects that must be simulated, None for an unknown scenario; where it isn't given,
            the set of objects isn't checked.
        expected: scenario ids that must all be there.
        shards: how many.
        limit: how many faults to describe; all are counted.

    Raises:
        OSError: if the file can't be opened.
    """
    path = Path(path)
    report = Report(Faults(limit))
    faults = report.faults
    fault = _archive_fault(path)
    if fault:
        faults.add("archive", path.name, fault)
        if "its name" not in fault:
            return report
    found: dict[int, str] = {}
    first: bytes | None = None
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isdir() and member.name in (".", "./"):
                    continue
                match = SHARD_NAME.fullmatch(member.name)
                stream = archive.extractfile(member) if member.isfile() else None
                if match is None or stream is None or int(match[2]) != shards or int(match[1]) >= shards:
                    text = f"not named as one of {shards} shards, NAME.binproto-00000-of-{shards:05d}"
                    faults.add("shard name", member.name, text)
                elif int(match[1]) in found:
                    faults.add("shard name", member.name, "occurs twice")
                else:
                    found[int(match[1])] = member.name
                if stream is None:
                    continue
                report.shards += 1
                metadata = _check_shard(stream, member.name, simulated, report)
                first = metadata if first is None else first
                if metadata != first:
                    faults.add("metadata", member.name, "its metadata isn't that of the first shard")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        faults.add("archive", path.name, f"is damaged or cut short ({error})")
        return report
    absent = sorted(set(range(shards)) - set(found))
    if absent:
        faults.add(
            "shard count", path.name, f"{len(absent)} of {shards} shards are missing, the first is number {absent[0]}"
        )
    for identity in sorted((expected or set()) - report.scenario_ids):
        faults.add("missing scenario", f"scenario {identity}", "is missing")
    return report
