"""What all forms share: the file that a name means, the labels that a value means, keys, segments and folds."""

import io
import json
import logging
import os
import tarfile
import unicodedata
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from shard_tools.audio_files import SPLIT_NAMES
from shard_tools.build import build
from shard_tools.catalogs import Catalog
from shard_tools.forms import look
from shard_tools.forms.entries import Asked, split_of
from shard_tools.plan import write_plan
from tests.helpers import options
from tests.shard_tools.containers import recordings
from tests.shard_tools.test_forms import catalog, wds

(WAV,) = recordings(1)
WORDS = "index,mid,display_name\n0,/m/a,A\n1,/m/b,B\n2,/m/c,C\n3,/m/d,D\n"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(match: str, *words: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        catalog(*words)
    assert "\n" not in str(caught.value)


def labels(found: Catalog) -> list[list[str]]:
    return [[found.labels[label].name for label in clip.labels] for clip in found.clips]


def paths(found: Catalog, root: Path) -> list[str]:
    return [clip.path.removeprefix(f"{root}/") for clip in found.clips]


def tar(path: Path, members: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content if isinstance(content, bytes) else content.encode()))
    return path.parent


def parquet(root: Path, name: str = "label", **columns: object) -> Path:
    values = columns.pop("values")
    rows = {"audio": [{"bytes": WAV, "path": f"{row}.wav"} for row in range(len(values))], name: values}
    pq.write_table(pa.table(rows | columns), root / "train.parquet")
    return root


def test_a_listed_path_means_that_file(tmp_path):
    """Of files of one name in several folders the alphabet decided."""
    root = write(tmp_path, {
        "audio/home/a.wav": WAV, "audio/street/a.wav": WAV, "audio/street/a.flac": WAV, "x/audio/street/b.wav": WAV,
        "weak.tsv": "filename\tevent_labels\naudio/home/a.wav\tdog\naudio/street/a.wav\tcar\naudio/street/b.wav\tcar\n"
                    "audio/home/b.wav\tdog\n",
    })  # fmt: skip
    found = catalog("--root", root)
    assert paths(found, root) == ["audio/home/a.wav", "audio/street/a.wav", "x/audio/street/b.wav"]
    assert [clip.others for clip in found.clips] == [(), (), ()]
    assert [failure.id for failure in found.missing] == ["audio/home/b.wav"]  # not the one of another folder
    found = catalog("--table", root / "weak.tsv", "--root", root / "audio", "--dataset", "dcase")
    assert paths(found, root) == ["audio/home/a.wav", "audio/street/a.wav"]
    (root / "weak.tsv").write_text("filename\tevent_labels\na.wav\tdog\n")
    refused(r"'a\.wav' could be \S+/audio/home/a\.wav or \S+/audio/street/a\.wav; write its path", "--root", root)
    (root / "audio" / "home" / "a.wav").unlink()
    (root / "audio" / "street" / "a.wav").rename(root / "audio" / "a.wav")
    assert paths(catalog("--root", root), root) == ["audio/a.wav"]  # that has the very ending
    (root / "weak.tsv").write_text("filename\tevent_labels\nhome/c.wav\tdog\nstreet/c.wav\tcar\n")
    (root / "c.wav").write_bytes(WAV)
    refused(r"'home/c\.wav' and 'street/c\.wav' could both be \S+/c\.wav", "--root", root)


def test_of_files_of_one_name_that_of_the_split_is_taken(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, {f"audio/{split}/soundscapes/0.wav": WAV,
                         f"metadata/{split}/soundscapes.tsv": "filename\tevent_labels\n0.wav\tdog\n"})  # fmt: skip
    found = catalog("--root", tmp_path)
    assert [(clip.split, clip.path.split("/")[-3]) for clip in found.clips] == [(name, name) for name in found.splits]


def test_urbansound8k_has_the_file_of_the_fold(tmp_path):
    write(tmp_path, {
        "metadata/UrbanSound8K.csv": "slice_file_name,fold,classID,class\n1-0-0-0.wav,2,0,dog\n2-0-0-0.wav,1,0,dog\n",
        "audio/fold1/1-0-0-0.wav": WAV, "audio/fold2/1-0-0-0.flac": WAV, "audio/fold2/1-0-0-0.wav": WAV,
        "audio/2-0-0-0.wav": WAV,
    })  # fmt: skip
    assert paths(catalog("--root", tmp_path), tmp_path) == ["audio/fold2/1-0-0-0.wav", "audio/2-0-0-0.wav"]


