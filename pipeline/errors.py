"""The one error a user may see without a traceback.

In: a condition that the user caused and can mend. Out: one line on stderr and exit status 2.
"""

import os
import sys
import time
from collections.abc import Callable

LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # variables of deepspeed and torchrun
GRACE_SECONDS = 40.0  # longer than rank 0 may take to close its tracking; its exit ends the wait


class UserError(Exception):
    """Bad input or configuration. The text names the file or key, its value and the remedy.

    Args:
        text: One line for people.
        local: Only this rank met it, so this rank must say it.
    """

    def __init__(self, text: str, local: bool = False) -> None:
        super().__init__(text)
        self.local = local


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status; a `UserError` becomes one stderr line and status 2.

    Where all ranks meet the same error, rank 0 alone says it. Launchers that end all ranks when one exits
    (deepspeed, torchrun) do so when rank 0 has: the others give it time.

    Raises:
        SystemExit: always, with the status.
    """
    try:
        status = main() or 0
    except UserError as error:
        if error.local or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            sys.stderr.flush()
        elif any(name in os.environ for name in LAUNCHERS):
            time.sleep(GRACE_SECONDS)
        status = 2
    sys.exit(status)
