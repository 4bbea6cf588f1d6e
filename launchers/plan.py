"""What a run will need on a cluster: memory, batch, FLOPs, bandwidth, time. No GPU, data or launcher needed.

    python launchers/plan.py --gpus 64 --gpu-memory 80 [--nodes 8] [--finetune] [key=value ...]

In: the settings of a run. Out: a report. The model is run once on fake tensors, so memory, FLOPs and kernels are
those of the code. A GPU's rate is measured (--clips-per-second, or --run of an earlier run) or assumed. A step takes
max(compute, launch floor) + exposed traffic: the host needs 34 us for each kernel, and what the backward passes
cannot hide is waited for.
"""

import argparse
import json
import math
from typing import TYPE_CHECKING

from pipeline.command_line import new_parser, path_of
from pipeline.config import FinetuneRecipe, PretrainRecipe
from pipeline.errors import UserError, run_cli
from pipeline.files import read_json
from pipeline.methods import FINETUNE, PRETRAIN, Reads
from pipeline.recipes import load_recipe

if TYPE_CHECKING:
    from pipeline.engine.plan import Cost, Shape


def main() -> None:
    """Parses, plans, prints."""
    args = _arguments()
    from pipeline.engine import plan  # torch: not for --help

    kind: type[PretrainRecipe | FinetuneRecipe] = FinetuneRecipe if args.finetune else PretrainRecipe
    recipe = load_recipe(kind, args.config, args.settings)
    shape, clips = _data(recipe)
    contrast = 0
    method: Reads
    if isinstance(recipe, FinetuneRecipe):
        method = FINETUNE[recipe.finetune.method]
    else:
        method = PRETRAIN[recipe.pretrain.method]
        both_ways = recipe.pretrain.symmetric or recipe.pretrain.negatives == "both"
        contrast = method.contrast * (2 if both_ways else 1)
    cost = plan.record(recipe, shape, args.precision)
    batch = _batch(recipe, args.gpus)
    teacher = f" and a teacher's {cost.teacher / 1e6:.2f}" if cost.teacher else ""
    print(f"{method.label}, {recipe.model.size}: {cost.parameters / 1e6:.2f} M parameters{teacher}, {args.precision}; "
          f"{args.gpus} GPUs of {args.gpu_memory:g} GB, {args.nodes} x {args.gpus // args.nodes}")  # fmt: skip
    if recipe.data.seconds:
        print("all figures are of inputs as long as the shards' clips; those of data.seconds cost less")
    wanted = recipe.train.micro_batch
    _print_memory(cost, args.gpus, batch, args.gpu_memory, wanted)
    rate = _rate(args, cost)
    per_clip = _read(recipe, method, shape)
    print(f"\ncompute    {cost.flops / 1e9:.1f} GFLOP a clip, {cost.flops * batch / 1e12:.1f} TFLOP a step of {batch} "
          "clips (forward and backward)")  # fmt: skip
    steps = recipe.train.steps or recipe.train.epochs * clips / batch
    link = _link(args, args.gpus)
    named = "--link, between nodes" if args.nodes > 1 else "--nvlink, within a node"
    print(f"link       {link / 1e9:g} GB/s a GPU and direction ({named})")
    best = 0.0
    for stage in _stages(cost):
        accumulation = _accumulation(cost, stage, args.gpus, batch, args.gpu_memory, wanted)
        sent = plan.traffic(cost, stage, args.gpus, batch, contrast, accumulation)
        took = plan.step_time(cost, stage, args.gpus, batch, contrast, accumulation, rate * cost.flops, link)
        best = max(best, batch / took.total)
        parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sent.items())
        micro = batch // args.gpus // accumulation
        print(f"\nZeRO {stage}     micro-batch {micro} x {accumulation}: {took.total:.3f} s a step "
              f"= max(compute {took.compute:.3f}, launch floor {took.floor:.3f}) + exposed traffic "
              f"{took.exposed:.3f}")  # fmt: skip
        if accumulation > 1 and contrast:
            print("           GradCache: another forward pass of each micro-batch, "
                  f"{cost.pooled_flops / 1e9:.1f} GFLOP a clip, {cost.pooled_flops / cost.flops:.0%} more")  # fmt: skip
        print(f"traffic    {sum(sent.values()) / 1e6:.0f} MB a GPU and step ({parts})")
        hours = steps * took.total / 3600
        print(f"time       {batch / took.total * 3600:,.0f} clips an hour; {steps:,.0f} steps on {clips:,} clips: "
              f"{hours:.1f} h, {hours * args.gpus:.0f} GPU hours")  # fmt: skip
        print(f"gain       {_gain(args, cost, stage, batch, contrast, rate * cost.flops, wanted)}")
    print(f"\nshards     {best * per_clip / 1e6:.0f} MB/s in all, {best * per_clip / args.nodes / 1e6:.0f} MB/s a node "
          f"({per_clip / 1e3:.0f} kB a clip)")  # fmt: skip


