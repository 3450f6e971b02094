"""Waymo Open Motion files to shards: `python -m tools.waymo_to_shards SOURCE_DIR OUT_DIR --workers N --budget K`.

Each TFRecord file, of Scenario or tf.Example records, becomes one shard of the same name, and manifest.json says what came of
all. A run that was cut off goes on where it stopped: shards that are whole and whose source hasn't changed are kept. A
damaged record is left out, counted and named by file and byte; with more than `--budget` of them the run stops. Exit codes:
0 all converted, 2 stopped with one line that says why. Needs `pip install '.[train,waymo]'`.
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules.scene import AgentType, Scene
from datamodules.scene_shards import MANIFEST, SUFFIX, ShardError, ShardWriter, read_index, read_place
from datamodules.tfrecord import RecordError, TFRecordFile
from datamodules.waymo_example import is_example, read_any
from datamodules.waymo_extra import google_crc32c

FORMAT = 1
"""Of what a shard says about itself; shards of another one are made again."""
_CHUNK = 1 << 24

Report = dict[str, Any]
"""What a shard says about itself, as JSON: source, records, skipped, counts."""


class BudgetError(ValueError):
    """More damaged records than the budget."""


def sources_of(place: Path) -> list[Path]:
    """The TFRecord files of a folder (`tfrecord` is part of their names), or the one file.

    Raises:
        FileNotFoundError: there is none.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise FileNotFoundError(f"{place} is neither a folder nor a file")
    found = sorted(path for path in place.iterdir() if path.is_file() and "tfrecord" in path.name)
    if not found:
        raise FileNotFoundError(f"{place} holds no file with tfrecord in its name; name the folder of one split")
    return found


def shard_of(source: Path, folder: Path) -> Path:
    return folder / f"{source.name}{SUFFIX}"


def convert(source: Path, shard: Path, budget: int) -> Report:
    """Make one shard of one file.

    Raises:
        RecordError: the file isn't a TFRecord.
        BudgetError: more than `budget` records of this file are damaged.
    """
    skipped: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    before = _identity(source)
    with ShardWriter(shard) as writer:
        for item in TFRecordFile(source).salvage():
            if isinstance(item, RecordError):
                if item.offset == 0 and item.next is None:
                    raise item  # nothing of it can be read
                skipped.append({"file": source.name, "offset": item.offset, "reason": item.reason})
            else:
                offset, data = item
                left_out: Counter[str] = Counter()
                try:
                    scene = read_any(data, left_out)
                except ValueError as error:
                    skipped.append({"file": source.name, "offset": offset, "reason": str(error)})
                else:
                    writer.add(scene)
                    counts["tf.Example records" if is_example(data) else "Scenario records"] += 1
                    counts += left_out
                    _count(scene, counts)
            if len(skipped) > budget:
                last = skipped[-1]
                raise BudgetError(
                    f"{source}: record at byte {last['offset']}: {last['reason']} "
                    f"(damaged record {len(skipped)} of this file, --budget {budget})"
                )
        if not counts["scenes"] and not skipped:
            counts["files without records"] += 1  # such as a download that never began
        if _identity(source) != before:
            raise ValueError(f"{source} changed while it was read; run again once it is whole")
        about = {"format": FORMAT, "source": before | {"crc32c": crc_of(source)}, "skipped": skipped, "counts": counts}
        writer.about = about
    return about


def kept(source: Path, shard: Path) -> Report | None:
    """What a finished shard says, if it is sound and of this very source; else None."""
    if not shard.is_file():
        return None
    try:
        places, about = read_index(shard)
        if about.get("format") != FORMAT or {**about["source"], **_identity(source)} != about["source"]:
            return None
        for place in places:
            read_place(shard, place)
    except ShardError:
        return None
    return about


