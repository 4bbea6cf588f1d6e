"""The reader of tables: what is read is what stands there, and what cannot be read is one line with file and line."""

import os
import re
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from shard_tools import catalogs
from shard_tools.labels import read_overrides
from shard_tools.tables import LONGEST_CELL, Table

ROWS = [("ü.wav", "dog"), ("2.wav", "bark;dog")]
TEXT = "path,labels\nü.wav,dog\n2.wav,bark;dog\n"


def records(path: Path, content: bytes, *columns: str) -> list[tuple[str, ...]]:
    path.write_bytes(content)
    return [cells for _, cells in Table(path).records(columns or ("path", "labels"))]


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.replace(",", "\t").encode(),
        TEXT.replace(",", ", ").encode(),
        b'path;labels\n\xc3\xbc.wav;dog\n2.wav;"bark;dog"\n',
        b",path,labels\n0,\xc3\xbc.wav,dog\n1,2.wav,bark;dog\n",  # pandas' index
        b" path , labels \n\n\xc3\xbc.wav,dog\n\n2.wav,bark;dog",
    ],
    ids=["utf-8", "mark", "utf-16", "utf-16-be", "crlf", "cr", "tabs", "spaces", "semicolons", "index", "blank lines"],
)
def test_the_same_rows_in_every_dress(tmp_path, content):
    assert [tuple(cell.strip() for cell in row) for row in records(tmp_path / "t.csv", content)] == ROWS


def test_columns_are_found_by_name_and_absent_ones_are_empty(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('labels,other,path\n"a\nb",x,1.wav\nc,y,2.wav\n')
    assert list(Table(path).records(("path", "labels"), ("fold",))) == [
        (2, ("1.wav", "a\nb", "")),
        (4, ("2.wav", "c", "")),
    ]


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b"", 1, "the file is empty"),
        (b"\n\n", 1, "the file is empty"),
        (b"path,labels\n", 1, "a header and no rows"),
        (b"path,label\n1,a\n", 1, "no column 'labels' (has path, label); it needs path,labels"),
        (b"path,labels,labels\n1,a,b\n", 1, "two columns 'labels'"),
        (b"path,labels\n1,a\n2\n", 3, "1 cells where the header has 2"),
        (b"path,labels\n1,a\n2,b,c\n", 3, "3 cells where the header has 2"),
        (b"path,labels\n1,a\n2,caf\xe9\n", 3, "not UTF-8; save the file as UTF-8"),
        ("path,labels\n1,a\n2,\ud800\n".encode("utf-16", "surrogatepass"), 3, "not UTF-16"),
        ("path,labels\n1,a\n".encode("utf-16-le"), 1, "NUL characters"),
        (b"path,labels\n1,a\n2,\0\n", 3, "NUL characters"),
        (b"path,labels\n1,a\n2," + b"x" * (LONGEST_CELL + 1) + b"\n", 3, "a cell of more than"),
        (b"path,labels\n1," + b"x" * (1 << 21), 2, "a line of more than"),
        (b'path,labels\n1,a\n2,"b\n3,c\n4,d\n', 3, "a quotation mark opens here"),
        (b'path,labels\n1,"a" dog\n', 2, "text follows a closing quotation mark"),
        (b"PK\x03\x04" + bytes(50), 1, "a zip file or a workbook"),
        (b"\x1f\x8b" + bytes(50), 1, "a gzip file"),
    ],
)
def test_what_is_no_table_is_named_by_line(tmp_path, content, line, said):
    path = tmp_path / "t.csv"
    with pytest.raises(UserError) as caught:
        records(path, content)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert said in str(caught.value)
    assert "; " in str(caught.value)


def test_kinds_of_files(tmp_path):
    for path, said in (
        (tmp_path, "is a directory"),
        (tmp_path / "no", "No such file"),
        ("/dev/zero", "no regular file"),
    ):
        with pytest.raises(UserError, match=said):
            Table(path)
    os.mkfifo(tmp_path / "pipe")  # as of a shell's <(command): read once, and then as often as needed
    thread = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(TEXT))
    thread.start()
    table = Table(tmp_path / "pipe")
    thread.join()
    assert [list(table.records(("path", "labels"))) for _ in range(2)] == [[(2, ROWS[0]), (3, ROWS[1])]] * 2


@pytest.mark.parametrize("text", ["1.5", "nan", "inf", "-1", "1e3", "x", "", "1_0", "9" * 30, "\u0661", "0x1"])
def test_whole_numbers(tmp_path, text):
    (tmp_path / "t.csv").write_text("x")
    table = Table(tmp_path / "t.csv")
    assert [table.integer(2, "fold", ok, 1) for ok in ("1", " 2 ", "3.0", "4.", "+5")] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match=re.escape(f"t.csv:2: fold = '{text}' is no whole number from 0 on"[:60])):
        table.integer(2, "fold", text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "1e300", "x", "1_0", "1,5"])
def test_seconds(tmp_path, text):
    (tmp_path / "t.csv").write_text("x")
    table = Table(tmp_path / "t.csv")
    assert [table.seconds(2, "start", ok) for ok in ("0", "1.5", " 30.000 ", "1e2")] == [0.0, 1.5, 30.0, 100.0]
    assert str(table.seconds(2, "start", "-0.0")) == "0.0"
    with pytest.raises(UserError, match=r"t\.csv:2: start = .* is not a number of seconds from 0 on"):
        table.seconds(2, "start", text)


