"""The benchmark of small scale from end to end, on a set like ESC-50 of a few clips of half a second."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from pipeline.files import read_json
from tests.benchmarks import small_scale

CLASSES, FOLDS, CLIPS = 4, (4, 5), 2  # clips of a class and fold


@pytest.fixture
def esc50(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "esc50"
    (folder / "audio").mkdir(parents=True)
    (folder / "meta").mkdir()
    time = np.arange(8000) / 16000
    rows: list[list[object]] = [["filename", "fold", "target", "category"]]
    for fold in FOLDS:
        for target in range(CLASSES):
            for take in range(CLIPS):
                name = f"{fold}-{target}{take}-{target}.wav"
                tone = np.sin(2 * np.pi * 300 * (target + 1) * time) + 0.3 * rng.standard_normal(len(time))
                soundfile.write(folder / "audio" / name, 0.3 * tone, 16000)
                rows.append([name, fold, target, f"tone_{target}"])
    with (folder / "meta" / "esc50.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.mark.slow
def test_runs_once_and_reports_what_is_there(esc50, tmp_path, monkeypatch):
    table = yaml.safe_load((Path(small_scale.HERE) / "small_scale.yaml").read_text())
    table |= {"seconds": 0.5, "rows": {"PSWaCL": table["rows"]["PSWaCL"]}, "finetuned": ["ast"], "epochs": {2: 1}}
    table["pretrain"]["train.batch_size"] = table["finetune"]["train.batch_size"] = 8
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(table))
    monkeypatch.setattr(small_scale, "TIMED", (1, 5))
    out = tmp_path / "out"
    words = ["small_scale", "--esc50", str(esc50), "--out", str(out), "--table", str(tmp_path / "toy.yaml"),
             "--steps", "2", "--from-step", "2", "--seeds", "0"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    found = out / "few" / "random-ast-2-0"  # a run that is finished: what it left counts
    found.mkdir(parents=True)
    (found / "results.json").write_text('{"value": 0.25}')
    (found / "config.yaml").write_text("train: {epochs: 3.0}")
    lines = [json.dumps({"step": step, "accuracy": value, "time": 0}) for step, value in enumerate((0.5, 1, 1), 1)]
    (found / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert small_scale.main() == 0
    clips = CLASSES * len(FOLDS) * CLIPS
    for probe in ("log-mel/probe.json", "untrained-0/probe.json", "pretrain/pswacl/probe-00000002.json"):
        assert {len(hits) for hits in read_json(out / probe, "").values()} == {clips}
    assert np.mean(read_json(out / "log-mel" / "probe.json", "")["mean, deviation: linear"]) == 1.0  # pure tones
    assert read_json(out / "few" / "pswacl-2-ast-2-0" / "results.json", "")["clips"] == CLASSES * CLIPS
    assert isinstance(read_json(out / "cost" / "pswacl.json", "")["step"], float)
    for steps in small_scale.TIMED:
        logged = (out / "cost" / f"pswacl-{steps}" / "metrics.jsonl").read_text().splitlines()
        assert max(json.loads(line)["step"] for line in logged) == steps
    text = (out / "tables.md").read_text()
    assert (out / "curve.png").stat().st_size > 10_000
    for line in ("| log-mel | mean, deviation: linear | 100.0 |", "| PSWaCL | waveform |", "| AST | PSWaCL, 2 steps |",
                 "| AST | nothing | 25.0 (1) | 2 |"):  # fmt: skip
        assert line in text

    def nothing(*_: object) -> None:
        pytest.fail("a finished run was begun again")

    monkeypatch.setattr(small_scale.Evidence, "_launch", nothing)
    monkeypatch.setattr(small_scale.Evidence, "_probe", nothing)
    assert small_scale.main() == 0
    assert (out / "tables.md").read_text() == text