def test_several_files_of_a_clip_are_said_where_the_build_goes_on(tmp_path, caplog):
    write(tmp_path, {"FSD50K.ground_truth/vocabulary.csv": "0,Dog,/m/a\n", "FSD50K.dev_audio/1.wav": WAV,
                     "FSD50K.ground_truth/dev.csv": "fname,labels,mids,split\n1,Dog,/m/a,train\n",
                     "FSD50K.ground_truth/eval.csv": "fname,labels,mids\n1,Dog,/m/a\n",
                     "FSD50K.dev_audio/1.flac": WAV, "FSD50K.eval_audio/1.wav": WAV})  # fmt: skip
    assert len(catalog("--root", tmp_path).clips) == 2
    assert "1 clips have several files, such as " in caplog.text
    write(tmp_path / "v", {"vggsound.csv": "aaaaaaaaaaa,30,dog,train\n", "aaaaaaaaaaa_30.wav": WAV,
                           "b/aaaaaaaaaaa_000030.mp4": WAV, "aaaaaaaaaaa.wav": WAV})  # fmt: skip
    caplog.clear()
    (clip,) = catalog("--root", tmp_path / "v").clips
    assert [other.path.rpartition("/")[2] for other in clip.others] == ["aaaaaaaaaaa_000030.mp4"]  # no whole video
    assert "1 clips have several files, such as " in caplog.text


def test_names_that_differ_by_an_ending_are_several_clips(tmp_path):
    files = {f"rec.{number:03d}": WAV for number in range(1, 11)}
    found = catalog("--root", write(tmp_path / "a", files), "--dataset", "unlabelled")
    assert found.clips[0].key == "rec"  # as ever, where no other has it
    assert len({clip.key for clip in found.clips}) == len({clip.path for clip in found.clips}) == 10
    found = catalog("--root", write(tmp_path / "b", {"dog.wav": WAV, "dog.flac": WAV}))
    assert [clip.key.partition("-")[0] for clip in found.clips] == ["dog", "dog"]
    rows = [{"path": "dog.wav", "labels": "x", "key": "rec.001"}, {"path": "dog.flac", "labels": "x", "key": "rec.002"}]
    cells = "path,labels,key\ndog.wav,x,rec.001\ndog.flac,x,rec.002\ndog.wav,x,rec.001\n"
    write(tmp_path / "b", {"t.jsonl": lines([*rows, rows[0]]), "t.csv": cells})
    found, other = (catalog("--table", tmp_path / "b" / name) for name in ("t.jsonl", "t.csv"))
    assert [clip.key for clip in found.clips] == [clip.key for clip in other.clips]
    assert len(found.clips) == 2
    wds(tmp_path / "w" / "0.tar", {"id": "rec.001", "label": "x"}, {"id": "rec.002", "label": "x"})
    assert [clip.id for clip in catalog("--root", tmp_path / "w").clips] == ["rec.001", "0.tar::1.wav"]  # its place
    write(tmp_path / "b", {"t.csv": "path,labels,key\ndog.wav,x,rec.001\ndog.flac,x,rec.001\n"})
    refused(r"'dog\.flac' gets the same key 'rec\.001' as 'dog\.wav'.*give each its own key", "--table",
            tmp_path / "b" / "t.csv")  # fmt: skip


def test_what_has_no_audio_in_a_tar_is_said(tmp_path, caplog):
    tar(tmp_path / "train.tar", {"0.wav": WAV, "0.json": '{"label": "a"}', "1.json": '{"label": "a"}', "2.bin": WAV,
                                 "2.json": '{"label": "b"}', "read.me": "x"})  # fmt: skip
    assert labels(catalog("--root", tmp_path)) == [["a"]]
    said = [record.getMessage() for record in caplog.records if "have no audio beside them" in record.getMessage()]
    assert said == [f"{tmp_path}: 2 JSON or .cls files have no audio beside them and are left out, such as "
                    f"{tmp_path / 'train.tar'}::1.json"]  # fmt: skip


def test_names_with_dots_in_a_tar(tmp_path):
    """A key ended at the first dot, and of ten clips one was built."""
    names = [f"2024.05.01-12.{minute:02d}" for minute in range(10)]
    members = {f"{name}.{ending}": content for name in names
               for ending, content in (("wav", WAV), ("json", json.dumps({"label": name})))}  # fmt: skip
    found = catalog("--root", tar(tmp_path / "train.tar", members))
    assert labels(found) == [[name] for name in names]
    assert paths(found, tmp_path) == [f"train.tar::{name}.wav" for name in names]
    assert len({clip.key for clip in found.clips}) == 10
    tar(tmp_path / "train.tar", {"0.wav": WAV, "0.meta.json": '{"label": "no"}', "0.json": '{"label": "dog"}'})
    assert labels(catalog("--root", tmp_path)) == [["dog"]]
    tar(tmp_path / "train.tar", {"0.wav": WAV, "0.flac": WAV, "0.json": '{"label": "dog"}'})
    refused(r"train\.tar::0\.wav and \S+train\.tar::0\.flac: two files of audio of one clip", "--root", tmp_path)