def test_labels_with_commas(tmp_path):
    (tmp_path / "t.csv").write_text("x")
    table = Table(tmp_path / "t.csv")
    birds = "Bird vocalization, bird call, bird song"
    index = {birds: 0, "Dog": 1, "Bark": 2, "/m/1": 0}
    assert table.labels(2, f"{birds};Dog", None, index) == [birds, "Dog"]
    assert table.labels(2, birds, ",", index) == [birds]
    assert table.labels(2, "Bark,Dog", ",", index) == ["Bark", "Dog"]
    assert table.labels(2, "Bark,Dog", ",") == ["Bark", "Dog"]
    assert table.labels(2, birds, ";") == [birds]  # said outright
    for cell, separator, known, said in (
        ("Bark,Dog", None, index, "but each of its parts is; give --label-separator ','"),
        ("Bark,Cat", None, index, "label 'Bark,Cat' is not in the vocabulary; see --class-labels"),
        ("Bark,Dog", None, None, "label 'Bark,Dog' holds ','; give --label-separator ',' where"),
        ("Bark|Dog", None, None, "give --label-separator '|' where"),
        ("['Dog']", None, None, "stands in brackets or quotation marks"),
        ("Bark,Dog", ",", index | {"Bark,Dog": 3}, "is a label of the vocabulary and so is each of its parts"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            table.labels(2, cell, separator, known)


VALID = b"path,labels,start,end,split,fold,key\na.wav,dog;cat,0,1,train,1,\nb.wav,dog,0.5,2,eval,2,x\n"
SEGMENTS = b'# YTID, start, end, labels\naaaaaaaaaaa, 0.000, 10.000, "/m/1,/m/2"\nbbbbbbbbbbb, 30.000, 40.000, "/m/1"\n'
WORDS = b"index,mid,display_name\n0,/m/1,dog\n1,/m/2,cat\n"
ESC = b"filename,fold,target,category\na.wav,1,0,dog\nb.wav,2,1,cat\n"
BETTER = b"id,labels\naaaaaaaaaaa,dog\n"


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """A table with bytes or cells replaced, repeated or cut out; sometimes bytes alone."""
    content = draw(
        st.sampled_from([valid, valid, valid, valid.decode().encode("utf-16"), draw(st.binary(max_size=60))])
    )
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(content)))
        count = draw(st.integers(0, 12))
        new = draw(st.sampled_from([
            b"", b",", b";", b"\n", b"\r", b'"', b"\0", b"\xff", b"nan", b"-1", b"1e999", b"../x", b"0", b"\t",
            content[place : place + count] * 2, "\u2028".encode(), b"#", b"_", b" ",
        ]))  # fmt: skip
        content = content[:place] + new + content[place + count :]
    return content


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Names are enough: nothing is decoded here."""
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "audio").mkdir()
    (folder / "meta").mkdir()
    for name in ("a.wav", "b.wav", "aaaaaaaaaaa.wav", "Ybbbbbbbbbbb_30000.flac", "audio/a.wav", "audio/b.flac"):
        (folder / name).write_bytes(b"x")
    (folder / "valid_segments.csv").write_bytes(SEGMENTS)
    (folder / "valid_words.csv").write_bytes(WORDS)
    return folder


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_a_catalog_or_one_line(sounds, data):
    valid, known = sounds / "valid_segments.csv", sounds / "valid_words.csv"
    table, segments, words = sounds / "t.csv", sounds / "s.csv", sounds / "w.csv"
    table.write_bytes(data.draw(mutated(VALID)))
    segments.write_bytes(data.draw(mutated(SEGMENTS)))
    words.write_bytes(data.draw(mutated(WORDS)))
    (sounds / "meta" / "esc50.csv").write_bytes(data.draw(mutated(ESC)))
    (sounds / "better.csv").write_bytes(data.draw(mutated(BETTER)))
    (sounds / "list.txt").write_bytes(data.draw(mutated(b"aaaaaaaaaaa.wav\n./Ybbbbbbbbbbb_30000.flac\n")))
    for read in (
        lambda: catalogs.table(sounds, table, None, None),
        lambda: catalogs.table(sounds, table, words, "train", ","),
        lambda: catalogs.audioset(sounds, segments, words, None, "train"),
        lambda: catalogs.audioset(sounds, valid, known, None, "eval", sounds / "list.txt", sounds / "better.csv"),
        lambda: catalogs.audioset(sounds, valid, None, words, "train"),
        lambda: catalogs.esc50(sounds, "train"),
    ):  # fmt: skip
        try:
            catalog = read()
        except UserError:
            continue
        assert len(catalog.clips) > 0
        for clip in catalog.clips:
            assert re.fullmatch(r"[A-Za-z0-9_-]+", clip.key)
            assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", clip.split)
            assert clip.start >= 0
            assert clip.end is None or clip.end > clip.start
            assert clip.labels == tuple(sorted(set(clip.labels)))
            assert all(0 <= label < len(catalog.labels) for label in clip.labels)
            assert clip.fold >= 0


def test_a_better_label_may_be_a_name_with_commas(tmp_path):
    path = tmp_path / "better.csv"
    path.write_text('id,labels\na,"one, two"\nb,"three,four"\n')
    vocabulary = [catalogs.Label(id="/m/1", name="one, two"), catalogs.Label(id="/m/2", name="three"),
                  catalogs.Label(id="/m/3", name="four")]  # fmt: skip
    assert read_overrides(path, vocabulary, ",").labels == {"a": (0,), "b": (1, 2)}
    with pytest.raises(UserError, match=r"better\.csv:3: label 'three,four' .* give --label-separator ','"):
        read_overrides(path, vocabulary)
