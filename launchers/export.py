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
from pipeline.files import user_path

FORMATS = {"safetensors": "model.safetensors", "hf": "hf", "onnx": "model.onnx"}  # name in RUN_DIR/export


def main() -> None:
    """Parses, writes, says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="RUN_DIR", help="a run")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--out", metavar="PATH", help="where (default: in RUN_DIR/export)")
    parser.add_argument("--last", action="store_true", help="the last weights, not the averaged ones (default: off)")
    args = parser.parse_args()
    from pipeline import export  # torch: not for --help

    writers = {"safetensors": export.export_safetensors, "hf": export.export_hf, "onnx": export.export_onnx}
    run_dir = user_path(args.checkpoint, "--checkpoint")
    out = run_dir / export.EXPORTS / FORMATS[args.format] if args.out is None else user_path(args.out, "--out")
    export.check_place(run_dir, out, directory=args.format == "hf")
    held = writers[args.format](export.open_exported(run_dir, average=not args.last), out)
    sys.stdout.write(f"{out}: {held}\n")


if __name__ == "__main__":
    run_cli(main)