def test_a_text_of_several_labels_is_no_class(tmp_path):
    """A csv refused it, and the other forms made a class 'Dog,Bark'."""
    for mark in ",;|":
        other = "," if mark == ";" else ";"
        text = f"Dog{mark}Bark"
        said = rf"label 'Dog\{mark}Bark' holds '\{mark}'; give --label-separator '\{mark}' .*'{other}' where it is one"
        roots = {name: tmp_path / f"{ord(mark)}{name}" for name in ("parquet", "wds", "audiofolder", "csv", "nemo")}
        for name, root in roots.items():
            write(root, {"0.wav": WAV, "1.wav": WAV} if name not in ("parquet", "wds") else {})
            root.mkdir(exist_ok=True)
        parquet(roots["parquet"], "labels", values=[text, "Dog"])
        wds(roots["wds"] / "train.tar", {"labels": text}, {"labels": "Dog"})
        write(roots["audiofolder"], {"metadata.tsv": f"file_name\tlabels\n0.wav\t{text}\n1.wav\tDog\n"})
        for form, column in (("csv", "path"), ("nemo", "audio_filepath")):
            rows = [{column: f"{number}.wav", "labels": cell} for number, cell in enumerate((text, "Dog"))]
            write(roots[form], {"t.jsonl": lines(rows)})
        for form, root in roots.items():
            table = root / "t.jsonl" if form in ("csv", "nemo") else None
            if (form, mark) != ("csv", ";"):  # its own separator
                with pytest.raises(UserError, match=said):
                    look.read(form, Asked(root, table))
            for separator, wanted in ((mark, [["Bark", "Dog"], ["Dog"]]), (other, [[text], ["Dog"]])):
                assert labels(look.read(form, Asked(root, table, separator=separator))) == wanted
    (tmp_path / "v.csv").write_text(WORDS + '4,/m/e,"A, B"\n')
    (tmp_path / "p").mkdir()
    root = parquet(tmp_path / "p", values=["A, B", "/m/c", "D"])
    assert labels(catalog("--root", root, "--class-labels", tmp_path / "v.csv")) == [["A, B"], ["C"], ["D"]]
    parquet(root, values=["A|B"])
    refused(r"parquet::0: label 'A\|B' is not in the vocabulary, but each of its parts is; give --label-separator '\|'",
            "--root", root, "--class-labels", tmp_path / "v.csv")  # fmt: skip


def test_columns_of_zeros_and_ones_are_no_numbers_of_classes(tmp_path):
    words = ("--root", tmp_path, "--class-labels", tmp_path / "v.csv")
    (tmp_path / "v.csv").write_text(WORDS)
    parquet(tmp_path, values=[[0, 0, 1, 1], [0, 0, 0, 1]])
    refused(r"train\.parquet::0: labels are 4 zeros and ones, one of each class.*write the numbers or names", *words)
    parquet(tmp_path, values=[[0, 1], [3, 2, 3]])
    refused(r"train\.parquet::1: class 3 stands several times in its labels", *words)
    parquet(tmp_path, values=[[0, 1], [3]])
    assert labels(catalog(*words)) == [["A", "B"], ["D"]]
    (tmp_path / "train.parquet").unlink()
    for target, said in (([[0.9, 0, 0, 0]], "0.9 for class 0"), ([[0, 1, 2, 0]], "2 for class 2"),
                         ([[0, 0, 0, np.nan]], "nan for class 3")):  # fmt: skip
        with h5py.File(tmp_path / "train.h5", "w") as file:
            file["waveform"], file["target"] = np.zeros((1, 1600), np.int16), np.array(target)
            file.attrs["sample_rate"] = 16000
        refused(rf"train\.h5: target of clip 0 is {said}, neither 0 nor 1", *words)
    with h5py.File(tmp_path / "train.h5", "a") as file:
        file["target"][:] = [[0, 1, 0, 1]]
    assert labels(catalog(*words)) == [["B", "D"]]


def test_what_is_no_label_is_refused_by_row(tmp_path, caplog):
    write(tmp_path, {"0.wav": WAV, "1.wav": WAV})
    for value in ('["Dog", null]', "NaN", '{"a": 1}', "1.5", "true", '["Dog", 1.5]'):
        write(tmp_path, {"t.jsonl": f'{{"path": "0.wav", "labels": "Dog"}}\n{{"path": "1.wav", "labels": {value}}}\n'})
        refused(r"t\.jsonl:2: label .* is no name and no number of a class", "--table", tmp_path / "t.jsonl")
    write(tmp_path, {"t.jsonl": '{"path": "0.wav", "labels": "Dog"}\n{"path": "1.wav", "labels": null}\n'})
    assert labels(catalog("--table", tmp_path / "t.jsonl")) == [["Dog"], []]
    assert "t.jsonl: 1 of 2 clips have no label" in caplog.text
    wds(tmp_path / "w" / "0.tar", {"label": None, "labels": ["Dog"]}, {"label": None})
    assert labels(catalog("--root", tmp_path / "w")) == [["Dog"], []]
    caplog.clear()
    catalog("--root", tmp_path, "--dataset", "unlabelled")
    assert "have no label" not in caplog.text


