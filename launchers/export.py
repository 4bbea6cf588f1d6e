"""Write a run's weights for other programs.

    python launchers/export.py --checkpoint RUN_DIR --format {safetensors,hf,onnx} [--out PATH]

In: a run directory of pretrain.py or finetune.py, of any ZeRO stage. Out: one safetensors file in float32; a
directory that ASTModel or ASTForAudioClassification of `transformers` loads (the spectrogram side); or an ONNX
graph for any batch (pip install 'craft-audio[onnx]'). Each appears whole or not at all, and replaces nothing but an
earlier file of that name, or a directory that --format hf made.
"""

import argparse
import sys

from pipeline.errors import run_cli
from pipeline.export import EXPORTS, check_place, export_hf, export_onnx, export_safetensors, open_exported
from pipeline.files import user_path

FORMATS = {
    "safetensors": (export_safetensors, "model.safetensors"),
    "hf": (export_hf, "hf"),
    "onnx": (export_onnx, "model.onnx"),
}


def main() -> None:
    """Parses, writes, says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="RUN_DIR", help="a run")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--out", metavar="PATH", help="where (default: in RUN_DIR/export)")
    parser.add_argument("--last", action="store_true", help="the last weights, not the averaged ones (default: off)")
    args = parser.parse_args()
    write, name = FORMATS[args.format]
    run_dir = user_path(args.checkpoint, "--checkpoint")
    out = run_dir / EXPORTS / name if args.out is None else user_path(args.out, "--out")
    check_place(run_dir, out, directory=args.format == "hf")
    held = write(open_exported(run_dir, average=not args.last), out)
    sys.stdout.write(f"{out}: {held}\n")


if __name__ == "__main__":
    run_cli(main)
