"""Your own text, WikiText-103 and PG-19 in the layout of their authors, and whatever may be wrong with files."""

import json
import os
import sys

import pytest

from datamodules import text_files
from datamodules.embedded_source import SourceError
from datamodules.text_corpora import PG19, WikiText103
from datamodules.text_documents import SPLITS, check_utf8
from datamodules.text_files import TextFiles
from datamodules.token_files import open_token_files, write_token_files
from datamodules.tokens import Bytes


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def all_documents(source):
    return {split: list(source.documents(split)) for split in SPLITS}


def every(source):
    return sorted(document for part in all_documents(source).values() for document in part)


def test_a_folder_gives_each_file_to_one_split(tmp_path):
    write(tmp_path, **{f"sub{n % 3}__{n}_dot_txt": f"text of {n}\n" for n in range(40)}, image_dot_png=b"\xff")
    found = all_documents(TextFiles(tmp_path))
    assert {split: len(part) for split, part in found.items()} == {"train": 36, "val": 2, "test": 2}
    assert every(TextFiles(tmp_path)) == sorted((f"sub{n % 3}/{n}.txt", b"text of %d\n" % n) for n in range(40))


def test_a_separator_makes_documents_of_one_file(tmp_path):
    file = write(tmp_path, one_dot_txt="a\n<end>\nb\n<end>\nc\n<end>\n") / "one.txt"
    assert every(TextFiles(file, separator="<end>\n")) == [
        ("one.txt#0", b"a\n"),
        ("one.txt#1", b"b\n"),
        ("one.txt#2", b"c\n"),
    ]
    assert all(all_documents(TextFiles(file, separator="<end>\n")).values())


def test_a_separator_that_occurs_nowhere_is_named(tmp_path):
    write(tmp_path, one_dot_txt="a\n", two_dot_txt="b\n")
    with pytest.raises(SourceError, match=r"separator '<end>' occurs in none of 2 text files"):
        list(TextFiles(tmp_path, separator="<end>").documents("train"))
    with pytest.raises(ValueError, match="separator is empty"):
        TextFiles(tmp_path, separator="")


def test_given_splits_are_kept(tmp_path):
    write(tmp_path, train__a_dot_md="a", train__b_dot_py="b", held_dot_jsonl='{"text": "c"}\n')
    source = TextFiles(tmp_path, train="train", val="held.jsonl")
    assert all_documents(source) == {
        "train": [("train/a.md", b"a"), ("train/b.py", b"b")], "val": [("held.jsonl#1", b"c")], "test": [],
    }  # fmt: skip
    with pytest.raises(SourceError, match=r"nowhere: no such file or folder"):
        list(TextFiles(tmp_path, train="nowhere").documents("train"))
    with pytest.raises(ValueError, match="without train"):
        TextFiles(tmp_path, val="held.jsonl")


def test_given_splits_lie_within_the_path_and_share_no_file(tmp_path):
    write(tmp_path, in__a_dot_txt="a", in__held_dot_txt="b", out_dot_txt="c")
    for outside in ("../out.txt", str(tmp_path / "out.txt")):
        with pytest.raises(ValueError, match=r"val=.*out\.txt is not within .*in"):
            list(TextFiles(tmp_path / "in", train="a.txt", val=outside).documents("val"))
    for splits in ({"train": ".", "val": "held.txt"}, {"train": "a.txt", "val": "held.txt", "test": "../in/held.txt"}):
        with pytest.raises(
            ValueError, match=r"held\.txt: is in (train|val) and in (val|test); give splits that share no"
        ):
            list(TextFiles(tmp_path / "in", **splits).documents("train"))


def test_equal_texts_land_in_one_split_whatever_their_names(tmp_path):
    write(tmp_path, **{f"{n}_dot_txt": f"text {n % 10}" for n in range(100)})
    found = {split: {document.text for document in part} for split, part in all_documents(TextFiles(tmp_path)).items()}
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 10
    assert all(found.values())


def test_links_and_hidden_files_are_left_alone(tmp_path):
    write(tmp_path, texts__a_dot_txt="a", texts___dot_git__b_dot_txt="b", texts___dot_c_dot_txt="c", out__d_dot_txt="d")
    (tmp_path / "texts" / "link.txt").symlink_to(tmp_path / "out" / "d.txt")
    (tmp_path / "texts" / "folder").symlink_to(tmp_path / "out")
    assert every(TextFiles(tmp_path / "texts")) == [("a.txt", b"a")]
    (tmp_path / "linked.txt").symlink_to(tmp_path / "out" / "d.txt")
    assert every(TextFiles(tmp_path / "linked.txt")) == [("linked.txt", b"d")]  # one that is asked for by name


