"""launchers/embed.py: the vectors of the encoder, the same bytes on any ranks, and what could not be read."""

import codecs
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from launchers.embed import main
from pipeline.config import DataConfig, FinetuneRecipe
from pipeline.data.corpus import load_corpus
from pipeline.data.loader import Loader
from pipeline.data.manifest import load_index, load_manifest
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.probing.features import compute, mapped
from pipeline.probing.frozen import open_frozen, pooled
from pipeline.serving import embed as embedding
from pipeline.serving.embed import read_list
from pipeline.serving.scorer import load_scorer
from tests.conftest import ROOT
from tests.helpers import damaged_copy, shards_of_lengths
from tests.ranks import run_ranks

SMALL = ROOT / "tests" / "probing" / "small_pieces.py"


def embed(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, words), "--workers", "0"])
    return main()


def content(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.*")}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Five recordings, one of them longer than two clips and one damaged."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for number, seconds in enumerate((0.5, 0.3, 1.2, 0.5)):
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.normal(size=int(16000 * seconds)), 16000)
    (folder / "2x.wav").write_bytes(b"RIFF nothing")
    return folder


@pytest.mark.slow
def test_any_ranks_write_the_same_bytes_and_finished_pieces_are_kept(pretrained, shards, recordings, tmp_path):
    for what, words, count in (("clips", ["--shards", shards], 5), ("files", [recordings], 3)):
        command = [SMALL, "--checkpoint", pretrained, *words, "--workers", 0, "--layers", "2,4", "--out"]
        for ranks in (1, 2):
            said = run_ranks(ranks, *command, tmp_path / f"{what}-{ranks}", check=False)
            assert {status for status, _ in said} == {int(what == "files")}
        once = content(tmp_path / f"{what}-1")
        assert once == content(tmp_path / f"{what}-2")
        files = sorted((tmp_path / f"{what}-1").glob("*.parquet"))
        assert len(files) >= count - 1
        kept = {file: file.stat().st_mtime_ns for file in files[1:]}
        files[0].unlink()
        run_ranks(2, *command, tmp_path / f"{what}-1", check=False)
        assert content(tmp_path / f"{what}-1") == once
        assert {file: file.stat().st_mtime_ns for file in files[1:]} == kept


def test_shards_give_a_vector_for_each_clip_and_layer(pretrained, shards, tmp_path, monkeypatch):
    assert embed(monkeypatch, "--checkpoint", pretrained, "--shards", shards, "--split", "eval", "--layers", "1,4",
                 "--pool", "time_frequency", "--out", tmp_path / "out") == 0  # fmt: skip
    table = pq.read_table(tmp_path / "out" / "eval-000000.parquet")
    clips = load_manifest(shards).splits["eval"].clips
    assert table["key"].to_pylist()[::2] == load_index(shards, "eval")["key"].to_pylist()
    assert table["layer"].to_pylist() == [1, 4] * clips
    assert set(table["time"].to_pylist()) == {0.0}
    data = DataConfig(shards=str(shards))
    frozen = open_frozen(str(pretrained), DataSpec.of(load_corpus(data), data))
    data = DataConfig(shards=str(shards), mean=-5.0, std=4.0, workers=0)
    with Loader(data, "eval", batch_size=32) as loader:
        batch = next(iter(loader.batches()))
        tokens = frozen(batch, [1])
    expected = torch.cat([pooled(tokens[stream, 1], "time_frequency", frozen.grids[stream]) for stream in
                          ("spec", "wav")], dim=1)[batch.valid]  # fmt: skip
    assert str(table.schema.field("embedding").type) == f"fixed_size_list<element: float>[{expected.shape[1]}]"
    found = np.array(table["embedding"].to_pylist()[: 2 * len(expected) : 2], np.float32)
    assert np.array_equal(found, expected.numpy())


