"""All commands under one name; what each does and takes says `craft COMMAND --help`.

    craft COMMAND [OPTION ...]

`craft pretrain` and `craft finetune` run one process, or as a rank of what launched them. A launcher of several ranks
takes the module or script that stands beside the command: `deepspeed --module launchers.pretrain ...`,
`torchrun -m launchers.pretrain ...`, or `launchers/pretrain.py` of a checkout.
"""

import difflib
import sys
from importlib import import_module

from pipeline import __version__
from pipeline.errors import UserError, run_cli

COMMANDS = {
    "build": ("shard_tools.build_shards", "a data set, labelled or not -> shards"),
    "verify": ("shard_tools.verify_shards", "every byte of shards against their manifest"),
    "inspect": ("shard_tools.inspect_shards", "what is in shards and how it sounds"),
    "pretrain": ("launchers.pretrain", "pretrain on shards"),
    "finetune": ("launchers.finetune", "finetune on labelled shards, and evaluate"),
    "evaluate": ("launchers.evaluate", "finetuned runs, alone or as one, on shards"),
    "probe": ("launchers.probe", "what frozen features are worth"),
    "embed": ("launchers.embed", "frozen embeddings of shards or recordings"),
    "predict": ("launchers.predict", "label recordings with a finetuned run"),
    "export": ("launchers.export", "a run's weights for other programs"),
    "ablate": ("launchers.ablate", "the paper's tables: every distinct run once"),
    "plan": ("launchers.plan", "what a run will need on a cluster"),
    "demo": ("launchers.demo_app", "a page in the browser to try a finetuned run"),
}


def usage() -> str:
    """What `craft --help` shows."""
    lines = [f"  {name:9s} {about:56s} {module}" for name, (module, about) in COMMANDS.items()]
    return "\n".join([(__doc__ or "").strip(), "", "commands, and their modules:", *lines, "", "  --version\n"])


def main() -> None:
    """Hands the command line to the command's own main, and exits with its status."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"craft {name}", *sys.argv[2:]]
        run_cli(lambda: import_module(COMMANDS[name][0]).main())
    run_cli(lambda: about(name))


def about(word: str) -> None:
    """Says what is asked for instead of a command.

    Raises:
        UserError: it is neither.
    """
    if word in ("--help", "-h"):
        sys.stdout.write(usage())
    elif word == "--version":
        sys.stdout.write(f"craft-audio {__version__}\n")
    else:
        near = difflib.get_close_matches(word, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; craft --help lists them"
        raise UserError(f"craft has no command '{word:.100}'{hint}")


if __name__ == "__main__":
    main()
