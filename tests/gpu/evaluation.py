"""Evaluation: scores of a base model through the product's own path, and metrics of an AudioSet's worth of scores.

In: nothing. Out: clips/s of `score` in each precision; seconds of the metrics on the host, and that a subset of classes
is scikit-learn's to the last digits; an estimate of the interval's seconds, of a tenth of the classes.
"""

import importlib.util
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from pipeline import distributed
from pipeline.engine import evaluation
from pipeline.tasks import FinetuneTask
from tests.benchmarks.bench_step import batch_of
from tests.gpu.report import Check
from tests.gpu.steps import finetuning, shape_of

LABELS = 2.7  # of a clip, as AudioSet has them
LIMIT = 1e-9
COMPARED = 20  # classes


def run(check: Check) -> None:
    clips, classes = (500, 20) if check.small else (20_000, 527)
    rng = np.random.default_rng(0)
    targets = (rng.random((clips, classes)) < LABELS / classes).astype(np.float32)
    # Scores that know something; rounded, as those of bf16 are, so that some are equal.
    scores = np.round(rng.normal(size=targets.shape) + targets, 3).astype(np.float32)
    with check.part("metrics"):
        _metrics(check, scores, targets)
    with check.part("interval"):
        _interval(check, scores, targets)
    with distributed.session(300, seed=0), check.part("forward"):
        _forward(check)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _metrics(check: Check, scores: np.ndarray, targets: np.ndarray) -> None:
    size = " x ".join(map(str, scores.shape))
    found = evaluation.all_metrics(scores, targets, single_label=False)
    seconds = _seconds(lambda: evaluation.all_metrics(scores, targets, single_label=False))
    values = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    check.info("metrics", f"{seconds:.2f} s for {size} on the CPU, {torch.get_num_threads()} threads: {values}")
    if importlib.util.find_spec("sklearn") is None:
        check.info("metrics_equal", "none: scikit-learn is not installed")
        return
    from sklearn.metrics import average_precision_score, roc_auc_score

    own, truth = scores[:, :COMPARED], targets[:, :COMPARED]
    worst = 0.0
    for ours, theirs in ((evaluation.average_precision, average_precision_score), (evaluation.auc, roc_auc_score)):
        for column, value in enumerate(ours(own, truth)):
            worst = max(worst, abs(float(value) - float(theirs(truth[:, column], own[:, column]))))
    check.below("metrics_equal", worst, LIMIT)


def _interval(check: Check, scores: np.ndarray, targets: np.ndarray) -> None:
    """Its cost is in proportion to the classes."""
    classes, draws = scores.shape[1], evaluation.draws_for(scores.size)
    few = max(1, classes // 10)
    weights = evaluation.clip_weights(len(scores), draws, np.random.default_rng(0))
    seconds = _seconds(lambda: evaluation.weighted_metric(scores[:, :few], targets[:, :few] > 0.5, weights, "mAP"))
    check.info("interval", f"{seconds:.1f} s for {few} of {classes} classes and {draws} draws: "
                           f"{seconds * classes / few:.0f} s for all")  # fmt: skip


def _forward(check: Check) -> None:
    """Clips a second of `score`: forward passes, gathers and copies to the host; the network is finetuned SWaB's."""
    shape, clips, count = shape_of(check), *((4, 2) if check.small else (48, 10))
    task = FinetuneTask(finetuning(check, clips), shape.mel_bins, shape.frames, shape.classes, single_label=False)
    task = task.to(check.device).eval()
    batches = [batch_of(clips, shape, check.device)] * count
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    words = []
    try:
        for name in ("fp32", "TF32", "bf16"):
            torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
            torch.backends.cudnn.allow_tf32 = name != "fp32"
            task = task.to(torch.bfloat16 if name == "bf16" else torch.float32)
            evaluation.score(task, batches[:1])
            seconds = _seconds(partial(evaluation.score, task, batches))
            words.append(f"{name} {clips * count / seconds:.0f} clips/s")
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    check.info("score", f"{', '.join(words)}; batches of {clips}")
