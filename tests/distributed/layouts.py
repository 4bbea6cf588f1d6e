"""Rank program: checkpoints from one layout (ranks, ZeRO stage, precision, offload) into another.

    layouts.py DIR ROUND OUT.json

Round 0 saves after two of four steps in every layout, and goes on from that checkpoint in a fresh engine.
Each later round takes every chain over in the layout that `CHAINS` gives it, and trains two more steps.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.config import CheckpointConfig, PretrainRecipe
from pipeline.distributed import World
from pipeline.engine import checkpoint, parts
from pipeline.engine.checkpoint import Checkpoints
from pipeline.engine.setup import build_engine, reconcile
from pipeline.engine.step import accumulate, update_teacher
from pipeline.recipes import load_recipe
from tests.distributed.gradients import COMMON, share_of, task_of

RANKS = (2, 1, 4, 2)
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
DIVIDED = {"stage3_param_persistence_threshold": 0}  # ZeRO 3 keeps no small weight whole: a teacher gathers them
# Per round: ZeRO stage, bf16, offload.
CHAINS: dict[str, list[tuple[int, bool, bool]]] = {
    "strided": [(2, False, False), (0, False, False), (3, False, False), (1, False, False)],
    "plain": [(3, False, False), (2, False, True), (0, False, False), (3, False, False)],
    "sinc": [(1, False, False), (3, False, False), (2, False, False), (0, False, False)],
    "plain too": [(0, False, False), (1, False, False), (1, False, False), (2, False, False)],
    "bf16": [(2, True, False), (1, True, False), (3, True, False), (1, True, False)],
    "bf16 too": [(1, True, False), (3, True, True), (2, True, False), (3, True, False)],
    "offload": [(3, False, True), (1, False, True), (2, False, True), (3, False, True)],
    "latent": [(2, False, False), (3, False, False), (1, False, False), (0, False, False)],
    "latent, bf16": [(3, True, False), (2, True, True), (3, True, False), (1, True, False)],
}
WORDS = {
    "strided": "model.frontend=strided model.wav_depth=1",
    "sinc": "model.frontend=sinc model.drop_path=0.3",
    "latent": "pretrain.method=craft_latent",
    "latent, bf16": "pretrain.method=craft_latent",
}


class Trainer:
    """An engine on the fixed global batch, fresh or from a checkpoint."""

    def __init__(self, chain: str, number: int, world: World, run_dir: Path | None) -> None:
        stage, bf16, offload = CHAINS[chain][number]
        recipe = load_recipe(PretrainRecipe, [], [*COMMON.split(), "optim.lr=1e-3", *WORDS.get(chain, "").split()])
        zero: dict[str, Any] = {"stage": stage, **(OFFLOAD if offload else {})}
        zero |= DIVIDED if "latent" in chain else {}
        ds, self.batches = reconcile({"zero_optimization": zero, "bf16": {"enabled": bf16}}, recipe, world)
        self.world, self.task, self.batch = world, task_of(recipe), share_of(world)
        state = checkpoint.read_state(run_dir) if run_dir else None
        weights = dict(checkpoint.stored(run_dir, state, "weights")) if run_dir and state else {}
        if weights:
            self.task.load_state_dict(weights)
        self.engine = build_engine(self.task, recipe, ds)
        self.step, self.mean = 0, parts.Mean(self.engine)
        if run_dir and state:
            checkpoint.restore(self.engine, run_dir, state, weights, world)
            self.mean.restore(checkpoint.stored(run_dir, state, "average"))
            self.step = state["step"]

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            named = accumulate(self.engine, self.task, self.batch, self.batches)
            self.engine.step()
            update_teacher(self.task, 0.5 + self.step / 10)
            self.mean.take(lambda mean, weights: mean.lerp_(weights, 0.3))
            self.step += 1
            losses.append(distributed.mean(named, self.world.device)["loss"])
        return losses

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, on rank 0's word."""
        weights = parts.full_weights(self.engine)
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        assert bool(weights) is self.world.is_main
        state = weights | parts.full_moments(self.engine, dict.fromkeys(parts.spread(self.engine), 0))
        average = parts.put_together(self.engine, self.mean.parts, dict.fromkeys(self.mean.parts, 0))
        state |= {f"average/{name}": mean for name, mean in average.items()}
        if self.task.teacher:
            state |= {f"teacher/model.{name}": weight.clone() for name, weight in self.task.teacher.weights.items()}
        return state

    def save(self, run_dir: Path) -> None:
        saver = Checkpoints(run_dir, CheckpointConfig(), self.world)
        saver.save(self.engine, {"step": self.step}, self.mean.parts)
        saver.finish()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def begin(chain: str, run_dir: Path, world: World) -> dict[str, Any]:
    straight = Trainer(chain, 0, world, None)
    first = straight.train(2)
    straight.save(run_dir)
    saved = straight.state()
    second = straight.train(2)
    resumed = Trainer(chain, 0, world, run_dir)
    restored = same(resumed.state(), saved)
    losses = resumed.train(2)
    ends = same(resumed.state(), straight.state())
    return {
        "restored": restored,
        "same_losses": losses == second,
        "same_end": ends,
        "losses": first,
        "straight": first + second + straight.train(4),
    }


def take_over(chain: str, number: int, run_dir: Path, world: World) -> dict[str, Any]:
    trainer = Trainer(chain, number, world, run_dir)
    found = trainer.state()
    kept = (("weights", ""), ("optimizer-*", ""), ("average", "average/"), ("teacher", "teacher/"))
    stored = {prefix + name: tensor for files, prefix in kept
              for name, tensor in checkpoint.stored(run_dir, checkpoint.read_state(run_dir), files)}  # fmt: skip
    report = {"restored": same(found, stored), "losses": trainer.train(2)}
    trainer.save(run_dir)
    return report


def main() -> None:
    folder, number, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    with distributed.session(300, seed=0) as world:
        report = {
            name: take_over(name, number, folder / name, world) if number else begin(name, folder / name, world)
            for name in CHAINS
        }
        if world.is_main:
            out.write_text(json.dumps(report, indent=1))
        distributed.barrier()


if __name__ == "__main__":
    main()
