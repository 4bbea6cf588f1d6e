"""What a data set lists: labels, folds and splits as they were meant, the right file for each clip, or one line."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.data.manifest import load_index
from pipeline.errors import UserError
from shard_tools import catalogs
from shard_tools.audio_files import AudioFiles, plain_times, split_of_segments, walk
from shard_tools.build import build
from shard_tools.catalogs import clean_key
from tests.helpers import digests, options

WORDS = 'index,mid,display_name\n0,/m/1,dog\n1,/m/2,"bark, howl"\n2,/m/3,cat\n'


def sounds(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, np.full(1600, 0.1), 16000, format="WAV")
    return folder


def table(folder: Path, text: str, split: str | None = None, separator: str | None = None) -> catalogs.Catalog:
    (folder / "t.csv").write_text(text)
    return catalogs.table(folder, folder / "t.csv", None, split, separator)


def refused(folder: Path, text: str, *words: str, split: str | None = None) -> None:
    with pytest.raises(UserError) as caught:
        table(folder, text, split)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def three(tmp_path):
    return sounds(tmp_path, "1.wav", "2.wav", "3.wav")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("0,/m/1,dog\n2,/m/2,cat\n", 3, "no row has index 1"),
        ("1,/m/1,dog\n2,/m/2,cat\n", 3, "no row has index 0"),
        ("0,/m/1,dog\n0,/m/2,cat\n", 3, "index 0 is that of line 2 too"),
        ("0,/m/1,dog\none,/m/2,cat\n", 3, "index = 'one' is no whole number"),
        ("0,/m/1,dog\n-1,/m/2,cat\n", 3, "index = '-1' is no whole number from 0 on"),
        ("0,/m/1,dog\n1,/m/1,cat\n", 3, "'/m/1' is also a mid or display_name of line 2"),
        ("0,/m/1,dog\n1,/m/2,dog\n", 3, "'dog' is also a mid or display_name of line 2"),
        ("0,/m/1,/m/2\n1,/m/2,dog\n", 3, "'/m/2' is also a mid or display_name of line 2"),
        ("0,/m/1,dog\n1,,cat\n", 3, "an empty mid or display_name"),
    ],
)
def test_a_vocabulary_numbers_each_class_once(three, text, line, said):
    (three / "v.csv").write_text("index,mid,display_name\n" + text)
    (three / "t.csv").write_text("path,labels\n1.wav,dog\n")
    with pytest.raises(UserError) as caught:
        catalogs.table(three, three / "t.csv", three / "v.csv", None)
    assert f"v.csv:{line}: " in str(caught.value)
    assert said in str(caught.value)


def test_rows_of_a_vocabulary_may_be_in_any_order(three):
    (three / "v.csv").write_text("index,mid,display_name\n2,c,cat\n0,/m/1,dog\n1.0,b,b\n")
    (three / "t.csv").write_text('path,labels\n1.wav,"cat;/m/1"\n')
    catalog = catalogs.table(three, three / "t.csv", three / "v.csv", None)
    assert [label.name for label in catalog.labels] == ["dog", "b", "cat"]
    assert catalog.clips[0].labels == (0, 2)


def test_one_clip_in_two_rows(three, caplog):
    labels = ("'1.wav' came before with other labels, in line 2", "labels of a clip in one row, such as dog;bark")
    refused(three, "path,labels\n1.wav,dog\n1.wav,bark\n", "t.csv:3: ", *labels)
    refused(three, "path,labels,fold\n1.wav,a,1\n1.wav,a,2\n", "t.csv:3: '1.wav' came before with another fold")
    refused(three, "path,labels,end\n1.wav,a,1\n1.wav,a,2\n", "another end, in line 2; tell them apart by a column key")
    refused(three, "path,labels,key\n1.wav,a,x\n2.wav,a,x\n", "'2.wav' gets the same key 'x' as '1.wav' in line 2")
    refused(three, "path,labels,key\n1.wav,a,x\n1.wav,b,x\n", "t.csv:3: '1.wav' came before with other labels")
    refused(three, "path,labels,key,end\n1.wav,a,x,1\n1.wav,a,x,2\n", "t.csv:3: '1.wav' came before with another end")
    refused(three, "path,labels,key\n1.wav,a,x\n2.wav,a,\n1.wav,b,y\n",
            "t.csv:4: '1.wav' came before under the key 'x' with other labels, in line 2")  # fmt: skip
    refused(three, "path,labels,key,start,fold\n1.wav,a,x,,1\n1.wav,a,,0,2\n",
            "t.csv:3: '1.wav' came before under the key 'x' with another fold, in line 2")  # fmt: skip
    caplog.set_level(logging.WARNING)
    catalog = table(three, "path,labels\n1.wav,dog;bark\n2.wav,dog\n1.wav,bark;dog\n9.wav,dog\n9.wav,dog\n")
    assert [clip.key for clip in catalog.clips] == ["1", "2"]
    assert catalog.listed("train") == 3
    assert "2 rows repeat an earlier one and count once, such as line 4" in caplog.text


def test_a_clip_of_two_splits_is_said(three, caplog):
    catalog = table(three, "path,labels,split\n1.wav,a,train\n2.wav,b,train\n1.wav,a,eval\n")
    assert len(catalog.clips) == 3
    assert "1 clips are in several splits, such as line 4" in caplog.text
    caplog.clear()
    rows = "1.wav,a,train,x\n2.wav,b,train,y\n1.wav,a,eval,z\n2.wav,b,train,w\n"
    assert len(table(three, "path,labels,split,key\n" + rows).clips) == 4
    assert "1 clips are in several splits, such as line 4" in caplog.text
    assert "1 rows list, under another key, what an earlier row lists, such as line 5" in caplog.text


def test_where_a_table_s_files_lie_stays_out_of_shards(tmp_path):
    """Keys, ids, sources and failures are the same below any folder, and name none of it."""
    found = []
    for home in (tmp_path / "anna", tmp_path / "disk" / "of" / "ben"):
        audio, other, hidden = home / "data" / "audio", home / "data" / "lists", home / "secret"
        places = [audio / "a.wav", audio / "sub" / "b.wav", other / "c.wav", hidden / "d.wav", hidden / "x" / "d.wav"]
        for number, path in enumerate(places, 1):
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.full(1600, 0.01 * number), 16000)
        (hidden / "text.wav").write_text("no audio")
        (home / "link").symlink_to(audio)
        rows = [audio / "a.wav", f"{audio}/../audio/sub/b.wav", *places[2:], hidden / "text.wav", hidden / "gone.wav",
                "../lists/c.wav", home / "link" / "a.wav", "a.wav"]  # fmt: skip
        (other / "t.csv").write_text("path,labels\n" + "".join(f"{path},x\n" for path in rows))
        out = home / "out"
        build(catalogs.table(home / "link", other / "t.csv", None, None), out, options(0.1), 1, engine="inline")
        index = load_index(out).to_pylist()
        assert {row["key"]: row["source"] for row in index} == {
            "a": "a.wav", clean_key("sub/b.wav"): "sub/b.wav", "c": "c.wav", "d": "d.wav",
            clean_key("d.wav#2"): "d.wav#2", clean_key("../lists/c.wav"): "../lists/c.wav",
        }  # fmt: skip
        failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
        assert [(one["id"], one["path"]) for one in failures] == [("gone.wav",) * 2, ("text.wav",) * 2]
        for path in out.iterdir():
            assert str(home).encode() not in path.read_bytes()
            assert b"secret" not in path.read_bytes()
        found.append(digests(out))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ("0 1 2", "t.csv:2: fold 0 beside others: folds count from 1"),
        ("1 0 2", "t.csv:3: fold 0 beside others"),
        ("1 -1 2", "t.csv:3: fold = '-1' is no whole number"),
        ("1 1.5 2", "t.csv:3: fold = '1.5' is no whole number"),
        ("1 2 nan", "t.csv:4: fold = 'nan' is no whole number"),
        ("1 2 99999", "t.csv:4: fold = '99999' is no whole number"),
    ],
)
def test_folds_count_from_one(three, cells, said):
    rows = "".join(f"{number}.wav,a,{cell}\n" for number, cell in enumerate(cells.split(), 1))
    refused(three, "path,labels,fold\n" + rows, said)


def test_folds_as_pandas_writes_them_and_folds_in_part(three, caplog):
    caplog.set_level(logging.WARNING)
    catalog = table(three, "path,labels,fold\n1.wav,a,1.0\n2.wav,a,2.0\n3.wav,a,\n")
    assert [clip.fold for clip in catalog.clips] == [1, 2, 0]
    assert "t.csv:4: 1 clips of split 'train' have no fold and 2 have one" in caplog.text
    caplog.clear()
    rows = "1.wav,a,1,train\n2.wav,a,2,train\n3.wav,a,,eval\n"
    assert [clip.fold for clip in table(three, "path,labels,fold,split\n" + rows).clips] == [1, 2, 0]
    assert caplog.text == ""
    assert [clip.fold for clip in table(three, "path,labels,fold\n1.wav,a,0\n2.wav,a,0\n").clips] == [0, 0]  # none


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("1.wav,a,nan,", "start = 'nan'"),
        ("1.wav,a,-1,", "start = '-1'"),
        ("1.wav,a,,inf", "end = 'inf'"),
        ("1.wav,a,2,2", "end 2 is not after start 2"),
        ("1.wav,a,,0", "end 0 is not after start 0"),
        (",a,,", "an empty path"),
    ],
)
def test_a_segment_lies_in_time(three, row, said):
    refused(three, f"path,labels,start,end\n{row}\n", "t.csv:2: ", said)


@pytest.mark.parametrize("name", ["../x", "a/b", "/abs", ".hidden", "-x", "a b", "x" * 101])
def test_a_split_is_a_file_name(three, name):
    refused(three, f"path,labels,split\n1.wav,a,{name}\n", "t.csv:2: split '")
    for read in (
        lambda: catalogs.folder(three, name),
        lambda: catalogs.esc50(three, name),
        lambda: catalogs.audioset(three, three / "no.csv", None, None, name),
    ):
        with pytest.raises(UserError, match="--split '"):
            read()


def test_nothing_found_says_what_is_there(tmp_path):
    sounds(tmp_path, "1.wav", "sub/2.flac")
    for rows, said in (
        ("1,dog\n", "names lack their endings; did you mean '1.wav'?"),
        ("1.mp3,dog\n", "did you mean '1.wav'?"),
        ("1.WAV,dog\n", "did you mean '1.wav'?"),
        ("sub\\2.flac,dog\n", "paths with backslashes are of Windows: write /, and did you mean 'sub/2.flac'?"),
        ("2.flac,dog\n", "files there: 1 .csv, 1 .flac, 1 .wav"),
    ):
        refused(tmp_path, "path,labels\n" + rows, "0 of 1 listed clips of split 'train' have a file", said)
    refused(tmp_path, "path,labels,split\n1.wav,a,train\n", "no row of split 'evla'", split="evla")
    refused(tmp_path, "path,labels,split\n1.wav,a,train\n9.wav,a,eval\n", "0 of 1 listed clips of split 'eval'")
    with pytest.raises(UserError, match="nowhere: is no directory"):
        catalogs.table(tmp_path / "nowhere", tmp_path / "t.csv", None, None)
    (tmp_path / "s.csv").write_text('aaaaaaaaaaa, 0, 10, "/m/1"\n')
    (tmp_path / "v.csv").write_text(WORDS)
    with pytest.raises(UserError, match=r"0 of 1 listed clips .* 3 \.csv, 1 \.flac, 1 \.wav"):
        catalogs.audioset(tmp_path, tmp_path / "s.csv", tmp_path / "v.csv", None, "train")


def test_lookalike_classes_are_said(three, caplog):
    table(three, "path,labels\n1.wav,Dog\n2.wav,dog\n")
    assert "'Dog' and 'dog' are two classes" in caplog.text


YTID = "-_abcde_f30"


def segments(folder: Path, *rows: str) -> catalogs.Catalog:
    (folder / "s.csv").write_text("# YTID, start, end, labels\n" + "".join(f"{row}\n" for row in rows))
    (folder / "v.csv").write_text(WORDS)
    return catalogs.audioset(folder / "a", folder / "s.csv", folder / "v.csv", None, "train")


SECONDS = [f"{first}{last}" for first in ("30", "30.0", "30.000", "000030")
           for last in ("", "_40", "_40.0", "_40.000", "_000040")]  # fmt: skip


@pytest.mark.parametrize("times", [*SECONDS, "30000", "30000_40000"])
def test_a_segment_is_found_in_all_spellings(tmp_path, times):
    for letter in ("", "Y"):
        folder = tmp_path / f"x{letter}"
        sounds(folder / "a", f"{letter}{YTID}_{times}.WAV", "other.wav")
        (clip,) = segments(folder, f'{YTID}, 30.000, 40.000, "/m/1"').clips
        assert (clip.key, clip.trimmed, clip.start, clip.end) == (f"{YTID}_30000", True, 0.0, 10.0)
        with pytest.raises(UserError, match="0 of 1"):
            segments(folder, f'{YTID}, 20.000, 30.000, "/m/1"')


def test_ids_that_end_as_times_do_are_themselves():
    assert plain_times("abcdefg_007") == "abcdefg_007"
    assert plain_times("Yabcdefg_007") == "Yabcdefg_007"
    assert plain_times("abc_01_0023") == "abc_01_0023"
    assert plain_times("abcdefghijk_0.500") == "abcdefghijk_0.5"
    assert plain_times("abcdefghijk_00") == "abcdefghijk_0"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("aaaaaaaaaaa, 0, 10, /m/1,/m/2", "is not 'YTID, start, end"),  # the second label was dropped
        ("aaaaaaaaaaa, 0, 10", "is not 'YTID, start, end"),
        ("aaaaaaaaaaa\t0\t10\t/m/1", "is not 'YTID, start, end"),
        ('aaaaaaaaaaa, 10, 0, "/m/1"', "end 0 is not after start 10"),
        ('aaaaaaaaaaa, nan, 10, "/m/1"', "start = 'nan'"),
        ('../../x, 0, 10, "/m/1"', "is no YouTube id"),
        ('aaaaaaaaaaa, 0, 10, "/m/1,"', "with an empty one"),
        ('aaaaaaaaaaa, 0, 10, "/m/9"', "label '/m/9' is not in the vocabulary"),
        ('bbbbbbbbbbb, 0, 10, "/m/2"', "came before with another end or other labels"),
        ('bbbbbbbbbbb, 0, 11, "/m/1"', "came before with another end or other labels"),
    ],
)
def test_a_segments_csv_is_checked_by_row(tmp_path, row, said):
    sounds(tmp_path / "a", "bbbbbbbbbbb.wav")
    with pytest.raises(UserError) as caught:
        segments(tmp_path, 'bbbbbbbbbbb, 0, 10, "/m/1"', row)
    assert "s.csv:3: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "ending", [".json", ".jpg", ".npy", ".csv", ".h5", ".part", ".wav.part", ".description", ".a", ""]
)
def test_files_beside_the_audio_do_not_hide_it(tmp_path, ending):
    for name in ("aaaaaaaaaaa", "Ybbbbbbbbbbb"):
        sounds(tmp_path / "a", f"{name}.wav")
        (tmp_path / "a" / f"{name}{ending}").write_text("x")
    catalog = segments(tmp_path, 'aaaaaaaaaaa, 0, 10, "/m/1"', 'bbbbbbbbbbb, 0, 10, "/m/1"')
    assert [os.path.basename(clip.path) for clip in catalog.clips] == ["aaaaaaaaaaa.wav", "Ybbbbbbbbbbb.wav"]


def test_an_empty_file_goes_behind_whole_ones_and_the_choice_is_said(tmp_path, caplog):
    sounds(tmp_path / "a", "aaaaaaaaaaa.wav", "aaaaaaaaaaa.ogg", "b/aaaaaaaaaaa.mp3", "bbbbbbbbbbb.unknown")
    (tmp_path / "a" / "aaaaaaaaaaa.flac").touch()
    catalog = segments(tmp_path, 'aaaaaaaaaaa, 0, 10, "/m/1"', 'bbbbbbbbbbb, 0, 10, "/m/1"')
    assert [os.path.basename(clip.path) for clip in catalog.clips] == ["aaaaaaaaaaa.ogg", "bbbbbbbbbbb.unknown"]
    assert f"1 clips have several files, such as {tmp_path}/a/aaaaaaaaaaa.ogg (taken) and" in caplog.text
    sounds(tmp_path / "a", "aaaaaaaaaaa_0.000.wav")  # the segment itself goes before a whole video
    assert segments(tmp_path, 'aaaaaaaaaaa, 0, 10, "/m/1"').clips[0].path.endswith("aaaaaaaaaaa_0.000.wav")
    files = AudioFiles(iter(["/x/a.part", "/x/a.json", "/x/a.crdownload"]))
    assert files.find(["a"]) == []


def test_links_are_followed_once_and_what_is_left_out_is_said(tmp_path, caplog):
    sounds(tmp_path / "elsewhere", "x.wav")
    root = sounds(tmp_path / "root", "real/1.wav", ".hidden/2.wav", ".cache.wav", "closed/3.wav")
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "real" / "up").symlink_to(root)
    (root / "real" / "top").symlink_to(tmp_path)
    (root / "closed").chmod(0)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 1:
            parent.chmod(parent.stat().st_mode | 0o11)
    user = os.geteuid()
    if not user:
        os.seteuid(65534)  # root reads everything
    try:
        found = sorted(os.path.relpath(path, root) for path in walk(root))
    finally:
        if not user:
            os.seteuid(user)
        (root / "closed").chmod(0o700)
    assert found == ["a/x.wav", "real/1.wav"]
    assert "2 hidden folders and audio files are left out" in caplog.text
    assert "3 folders are reached again by links, and read once" in caplog.text
    assert f"1 folders cannot be read, and what they hold is left out, such as {root}/closed (Permission" in caplog.text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train/cat/1.wav", "train/dog/1.wav", "test/cat/1.wav"), "named test, train, which are splits"),
        (("Train/1.wav", "Valid/1.wav"), "which are splits"),
        (("train/cat/1.wav",), "named train, which are splits"),
        (("cat/1.wav", "dog/1.wav", "validation/1.wav"), "named validation, which are splits"),
        (("fold1/1.wav", "fold2/1.wav"), "which are folds"),
        (("cat/train/1.wav", "cat/test/1.wav"), "in the class folders are named"),
        (("cat/fold_1/1.wav", "cat/fold_2/1.wav"), "in the class folders are named"),
        (("1.wav",), "holds no folders of audio (files there: 1 .wav)"),
    ],
)
def test_split_and_fold_folders_are_no_classes(tmp_path, names, said):
    with pytest.raises(UserError) as caught:
        catalogs.folder(sounds(tmp_path, *names), "train")
    assert said in str(caught.value)


def test_a_train_is_a_class_and_other_files_are_said(tmp_path, caplog):
    sounds(tmp_path, "train/1.wav", "car/1.wav", "car/2.MP3", "stray.wav")
    (tmp_path / "car" / "notes.txt").write_text("x")
    (tmp_path / "car" / "1.json").write_text("x")
    catalog = catalogs.folder(tmp_path, "train")
    assert [label.name for label in catalog.labels] == ["car", "train"]
    assert [clip.id for clip in catalog.clips] == ["car/1.wav", "car/2.MP3", "train/1.wav"]
    assert "left out as no audio, by their endings: 1 .json, 1 .txt" in caplog.text
    assert "1 audio files are in no class folder and are left out, such as stray.wav" in caplog.text


def test_speech_commands_lists_are_its_splits(tmp_path, caplog):
    names = [f"{word}/{number}.wav" for word in ("no", "yes") for number in range(3)]
    sounds(tmp_path, *names, "_background_noise_/hum.wav")
    (tmp_path / "validation_list.txt").write_text("yes/0.wav\n")
    (tmp_path / "testing_list.txt").write_text("no/1.wav\r\nno/9.wav\r\n")
    catalog = catalogs.folder(tmp_path)
    assert [label.name for label in catalog.labels] == ["no", "yes"]
    found = {name: [catalog.clips[row].id for row in catalog.clips.rows(name).tolist()] for name in catalog.splits}
    assert found == {"train": ["no/0.wav", "no/2.wav", "yes/1.wav", "yes/2.wav"], "test": ["no/1.wav"],
                     "validation": ["yes/0.wav"]}  # fmt: skip
    assert [(failure.id, failure.split) for failure in catalog.missing] == [("no/9.wav", "test")]
    assert "_background_noise_ (1 files) is no class and is left out" in caplog.text
    assert catalogs.folder(tmp_path, "validation").splits == ["validation"]
    with pytest.raises(UserError, match="--split eval: the lists of"):
        catalogs.folder(tmp_path, "eval")
    (tmp_path / "testing_list.txt").write_text("yes/0.wav\n")
    with pytest.raises(UserError, match=r"testing_list\.txt:1: 'yes/0\.wav' is in validation_list\.txt too"):
        catalogs.folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("medieval_train.csv", "train"),
        ("eval_segments.csv", "eval"),
        ("balanced_train_segments.csv", "train"),
        ("unbalanced_train_segments.csv", "train"),
        ("AudioSet-Evaluation.csv", "eval"),
        ("medieval.csv", "train"),
    ],
)
def test_whole_words_of_a_name_tell_the_split(name, split, caplog):
    assert split_of_segments(Path("/evaluation/eval") / name) == split
    assert ("its name tells no split; taken as train" in caplog.text) == (name == "medieval.csv")
    for other in ("train_eval.csv", "test_segments.csv", "val.csv"):
        with pytest.raises(UserError, match="give --split"):
            split_of_segments(other)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a.wav,0,0,dog", "fold = '0' is no whole number from 1"),
        ("a.wav,x,0,dog", "fold = 'x'"),
        ("a.wav,1,-1,dog", "target = '-1'"),
        ("a.wav,1,0,", "an empty filename or category"),
        ("b.wav,1,0,dog", "'b.wav' came before with another fold or target"),
        ("a.wav,1,1,dog", "target 1 is 'cat' in a row before and 'dog' here"),
    ],
)
def test_esc50_rows(tmp_path, row, said):
    sounds(tmp_path, "audio/a.flac", "audio/b.flac")
    (tmp_path / "meta").mkdir()
    head = "filename,fold,target,category\nb.wav,2.0,1,cat\n"
    (tmp_path / "meta" / "esc50.csv").write_text(head + "a.wav,1.0,0,dog\n")
    catalog = catalogs.esc50(tmp_path, "train")
    assert [(clip.key, clip.fold, clip.labels) for clip in catalog.clips] == [("b", 2, (1,)), ("a", 1, (0,))]
    (tmp_path / "meta" / "esc50.csv").write_text(f"{head}{row}\n")
    with pytest.raises(UserError) as caught:
        catalogs.esc50(tmp_path, "train")
    assert "esc50.csv:3: " in str(caught.value)
    assert said in str(caught.value)