def test_suffixes_are_known_in_any_case_and_others_refused(tmp_path):
    write(
        tmp_path,
        A_dot_TXT="a",
        b_dot_JSONL='{"text": "b"}\n',
        corpus="c",
        d_dot_json="[]",
        e_dot_txt_dot_gz=b"\x1f\x8b",
    )
    assert every(TextFiles(tmp_path)) == [("A.TXT", b"a"), ("b.JSONL#1", b"b")]
    assert every(TextFiles(tmp_path / "corpus")) == [("corpus", b"c")]
    for name in ("d.json", "e.txt.gz"):
        with pytest.raises(ValueError, match=rf"{name}: \.\w+ is of no kind that is read: \.txt, .*\.parquet; convert"):
            list(TextFiles(tmp_path / name).documents("train"))
    assert every(TextFiles(tmp_path / "d.json", suffixes=[".json"])) == [("d.json", b"[]")]


def test_names_that_are_not_utf8_are_read(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"au lait")
    folder = write_token_files(TextFiles(tmp_path), Bytes(), tmp_path / "cache")
    assert open_token_files(folder)["train"].names == (os.fsdecode(b"caf\xe9.txt"),)


def test_lines_of_other_splits_are_not_parsed_again(tmp_path, monkeypatch):
    write(tmp_path, a_dot_jsonl="".join(json.dumps({"text": str(n)}) + "\n" for n in range(40)))
    source, parsed = TextFiles(tmp_path), []
    first = all_documents(source)
    monkeypatch.setattr(text_files.json, "loads", lambda line, loads=json.loads: parsed.append(line) or loads(line))
    assert all_documents(source) == first
    assert len(parsed) == 40


