"""A page to try a finetuned run: upload or record audio, see it, and its labels over time.

    pip install -e ".[demo]"
    python launchers/demo_app.py --checkpoint RUN_DIR [--port 7860] [--host 0.0.0.0]

In: a run directory of finetune.py. Out: a page on localhost, until Ctrl-C.
"""

import argparse
from pathlib import Path

from pipeline.errors import run_cli
from pipeline.serving.demo import build_page
from pipeline.serving.scorer import load_scorer


def main() -> None:
    """Parses, loads, serves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="RUN_DIR", help="a finetuned run")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="(default: 7860)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    args = parser.parse_args()
    page = build_page(load_scorer(args.checkpoint), args.checkpoint.resolve().name)
    print(f"http://{args.host}:{args.port}", flush=True)
    page.launch(server_name=args.host, server_port=args.port, quiet=True, share=False)


if __name__ == "__main__":
    run_cli(main)