def test_metadata_of_a_split_without_labels(tmp_path, caplog):
    write(tmp_path, {"train/0.wav": WAV, "train/metadata.csv": "file_name,label\n0.wav,Dog\n",
                     "test/1.wav": WAV, "test/metadata.csv": "file_name,duration\n1.wav,1\n"})  # fmt: skip
    refused(r"test/metadata\.csv:2: no label \(it has file_name, duration\), where other rows have one; add 'label'",
            "--root", tmp_path)  # fmt: skip
    write(tmp_path, {"test/metadata.csv": "file_name,label,start\n1.wav,,1\n"})
    assert labels(catalog("--root", tmp_path)) == [[], ["Dog"]]
    write(tmp_path, {"test/metadata.csv": 'file_name,label\n1.wav,"a,b"\n'})
    refused(r"test/metadata\.csv:2: label 'a,b' holds ','", "--root", tmp_path)  # the file that lists it
    (tmp_path / "train" / "metadata.csv").unlink()
    write(tmp_path, {"test/metadata.csv": ",file_name\n7,1.wav\n"})  # pandas' index has no name
    assert labels(catalog("--root", tmp_path)) == [[]]
    assert "1 of 1 clips have no label" in caplog.text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (pa.array([{"name": "Dog"}]), "struct<name: string>"),
        (pa.array([1.0]), "double"),
        (pa.array([True]), "bool"),
        (pa.array([b"Dog"]), "binary"),
        (pa.array([[["Dog"]]]), "list<.*list<"),
    ],
)
def test_a_column_that_holds_no_labels_is_named(tmp_path, values, said):
    refused(rf"train\.parquet: column 'label' holds {said}.*, not names or numbers of classes", "--root",
            parquet(tmp_path, values=values))  # fmt: skip


def test_all_kinds_of_lists_in_parquet(tmp_path):
    texts = [["Dog", "Cat"], ["Cat", "Dog"]]
    for kind in (pa.list_(pa.string(), 2), pa.large_list(pa.large_string()),
                 pa.list_(pa.dictionary(pa.int32(), pa.string()))):  # fmt: skip
        assert labels(catalog("--root", parquet(tmp_path, values=pa.array(texts, kind)))) == [["Cat", "Dog"]] * 2
    found = catalog("--root", parquet(tmp_path, "labels", values=[["/m/a"], ["/m/b"]], human_labels=[["A"], None]))
    assert [label.name for label in found.labels] == ["A", "/m/b"]
    found = catalog("--root", parquet(tmp_path, "labels", values=["/m/a", "/m/b"], human_labels=["A", "B"]))
    assert [label.name for label in found.labels] == ["/m/a", "/m/b"]
    refused(r"parquet::0: label None is no name", "--root", parquet(tmp_path, values=[["Dog", None], ["Cat"]]))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('"start": NaN', "start nan and end none cannot be"),
        ('"start": -0.5', "start -0.5 and end none cannot be"),
        ('"end": Infinity', "start 0 and end inf cannot be"),
        ('"start": 2, "end": 2', "start 2 and end 2 cannot be"),
        ('"fold": 70000', "fold 70000 is no number from 0 to 32767"),
        ('"fold": -1', "fold -1 is no number"),
        ('"fold": 1.5', "fold 1.5 is no whole number"),
        ('"fold": Infinity', "start, end or fold is no number"),
        pytest.param(f'"start": 1{"0" * 400}', "start, end or fold is no number", id="huge"),
    ],
)
def test_a_segment_and_a_fold_that_cannot_be(tmp_path, row, said):
    write(tmp_path, {"0.wav": WAV, "t.jsonl": f'{{"path": "0.wav", "labels": "Dog", {row}}}\n'})
    refused(rf"t\.jsonl:1: {said}", "--table", tmp_path / "t.jsonl")


def test_folds_and_times_of_other_forms(tmp_path):
    for fold in (70000, -1):
        refused(rf"train\.parquet::0: fold {fold} is no number from 0 to 32767", "--root",
                parquet(tmp_path, values=["Dog"], fold=[fold]))  # fmt: skip
    row = {"audio_filepath": "0.wav", "label": "Dog", "offset": -0.25, "duration": 0.5}
    write(tmp_path, {"n.json": json.dumps(row), "0.wav": WAV})
    refused(r"n\.json:1: start -0\.25 and end 0\.25 cannot be", "--table", tmp_path / "n.json")


