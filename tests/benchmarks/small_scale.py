"""What pretraining is worth at small scale: frozen and finetuned scores on ESC-50, and what they cost.

    python -m tests.benchmarks.small_scale [--part all|curve|few|cost|report] [--steps N ...] [--from-step N]
                                           [--seeds N ...] [--esc50 DIR] [--out runs/small_scale] [--table FILE]

In: ESC-50 (default: `$CRAFT_SHARED/data/esc50`) and a table of methods (small_scale.yaml). Fold 5 is held out of every
pretraining and finetuning. Out: in OUT, tables.md and curve.png, written again after each run with what is there.

    curve   each method to the first of --steps, then each to the next one. After each: a linear probe of the last
            block's frozen tokens, frequency patches side by side (pool time_frequency), of the spectrogram, of the
            waveform and of both, on each fold in turn. Beside it untrained encoders of each of --seeds, and
            statistics of each mel bin over time, with the same probe and with SVMs.
    few     AST and SWaB, finetuned from random weights and from each pretraining after --from-step steps, with 4, 8 and
            32 labelled clips a class, for each of --seeds: accuracy on fold 5, and the epoch in which 99 % of the
            training clips are known.
    cost    CPU seconds of a step of each method on one thread, on the CPU even where there are GPUs: those of a run of
            140 steps less those of a run of 20, so that starting is not in them.
    all     all three; report: the tables alone

Where torch finds a GPU, curve and few train on it, in bf16, and probe on it. Every run has a directory of its own in
OUT. Killed at any moment, the same command goes on; more steps, seeds or rows of the table add runs. The learning rate
is constant after its warm-up, so one run of a method has all points of its curve, and none of them was annealed.

On one core, at five seconds a clip, 1,000 steps of 32 clips take 8 minutes (AudioMosaic) to 52 (CRAFT-Latent), of all
methods about 4 hours; a probe takes 1 to 5 minutes. A finetuning takes 3 to 6 minutes (AST, 4 clips a class) to 46
(SWaB, 32), all of one seed about 12 hours or more.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Large tensors come back at every step: memory that is kept costs no page faults. A third of a step of CRAFT-MAE.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 33))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 34))

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from pipeline import distributed
from pipeline.ablation.executors import LocalExecutor
from pipeline.ablation.grid import ROOT
from pipeline.config import DataConfig, PretrainRecipe
from pipeline.data.corpus import load_corpus
from pipeline.data.loader import Loader
from pipeline.data.manifest import load_index, load_manifest
from pipeline.data.spec import DataSpec
from pipeline.errors import UserError, run_cli
from pipeline.files import lock, write_csv, write_json
from pipeline.methods import FINETUNE, PRETRAIN, mismatch
from pipeline.model.craft import Craft, Streams
from pipeline.probing.features import BATCH, Features, compute, mapped
from pipeline.probing.frozen import Frozen, open_frozen
from pipeline.probing.protocol import by_folds, judge_once
from pipeline.recipes import load_recipe, read_yaml
from shard_tools import catalogs
from shard_tools.build import build
from shard_tools.catalogs import Catalog
from shard_tools.plan import BuildOptions
from shard_tools.write import AudioOptions
from tests.benchmarks.small_scale_report import HELD_OUT, Right, write_report

HERE = Path(__file__).parent
COSTS = (1, 3, 10, 30, 100)  # C of an SVM
TIMED = (20, 140)  # steps of the runs whose difference is the cost of a step
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


class Table(BaseModel):
    """A file like small_scale.yaml.

    Attributes:
        seconds: Of a clip.
        pretrain: Settings of every pretraining.
        rows: Name -> settings of one.
        finetune: Settings of every finetuning.
        finetuned: Methods of finetuning.
        epochs: Labelled clips a class -> epochs of finetuning.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float
    pretrain: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    finetune: dict[str, Any]
    finetuned: tuple[str, ...]
    epochs: dict[int, float]


