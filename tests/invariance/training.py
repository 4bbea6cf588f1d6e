"""Rank program: what every method makes of the shards of former/ in 20 steps, a resumed run, and the runs of former/.

    training.py FOLDER

All in one process group. FOLDER gets a copy of former/, a run directory per name of `RUNS`, and
FOLDER/report.json: name -> the records of its steps, and what an evaluation gave.
"""

import gc
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.command_line import Launch, read_deepspeed_config
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.distributed import World
from pipeline.engine.evaluation import all_metrics
from pipeline.model import craft
from pipeline.model.weights import weights_file
from pipeline.recipes import load_recipe
from pipeline.runs import score_run
from pipeline.tracking import figures
from pipeline.train import finetune, pretrain
from tests.ranks import ROOT

FORMER = Path(__file__).with_name("former")
STEPS = 20

COMMON = [
    "data.shards=former/shards", "data.streams=2", "data.window=4", "data.workers=0", "train.batch_size=6",
    "model.size=micro", "model.patch=4", "model.stride=4", "model.channels=[6,5,5]", "model.kernels=[5,11,21]",
    "model.kernel_strides=[1,5,10]", "optim.lr=1e-4", "optim.warmup=4", "checkpoint.average=[0,0]",
    "eval.batch_size=4", "eval.every_epochs=0", "eval.every_clips=0",
    "log.every=1", "log.mlflow=false", "log.model=false", "log.pictures=0", "log.stragglers=0", "log.peak_tflops=null",
]  # fmt: skip
PRETRAIN = [*COMMON, "pretrain.clusters=[1,2]"]
FINETUNE = [*COMMON, "augment.freq_mask=4", "augment.time_mask=3", "finetune.bottlenecks=4"]
# Name -> DeepSpeed's file, a file of configs/, further words. A row of each method; options that change a path.
RUNS: dict[str, tuple[str, str, str]] = {
    "ssast": ("zero0.json", "", "pretrain.method=ssast"),
    "ssast, its code": ("zero1.json", "pretrain/ssast_original.yaml", ""),
    "wapt": ("zero1.json", "", "pretrain.method=wapt"),
    "swapt": ("zero2.json", "", "pretrain.method=swapt train.micro_batch=1"),
    "swacl": ("zero3.json", "pretrain/swacl180.yaml", "pretrain.r_cl=1.0"),
    "pswacl": ("ds.json", "", "pretrain.r_cl=1.0"),
    "pswacl, every option": (
        "zero3.json", "", "pretrain.r_cl=1.0 pretrain.symmetric=true pretrain.projection=mlp "
        "pretrain.clean_spectrogram=true pretrain.mask_waveform=true train.micro_batch=1"
    ),
    "pswacl, tokens": ("zero2.json", "", "pretrain.r_cl=1.0 pretrain.level=token pretrain.contrast=raw"),
    "pswacl, modern": ("zero0.json", "pretrain/modern.yaml", "train.micro_batch=1 model.norm=group"),
    "craft_mae": ("zero2.json", "pretrain/craft_mae.yaml", "pretrain.r_cl=1.0 train.micro_batch=1"),
    "craft_latent": (
        "zero3.json", "pretrain/craft_latent.yaml", "train.micro_batch=1 pretrain.teacher_decay=[0.5,0.9] "
        "pretrain.teacher_steps=0 pretrain.views=2"
    ),
    "craft_mosaic": ("zero3.json", "pretrain/craft_mosaic.yaml", "train.micro_batch=1"),
    "audio_mosaic": ("ds.json", "pretrain/audio_mosaic.yaml", ""),
    "ast": ("zero0.json", "", "finetune.method=ast finetune.pool=cls"),
    "wast": (
        "zero1.json", "finetune/audioset_full.yaml", "finetune.method=wast data.train_split=train train.micro_batch=1"
    ),
    "swast": ("zero2.json", "finetune/esc50.yaml", "finetune.method=swast finetune.head=mean_logits"),
    "swab": ("zero2.json", "", "train.micro_batch=1"),
    "swab, modern": ("zero3.json", "finetune/modern.yaml", "checkpoint.ema=0.9 checkpoint.ema_every=2"),
}  # fmt: skip
# From the checkpoint of which step; one between two averages.
RESUMED = {"pswacl, every option": 10, "craft_mae": 10, "craft_latent": 10, "craft_mosaic": 10, "swab, modern": 9}


