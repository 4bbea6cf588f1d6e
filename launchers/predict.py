"""Label audio files with a finetuned run.

    python launchers/predict.py --checkpoint RUN_DIR AUDIO [AUDIO ...] [--top 5] [--json]

In: a run directory of finetune.py and audio files of any codec, rate and length (the first clip length
of each is heard). Out: the best labels with scores. A file that cannot be read is said on stderr
and makes the exit status 1; the others are labelled all the same.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from pipeline.data.fbank import fbank
from pipeline.data.loader import pad_frames
from pipeline.data.manifest import Label
from pipeline.data.spec import DataSpec
from pipeline.errors import run_cli
from pipeline.flow import Batch
from pipeline.jobs import load_finetuned
from pipeline.model.weights import weights_file
from pipeline.tasks import FinetuneTask
from shard_tools.decode import DecodeError, decode
from shard_tools.write import encode_waveform


def predict(task: FinetuneTask, spec: DataSpec, path: str, top: int) -> list[tuple[Label, float]]:
    """The best labels of one file: probabilities, softmax of single-label data, else a sigmoid each.

    The file goes the way of the shards: decoded, down-mixed, resampled, mean removed, rounded to int16.

    Raises:
        DecodeError: it cannot be read.
    """
    decoded = decode(path, 0.0, None, rate=spec.sample_rate, seconds=spec.samples / spec.sample_rate)
    stored, _ = encode_waveform(decoded, spec.samples)
    device = next(task.parameters()).device
    waveform = torch.from_numpy(stored).to(device).float()[None] / 32768
    features = pad_frames(fbank(waveform, spec.sample_rate, spec.mel_bins), spec.frames)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    targets = torch.zeros(1, len(spec.labels), device=device)
    batch = Batch(zero, zero, zero == 0, waveform, (features - spec.mean) / (2 * spec.std), targets)
    with torch.no_grad():
        logits = task(batch).logits[0]
    scores = logits.softmax(dim=0) if spec.single_label else logits.sigmoid()
    best = scores.topk(min(top, len(scores)))
    return [(spec.labels[i], score) for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def main() -> int:
    """Parses, predicts, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="RUN_DIR", help="a finetuned run")
    parser.add_argument("audio", nargs="+", metavar="AUDIO", help="audio files")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="labels per file (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a file (default: a table with bars)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task, spec = load_finetuned(args.checkpoint, weights_file(args.checkpoint), device)
    failed = 0
    for path in args.audio:
        try:
            best = predict(task, spec, path, args.top)
        except DecodeError as error:
            sys.stderr.write(f"{path}: {error}\n")
            failed += 1
            continue
        if args.json:
            labels = [{"label": label.name, "id": label.id, "score": round(score, 6)} for label, score in best]
            sys.stdout.write(json.dumps({"path": path, "labels": labels}, ensure_ascii=False) + "\n")
            continue
        sys.stdout.write(f"{path}\n")
        for label, score in best:
            sys.stdout.write(f"  {score:6.3f} {'#' * round(30 * score):30s} {label.name}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main)