def test_labels_of_sound_events_have_no_spaces_around_them(tmp_path):
    """The event kept its space, and its class was not found."""
    write(tmp_path, {"0.wav": WAV, "strong.tsv": "filename\tonset\toffset\tevent_label\n0.wav\t0\t0.3\tdog \n"})
    assert [clip.events for clip in catalog("--root", tmp_path).clips] == [((0.0, 0.3, 0),)]
    write(tmp_path, {"strong.tsv": "filename\tonset\toffset\tevent_labels\n0.wav\t0\t0.3\t,\n"})
    refused(r"strong\.tsv:2: no event_label and no event_labels", "--root", tmp_path)


def test_a_clip_has_no_label_of_an_event_after_its_end(tmp_path):
    """The first second of a recording was stored with the labels of all of it."""
    strong = "filename\tonset\toffset\tevent_label\n0.wav\t0.2\t4\tDog\n1.wav\t0\t2\tDog\n"
    write(tmp_path / "d", {"0.wav": WAV, "1.wav": WAV, "strong.tsv": strong + "1.wav\t1\t3\tCat\n1.wav\t2\t3\tCat\n"})
    found = catalog("--root", tmp_path / "d")
    said = r"d/1\.wav: event 'Cat' begins at 1 s, and of a clip 1 s are stored \(so of 1 clips in all\): give more"
    with pytest.raises(UserError, match=said):
        build(found, tmp_path / "out", options(1.0, 4), 1, engine="inline")
    assert not (tmp_path / "out").exists()
    write(tmp_path / "d", {"strong.tsv": strong})
    build(catalog("--root", tmp_path / "d"), tmp_path / "out", options(1.0, 4), 1, engine="inline")


def test_kaldi_s_tabs_and_separators(tmp_path):
    write(tmp_path, {"0.wav": WAV, "wav.scp": "utt1\t0.wav\n", "text": "utt1 Dog bark,Cat\n"})
    assert labels(catalog("--root", tmp_path, "--label-separator", ",")) == [["Cat", "Dog bark"]]
    assert labels(catalog("--root", tmp_path)) == [["Dog", "bark,Cat"]]
    write(tmp_path, {"wav.scp": "utt1\n"})
    refused(r"wav\.scp:1: 'utt1' is a recording without a path", "--root", tmp_path)


def test_utterances_of_kaldi_without_a_line_of_labels_are_counted(tmp_path, caplog):
    write(tmp_path, {f"{i}.wav": WAV for i in range(3)})
    write(tmp_path, {"wav.scp": "".join(f"u{i} {i}.wav\n" for i in range(3)), "text": "u1 Dog\nu2\n"})
    assert labels(catalog("--root", tmp_path)) == [["Dog"], []]
    assert f"{tmp_path}/text: 1 utterances are not in it, such as 'u0', and are left out" in caplog.text
    caplog.clear()
    write(tmp_path, {"segments": "s1 u0 0 0.5\ns2 u0 0.5 1\ns3 u1 0 1\n", "text": "s2 Dog\ns3 Cat\n"})
    assert labels(catalog("--root", tmp_path)) == [["Dog"], ["Cat"]]
    assert f"{tmp_path}/text: 1 utterances are not in it, such as 's1', and are left out" in caplog.text
    caplog.clear()
    write(tmp_path, {"text": "s1 Dog\ns2 Dog\ns3 Cat\n"})
    assert len(catalog("--root", tmp_path).clips) == 3
    assert "left out" not in caplog.text


def test_a_clip_of_two_splits_is_said(tmp_path, caplog):
    rows = [{"path": f"{name}.wav", "labels": "Dog", "split": split, "start": start}
            for name, split, start in ((0, "train", 0), (1, "train", 0), (1, "train", 0.5), (0, "eval", 0),
                                       (1, "eval", 0.75))]  # fmt: skip
    write(tmp_path, {"0.wav": WAV, "1.wav": WAV, "t.jsonl": lines(rows)})
    assert len(catalog("--table", tmp_path / "t.jsonl").clips) == 5
    assert "t.jsonl: 1 clips are in several splits, such as '0.wav': a model is then tested on" in caplog.text


