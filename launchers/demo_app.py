"""A page to try a finetuned run: upload or record audio, see it, and its labels over time.

    pip install -e ".[demo]"
    python launchers/demo_app.py --checkpoint RUN_DIR [--port 7860] [--host 0.0.0.0]

In: a run directory of finetune.py, an export of one, or hf://OWNER/NAME. Out: a page on localhost, until Ctrl-C.
"""

import socket

from pipeline.command_line import new_parser
from pipeline.errors import UserError, run_cli
from pipeline.hub import model_of


def check_address(host: str, port: int) -> None:
    """Tries the address before the model is loaded.

    Raises:
        UserError: it is not this machine's, or another program has it.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: give 1 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give another") from error


def main() -> None:
    """Parses, loads, serves."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, type=model_of("--checkpoint"), metavar="RUN",
        help="a finetuned run, an hf-craft export of one, or hf://OWNER/NAME")  # fmt: skip
    add("--port", type=int, default=7860, metavar="N", help="(default: 7860)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    args = parser.parse_args()
    check_address(args.host, args.port)
    from pipeline.serving.demo import MAX_UPLOAD, build_page  # torch: not for --help
    from pipeline.serving.scorer import load_scorer

    page = build_page(load_scorer(args.checkpoint), args.checkpoint.resolve().name)
    print(f"http://{args.host}:{args.port}", flush=True)
    page.launch(server_name=args.host, server_port=args.port, quiet=True, share=False, max_file_size=MAX_UPLOAD)


if __name__ == "__main__":
    run_cli(main)