def _link(args: argparse.Namespace, gpus: int) -> float:
    """Bytes a second that a GPU sends over the slowest link of a ring of so many."""
    return float((args.link if gpus > args.gpus // args.nodes else args.nvlink) * 1e9)


def _read(recipe: PretrainRecipe | FinetuneRecipe, method: Reads, shape: "Shape") -> float:
    """Bytes of the shards that a clip of a batch takes, as the loader reads them."""
    from pipeline.data.augment import changes_waveform
    from pipeline.engine.plan import clip_bytes

    computed = recipe.data.fbank == "online" or (recipe.data.fbank == "auto" and changes_waveform(recipe.augment))
    own = clip_bytes(shape, method.wav or computed, method.spec and not computed)
    return own + recipe.augment.mixup * clip_bytes(shape, True, False)  # mixup's other clips


def _accumulation(cost: "Cost", stage: int, gpus: int, batch: int, gigabytes: float, wanted: int) -> int:
    """Micro-batches of `wanted` clips, where it divides; else the fewest that fit, and where none does, of one clip."""
    from pipeline.engine import plan

    share = batch // gpus
    if wanted and share % wanted == 0:
        return share // wanted
    fitting = (share // micro for micro in range(share, 0, -1)
               if share % micro == 0 and plan.memory(cost, stage, gpus, micro).total <= plan.ROOM * gigabytes * 1e9)
    return next(fitting, share)


def _gain(
    args: argparse.Namespace, cost: "Cost", stage: int, batch: int, contrast: int, sustained: float, wanted: int
) -> str:
    """From how many GPUs on a step of this batch is more launch floor and traffic than computation."""
    from pipeline.engine import plan

    node = args.gpus // args.nodes
    for gpus in (gpus for gpus in range(1, batch + 1) if batch % gpus == 0):
        accumulation = _accumulation(cost, stage, gpus, batch, args.gpu_memory, wanted)
        link = _link(args, gpus)
        took = plan.step_time(cost, stage, gpus, batch, contrast, accumulation, sustained, link)
        if took.compute < took.total / 2:
            return (f"from {gpus} GPUs on ({node} a node), more of a step of {batch} clips is launch floor and traffic "
                    f"than computation ({took.compute:.3f} of {took.total:.3f} s)")  # fmt: skip
    return f"computation is the larger part of a step of {batch} clips on any number of GPUs up to {batch}"


def _arguments() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--gpus", type=int, required=True, metavar="R", help="GPUs in all")
    add("--gpu-memory", type=float, required=True, metavar="GB", help="of one GPU")
    add("--nodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    add("--finetune", action="store_true", help="plan finetune.py (default: pretrain.py)")
    add("--precision", choices=["bf16", "fp16", "fp32"], default="bf16", help="(default: bf16)")
    add("--clips-per-second", type=float, metavar="X", help="measured, of one GPU (default: assumed)")
    add("--run", type=path_of("--run"), metavar="RUN_DIR", help="take it from this run (default: assumed)")
    add("--tflops", type=float, default=312.0, metavar="X", help="a GPU at its peak (default: 312)")
    add("--mfu", type=float, default=0.3, metavar="X", help="share of it, assumed (default: 0.3)")
    add("--link", type=float, default=50.0, metavar="GB/S", help="a GPU's share of the network between nodes, one "
        "direction (default: 50, that is 400 Gb/s)")  # fmt: skip
    add("--nvlink", type=float, default=300.0, metavar="GB/S", help="of a GPU to others of its node, one direction "
        "(default: 300, what nccl reaches of NVLink 4's 450)")  # fmt: skip
    add("--config", action="append", default=[], metavar="YAML", help="overrides (default: none)")
    add("settings", nargs="*", metavar="key=value", help="settings of the run (default: none)")
    args = parser.parse_intermixed_args()
    if min(args.gpus, args.nodes) < 1 or args.gpus % args.nodes:
        raise UserError(f"--gpus {args.gpus} --nodes {args.nodes}: give equally many GPUs on each node")
    for name in ("gpu_memory", "clips_per_second", "tflops", "mfu", "link", "nvlink"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number above 0")
    return args


def _data(recipe: PretrainRecipe | FinetuneRecipe) -> tuple["Shape", int]:
    """Audio format and training clips of an epoch: of the shards without the fold held out, else AudioSet's."""
    from pipeline.data.corpus import load_corpus
    from pipeline.data.manifest import load_index
    from pipeline.data.spec import DataSpec
    from pipeline.engine.plan import Shape

    data = recipe.data
    if not data.shards:
        balanced = isinstance(recipe, FinetuneRecipe) and "unbalanced" not in data.train_split.split(",")
        return Shape(), data.epoch_clips or (20_000 if balanced else 2_000_000)
    corpus = load_corpus(data)
    spec = DataSpec.of(corpus, data)
    clips = sum(member.clips for member in corpus.members)
    if data.fold:
        clips -= sum(len(load_index(member.location, split, [data.fold], ["fold"]))
                     for member in corpus.members for split in member.train)  # fmt: skip
    return Shape(spec.samples, spec.mel_bins, spec.frames, len(spec.labels)), data.epoch_clips or clips


def _batch(recipe: PretrainRecipe | FinetuneRecipe, gpus: int) -> int:
    """The recipe's batch, or the nearest that divides, with a word on it.

    Raises:
        UserError: it divides, but not into the recipe's micro-batches.
    """
    from pipeline.engine.setup import nearest_batches, plan_batches

    total = recipe.train.batch_size
    try:
        plan_batches(recipe, {}, gpus)
        print(f"batch      {total} clips: {total // gpus} a GPU")
        return total
    except UserError as error:
        if total % gpus == 0:
            raise
        sizes, ranks = nearest_batches(total, gpus)
        print(f"batch      {error}")
        print(f"           planned with {sizes[0]}: {sizes[0] // gpus} a GPU; {total} itself runs on "
              f"{' or '.join(map(str, ranks))} GPUs")  # fmt: skip
        return sizes[0]


def _print_memory(cost: "Cost", gpus: int, batch: int, gigabytes: float, wanted: int) -> None:
    from pipeline.engine import plan

    share = batch // gpus
    micros = [micro for micro in range(share, 0, -1) if share % micro == 0]
    micros = [micro for number, micro in enumerate(micros) if number < 5 or micro in (1, wanted)]
    print("\nmemory     GB a GPU, by micro-batch (x accumulation); * does not fit")
    print(" " * 11 + "ZeRO  states " + "".join(f"{f'{micro} (x {share // micro})':>12s}" for micro in micros))
    for stage in _stages(cost):
        cells = []
        for micro in micros:
            need = plan.memory(cost, stage, gpus, micro)
            cells.append(f"{need.total / 1e9:10.2f}{' ' if need.total <= plan.ROOM * gigabytes * 1e9 else '*'} ")
        states = plan.memory(cost, stage, gpus, 0)
        print(f"           {stage:4d}{states.total / 1e9:8.2f} " + "".join(cells))


def _stages(cost: "Cost") -> list[int]:
    """ZeRO stages; half precision has no stage 0 here."""
    return [1, 2, 3] if cost.half else [0, 1, 2, 3]


def _rate(args: argparse.Namespace, cost: "Cost") -> float:
    """Clips a second of one GPU."""
    if args.clips_per_second:
        print(f"\nrate       {args.clips_per_second:g} clips/s a GPU, as given")
        return float(args.clips_per_second)
    if args.run:
        try:
            lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
            rates = sorted(float(line["clips_per_second"]) for line in lines if "clips_per_second" in line)
        except OSError as error:
            raise UserError(f"--run {args.run}: {error.strerror}: {error.filename}; give a run directory") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"--run {args.run}: metrics.jsonl: {error}; give another run") from error
        ds = read_json(args.run / "ds.json", "give a run directory")
        if not rates:
            raise UserError(f"--run {args.run}: its metrics.jsonl has no clips_per_second yet")
        share = ds["train_micro_batch_size_per_gpu"] * ds["gradient_accumulation_steps"]
        size = ds["train_batch_size"] // share
        print(f"\nrate       {rates[len(rates) // 2] / size:.2f} clips/s a GPU: the median of {args.run} on {size}")
        return float(rates[len(rates) // 2] / size)
    rate = args.tflops * 1e12 * args.mfu / cost.flops
    print(f"\nrate       {rate:.1f} clips/s a GPU, assumed: {args.mfu:.0%} of {args.tflops:g} TFLOP/s")
    return float(rate)


if __name__ == "__main__":
    run_cli(main)