class Evidence:
    """The runs of a table in a directory.

    Args:
        table: Methods.
        esc50: Directory of the audio.
        out: Of the runs.
        seeds: Of untrained encoders and finetunings.
        steps: Of pretraining, after which it is probed.

    Attributes:
        failed: Directories of runs whose launcher failed.
    """

    def __init__(self, table: Table, esc50: Path, out: Path, seeds: Sequence[int], steps: Sequence[int]) -> None:
        self.table, self.out, self.seeds, self.steps = table, out, list(seeds), sorted(set(steps))
        self.failed: list[Path] = []
        self._esc50 = esc50
        self._executor = LocalExecutor(1, 1, 0)
        self.shards = self._build("shards", lambda: catalogs.esc50(esc50, "train"))
        index = load_index(str(self.shards), columns=["fold", "labels", "source"])
        self.folds = index["fold"].to_numpy()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._config = "bf16.json" if self.device.type == "cuda" else "zero0.json"
        self._clips = list(zip(*(index[name].to_pylist() for name in ("source", "labels", "fold")), strict=True))

    def _build(self, name: str, catalog: Callable[[], Catalog]) -> Path:
        """Shards OUT/NAME of a catalog, where they are not there yet."""
        folder = self.out / name
        if not (folder / "manifest.json").exists():
            say(f"building {folder}")
            build(catalog(), folder, BuildOptions(AudioOptions(seconds=self.table.seconds), 512), 1, engine="inline")
        return folder

    # Pretraining and frozen scores

    def curve(self) -> None:
        """All methods to the first of the steps, then to the next."""
        self._once(self.out / "log-mel" / "probe.json", self._log_mel)
        for seed in self.seeds:
            self._once(self.out / f"untrained-{seed}" / "probe.json", partial(self._untrained, seed))
        for step in self.steps:
            for name in self.table.rows:
                made = self.checkpoint(name, step)
                if not (made / "complete").exists():
                    self._pretrain(name, step)
                if (made / "complete").exists():
                    self._once(self.run_dir(name) / f"probe-{step:08d}.json", partial(self._trained, made))

    def run_dir(self, name: str) -> Path:
        """Of a pretraining."""
        return self.out / "pretrain" / name.lower()

    def checkpoint(self, name: str, step: int) -> Path:
        """Of a pretraining after so many steps, whether it is there or not."""
        return self.run_dir(name) / "checkpoints" / f"step-{step:08d}"

    def _pretrain(self, name: str, step: int) -> None:
        """Goes on to `step`."""
        folder = self.run_dir(name)
        kept = sorted({other for other in self.steps if other < step} | {int(file.stem.removeprefix("probe-"))
                                                                       for file in folder.glob("probe-*.json")})
        keep = [other / step for other in (*kept, step) if other <= step]
        self._launch(folder, "pretrain.py", self._settings(name, folder, step) | {"checkpoint.keep_at": keep})

    def _settings(self, name: str, folder: Path, step: int) -> dict[str, Any]:
        return self.table.pretrain | self.table.rows[name] | {
            "data.shards": str(self.shards), "data.fold": HELD_OUT, "run.dir": str(folder), "train.steps": step,
        }  # fmt: skip

    def _launch(self, folder: Path, script: str, settings: dict[str, Any]) -> float | None:
        """CPU seconds of a launcher, its starting among them; None: it failed."""
        folder.mkdir(parents=True, exist_ok=True)
        words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
        before = _children()
        while not self._executor.start(folder, script, ["--deepspeed_config", self._config, *words]):
            say(f"waiting for the process that still works on {folder}")  # of a command that was killed
            time.sleep(60)
        try:
            while (status := self._executor.poll(folder)) is None:
                time.sleep(0.2)
        except KeyboardInterrupt:
            self._executor.stop([folder])
            raise
        seconds = _children() - before
        if status:
            self.failed.append(folder)
            say(f"failed  {folder} (exit {status}); see its output.log")
            return None
        say(f"done    {folder} ({seconds:.0f} CPU seconds)")
        return seconds

    def cost(self) -> None:
        """OUT/cost/NAME.json: CPU seconds of a step."""
        with mock.patch.dict(os.environ, ON_CPU), mock.patch.object(self, "_config", "zero0.json"):
            for name in self.table.rows:
                file = self.out / "cost" / f"{name.lower()}.json"
                if file.exists():
                    continue
                used = []
                for steps in TIMED:
                    folder = file.parent / f"{name.lower()}-{steps}"
                    shutil.rmtree(folder, ignore_errors=True)  # of a command that was killed: half of its seconds
                    settings = self._settings(name, folder, steps) | {"eval.every": 0, "checkpoint.every": 0}
                    used.append(self._launch(folder, "pretrain.py", settings))
                if None not in used:
                    write_json(file, {"step": (used[1] - used[0]) / (TIMED[1] - TIMED[0])})
                    write_report(self)

    def _once(self, file: Path, judge: Callable[[], Right]) -> None:
        """Writes the judgement of frozen features where there is none, and the report."""
        if file.exists():
            return
        begun = time.process_time()
        right = judge()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, right)
        scores = ", ".join(f"{name} {100 * np.mean(hits):.1f}" for name, hits in right.items())
        say(f"probed  {file}: {scores} ({time.process_time() - begun:.0f} CPU seconds)")
        write_report(self)

    def _trained(self, made: Path) -> Right:
        return self._probe(open_frozen(str(made), self._spec()))

    def _untrained(self, seed: int) -> Right:
        """Of an encoder of both representations."""
        words = [f"{key}={json.dumps(value)}" for key, value in self.table.pretrain.items() if key.startswith("model.")]
        config, spec = load_recipe(PretrainRecipe, [], words).model, self._spec()
        torch.manual_seed(seed)
        model = Craft(config, Streams(spec=True, wav=True, mel_bins=spec.mel_bins, frames=spec.frames))
        return self._probe(Frozen(model, spec, None))

    def _spec(self) -> DataSpec:
        data = DataConfig(shards=str(self.shards), fold=HELD_OUT)
        return DataSpec.of(load_corpus(data), data)

    def _probe(self, frozen: Frozen) -> Right:
        streams = [*frozen.streams, *(["both"] if len(frozen.streams) > 1 else [])]
        with distributed.session(1800.0, 0) as world, tempfile.TemporaryDirectory(dir=self.out) as folder:
            files = compute(frozen.to(world.device), str(self.shards), "train", [frozen.depth], "time_frequency",
                            Path(folder), world, workers=0)  # fmt: skip
            features = mapped(files)
            return {stream: self._linear(features, stream, frozen.depth) for stream in streams}

    def _linear(self, features: Features, stream: str, layer: int) -> list[int]:
        """The linear probe: each fold in turn held out."""
        right = np.zeros(len(self.folds), np.int64)
        for one in by_folds(self.folds[features.rows], [], 0):
            _, scores, targets = judge_once(features, one, "linear", stream, [layer], True, self.device)
            right[features.rows[one.test]] = scores.argmax(axis=1) == targets.argmax(axis=1)
        return right.tolist()

    def _log_mel(self) -> Right:
        """Statistics of each mel bin over time: the linear probe, and SVMs with the same choosing folds."""
        data = DataConfig(shards=str(self.shards), train_split="train", eval_split="train", workers=0)
        frames = load_manifest(str(self.shards)).fbank.frames  # without padding
        parts: list[tuple[torch.Tensor, ...]] = []
        with Loader(data, "eval", waveform=False, fbank=True, batch_size=BATCH, device=torch.device("cpu")) as loader:
            for batch in loader.batches():
                assert batch.fbank is not None
                fbank = batch.fbank[:, :frames]
                made = torch.cat([fbank.mean(dim=1), fbank.std(dim=1), fbank.amax(dim=1), fbank.diff(dim=1).std(dim=1)],
                                 dim=1)  # fmt: skip
                parts.append(tuple(value[batch.valid].clone() for value in (batch.row, batch.targets, made)))
        rows, targets, made = (torch.cat(column) for column in zip(*parts, strict=True))
        two = made[:, : made.shape[1] // 2].contiguous()
        features = Features([{"rows": rows, "targets": (targets > 0.5).to(torch.uint8), "spec.1": two}])
        names = targets.argmax(dim=1).numpy()
        return {
            "mean, deviation: linear": self._linear(features, "spec", 1),
            "mean, deviation: SVM": self._svm(two.numpy(), names, rows.numpy()),
            "mean, deviation, maximum, deviation of differences: SVM": self._svm(made.numpy(), names, rows.numpy()),
        }

    def _svm(self, x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> list[int]:
        """An SVM with a Gaussian kernel: each fold in turn held out."""
        right = np.zeros(len(self.folds), np.int64)
        for one in by_folds(self.folds[rows], [], 0):
            rest, models = np.setdiff1d(one.train, one.chosen_on), []
            for cost in COSTS:
                model = make_pipeline(StandardScaler(), SVC(C=cost)).fit(x[rest], y[rest])
                models.append((model.score(x[one.chosen_on], y[one.chosen_on]), -cost))
            best = make_pipeline(StandardScaler(), SVC(C=-max(models)[1])).fit(x[one.train], y[one.train])
            right[rows[one.test]] = best.predict(x[one.test]) == y[one.test]
        return right.tolist()

    # Few labels

    def few(self, from_step: int) -> None:
        """Finetunings: few labels first, and one seed after the other."""
        shards = {seed: self._few_shards(seed) for seed in self.seeds}
        for count, epochs in self.table.epochs.items():
            for seed in self.seeds:
                for method in self.table.finetuned:
                    for name in ("", *self.table.rows):
                        folder = self.few_dir(name, method, count, seed, from_step)
                        if (folder / "results.json").exists() or not self.finetunes(name, method):
                            continue
                        made = self.checkpoint(name, from_step) if name else None
                        if made and not (made / "complete").exists():
                            say(f"{name}: not pretrained for {from_step} steps yet, --part curve does")
                            continue
                        settings = self.table.finetune | {
                            "data.shards": str(shards[seed]), "data.train_split": f"few{count}",
                            "data.eval_split": "eval", "finetune.method": method, "run.seed": seed,
                            "train.epochs": epochs, "run.dir": str(folder), "model.init": str(made or ""),
                        }  # fmt: skip
                        if self._launch(folder, "finetune.py", settings) is not None:
                            write_report(self)

    def few_dir(self, name: str, method: str, count: int, seed: int, from_step: int) -> Path:
        """Of a finetuning; no name: from random weights."""
        before = f"{name.lower()}-{from_step}" if name else "random"
        return self.out / "few" / f"{before}-{method}-{count}-{seed}"

    def finetunes(self, name: str, method: str) -> bool:
        """Whether a method of finetuning reads what a pretraining has learned to embed."""
        method_of = self.table.rows[name]["pretrain.method"] if name else ""
        return not name or not mismatch(PRETRAIN[method_of], FINETUNE[method])

    def _few_shards(self, seed: int) -> Path:
        """A split for each number of labelled clips a class, drawn by `seed`; fold 5 is "eval"."""
        rows = [["path", "labels", "split"]]
        rows += [[source, f"class {label[0]}", "eval"] for source, label, fold in self._clips if fold == HELD_OUT]
        training: dict[int, list[str]] = {}
        for source, labels, fold in sorted(self._clips):
            if fold != HELD_OUT:
                training.setdefault(labels[0], []).append(source)
        for label, sources in training.items():
            order = np.random.default_rng([seed, label]).permutation(len(sources))
            for count in self.table.epochs:  # the fewer are among the more
                rows += [[sources[i], f"class {label}", f"few{count}"] for i in order[:count]]
        table = self.out / f"few-{'-'.join(map(str, self.table.epochs))}-seed{seed}.csv"
        write_csv(table, rows)
        return self._build(table.stem, lambda: catalogs.table(self._esc50, table, None, None))


def _children() -> float:
    """CPU seconds of the processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def say(line: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def read_table(path: Path) -> Table:
    """A file like small_scale.yaml.

    Raises:
        UserError: it cannot be read, or is none.
    """
    content = read_yaml(path, "small_scale.yaml is an example")
    try:
        return Table.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "small_scale.lock").open("ab") as file:
        if not lock(file.fileno(), wait=False):
            raise UserError(f"--out {out}: another small_scale.py works there; wait for it or give another --out")
        yield


def main() -> int:
    """Parses, runs what is missing, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    data = Path(os.environ.get("CRAFT_SHARED", ROOT.parent / "shared")) / "data" / "esc50"
    add("--part", choices=("all", "curve", "few", "cost", "report"), default="all", help="see above (default: all)")
    add("--steps", type=int, nargs="+", default=[1000, 3000, 10000], metavar="N",
        help="of pretraining (default: 1000 3000 10000)")  # fmt: skip
    add("--from-step", type=int, default=3000, metavar="N", help="few: of the pretrainings (default: 3000)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add("--esc50", type=Path, default=data, metavar="DIR", help="audio/ and meta/ of ESC-50 (default: of CRAFT_SHARED)")
    add("--out", type=Path, default=Path("runs/small_scale"), metavar="DIR", help="(default: runs/small_scale)")
    add("--table", type=Path, default=HERE / "small_scale.yaml", metavar="FILE", help="(default: small_scale.yaml)")
    args = parser.parse_args()
    if not (args.esc50 / "meta" / "esc50.csv").is_file():
        raise UserError(f"--esc50 {args.esc50}: holds no meta/esc50.csv; give the directory of ESC-50")
    if min(*args.steps, args.from_step) < 1:
        raise UserError(f"--steps {args.steps} --from-step {args.from_step}: give 1 or more")
    table = read_table(args.table)
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    out = args.out.resolve()  # launchers run elsewhere
    with _alone(out):
        try:
            evidence = Evidence(table, args.esc50.resolve(), out, args.seeds, args.steps)
            if args.part in ("all", "curve"):
                evidence.curve()
            if args.part in ("all", "few"):
                evidence.few(args.from_step)
            if args.part in ("all", "cost"):
                evidence.cost()
        except KeyboardInterrupt:
            say("the same command goes on from here")
            return 130
        write_report(evidence)
    print((out / "tables.md").read_text(encoding="utf-8"), flush=True)
    return 1 if evidence.failed else 0


if __name__ == "__main__":
    run_cli(main)
