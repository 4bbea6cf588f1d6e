"""Frozen features of a model in training, probed at its evaluations: whether pretraining learns.

In: the model as it is, through its engine; a small labelled shard directory. Out: metrics of a kNN and a linear probe
on the spectrogram's tokens, the waveform's and both, "time_frequency", last layer.

Rank r encodes the r-th run of neighbouring batches, always of `BATCH` clips and equally many on each rank (the last one
again where there are fewer: under ZeRO-3 a forward pass is a collective), and all gather them, in the order of the
index. So for equal weights the numbers are the same on any ranks. Rank 0 trains the probes while the others wait.
Clips are cut or zero-padded to the run's length, or to that of `data.seconds` which holds them. Cost, at a probe: a
forward pass of n clips over R ranks, one gather of n / R vectors a rank, n x 2 f D x 4 bytes on each host (200 MB for
2,000 clips of base), six fits a probe and stream.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipeline import distributed
from pipeline.config import PretrainRecipe
from pipeline.data.loader import Loader
from pipeline.data.manifest import load_index, load_manifest
from pipeline.data.spec import DataSpec
from pipeline.distributed import World
from pipeline.engine.job import Job
from pipeline.errors import UserError
from pipeline.flow import Encoded
from pipeline.methods import Reads
from pipeline.model.heads import row_means
from pipeline.probing.features import BATCH, Features
from pipeline.probing.probes import Probe
from pipeline.probing.protocol import by_folds, by_seeds, judge_once

PROBES: tuple[Probe, ...] = ("knn", "linear")


class Curve:
    """The probes of `eval.probe`: trained on split "train" and tested on "eval", or where there are folds and no such
    split, tested on the last fold.

    Args:
        recipe: Settings of the pretraining.
        spec: Its data: the clips are normalised and as long as in training.
        reads: Which representations the model reads.
        world: Ranks.

    Raises:
        UserError: shards that cannot be read, of another format, without labels, split or folds, or not the same on all
            ranks.
    """  # noqa: D205

    def __init__(self, recipe: PretrainRecipe, spec: DataSpec, reads: Reads, world: World) -> None:
        shards, config = recipe.eval.probe, recipe.eval
        manifest = load_manifest(shards)
        distributed.check_same({"eval.probe's digest": manifest.digest[:16]}, "give all hosts the same shards")
        found = (manifest.audio.sample_rate, manifest.fbank.mel_bins)
        if found != (spec.sample_rate, spec.mel_bins):
            raise UserError(
                f"eval.probe = {shards}: {found[0]} Hz and {found[1]} mel bins, but the run has {spec.sample_rate} and "
                f"{spec.mel_bins}; rebuild the shards with that format"
            )
        if not manifest.labels or "train" not in manifest.splits:
            raise UserError(f"eval.probe = {shards}: labels and a split 'train' are needed; it has "
                            f"{len(manifest.labels)} labels, splits {', '.join(manifest.splits)}")  # fmt: skip
        self._splits = ["train", "eval"] if "eval" in manifest.splits else ["train"]
        self._folds = np.zeros(0, np.int64)
        if len(self._splits) == 1:
            self._folds = load_index(shards, columns=["fold"])["fold"].to_numpy()
            by_folds(self._folds, [], 0)  # says that there are none
        self._single, self._limit, self._every = manifest.single_label, config.probe_clips, config.probe_every
        longest, whole = spec.samples / spec.sample_rate, manifest.audio.seconds
        seconds = tuple(length for length in spec.seconds if length < whole <= longest)
        self._data = recipe.data.model_copy(
            update={"shards": shards, "fold": 0, "mean": spec.mean, "std": spec.std, "seconds": seconds,
                    "frames": 0 if seconds else spec.frames, "train_split": "train", "eval_split": "train"}
        )  # fmt: skip
        self._reads, self._world = reads, world

    def due(self, job: Job, step: int) -> bool:
        """Whether the evaluation after `step` steps is probed: each `eval.probe_every`-th, and the last one."""
        if self._every == 1 or step == job.total_steps:
            return True
        return sum(map(job.evaluation_due, range(step))) % self._every == 0  # whatever was resumed in between

    def measure(self, forward: Callable[..., Any], grids: dict[str, tuple[int, int]]) -> dict[str, float]:
        """`probe_PROBE_STREAM` of each probe and stream, accuracy or mAP, equal on all ranks; a collective.

        Args:
            forward: The task, or the engine around it, in evaluation mode.
            grids: Patches of "spec" and "wav" along frequency and time.

        Raises:
            UserError: too many bad clips.
        """
        pieces = [self._encode(forward, grids, split) for split in self._splits]

        def judge() -> dict[str, float]:
            features = Features(pieces)
            if len(pieces) > 1:
                train = len(pieces[0]["rows"])
                (division,) = by_seeds(np.arange(train), np.arange(train, len(features.rows)), [0])
            else:
                folds = self._folds[features.rows]
                (division,) = by_folds(folds, [int(folds.max())], 0)
            streams = [stream for stream in ("spec", "wav") if f"{stream}.1" in pieces[0]]
            return {
                f"probe_{probe}_{stream}": judge_once(
                    features, division, probe, stream, [1], self._single, self._world.device
                )[0]["value"]
                for probe in PROBES
                for stream in [*streams, *(["both"] if len(streams) > 1 else [])]
            }

        return distributed.decide(judge)

    def _encode(
        self, forward: Callable[..., Any], grids: dict[str, tuple[int, int]], split: str
    ) -> dict[str, torch.Tensor]:
        """Rows, targets and features of a split, by row; on the host."""
        world, parts = self._world, []
        with Loader(
            self._data.model_copy(update={"eval_split": split}), "eval", waveform=self._reads.wav,
            fbank=self._reads.spec, batch_size=BATCH, device=world.device, limit=self._limit,
        ) as loader, torch.no_grad():  # fmt: skip
            share = -(-len(loader) // world.size)
            first = min(world.rank * share, len(loader) - 1)
            coming = loader.batches(first, min(first + share, len(loader)))
            batch = next(coming)
            for number in range(share):
                fresh = world.rank * share + number < len(loader)
                encoded: Encoded = forward(batch, tokens=True)
                both = {"spec": encoded.spec, "wav": encoded.wav}
                made = {f"{stream}.1": row_means(tokens[0].float(), grids[stream][0])
                        for stream, tokens in both.items() if tokens}  # fmt: skip
                made |= {"rows": batch.row, "targets": (batch.targets > 0.5).to(torch.uint8)}
                valid = distributed.gather((batch.valid & fresh).to(torch.uint8)).bool().cpu()
                parts.append({name: distributed.gather(value).cpu()[valid] for name, value in made.items()})
                batch = next(coming, batch)
            found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            loader.bad_clips.check(loader.clips - len(found["rows"]))
        order = found["rows"].argsort()
        return {name: value[order] for name, value in found.items()}