def test_columns_of_files_have_their_time_and_end_with_the_audio(pretrained, recordings, tmp_path, monkeypatch, capsys):
    (tmp_path / "list.txt").write_text(f"{recordings / '2.wav'}\n\n")
    words = ["--checkpoint", pretrained, recordings / "1.wav", "--list", tmp_path / "list.txt", "--level", "time",
             "--stream", "spec", "--dtype", "fp16"]  # fmt: skip
    assert embed(monkeypatch, *words, "--out", tmp_path / "out") == 0
    table = pq.read_table(tmp_path / "out" / "files-000000.parquet")
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: halffloat>[96]"
    short = table.filter(np.array(table["key"].to_pylist()) == str(recordings / "1.wav"))
    assert short["time"].to_pylist() == pytest.approx([0, 0.16])  # 0.3 s; a clip has 3 columns or more
    times = table["time"].to_pylist()[2:]
    starts = [0.0, 0.5, 0.7]  # the last window ends with the recording
    assert times == pytest.approx([start + column * 0.16 for start in starts for column in range(4)])
    assert "files of 96 numbers a vector" in capsys.readouterr().out
    with pytest.raises(UserError, match="level = time, not clip"):
        embed(monkeypatch, *words[:-6], "--stream", "spec", "--dtype", "fp16", "--out", tmp_path / "out")


def test_a_column_that_begins_where_a_window_ends_is_none_of_it(tmp_path):
    """Where windows of 0.96 s begin is rounded: their length, 6 columns, was a little more for most of them."""
    embedder = SimpleNamespace(width=2, hop=0.16, layers=[1])
    starts = 0.96 * np.arange(50)
    with embedding._parts(tmp_path / "x.parquet", embedder, half=False) as (write, _):
        write(["x"] * 50, starts, (starts + 0.96) - starts, np.zeros((50, 1, 7, 2), np.float32))
    assert pq.read_metadata(tmp_path / "x.parquet").num_rows == 50 * 6