def test_a_line_of_jsonl_is_a_document(tmp_path):
    texts = ["first\nline", "zweite Zeile – ü", "third"]
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n\n" for text in texts)
    source = TextFiles(write(tmp_path, a_dot_jsonl=lines) / "a.jsonl")
    assert every(source) == [(f"a.jsonl#{2 * n + 1}", text.encode()) for n, text in enumerate(texts)]
    renamed = TextFiles(write(tmp_path, b_dot_jsonl=lines.replace("text", "body")) / "b.jsonl", key="body")
    assert [d.text for d in every(renamed)] == [text.encode() for text in texts]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a\.jsonl: line 3 is not JSON"),
        (b"[" * 100_000, r"a\.jsonl: line 3 is not JSON that can be read \(maximum recursion"),
        (b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl: line 3 is not JSON that can be read \(Exceeds the limit"),
        (b'{"body": "x"}', r"a\.jsonl: line 3 has no text under 'text', found the keys 'body'"),
        (b'{"text": 4}', r"line 3 has no text under 'text'"),
        (b'["x"]', r"line 3 has no text under 'text', found list"),
        (b'{"text": "\\ud800"}', r"line 3 has half a surrogate pair at character 0"),
        (b'{"text": "\xff"}', r"a\.jsonl: line 3: byte 10 \(0xff\) is not UTF-8"),
        (b'{"text": " "}', r"a\.jsonl#3 is empty"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    write(tmp_path, a_dot_jsonl=b'{"text": "x"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        list(TextFiles(tmp_path).documents("train"))


def test_undecodable_text_is_named_with_its_offset(tmp_path):
    write(tmp_path, a_dot_txt=b"caf\xe9 au lait", b_dot_txt="x", c_dot_txt="y")
    with pytest.raises(ValueError, match=r"a\.txt: byte 3 \(0xe9\) is not UTF-8"):
        list(TextFiles(tmp_path).documents("train"))
    assert (b"caf\xe9 au lait") in [document.text for document in every(TextFiles(tmp_path, allow_invalid=True))]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 100])
def test_text_is_checked_by_blocks_as_at_once(block):
    whole = "aé€😀 – naïve".encode()
    assert check_utf8(whole, "x", block) is whole
    for place in range(len(whole)):
        for broken in (whole[:place], whole[:place] + b"\xff" + whole[place:], whole[place:]):
            try:
                broken.decode()
            except UnicodeDecodeError as error:
                with pytest.raises(ValueError, match=rf"x: byte {error.start} \(0x{broken[error.start]:02x}\)"):
                    check_utf8(broken, "x", block)
            else:
                assert check_utf8(broken, "x", block) == broken


def test_empty_text_is_refused_or_left_out(tmp_path):
    write(tmp_path, a_dot_txt="", b_dot_txt="x", c_dot_txt="y", d_dot_txt="z")
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        list(TextFiles(tmp_path).documents("train"))
    assert [document.name for document in every(TextFiles(tmp_path, skip_empty=True))] == ["b.txt", "c.txt", "d.txt"]


def test_missing_paths_are_named(tmp_path):
    with pytest.raises(SourceError, match=r"nowhere: no such file or folder"):
        TextFiles(tmp_path / "nowhere").identity()
    with pytest.raises(SourceError, match=r"holds no file that ends in \.txt"):
        TextFiles(write(tmp_path, a_dot_bin=b"x")).identity()


def test_changed_files_have_another_identity_and_are_drawn_anew(tmp_path):
    file = write(tmp_path, a_dot_txt="a|b|c") / "a.txt"
    source = TextFiles(file, separator="|")
    before = source.identity()
    assert before == TextFiles(file, separator="|").identity()
    assert len(every(source)) == 3
    file.write_text("a|b|c|d")
    assert source.identity() != before
    assert len(every(source)) == 4


def test_parquet_without_pyarrow_names_the_command(tmp_path, monkeypatch):
    write(tmp_path, a_dot_parquet=b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"a\.parquet.*pip install 'rotalith\[parquet\]'"):
        list(TextFiles(tmp_path).documents("train"))


def test_rows_of_parquet_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    import pyarrow.parquet as parquet

    texts = [f"text {n} – ü" for n in range(25)]
    table = pyarrow.table({"text": texts, "id": list(range(25))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    assert sorted(document.text.decode() for document in every(TextFiles(tmp_path))) == sorted(texts)
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body', found text, id"):
        list(TextFiles(tmp_path, key="body").documents("train"))
    with pytest.raises(ValueError, match=r"a\.parquet: row 0 of column 'id' is int"):
        list(TextFiles(tmp_path, key="id").documents("train"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable parquet file"):
        list(TextFiles(tmp_path).documents("train"))


ARTICLES = (
    " \n = First Article = \n \n Text of @-@ the first , with \n = = Section = = \n \n a formula in it \n"
    " = x = \n and more . \n \n = Second = \n \n More . \n \n = = = Deep = = = \n \n End \n \n"
)


def test_articles_of_wikitext_begin_at_their_titles(tmp_path):
    write(tmp_path, **{f"wiki_dot_{split}_dot_tokens": ARTICLES for split in ("train", "valid", "test")})
    for split, part in all_documents(WikiText103(tmp_path)).items():
        assert [document.name for document in part] == ["0 First Article", "1 Second"], split
        assert b"".join(document.text for document in part) == ARTICLES.encode()
        assert part[1].text.startswith(b" = Second = \n")


def test_what_is_not_wikitext_is_refused(tmp_path):
    write(tmp_path, wiki_dot_train_dot_tokens="plain text\n", wiki_dot_test_dot_tokens=b"\xff")
    with pytest.raises(SourceError, match=r"wiki\.train\.tokens: no line ' = Title = '"):
        list(WikiText103(tmp_path).documents("train"))
    with pytest.raises(ValueError, match=r"wiki\.test\.tokens: byte 0"):
        list(WikiText103(tmp_path).documents("test"))
    with pytest.raises(SourceError, match=r"wiki\.valid\.tokens: no such file"):
        WikiText103(tmp_path).identity()


def test_books_of_pg19_are_documents(tmp_path):
    write(
        tmp_path, train__10_dot_txt="ten", train__9_dot_txt="nine", validation__1_dot_txt="one", test__2_dot_txt="two"
    )
    assert all_documents(PG19(tmp_path)) == {
        "train": [("10", b"ten"), ("9", b"nine")], "val": [("1", b"one")], "test": [("2", b"two")],
    }  # fmt: skip
    (tmp_path / "test" / "2.txt").write_text("")
    with pytest.raises(ValueError, match=r"2\.txt: the file is empty"):
        list(PG19(tmp_path).documents("test"))
    (tmp_path / "test" / "2.txt").unlink()
    with pytest.raises(SourceError, match=r"test: holds no \.txt"):
        PG19(tmp_path).identity()