def test_what_a_row_says_of_its_split_goes_before_its_file_s_name(tmp_path):
    """A tar's JSON and a manifest's lines were not asked: clips of the test set went into the split to train on."""
    split = [{"split": "test"}, {}, {"split": None}, {"split": " eval "}]
    wds(tmp_path / "w" / "train-0.tar", *({"id": str(i), "label": "Dog"} | own for i, own in enumerate(split)))
    for form, column in (("nemo", "audio_filepath"), ("audiofolder", "file_name"), ("ast_json", "wav")):
        rows = [{column: f"{i}.wav", "label" if form != "ast_json" else "labels": "Dog"} | own
                for i, own in enumerate(split)]  # fmt: skip
        table = json.dumps({"data": rows}) if form == "ast_json" else lines(rows)
        name = {"nemo": "train_manifest.json", "audiofolder": "metadata.jsonl", "ast_json": "train.json"}[form]
        write(tmp_path / form, {f"{i}.wav": WAV for i in range(4)} | {name: table})
    for form in ("w", "nemo", "audiofolder", "ast_json"):
        found = catalog("--root", tmp_path / form)
        assert [clip.split for clip in found.clips] == ["test", "train", "train", "eval"], form
    wds(tmp_path / "w" / "train-0.tar", {"id": "x", "label": "Dog", "split": "../x"})
    refused(r"w/train-0\.tar::0\.wav: split '\.\./x' becomes a file name", "--root", tmp_path / "w")


def test_lists_of_folds_are_no_split(tmp_path):
    lists = {f"esc_{split}_data_{fold}.json": json.dumps({"data": [{"wav": "0.wav", "labels": "/m/a"}]})
             for split in ("train", "eval") for fold in (1, 2)}  # fmt: skip
    write(tmp_path, lists | {"0.wav": WAV})
    refused(r"esc_eval_data_1\.json and \S+esc_eval_data_2\.json are lists of one split.*give one by --table", "--root",
            tmp_path)  # fmt: skip
    for split in ("train", "eval"):
        (tmp_path / f"esc_{split}_data_2.json").unlink()
    assert catalog("--root", tmp_path).splits == ["eval", "train"]


def test_accents_as_one_sign_or_two_name_one_file(tmp_path, caplog):
    """A Mac writes them as two, tables from elsewhere as one."""
    caplog.set_level(logging.WARNING)
    names = [unicodedata.normalize(form, f"{form}é.wav") for form in ("NFC", "NFD")]
    write(tmp_path, dict.fromkeys(names, WAV))
    listed = [unicodedata.normalize("NFD", names[0]), unicodedata.normalize("NFC", names[1])]
    write(tmp_path, {"t.csv": "path,labels\n" + "".join(f"{name},x\n" for name in listed),
                     "t.jsonl": lines([{"path": name, "labels": "x"} for name in listed])})  # fmt: skip
    for table in ("t.csv", "t.jsonl"):
        found = catalog("--table", tmp_path / table)
        assert paths(found, tmp_path) == names
        assert len(found.missing) == 0
    assert caplog.text == ""


def test_accents_of_names_that_are_looked_for(tmp_path):
    """Where a table lists names and no paths."""
    names = {form: unicodedata.normalize(form, f"{form}é.wav") for form in ("NFC", "NFD")}
    other = [unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], name) for form, name in names.items()]
    write(tmp_path, {f"audio/{name}": WAV for name in names.values()})
    write(tmp_path, {"weak.tsv": "filename\tevent_labels\n" + "".join(f"{name}\tDog\n" for name in other)})
    assert paths(catalog("--root", tmp_path), tmp_path) == [f"audio/{name}" for name in names.values()]


def test_a_held_out_file_that_was_encoded_anew_is_held_out(tmp_path):
    """It was in train, and missing in test."""
    write(tmp_path, dict.fromkeys(("a/0.wav", "a/1.flac", "a/2.wav", "b/0.wav"), WAV))
    write(tmp_path, {"validation_list.txt": "a/0.wav\r\n", "testing_list.txt": "a/1.wav\nb/0.wav\nb/9.wav\n"})
    found = catalog("--root", tmp_path)
    assert {clip.id: clip.split for clip in found.clips} == {"a/0.wav": "validation", "a/1.flac": "test",
                                                             "a/2.wav": "train", "b/0.wav": "test"}  # fmt: skip
    assert [failure.id for failure in found.missing] == ["b/9.wav"]
    write(tmp_path, {"validation_list.txt": "a/1.flac\n"})
    refused(r"testing_list\.txt:1: 'a/1\.wav' is in validation_list\.txt too", "--root", tmp_path)


def test_audioset_as_files_is_neither_classes_nor_audio_without_labels(tmp_path):
    clips = ("Y-0RWZT-miFs", "YeI8F1Z2nZIA")
    write(tmp_path / "flat", {"balanced_train_segments.csv": "# YTID, start, end, labels\n",
                              **{f"{name}.wav": WAV for name in clips}})  # fmt: skip
    write(tmp_path / "apart", {"balanced_train_segments/Y-0RWZT-miFs.wav": WAV, "eval_segments/YeI8F1Z2nZIA.wav": WAV})
    for folder, other in (("flat", "unlabelled"), ("apart", "folder")):
        refused(rf"could be read as --dataset audioset \(.*; with --segments CSV .*--dataset {other} ", "--root",
                tmp_path / folder)  # fmt: skip


