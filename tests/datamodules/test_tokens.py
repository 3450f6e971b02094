"""Encoding loses nothing, counts bytes rightly and learns the same merges every time."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.tokens import BOS, BPE, Bytes, MergedBytes, blocks

TEXTS = [
    (
        "the quick brown fox jumps over the lazy dog, " * 20 + "naïve café\n\tdef f(x):\r\n    return x + 12345\n"
    ).encode()
] * 3


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return BPE(size=300).fit(TEXTS, tmp_path_factory.mktemp("bpe"))


def round_trips(encoder, text):
    ids = encoder.encode(text)
    assert ids.dtype == np.int64
    assert ids.shape == (len(ids),)
    assert not (ids == BOS).any()
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < encoder.size)
    assert encoder.decode(ids) == text
    assert encoder.bytes_per_token[ids].sum() == len(text)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_come_back(text):
    round_trips(Bytes(), text)


@settings(deadline=None, max_examples=100)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_any_bytes_come_back_through_merges(merged, text):
    round_trips(merged, text)


def test_every_byte_alone_comes_back(merged):
    everything = bytes(range(256))
    round_trips(merged, everything)
    round_trips(merged, everything[::-1] * 2)
    assert Bytes().encode(everything).tolist() == list(range(256))


def test_merges_shorten_what_they_were_learnt_from(merged):
    assert len(merged.encode(TEXTS[0])) < 0.5 * len(TEXTS[0])
    assert merged.size == 300
    assert merged.bytes_per_token[:256].tolist() == [1] * 256
    assert merged.bytes_per_token[BOS] == 0
    assert (merged.bytes_per_token[BOS + 1 :] > 1).all()
    assert Bytes().bytes_per_token.tolist() == [1] * 256 + [0]


def test_a_beginning_stands_for_no_text(merged):
    for encoder in (Bytes(), merged):
        assert encoder.decode(np.array([BOS, 65, BOS, 66])) == b"AB"


def test_learning_again_gives_the_same_file(merged, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("one", "two"):
        BPE(size=300).fit(iter(TEXTS), tmp_path / name)
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["tokenizer.json"]
    loaded = BPE(size=300).load(tmp_path / "one")
    assert loaded.encode(TEXTS[0]).tolist() == merged.encode(TEXTS[0]).tolist()


def test_the_sample_bounds_what_is_learnt_from(tmp_path):
    def texts():
        yield b"ab" * 50
        yield b"cd" * 50
        raise AssertionError("read past the sample")

    encoder = BPE(size=258, sample_bytes=150).fit(texts(), tmp_path)
    assert encoder.decode(np.array([257])) == b"ab"


def test_blocks_have_the_ids_of_the_whole(merged):
    text = TEXTS[0] + b"\n\n  two  spaces\t \n" + b"longword" * 10 + b" end "
    for size in (90, 200, 10_000):
        parts = list(blocks(text, size))
        assert b"".join(parts) == text
        assert max(map(len, parts)) <= size
        assert np.concatenate([merged.encode(part) for part in parts]).tolist() == merged.encode(text).tolist()
    assert b"".join(blocks(text, 3)) == text
    assert list(blocks(b"")) == []


def test_a_fitted_file_is_taken_instead_of_learning(merged, tmp_path):
    given = tmp_path / "given.json"
    given.write_text(merged.tokenizer.to_str())
    tokens = BPE(size=300, path=given)
    (tmp_path / "folder").mkdir()
    fitted = tokens.fit([b"nothing of it " * 50], tmp_path / "folder")
    assert fitted.encode(TEXTS[0]).tolist() == merged.encode(TEXTS[0]).tolist()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["tokenizer.json"]
    assert tokens.load(tmp_path / "folder").size == 300
    with pytest.raises(ValueError, match=r"given\.json: 300 ids, tokens\.size is 512"):
        BPE(size=512, path=given).fit([], tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        BPE(size=300, path=tmp_path / "nowhere.json").identity()
    before = tokens.identity()
    given.write_text(merged.tokenizer.to_str(pretty=True))
    assert before != tokens.identity()


def test_too_little_text_for_so_many_ids_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pairs for \d+ ids; set tokens\.size"):
        BPE(size=5000).fit([b"abab"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_ids_out_of_range_are_named(merged):
    for encoder in (Bytes(), merged):
        with pytest.raises(ValueError, match=rf"token {encoder.size} at place 1 is out of range"):
            encoder.decode(np.array([1, encoder.size]))
        with pytest.raises(ValueError, match="token -1 at place 0"):
            encoder.decode(np.array([-1]))


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match=r"tokens\.size is 256"):
        Bytes(size=256)
    with pytest.raises(ValueError, match=r"tokens\.bos is 0"):
        Bytes(bos=0)
    with pytest.raises(ValueError, match=r"tokens\.size is 257"):
        BPE(size=257)


def test_another_tokenizer_is_refused(merged, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        MergedBytes(path)
    content = json.loads(merged.tokenizer.to_str())
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"300 ids, tokens\.size is 512"):
        BPE(size=512).load(tmp_path)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="first 256 tokens are not the bytes"):
        MergedBytes(path)
