"""Writes tests/invariance/former/: shards, a pretraining on one rank, and a finetuning from it on two, six steps each.

    python -m tests.invariance.make_former

They stand for what users have on their disks, so they are written anew only where the formats change on purpose.
Relative places, and nothing of the machine but the seconds in metrics.jsonl, which are left out.
"""

import csv
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from pipeline import distributed
from shard_tools import catalogs
from shard_tools.build import build
from shard_tools.plan import BuildOptions
from shard_tools.synth import CLASSES, render
from shard_tools.write import AudioOptions
from tests.invariance import training
from tests.ranks import run_ranks

RATE, CLIP, CLIPS = 16000, 0.1, 20
LABELS = list(CLASSES)[:5]


def make_shards(out: Path, source: Path) -> None:
    """16 clips to train on and 4 held out, 5 a shard, cut from files of a quarter of a second; five classes."""
    with (source / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "start", "end", "labels", "split", "fold"])
        for number in range(CLIPS):
            rng = np.random.default_rng(number)
            names = [LABELS[i] for i in sorted({number % 5, int(rng.integers(5)) if number % 3 == 0 else number % 5})]
            soundfile.write(source / f"{number:02d}.flac", render(names, 0.25, RATE, rng), RATE)
            start = round(float(rng.uniform(0, 0.15)), 3)
            split = "eval" if number % 5 == 3 else "train"
            row = [f"{number:02d}.flac", start, round(start + CLIP, 3), ";".join(names), split, number % 3 + 1]
            table.writerow(row)
    catalog = catalogs.table(source, source / "table.csv", None, None)
    build(catalog, out, BuildOptions(AudioOptions(RATE, CLIP, mel_bins=16), 5), 1, engine="inline")
    shutil.rmtree(out / ".build", ignore_errors=True)


def rank_program(kind: str) -> None:
    """On each rank, in the folder that holds former/."""
    training.shrink()
    words = f"run.dir=former/{kind} train.steps=6 checkpoint.every=3 checkpoint.keep=1 checkpoint.keep_best=0".split()
    with distributed.session(300, seed=0) as world:
        if kind == "pretrain":
            training.run(False, "zero2.json", [], words, world)
        else:
            more = ["model.init=former/pretrain", "checkpoint.ema=0.9", "checkpoint.ema_every=2"]
            training.run(True, "zero3.json", [], [*words, *more], world)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "former"
        (Path(folder) / "source").mkdir()
        make_shards(made / "shards", Path(folder) / "source")
        for ranks, kind in ((1, "pretrain"), (2, "finetune")):
            run_ranks(ranks, __file__, folder, kind)
            run = made / kind
            shutil.rmtree(run / "logs")
            lines = "".join(json.dumps(row) + "\n" for row in training.records(run))
            (run / "metrics.jsonl").write_text(lines)
        shutil.rmtree(training.FORMER, ignore_errors=True)
        shutil.copytree(made, training.FORMER)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.chdir(sys.argv[1])
        rank_program(sys.argv[2])
    else:
        main()