def test_vectors_of_recordings_are_those_that_predict_gives_and_bad_ones_are_said(
    finetuned, recordings, tmp_path, monkeypatch, capsys
):
    assert embed(monkeypatch, "--checkpoint", finetuned, recordings, "--out", tmp_path / "out") == 1
    table = pq.read_table(tmp_path / "out" / "files-000000.parquet")
    scorer = load_scorer(finetuned)
    _, expected = scorer.hear([scorer.read(str(recordings / "0.wav"))])
    assert table["key"].to_pylist()[0] == str(recordings / "0.wav")
    np.testing.assert_allclose(table["embedding"].to_pylist()[0], expected[0], rtol=1e-4, atol=1e-5)
    assert sorted(set(table["key"].to_pylist())) == [str(recordings / f"{number}.wav") for number in range(4)]
    (line,) = (tmp_path / "out" / "files-000000.failed.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(recordings / "2x.wav")
    assert "1 recordings could not be read" in capsys.readouterr().err
    words = ["--checkpoint", finetuned, recordings / "0.wav", "--out", tmp_path / "again"]
    (tmp_path / "again").mkdir()
    assert embed(monkeypatch, *words) == 0
    (tmp_path / "again" / "files-000000.parquet").unlink()
    (tmp_path / "again" / "files-000000.failed.jsonl").write_text(f"{line}\n")  # an attempt that ended there
    assert embed(monkeypatch, *words) == 0
    assert not (tmp_path / "again" / "files-000000.failed.jsonl").exists()


def test_a_run_of_several_lengths_hears_each_clip_at_its_own(make_run, tmp_path, monkeypatch):
    """The vectors of shards, of files and of the scores are the same ones; features of a probe, too."""
    shards = shards_of_lengths(tmp_path / "audio", {0.15: 36, 0.4: 3, 0.6: 2})
    run = make_run(FinetuneRecipe, f"data.shards={shards}", "data.seconds=[0.2, 0.4]")
    words, found = ["--checkpoint", run, "--layers", "4"], {}
    for name, inputs in (("shards", ["--shards", shards, "--split", "train"]), ("files", [tmp_path / "audio"])):
        assert embed(monkeypatch, *words, *inputs, "--out", tmp_path / name) == 0
        (file,) = (tmp_path / name).glob("*.parquet")
        table = pq.read_table(file)
        keys = (Path(key).stem for key in table["key"].to_pylist())
        found[name] = dict(zip(keys, np.array(table["embedding"].to_pylist(), np.float32), strict=True))
    scorer = load_scorer(run)
    assert len(found["shards"]) == 41
    for key, vector in found["shards"].items():
        _, (expected,) = scorer.hear([scorer.read(str(tmp_path / "audio" / f"{key}.wav"))])
        np.testing.assert_allclose(vector, expected, rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(found["files"][key], expected, rtol=1e-4, atol=1e-5)
    assert embed(monkeypatch, *words, tmp_path / "audio", "--level", "time", "--out", tmp_path / "time") == 0
    data = DataConfig(shards=str(shards))
    frozen = open_frozen(str(run), DataSpec.of(load_corpus(data), data))
    files = compute(frozen, str(shards), "train", [4], "mean", tmp_path / "features", World(), workers=0)
    features = mapped(files)
    assert sorted(features.rows) == list(range(41))
    with pytest.raises(UserError, match=r"several lengths .* take --probe linear"):
        compute(frozen, str(shards), "train", [4], "tokens", tmp_path / "features", World(), workers=0)


def test_pieces_that_lack_clips_are_made_again_once_the_shards_are_mended(pretrained, shards, tmp_path, monkeypatch):
    words = ["--checkpoint", pretrained, "--split", "train", "--workers", 0, "--out", tmp_path / "vectors"]
    tar = damaged_copy(shards, tmp_path / "damaged", 6)
    with pytest.raises(UserError, match="max_bad_share"):
        embed(monkeypatch, *words, "--shards", tmp_path / "damaged")
    shutil.copy(shards / tar.name, tar)
    assert embed(monkeypatch, *words, "--shards", tmp_path / "damaged") == 0
    again = content(tmp_path / "vectors")
    words[-1] = tmp_path / "whole"
    assert embed(monkeypatch, *words, "--shards", shards) == 0
    assert again == content(tmp_path / "whole")


def test_a_list_holds_any_name_that_a_file_system_takes(tmp_path):
    names = ["a\u2028b.wav", "c\x0b\x85d.wav", " e.wav ", os.fsdecode(b"caf\xe9.wav")]
    (tmp_path / "list.txt").write_bytes(codecs.BOM_UTF8 + os.fsencode("\r\n".join([*names, "", "f.wav\n"])))
    assert read_list(tmp_path / "list.txt") == [*names, "f.wav"]


def test_mistakes_are_one_line_before_anything_is_written(pretrained, shards, recordings, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "nul.txt").write_bytes(b"a.wav\0b.wav\0")
    (tmp_path / "mine" / "notes.txt").touch()
    shared = ["--checkpoint", pretrained, "--out", tmp_path / "out"]
    for words, said in (
        ([*shared], "give --shards DIR, or audio files"),
        ([*shared, recordings, "--shards", shards], "one of both"),
        ([*shared, "--shards", shards, "--split", "dev"], "--split dev: .* has the splits"),
        ([*shared, recordings, "--hop", "0"], "--hop 0"),
        ([*shared, recordings, "--pool", "cls", "--level", "time"], "cls and dist are tokens of the whole clip"),
        ([*shared, recordings, "--layers", "9"], "the encoder has 4 blocks"),
        ([*shared, "--list", tmp_path / "none.txt"], "--list .*none.txt: .*No such file"),
        ([*shared, "--list", tmp_path / "nul.txt"], "--list .*nul.txt: has NUL bytes"),
        ([*shared[:2], recordings, "--out", tmp_path / "mine"], "is not empty, and not of this command"),
    ):
        with pytest.raises(UserError, match=said):
            embed(monkeypatch, *words)
    assert not (tmp_path / "out").exists()