@pytest.mark.parametrize("place", ["below", "remote"])
def test_the_plan_of_a_dry_run_below_the_root_is_no_source(tmp_path, caplog, place):
    """--dry-run and then the build: the second was refused for what the first had left."""
    root = tmp_path / "hf"
    root.mkdir()
    parquet(root, values=["a", "b"])
    where = root if place == "below" else f"local://{root}"
    found = catalog("--root", where)
    list(write_plan(found, root / "a" / "shards", options(1.0, 4)))
    assert [clip.path for clip in catalog("--root", where).clips] == [clip.path for clip in found.clips]
    assert "1 plans of --dry-run are left out, such as" in caplog.text


def test_json_lines_are_told_by_their_names(tmp_path):
    """They were read as a csv, and refused for their quotation marks."""
    write(tmp_path, {"0.wav": WAV, "m.jsonl": lines([{"file_name": "0.wav", "label": "a", "split": "train"}]),
                     "p.jsonl": lines([{"path": "0.wav", "duration": 1.0}]),
                     "cuts.jsonl": lines([{"id": "x", "start": 0.0, "recording": {"sources": []}}])})  # fmt: skip
    assert labels(catalog("--table", tmp_path / "m.jsonl")) == [["a"]]
    assert labels(catalog("--table", tmp_path / "p.jsonl")) == [[]]
    refused(r"cuts\.jsonl: no form of data set that is known: the table has id, start, recording; see", "--table",
            tmp_path / "cuts.jsonl")  # fmt: skip


def test_a_pipe_in_the_root_is_no_table(tmp_path):
    """Nobody writes into it, so opening it would never end."""
    write(tmp_path, {"dog/a.wav": WAV, "cat/b.wav": WAV})
    os.mkfifo(tmp_path / "notes.txt")
    assert labels(catalog("--root", tmp_path)) == [["cat"], ["dog"]]


@pytest.mark.parametrize("name", sorted(SPLIT_NAMES))
def test_every_name_of_a_split_is_one(name):
    """What look.py takes for a folder of a split had none of its own, and its clips were gone, or in train."""
    assert split_of(f"{name}/0.tar")


