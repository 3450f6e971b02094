"""TFRecord framing: the CRC's known values, a round trip, and every way a file can be damaged."""

import pickle
import struct

import numpy as np
import pytest

from datamodules.tfrecord import RecordError, TFRecordFile, masked_crc, write_tfrecord

RECORDS = [b"123456789", b"", bytes(range(256)) * 40, b"last"]
OFFSETS = [0, 25, 41, 10297]  # a record costs sixteen bytes more than its data


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "train.tfrecord-00000-of-00002"
    write_tfrecord(file, RECORDS)
    return file


def flip(path, offset, bit=0x10):
    data = bytearray(path.read_bytes())
    data[offset] ^= bit
    path.write_bytes(data)


def crc32c_by_bit(data: bytes) -> int:
    """The definition: reflected polynomial 0x82F63B78."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_published_check_value():
    assert crc32c_by_bit(b"123456789") == 0xE3069283
    assert masked_crc(b"123456789") == 0xC78AB0E5
    assert masked_crc(struct.pack("<Q", 952947)) == 0x11443719  # of a file that TensorFlow wrote


@pytest.mark.parametrize("length", [0, 1, 7, 8, 333])
def test_the_mask_over_the_definition(length):
    data = np.random.default_rng(length).bytes(length)
    crc = crc32c_by_bit(data)
    assert masked_crc(data) == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_records_come_back_by_number_and_in_turn(path):
    file = TFRecordFile(path)
    assert list(file) == RECORDS
    assert len(file) == 4
    assert file.offsets == OFFSETS
    assert file[-1] == b"last"
    assert [file[index] for index in (2, 0)] == [RECORDS[2], RECORDS[0]]
    assert list(pickle.loads(pickle.dumps(file))) == RECORDS
    with pytest.raises(IndexError):
        file[4]


def test_the_bytes_are_those_of_the_format(tmp_path):
    write_tfrecord(tmp_path / "one", [b"123456789"])
    length = struct.pack("<Q", 9)
    expected = length + struct.pack("<I", masked_crc(length)) + b"123456789" + struct.pack("<I", 0xC78AB0E5)
    assert (tmp_path / "one").read_bytes() == expected


def test_an_empty_file_has_no_record(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert list(TFRecordFile(tmp_path / "empty")) == []
    assert len(TFRecordFile(tmp_path / "empty")) == 0


@pytest.mark.parametrize("byte", [0, 4000, 10239])
def test_a_flipped_byte_of_data_is_named_and_passed_over(path, byte):
    flip(path, OFFSETS[2] + 12 + byte)
    file = TFRecordFile(path)
    with pytest.raises(RecordError, match=rf"{path.name}: record at byte 41: its 10240 bytes fail their CRC"):
        list(file)
    with pytest.raises(RecordError, match="byte 41"):
        file[2]
    assert file[3] == b"last"  # lengths are whole, so the others are found
    found = list(file.salvage())
    assert [item[1] for item in found if isinstance(item, tuple)] == [RECORDS[0], RECORDS[1], RECORDS[3]]
    assert [item.offset for item in found if isinstance(item, RecordError)] == [41]


@pytest.mark.parametrize("at", [0, 3, 7, 8, 11])  # of the length, then of its CRC
def test_a_flipped_byte_of_a_length(path, at):
    flip(path, OFFSETS[2] + at)
    with pytest.raises(RecordError, match=rf"{path.name}: record at byte 41: its length fails its CRC"):
        len(TFRecordFile(path))
    *sound, error = TFRecordFile(path).salvage()
    assert [data for _, data in sound] == RECORDS[:2]
    assert error.next is None


@pytest.mark.parametrize("kept", [10298, 10308, 10309, 10312, 10316])  # within head, data and CRC of the last
def test_a_cut_off_end(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RecordError, match=rf"{path.name}: record at byte 10297: .*(cut off|ends)"):
        list(TFRecordFile(path))
    assert [item[1] for item in TFRecordFile(path).salvage() if isinstance(item, tuple)] == RECORDS[:3]


def test_an_absurd_length_with_a_sound_crc(tmp_path):
    head = struct.pack("<Q", 2**63)
    (tmp_path / "absurd").write_bytes(head + struct.pack("<I", masked_crc(head)) + bytes(100))
    with pytest.raises(RecordError, match="record at byte 0: 9223372036854775808 bytes long with 96 left"):
        list(TFRecordFile(tmp_path / "absurd"))


def test_what_is_no_tfrecord(tmp_path):
    for content, reason in ((b"PK\x03\x04" + bytes(60), "not a TFRecord"), (b"\x1f\x8b" + bytes(60), "gzip")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(RecordError, match=rf"file: record at byte 0: {reason}"):
            list(TFRecordFile(tmp_path / "file"))
    with pytest.raises(FileNotFoundError):
        TFRecordFile(tmp_path / "absent")


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def records():
        yield b"one"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_tfrecord(tmp_path / "file", records())
    assert not list(tmp_path.iterdir())
