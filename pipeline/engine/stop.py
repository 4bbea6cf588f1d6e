"""A polite end: SIGTERM, SIGINT and Slurm's SIGUSR1 are noted, and the loop saves before it leaves.

In: signals. Out: their number, for the ranks to agree on. A launcher signals its ranks at different times
and some twice; only an agreed step ends the run, so no rank waits for one that has left.
"""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(Exception):  # noqa: N818 - a request, no error
    """All ranks agreed to stop.

    Args:
        signum: The signal that one of them got.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Notes the first stop signal while it is open; a context manager.

    Attributes:
        signum: The signal; 0: none so far.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signum = self.signum or number
