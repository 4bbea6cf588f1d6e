"""What global batch K of a run is: its clips in global order, what happened to them, and a hash of every tensor.

    python -m pipeline.data.show --shards DIR --batch K [--batch-size B] [--ranks R] [--workers W] [--json]
        [--png FILE] [--config RUN_DIR/config.yaml] [key=value ...]

In: shards and the settings of a run. Out: a table, JSON or a picture of the batch.

R processes are started, each with W reader processes, and each makes its own share of the batch as training does.
The text is the same for any R and W, or something is wrong: two runs that should see the same clips can be
compared by it, on other machines too.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
import tempfile
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pipeline.config import FinetuneRecipe, PretrainRecipe, Recipe
from pipeline.data.augment import describe
from pipeline.data.loader import Loader
from pipeline.errors import UserError, run_cli
from pipeline.files import check_output_file, new_file, user_path
from pipeline.recipes import load_recipe

TENSORS = ("position", "row", "valid", "waveform", "fbank", "targets")
PICTURES = 24  # clips in the PNG
WRAP = 64  # letters of a line above a picture


def open_loader(recipe: Recipe, rank: int, ranks: int, workers: int) -> Loader:
    """The training loader of a rank, on the CPU; of the recipe, data, augment, run.seed and train.batch_size matter."""
    data = recipe.data.model_copy(update={"workers": workers})
    size, seed = recipe.train.batch_size, recipe.run.seed
    return Loader(data, augment=recipe.augment, batch_size=size, seed=seed, rank=rank, world_size=ranks)


def global_batch(recipe: Recipe, step: int, ranks: int, workers: int) -> dict[str, np.ndarray]:
    """Batch `step`, read by `ranks` processes with `workers` readers each, in global order: name -> array [G, ...].

    Raises:
        UserError: what a rank said.
        RuntimeError: a rank died, or its clips are not those of its positions.
    """
    context = multiprocessing.get_context("spawn")
    size = recipe.train.batch_size
    if size % ranks:
        raise UserError(f"--ranks {ranks}: a batch of {size} clips does not divide by it; see --batch-size")
    with tempfile.TemporaryDirectory() as folder:
        words = (recipe, step, ranks, workers, folder)
        processes = [context.Process(target=_rank, args=(rank, *words)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        for said in sorted(Path(folder).glob("*.error")):
            raise UserError(said.read_text(encoding="utf-8"))
        for rank, process in enumerate(processes):
            if process.exitcode:
                raise RuntimeError(f"rank {rank} of {ranks} ended with status {process.exitcode}")
        whole = {}
        for name in TENSORS:
            parts = [np.load(Path(folder) / f"{rank}.{name}.npy") for rank in range(ranks)]
            whole[name] = np.stack(parts, axis=1).reshape(size, *parts[0].shape[1:])  # rank r holds r, r + R, ...
    if not np.array_equal(whole["position"], step * size + np.arange(size)):
        raise RuntimeError(f"{ranks} ranks read positions {whole['position'].tolist()}")
    return whole


def _rank(rank: int, recipe: Recipe, step: int, ranks: int, workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    try:
        with open_loader(recipe, rank, ranks, workers) as loader:
            batch = next(loader.batches(step))
    except UserError as error:
        (Path(folder) / f"{rank}.error").write_text(str(error), encoding="utf-8")
        return
    for name in TENSORS:
        np.save(Path(folder) / f"{rank}.{name}.npy", getattr(batch, name).numpy())


def explain(recipe: Recipe, step: int, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """The batch in words and hashes, ready for JSON; nothing in it depends on ranks or workers."""
    with open_loader(recipe, 0, 1, 0) as loader:
        draw, spec, epoch = loader.draw(step), loader.spec, loader.clips
        names, planned = loader.names(batch["row"].tolist()), loader.keys(draw.rows.tolist())
        partners = loader.keys(draw.partners.tolist())
    position, frames = torch.from_numpy(draw.position), batch["fbank"].shape[1]
    augmented = describe(recipe.augment, recipe.run.seed, position, spec, frames)
    clips = []
    for i, (key, shard) in enumerate(names):
        done = augmented[i]
        if draw.mixed[i] and partners[i] != planned[i]:
            done = {"mixup": {"key": partners[i], "weight": round(float(draw.weight[i]), 6)}} | done
        targets = batch["targets"][i]
        labels = {spec.labels[c].name: round(float(targets[c]), 6) for c in targets.nonzero()[0]}
        clip = {"position": int(draw.position[i]), "epoch": int(draw.position[i]) // epoch, "key": key, "shard": shard}
        if key != planned[i]:
            clip["in_place_of"] = planned[i]
        clips.append(clip | {"labels": labels, "augmentation": done})
    return {
        "batch": step,
        "batch_size": recipe.train.batch_size,
        "seed": recipe.run.seed,
        "sampler": recipe.data.sampler,
        "split": recipe.data.train_split,
        "fold": recipe.data.fold,
        "manifest": spec.digest,
        "clips_of_an_epoch": epoch,
        "tensors": {
            name: {
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                "sha256": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(),
            }
            for name, array in batch.items()
        },
        "clips": clips,
    }


def table(content: dict[str, Any]) -> str:
    """The explanation as lines for people."""
    clips = content["clips"]
    lines = [
        f"batch {content['batch']} of {content['batch_size']} clips: positions {clips[0]['position']} to "
        f"{clips[-1]['position']}, epoch {clips[0]['epoch']} to {clips[-1]['epoch']}; {content['clips_of_an_epoch']} "
        f"clips an epoch, sampler {content['sampler']}, seed {content['seed']}"
    ]
    width = max(len(clip["key"]) for clip in clips)
    for clip in clips:
        labels = ", ".join(name if weight == 1 else f"{name} {weight:.2f}" for name, weight in clip["labels"].items())
        line = f"{clip['position']:>10d}  {clip['key']:{width}s}  {clip['shard']}  {labels}"
        if clip["augmentation"]:
            line += f"  [{_words(clip['augmentation'])}]"
        if "in_place_of" in clip:
            line += f"  (for {clip['in_place_of']}, which cannot be read)"
        lines.append(line)
    for name, tensor in content["tensors"].items():
        lines.append(f"{name:10s} {tensor['dtype']:8s} {tensor['shape']!s:18s} sha256 {tensor['sha256']}")
    return "\n".join(lines) + "\n"


def _words(done: dict[str, Any]) -> str:
    said = []
    if "mixup" in done:
        said.append(f"{1 - done['mixup']['weight']:.2f} of {done['mixup']['key']}")
    if "roll_seconds" in done:
        said.append(f"roll {done['roll_seconds']:+.3f} s")
    if "noise_level" in done:
        said.append(f"noise {done['noise_level']:.3f}")
    if "noise_snr" in done:
        said.append(f"noise at {done['noise_snr']:.1f} dB")
    for name, unit in (("freq_mask", "bins"), ("time_mask", "frames")):
        if name in done:
            first, count = done[name]
            said.append(f"no {unit} {first}-{first + count - 1}" if count else f"no {unit} masked")
    return ", ".join(said)


def draw_picture(content: dict[str, Any], batch: dict[str, np.ndarray], file: Path) -> None:
    """A picture: waveform over fbank for each of the first clips."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = content["clips"][:PICTURES]
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(4.2 * across, 2.9 * down + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2 * down, across, squeeze=False, height_ratios=[1, 2] * down)
    figure.suptitle(
        f"batch {content['batch']}: {len(shown)} of {content['batch_size']} clips, normalised fbank "
        f"{content['tensors']['fbank']['sha256'][:12]}, waveform {content['tensors']['waveform']['sha256'][:12]}"
    )
    for axis in grid.ravel():
        axis.set_visible(False)
    for i, clip in enumerate(shown):
        wave, spectrum = grid[2 * (i // across), i % across], grid[2 * (i // across) + 1, i % across]
        labels = ", ".join(f"{name} {weight:.2f}" if weight < 1 else name for name, weight in clip["labels"].items())
        lines = [f"{clip['position']}: {clip['key']}", *textwrap.wrap(labels, WRAP)]
        lines += textwrap.wrap(_words(clip["augmentation"]), WRAP)
        wave.set_title("\n".join(lines), fontsize=6, parse_math=False)
        wave.plot(batch["waveform"][i], linewidth=0.3)
        wave.set(xlim=(0, batch["waveform"].shape[1]), xticks=[])
        spectrum.imshow(batch["fbank"][i].T, origin="lower", aspect="auto", vmin=-2, vmax=2, interpolation="nearest")
        spectrum.set(xlabel="frame", ylabel="mel bin")
        for axis in (wave, spectrum):
            axis.set_visible(True)
            axis.tick_params(labelsize=6)
            axis.xaxis.label.set_size(6)
            axis.yaxis.label.set_size(6)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as made:
            figure.savefig(made, dpi=100, format=file.suffix.removeprefix(".") or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"--png {file}: {error}; name a .png file that can be written") from error


def _recipe(args: argparse.Namespace) -> Recipe:
    words = [*args.settings, *([f"data.shards={args.shards}"] if args.shards else [])]
    if args.batch_size is not None:
        words.append(f"train.batch_size={args.batch_size}")
    kinds = {word.partition(".")[0] for word in words}
    for file in args.config:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        kinds |= content.keys() if isinstance(content, dict) else set()
    return load_recipe(FinetuneRecipe if "finetune" in kinds else PretrainRecipe, args.config, words)


def main() -> None:
    """Reads the batch and says what it is.

    Raises:
        UserError: wrong settings or shards.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", metavar="DIR", help="shards, as data.shards (default: those of --config)")
    parser.add_argument("--batch", required=True, type=int, metavar="K", help="number of the batch, from 0")
    parser.add_argument("--batch-size", type=int, metavar="B", help="clips of the global batch (default: the recipe's)")
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="processes (default: 1)")
    parser.add_argument("--workers", type=int, default=0, metavar="W", help="reader processes of each (default: 0)")
    parser.add_argument("--json", action="store_true", help="JSON with a sha256 of every tensor (default: a table)")
    parser.add_argument("--png", type=partial(user_path, what="--png"), metavar="FILE",
                        help="draw the first clips (default: no picture)")  # fmt: skip
    parser.add_argument("--config", action="append", default=[], type=partial(user_path, what="--config"),
                        metavar="YAML", help="a run's config.yaml, or any recipe")  # fmt: skip
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, e.g. data.sampler=balanced")
    args = parser.parse_intermixed_args()
    for name, least in (("batch", 0), ("ranks", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: at least {least}")
    if args.png:
        check_output_file(args.png, "--png")
    recipe = _recipe(args)
    if not recipe.data.shards:
        raise UserError("no shards are named; give --shards DIR, or the --config of a run")
    batch = global_batch(recipe, args.batch, args.ranks, args.workers)
    content = explain(recipe, args.batch, batch)
    if args.png:
        draw_picture(content, batch, args.png)
    sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n" if args.json else table(content))


if __name__ == "__main__":
    run_cli(main)