def crc_of(path: Path) -> str:
    """crc32c of a whole file, eight hexadecimal digits."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = google_crc32c.extend(crc, chunk)
    return f"{crc:08x}"


def _identity(source: Path) -> dict[str, Any]:
    stat = source.stat()
    return {"name": source.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def _count(scene: Scene, counts: Counter[str]) -> None:
    counts["scenes"] += 1
    counts["agents"] += scene.agents
    counts["agents at the current step"] += len(scene.simulated())
    for kind, number in enumerate(torch.bincount(scene.agent_types, minlength=len(AgentType)).tolist()):
        counts[f"agents {AgentType(kind).name}"] += number
    counts["map features"] += len(scene.feature_ids)
    counts["scenes without map"] += not len(scene.feature_ids)
    counts["scenes without lights"] += not len(scene.light_lanes)


def _job(source: Path, shard: Path, budget: int) -> tuple[Path, Report, bool]:
    """(shard, what it says, whether it was there already)."""
    torch.set_num_threads(1)
    about = kept(source, shard)
    return (shard, about, True) if about is not None else (shard, convert(source, shard, budget), False)


def run(
    source: Path, folder: Path, workers: int, budget: int, dataset_version: str, progress: Callable[[Report], None]
) -> Report:
    """Convert all of `source` into `folder` and return the manifest, which is written last.

    Args:
        source: folder of TFRecord files, or one file.
        folder: of the shards; made if it isn't there.
        workers: processes; 1 converts in this one.
        budget: damaged records that are left out before the run stops.
        dataset_version: goes to the manifest; the files don't tell theirs.
        progress: called with the report of each finished shard.

    Raises:
        OSError: no source, or the folder can't be written.
        ValueError: a file isn't a TFRecord, no record in any, too many damaged ones, or foreign shards in the folder.
    """
    sources = sources_of(source)
    folder.mkdir(parents=True, exist_ok=True)
    shards = {shard_of(path, folder): path for path in sources}
    if foreign := sorted(set(folder.glob(f"*{SUFFIX}")) - shards.keys()):
        raise ValueError(f"{foreign[0]} is of another source than {source}; choose an empty folder")
    for partial in folder.glob(f"*{SUFFIX}.*.partial"):
        partial.unlink()  # of a run that was killed
    manifest: Report = {"complete": False, "dataset_version": dataset_version, "shards": []}
    _write_manifest(folder, manifest)
    reports: dict[Path, Report] = {}
    skipped: list[dict[str, Any]] = []
    for shard, about, _ in _results(shards, workers, budget):
        reports[shard] = about
        skipped += about["skipped"]
        progress(about)
        if len(skipped) > budget:
            last = skipped[-1]
            raise BudgetError(
                f"{last['file']}: record at byte {last['offset']}: {last['reason']} "
                f"({len(skipped)} damaged records so far, --budget {budget})"
            )
    counts: Counter[str] = Counter()
    for about in reports.values():
        counts.update(about["counts"])
    if not counts["scenes"]:
        raise ValueError(f"{source} holds no sound record in {len(sources)} files; fetch it again")
    for shard in sorted(reports):
        about = reports[shard]
        size = shard.stat().st_size
        row = {"name": shard.name, "bytes": size, "crc32c": crc_of(shard), "scenes": about["counts"].get("scenes", 0)}
        manifest["shards"].append(row | {"source": about["source"]})
    skipped.sort(key=lambda fault: (fault["file"], fault["offset"]))
    manifest |= {"complete": True, "counts": dict(sorted(counts.items())), "skipped": skipped}
    _write_manifest(folder, manifest)
    return manifest


def _results(shards: dict[Path, Path], workers: int, budget: int) -> Iterator[tuple[Path, Report, bool]]:
    if workers == 1:
        for shard, source in shards.items():
            yield _job(source, shard, budget)
        return
    pool = ProcessPoolExecutor(min(workers, len(shards)), mp_context=get_context("spawn"))
    try:
        jobs: list[Future[tuple[Path, Report, bool]]] = [
            pool.submit(_job, source, shard, budget) for shard, source in shards.items()
        ]
        for job in as_completed(jobs):
            yield job.result()
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the shards that are being made


def _write_manifest(folder: Path, manifest: Report) -> None:
    partial = folder / f"{MANIFEST}.{uuid.uuid4().hex}.partial"
    try:
        partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Waymo Open Motion TFRecords (Scenario or tf.Example) to shards of scenes."
    )
    parser.add_argument("source", type=Path, help="folder of TFRecord files, or one file")
    parser.add_argument("folder", type=Path, help="where the shards go")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--budget", type=int, default=0, help="damaged records to leave out before stopping")
    parser.add_argument("--dataset-version", default="unknown", help="goes to the manifest, such as 1.3.0")
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.budget < 0:
        parser.error(f"--workers {options.workers} --budget {options.budget}: at least 1 and 0")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("files", total=len(sources_of(options.source)))
            manifest = run(
                options.source,
                options.folder,
                options.workers,
                options.budget,
                options.dataset_version,
                lambda about: bar.advance(task),
            )
    except (OSError, ValueError, BrokenExecutor) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for fault in manifest["skipped"]:
        print(f"left out: {fault['file']}: record at byte {fault['offset']}: {fault['reason']}", file=sys.stderr)
    counts = manifest["counts"]
    if empty := counts.get("files without records"):
        names = [row["source"]["name"] for row in manifest["shards"] if not row["scenes"]]
        print(f"warning: {empty} files hold no record, such as {names[0]}; fetch them again", file=sys.stderr)
    print(
        f"{counts['scenes']} scenes with {counts['agents']} agents in {len(manifest['shards'])} shards of {options.folder}, "
        f"{len(manifest['skipped'])} records left out, dataset version {manifest['dataset_version']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