def test_no_folder_of_a_split_is_left_out_in_silence(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    write(tmp_path, {f"{name}/{label}/0.wav": WAV for name in ("train", "testset", "heldout") for label in ("a", "b")})
    assert set(catalog("--root", tmp_path).splits) == {"train", "test", "heldout"}
    assert caplog.text == ""
    write(tmp_path, dict.fromkeys(("more/a/1.wav", "train/2.wav", "train/_background_noise_/3.wav"), WAV))
    write(tmp_path, {"more/a/1.txt": ""})
    assert len(catalog("--root", tmp_path, "--dataset", "audiofolder").clips) == 6
    assert "3 audio files are in no class folder of a split and are left out, such as more/a/1.wav" in caplog.text


def test_fold_0_beside_others_is_refused_in_every_form(tmp_path, caplog):
    """It would be in every training set, and never held out."""
    caplog.set_level(logging.WARNING)
    rows = [{"path": f"{fold}.wav", "labels": "Dog", "fold": fold} for fold in (1, 0, 2)]
    write(tmp_path, {"t.jsonl": lines(rows)} | {f"{fold}.wav": WAV for fold in range(3)})
    refused(r"t\.jsonl:2: fold 0 beside others: folds count from 1", "--table", tmp_path / "t.jsonl")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    refused(r"t\.parquet:2: fold 0 beside others", "--table", tmp_path / "t.parquet")
    (tmp_path / "p").mkdir()
    refused(r"train\.parquet::2: fold 0 beside others", "--root",
            parquet(tmp_path / "p", values=["Dog"] * 3, fold=[1, 2, 0]))  # fmt: skip
    found = catalog("--root", parquet(tmp_path / "p", values=["Dog"] * 3, fold=[1, 2, None]))
    assert [clip.fold for clip in found.clips] == [1, 2, 0]
    assert "train.parquet::2: 1 clips of split 'train' have no fold and 2 have one" in caplog.text
    caplog.clear()
    for folds in ([0, 0], [None, None]):
        catalog("--root", parquet(tmp_path / "p", values=["Dog"] * 2, fold=pa.array(folds, pa.int64())))
    assert caplog.text == ""


def test_a_row_of_parquet_tells_its_split(tmp_path):
    """All were of the split that the file's name tells, the test set in train."""
    found = catalog("--root", parquet(tmp_path, values=["a", "b", "a"], split=["test", None, "eval"]))
    assert [clip.split for clip in found.clips] == ["test", "train", "eval"]
    splits = pa.array(["test", "eval", "test"]).dictionary_encode()
    found = catalog("--root", parquet(tmp_path, values=["a", "b", "a"], split=splits))
    assert [clip.split for clip in found.clips] == ["test", "eval", "test"]
    found = catalog("--root", parquet(tmp_path, values=["a", "b", "a"], split=[1, 2, 3]))  # no names
    assert found.splits == ["train"]


def test_a_table_behind_very_many_files_is_found(tmp_path, monkeypatch):
    """Names of audio come before it in the alphabet; without it the clips had no labels."""
    monkeypatch.setattr(look, "LOOK_AROUND", 3)
    write(tmp_path, {f"{number}.wav": WAV for number in range(5)} | {f"more/{number}.wav": WAV for number in range(5)})
    write(tmp_path, {"metadata.csv": "file_name,label\n" + "".join(f"{number}.wav,Dog\n" for number in range(5))})
    assert look.find(Asked(tmp_path)) == "audiofolder"
    assert look._names(Asked(tmp_path)) == ["0.wav", "1.wav", "2.wav", "metadata.csv"]


def test_a_row_without_an_id_is_named(tmp_path):
    write(tmp_path, {"vggsound.csv": "aaaaaaaaaaa,1,Dog,train\n,1,Dog,train\n", "aaaaaaaaaaa_000001.wav": WAV})
    refused(r"vggsound\.csv:2: '' is no YouTube id", "--root", tmp_path)


def test_kaldi_s_lines_that_contradict_one_another(tmp_path):
    """The last one was taken: other audio under the label."""
    write(tmp_path, {"0.wav": WAV, "1.wav": WAV, "wav.scp": "r 0.wav\nr 1.wav\n", "text": "u Dog\n",
                     "segments": "u r 0 0.25\nu r 0 0.25\nu r 0.5 0.75\n"})  # fmt: skip
    refused(r"wav\.scp:2: 'r' came before with another path", "--root", tmp_path)
    write(tmp_path, {"wav.scp": "r 0.wav\nr 0.wav\n"})
    refused(r"segments:3: 'u' came before with another segment", "--root", tmp_path)


def test_an_empty_text_in_a_list_is_no_class(tmp_path):
    write(tmp_path, {"0.wav": WAV, "1.wav": WAV})
    write(tmp_path, {"t.jsonl": lines([{"path": "0.wav", "labels": ["Dog", ""]}, {"path": "1.wav", "labels": [" "]}])})
    found = catalog("--table", tmp_path / "t.jsonl")
    assert ([label.name for label in found.labels], labels(found)) == (["Dog"], [["Dog"], []])
    (tmp_path / "p").mkdir()
    words = [["D", ""], [""]]
    found = catalog("--root", parquet(tmp_path / "p", "labels", values=[["Dog", " "], [""]], human_labels=words))
    assert ([label.name for label in found.labels], labels(found)) == (["D"], [["D"], []])


def test_classes_that_look_alike_are_said(tmp_path, caplog):
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    write(tmp_path, {f"a/{split}/{name}/0.wav": WAV for split, name in zip(("train", "test"), names, strict=True)})
    write(tmp_path, {f"b/{name}/0.wav": WAV for name in ("Dog", "dog")})
    for root, (one, other) in (("a", sorted(names)), ("b", ("Dog", "dog"))):
        assert len(catalog("--root", tmp_path / root).labels) == 2
        assert f"{tmp_path / root}: '{one}' and '{other}' are two classes; are they meant as one?" in caplog.text


def test_a_clip_without_events_is_a_clip(tmp_path):
    """DESED's tables list such, with empty cells; those of other tables lack something."""
    strong = "filename\tonset\toffset\tevent_label\n0.wav\t0\t0.3\tDog\n1.wav\t\t\t\n"
    write(tmp_path, {"0.wav": WAV, "1.wav": WAV, "strong.tsv": strong})
    found = catalog("--root", tmp_path)
    assert labels(found) == [["Dog"], []]
    assert [len(clip.events) for clip in found.clips] == [1, 0]
    write(tmp_path, {"strong.tsv": strong.replace("1.wav\t\t", "1.wav\t0.1\t0.2")})
    refused(r"strong\.tsv:3: no event_label and no event_labels", "--root", tmp_path)
    write(tmp_path, {"strong.tsv": "filename\tevent_labels\n0.wav\tDog\n1.wav\t\n"})
    refused(r"strong\.tsv:3: no event_label and no event_labels", "--root", tmp_path)
