"""Write a run's weights for other programs.

    python launchers/export.py --checkpoint RUN_DIR --format {safetensors,hf,onnx} [--out PATH]

In: a run directory of pretrain.py or finetune.py, of any ZeRO stage. Out: one safetensors file in float32; a
directory that ASTModel or ASTForAudioClassification of `transformers` loads (the spectrogram side); or an ONNX
graph for any batch (pip install 'craft-audio[onnx]'). Each appears whole or not at all, and replaces nothing but an
earlier file of that name, or a directory that --format hf made.
"""

import sys

from pipeline.command_line import new_parser, path_of
from pipeline.errors import run_cli

FORMATS = {"safetensors": "model.safetensors", "hf": "hf", "onnx": "model.onnx"}  # name in RUN_DIR/export


def main() -> None:
    """Parses, writes, says what was written."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, type=path_of("--checkpoint"), metavar="RUN_DIR", help="a run")
    add("--format", required=True, choices=FORMATS, help="what to write")
    add("--out", type=path_of("--out"), metavar="PATH", help="where (default: in RUN_DIR/export)")
    add("--last", action="store_true", help="the last weights, not the averaged ones (default: off)")
    args = parser.parse_args()
    from pipeline import export  # torch: not for --help

    writers = {"safetensors": export.export_safetensors, "hf": export.export_hf, "onnx": export.export_onnx}
    out = args.out or args.checkpoint / export.EXPORTS / FORMATS[args.format]
    export.check_place(args.checkpoint, out, directory=args.format == "hf")
    held = writers[args.format](export.open_exported(args.checkpoint, average=not args.last), out)
    sys.stdout.write(f"{out}: {held}\n")


if __name__ == "__main__":
    run_cli(main)
