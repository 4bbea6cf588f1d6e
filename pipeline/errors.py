"""The one error a user may see without a traceback.

In: a condition that the user caused and can mend. Out: one line on stderr and exit status 2 (75 where it may pass).
"""

import io
import os
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress

LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # variables of deepspeed and torchrun
BROKEN_PIPE = 141  # what a shell shows of a program that died of SIGPIPE
GRACE_SECONDS = 40.0  # longer than rank 0 may take to close its tracking; its exit ends the wait


class UserError(Exception):
    """Bad input or configuration. The text names the file or key, its value and the remedy.

    Args:
        text: One line for people.
        local: Only this rank met it, so this rank must say it.
        transient: It may pass by itself, such as a store out of reach: `--max-restarts` tries again.
    """

    def __init__(self, text: str, local: bool = False, transient: bool = False) -> None:
        super().__init__(text)
        self.local, self.transient = local, transient


def exit_status(error: BaseException) -> int:
    """Of a process that `error` ends: 2 bad input, 75 a fault that may pass (EX_TEMPFAIL), 130 Ctrl-C, 70 any other."""
    if isinstance(error, UserError):
        return 75 if error.transient else 2
    return 130 if isinstance(error, KeyboardInterrupt) else 70


def say(text: str) -> None:
    """One line on stderr, in one write: lines of ranks must not mix.

    Where nobody reads it any more (the ssh session of a host that was cut off), the process must come to its end all
    the same: the line is in the logs.
    """
    with suppress(OSError):
        sys.stderr.write(f"error: {' '.join(text.split())}\n")
        sys.stderr.flush()


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status; a `UserError` becomes one stderr line and status 2, Ctrl-C status 130.

    Where all ranks meet the same error, rank 0 alone says it. Launchers that end all ranks when one exits
    (deepspeed, torchrun) do so when rank 0 has: the others give it time.

    Where a pipe's reader has seen enough (`| head`), the program ends without a word, as other programs do.

    Raises:
        SystemExit: always, with the status.
    """
    _mend_streams()
    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        if error.local or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            say(str(error))
        elif any(name in os.environ for name in LAUNCHERS):
            time.sleep(GRACE_SECONDS)
        status = exit_status(error)
    except KeyboardInterrupt as error:
        sys.stderr.write("interrupted\n")
        status = exit_status(error)
    except BrokenPipeError:
        if not _drop_unread_output():
            raise
        status = BROKEN_PIPE
    sys.exit(status)


def _mend_streams() -> None:
    """Output that was closed (`>&-`) goes nowhere; a character that the terminal lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the program
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_unread_output() -> bool:
    """Lets what is left in the buffers go nowhere, where nobody reads our output any more; else False."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    broken = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
    for descriptor in broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(broken)