def is_finetuning(name: str) -> bool:
    return RUNS[name][1].startswith("finetune/") or name.split(",")[0] in ("ast", "wast", "swast", "swab")


def run(finetuning: bool, ds: str, files: list[Path], words: list[str], world: World) -> None:
    """What the launchers do, in this group."""
    kind = FinetuneRecipe if finetuning else PretrainRecipe
    recipe = load_recipe(kind, files, [*(FINETUNE if finetuning else PRETRAIN), *words])
    distributed.seed_host(recipe.run.seed)
    launch: Any = Launch(recipe, read_deepspeed_config(ds))
    (finetune if finetuning else pretrain)(launch, world)
    gc.collect()  # the engine, before the next one


def train_one(name: str, place: str, world: World) -> None:
    ds, file, words = RUNS[name]
    files = [ROOT / "configs" / file] if file else []
    every = RESUMED.get(name, 0)
    words = f"{words} train.steps={STEPS} run.dir={place} checkpoint.every={every} checkpoint.keep=9"
    run(is_finetuning(name), ds, files, words.split(), world)


def of_the_machine(key: str) -> bool:
    """A number of metrics.jsonl that tells of speed."""
    return key in ("time", "clips_per_second", "data_wait_fraction", "mfu") or key.endswith("_seconds")


def records(run_dir: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without the numbers of the machine; those that held nothing else are left out."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if not of_the_machine(key)} for row in rows]
    return [row for row in kept if row.keys() > {"step"}]


def results(run_dir: Path) -> dict[str, float]:
    file = run_dir / "results.json"
    return json.loads(file.read_text())["metrics"] if file.exists() else {}


def shrink() -> None:
    """For rank programs, as it stays: a smaller "micro", as former/ shall be small files, and no picture of a run,
    which costs as much as its training.
    """
    craft.SIZES["micro"] = craft.Size(width=8, depth=2, heads=2)
    figures.curves = lambda *_: False


def main() -> None:
    shrink()
    os.chdir(sys.argv[1])
    report: dict[str, Path] = {}
    with distributed.session(300, seed=0) as world:
        if world.is_main:
            shutil.copytree(FORMER, "former")
        distributed.barrier()
        for number, name in enumerate(RUNS):
            train_one(name, f"runs/{number}", world)
            report[f"losses {name}"] = Path(f"runs/{number}")
            if name in RESUMED:
                if world.is_main:
                    shutil.copytree(f"runs/{number}", f"resumed/{number}")
                    for folder in Path(f"resumed/{number}/checkpoints").glob("step-*"):
                        if int(folder.name.removeprefix("step-")) > RESUMED[name]:
                            shutil.rmtree(folder)
                distributed.barrier()
                train_one(name, f"resumed/{number}", world)
                report[f"resumed {name}"] = Path(f"resumed/{number}")
        finetuned = Path("former/finetune")
        recipe = load_recipe(FinetuneRecipe, [finetuned / "config.yaml"], ["data.shards=former/shards"])
        scored = score_run(finetuned, weights_file(finetuned), recipe, world)
        found = all_metrics(scored.scores.logits, scored.scores.targets, scored.spec.single_label)
        before = results(finetuned)
        for name, ds in (("pretrain", "zero2.json"), ("finetune", "zero3.json")):
            run_dir = Path("former", name)
            run(name == "finetune", ds, [run_dir / "config.yaml"], ["train.steps=12", f"run.dir={run_dir}"], world)
            report[f"former {name}"] = run_dir
        if world.is_main:
            written = {name: [*records(folder), results(folder)] for name, folder in report.items()}
            written["former evaluated"] = [before, json.loads(json.dumps(found))]
            Path("report.json").write_text(json.dumps(written))
        distributed.barrier()


if __name__ == "__main__":
    main()
