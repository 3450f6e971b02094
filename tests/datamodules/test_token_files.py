"""Token files hold what the source gave, are published whole and are checked when read."""

import hashlib
import json
import tracemalloc
from dataclasses import dataclass, field

import numpy as np
import pytest

from datamodules.text_documents import SPLITS, Document, check_utf8
from datamodules.token_files import open_token_files, token_folder, write_token_files
from datamodules.tokens import BPE, Bytes

TEXTS = {"train": [b"one one one", b"zwei \xc3\xbc"], "val": [b"three"], "test": []}


@dataclass
class Made:
    """Documents from memory."""

    texts: dict = field(default_factory=lambda: TEXTS)
    name: str = "made"

    def identity(self, cache=None):
        return {"source": self.name, "texts": hashlib.sha256(repr(self.texts).encode()).hexdigest()}

    def documents(self, split, cache=None):
        return (Document(f"{split}{n}", text) for n, text in enumerate(self.texts[split]))


@pytest.mark.parametrize("tokens", [Bytes(), BPE(size=260)])
def test_files_hold_the_documents(tmp_path, tokens):
    folder = write_token_files(Made(), tokens, tmp_path)
    encoder = tokens.load(folder)
    for split, file in open_token_files(folder).items():
        texts = TEXTS[split]
        assert file.names == tuple(f"{split}{n}" for n in range(len(texts)))
        assert file.text_bytes.tolist() == [len(text) for text in texts]
        for text, start, end in zip(texts, file.starts, file.starts[1:], strict=False):
            ids = file.read(np.arange(start, end))
            assert ids[0] == encoder.bos
            assert encoder.decode(ids[1:]) == text
        assert file.ids.dtype == "<u2"
        assert len(file.ids) == file.starts[-1]


def test_a_long_document_is_written_without_a_copy_in_ids(tmp_path):
    text = "ab cü\n".encode() * 3_000_000  # 21 MB: its ids as int64 would have 168

    class Long(Made):
        """Known by its length."""

        def identity(self, cache=None):
            return {"source": self.name, "bytes": str(len(text))}

    tracemalloc.start()
    try:
        check_utf8(text, "text")
        checked = tracemalloc.get_traced_memory()[1]
        write_token_files(Long({**TEXTS, "train": [text]}), Bytes(), tmp_path)
        written = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert checked < 0.2 * len(text)
    assert written < 1.5 * len(text)  # a block of 1 MB as int64, and as it is written


def test_the_index_records_where_everything_is_from(tmp_path):
    folder = write_token_files(Made(), Bytes(), tmp_path)
    index = json.loads((folder / "index.json").read_text())
    assert index["source"] == Made().identity()
    assert index["tokens"] == {"tokens": "bytes"}
    for split in SPLITS:
        assert index["splits"][split]["sha256"] == hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
        assert index["splits"][split]["text_sha256"] == hashlib.sha256(b"".join(TEXTS[split])).hexdigest()


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Many(Bytes):
        """Bytes far up."""

        bytes_per_token = np.zeros(70_000)

        def __post_init__(self):
            object.__setattr__(self, "size", 70_000)

        def encode(self, text):
            return super().encode(text) + 69_000

    file = open_token_files(write_token_files(Made(), Many(), tmp_path))["val"]
    assert file.ids.dtype == "<u4"
    assert (file.read(np.arange(1, 6)) - 69_000).tolist() == list(b"three")


def test_other_texts_or_tokens_have_another_folder(tmp_path):
    other = Made({**TEXTS, "val": [b"four"]})
    folders = {token_folder(s, t, tmp_path) for s in (Made(), other) for t in (Bytes(), BPE(size=260), BPE(size=261))}
    assert len(folders) == 6


def test_files_are_written_once_and_whole(tmp_path):
    class Broken(Made):
        """Ends in an error."""

        def documents(self, split, cache=None):
            yield Document("whole", b"text")
            if split == "val":
                raise ValueError("a.txt: line 3 is not JSON")

    with pytest.raises(ValueError, match="line 3"):
        write_token_files(Broken(), Bytes(), tmp_path)
    assert [path for path in (tmp_path / "text").iterdir() if path.is_dir()] == []
    folder = write_token_files(Made(), Bytes(), tmp_path)
    written = (folder / "train.bin").stat().st_mtime_ns
    assert write_token_files(Made(), Bytes(), tmp_path) == folder
    assert (folder / "train.bin").stat().st_mtime_ns == written


def test_a_source_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="made: no documents"):
        write_token_files(Made({split: [] for split in SPLITS}), Bytes(), tmp_path)


def test_a_token_out_of_range_is_named(tmp_path):
    folder = write_token_files(Made(), Bytes(), tmp_path)
    ids = np.fromfile(folder / "train.bin", "<u2")
    ids[7] = 999
    ids.tofile(folder / "train.bin")
    file = open_token_files(folder)["train"]
    file.read(np.arange(7))
    with pytest.raises(ValueError, match=r"train\.bin: token 999 at byte 14 is out of range, there are 257"):
        file.read(np.arange(12).reshape(3, 4))


BROKEN = (
    ({"starts": [0, 3, 6]}, "3 starts and 1 bytes of val.bin for 1 documents"),
    ({"starts": [3, 6]}, "2 starts"),
    ({"starts": [0, 0]}, "starts of val.bin don't ascend"),
    ({"starts": [0, 6.0]}, "starts is not a list of int"),
    ({"starts": 6}, "starts is not a list of int"),
    ({"bytes": []}, "0 bytes of val.bin for 1"),
    ({"bytes": ["5"]}, "bytes is not a list of int"),
    ({"names": "val0"}, "names is not a list of str"),
    ({"names": [0]}, "names is not a list of str"),
    ({"dtype": "<i2"}, "dtype '<i2' of val.bin"),
    ({"dtype": None}, "dtype None of val.bin"),
)


def test_broken_files_are_named(tmp_path):
    folder = write_token_files(Made(), Bytes(), tmp_path)
    content = (folder / "val.bin").read_bytes()
    (folder / "val.bin").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"index\.json: val\.bin has 11 bytes, expected 12; delete the folder"):
        open_token_files(folder)
    (folder / "val.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.bin"):
        open_token_files(folder)
    (folder / "val.bin").write_bytes(content)
    whole = json.loads((folder / "index.json").read_text())
    for change, message in BROKEN:
        index = json.loads(json.dumps(whole))
        index["splits"]["val"] |= change
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=rf"index\.json: .*{message}.*; delete the folder"):
            open_token_files(folder)
    (folder / "index.json").write_text(json.dumps(whole | {"size": "257"}))
    with pytest.raises(ValueError, match="size is '257'"):
        open_token_files(folder)
    (folder / "index.json").write_text('{"form": 1}')
    with pytest.raises(ValueError, match="lacks 'splits'"):
        open_token_files(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: Expecting"):
        open_token_files(folder)
