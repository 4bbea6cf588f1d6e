"""Write a run's weights for other programs.

    python launchers/export.py --checkpoint RUN_DIR --format {safetensors,hf-craft,hf,onnx,onnx-waveform} [--out PATH]
    python launchers/export.py --checkpoint RUN_DIR --format hf-craft --push OWNER/NAME

In: a run directory of pretrain.py or finetune.py, of any ZeRO stage. Out:

    safetensors     one file in float32
    hf-craft        a directory that `transformers` loads with the code in it (trust_remote_code=True), and CRAFT
                    without: both representations, classifier, label names, feature extractor, model card
    hf              a directory that ASTModel or ASTForAudioClassification of `transformers` loads: the spectrogram side
    onnx            a graph from fbanks and waveforms, for any batch (pip install 'craft-audio[onnx]')
    onnx-waveform   the same with the fbank inside: from float samples at 16 kHz to logits and probabilities

Each appears whole or not at all, and replaces nothing but an earlier file of that name, or a directory that this made.
--push makes OWNER/NAME on the Hugging Face hub, private, where it is not yet there (pip install 'craft-audio[hf]'; the
token is HF_TOKEN, or that of `hf auth login`).
"""

import sys

from pipeline.command_line import new_parser, path_of
from pipeline.errors import UserError, run_cli

FORMATS = {  # name in RUN_DIR/export
    "safetensors": "model.safetensors", "hf-craft": "hf-craft", "hf": "hf", "onnx": "model.onnx",
    "onnx-waveform": "waveform.onnx",
}  # fmt: skip


def main() -> None:
    """Parses, writes, says what was written."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, type=path_of("--checkpoint"), metavar="RUN_DIR", help="a run")
    add("--format", required=True, choices=FORMATS, help="what to write")
    add("--out", type=path_of("--out"), metavar="PATH", help="where (default: in RUN_DIR/export)")
    add("--push", metavar="OWNER/NAME", help="with hf-craft: commit it to this repository of the hub (default: do not)")
    add("--last", action="store_true", help="the last weights, not the averaged ones (default: off)")
    args = parser.parse_args()
    if args.push and args.format != "hf-craft":
        raise UserError(f"--push {args.push}: goes with --format hf-craft, not {args.format}")
    from pipeline import export, hub  # torch: not for --help
    from pipeline.hf_craft.directory import HF_CRAFT_FILES, export_hf_craft

    files = {"hf": export.HF_FILES, "hf-craft": HF_CRAFT_FILES}.get(args.format)
    out = args.out or args.checkpoint / export.EXPORTS / FORMATS[args.format]
    export.check_place(args.checkpoint, out, files)
    run = export.open_exported(args.checkpoint, average=not args.last)
    if args.push:
        hub.new_repository(args.push)
    if args.format == "hf-craft":
        held = export_hf_craft(run, out, args.push or "")
    elif args.format.startswith("onnx"):
        held = export.export_onnx(run, out, waveform=args.format == "onnx-waveform")
    else:
        held = {"safetensors": export.export_safetensors, "hf": export.export_hf}[args.format](run, out)
    sys.stdout.write(f"{out}: {held}\n")
    if args.push:
        sys.stdout.write(f"{hub.push(out, args.push)}\n")


if __name__ == "__main__":
    run_cli(main)
