"""One rank fails: all ranks end within seconds and name it, instead of waiting for it in a collective.

In: an exception on some rank, or a verdict of `engine.watch`. Out: on every rank one line that names the rank, its
host and the reason, and the exit status; of the failing rank the traceback besides, also in `logs/rank-N.log`.

The failing rank says its reason first, then posts it on the board (a key-value store; no collective, the others may
hang in one), and ends with `os._exit`: leaving the process group would wait for ranks that wait for this one. A thread
of each rank reads the board every other second. Where several ranks fail, the first one's reason counts: a broken
connection is most often the consequence of another rank's end. Launchers kill all ranks when one exits, so each waits
a bounded time until rank 0 has closed its tracking.
"""

import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from threading import Event, Lock, Thread
from typing import NoReturn, Protocol

from pipeline.errors import GRACE_SECONDS, UserError, exit_status, say

log = logging.getLogger(__name__)

FAULT_STATUS = 70  # EX_SOFTWARE
POLL_SECONDS = 2.0
LINGER_SECONDS = 4 * POLL_SECONDS  # rank 0 holds the board: so long the others may take to read it
VERDICT, LEFT, MAIN_LEFT = "verdict", "left", "rank 0 left"


class BoardLost(Exception):  # noqa: N818 - a state of the network
    """Rank 0's host does not answer."""


class Board(Protocol):
    """Notes by name that all ranks see; each method raises `BoardLost` where rank 0's host does not answer."""

    def post(self, name: str, text: str) -> None:
        """Writes a note."""

    def post_first(self, name: str, text: str) -> str:
        """Writes a note where it is empty; returns what is there now."""

    def read(self, name: str) -> str:
        """Reads a note that some rank has posted."""

    def count(self, name: str, more: int) -> int:
        """Adds to a counter, which begins at 0; returns it."""


@dataclass(frozen=True)
class _Verdict:
    """Why the run ends: `text` names rank, host and reason; `rank` posted it; `status` is every rank's."""

    rank: int
    text: str
    status: int


class Faults:
    """Ends this rank with the others; a world of one rank has no others, and nothing happens here.

    Args:
        board: Of all ranks; None: one rank.
        rank: Own.
        size: Ranks.
    """

    def __init__(self, board: Board | None = None, rank: int = 0, size: int = 1) -> None:
        self._board, self._rank, self._size = board, rank, size
        self._verdict: _Verdict | None = None  # set by the failing rank itself
        self._before_exit: dict[str, Callable[[], None]] = {}
        self._closed, self._ending = Event(), Lock()
        self._thread = Thread(target=self._listen, name="faults", daemon=True)
        if board is not None:
            self._thread.start()

    def before_exit(self, name: str, act: Callable[[], None] | None) -> None:
        """What to do before another rank's fault ends this process, in a bounded time; None: no longer."""
        if act is None:
            self._before_exit.pop(name, None)
        else:
            self._before_exit[name] = act

    def report(self, error: BaseException) -> None:
        """Says what ended this rank and tells the others; to be called before anything is closed. Acts once."""
        if self._board is None or self._verdict is not None or isinstance(error, SystemExit):
            return
        reason = " ".join(str(error).split())
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        own = _Verdict(self._rank, f"rank {self._rank} on {socket.gethostname()}: {reason}", exit_status(error))
        self._verdict, reached = self._post(own)
        if isinstance(error, UserError):
            if error.local or self._rank == 0 or not reached:  # else rank 0 says it: all met it, or it reads the board
                say(str(error))
        elif self._verdict == own:
            log.critical("%s", own.text, exc_info=error)
            if self._rank and log.hasHandlers():  # which go to its file alone
                traceback.print_exception(error)
            say(own.text)
        else:
            log.error("after the fault of another rank: %s", reason, exc_info=error)
            say(f"rank {self._rank}: {self._verdict.text}")

    def leave(self, error: BaseException) -> None:
        """Reports `error` and ends this process; returns in a world of one rank."""
        if self._board is None:
            return
        self.report(error)
        assert self._verdict is not None
        self._end(self._verdict.status)

    def blame(self, text: str) -> NoReturn:
        """Ends all ranks for the reason `text`: the main thread of this one may never come back."""
        verdict, reached = self._post(_Verdict(self._rank, text, FAULT_STATUS))
        if not reached:
            log.warning("the verdict reaches no other rank")
        self._follow(verdict)

    def close(self) -> None:
        """Ends the thread: this rank leaves in the regular way."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _post(self, verdict: _Verdict) -> tuple[_Verdict, bool]:
        """The verdict that counts, and whether the board has it."""
        assert self._board is not None
        try:
            return _Verdict(**json.loads(self._board.post_first(VERDICT, json.dumps(asdict(verdict))))), True
        except BoardLost:
            return verdict, False

    def _listen(self) -> None:
        assert self._board is not None
        while not self._closed.wait(POLL_SECONDS):
            try:
                text = self._board.read(VERDICT)
            except BoardLost:  # rank 0 has ended, or `engine.watch` names its host
                continue
            if not text:
                continue
            if self._verdict is None:
                self._follow(_Verdict(**json.loads(text)))
            # The main thread reports, closes what is open and ends the process; unless that hangs too.
            if not self._closed.wait(GRACE_SECONDS):
                self._end(self._verdict.status)

    def _follow(self, verdict: _Verdict) -> NoReturn:
        """Ends this process for another rank's fault."""
        mended = verdict.status == exit_status(UserError(""))  # only by other words
        said = verdict.text if mended else f"{verdict.text}; the same command goes on from the newest checkpoint"
        log.critical("%s", said)
        say(f"rank {self._rank}: {said}")
        for name, act in list(self._before_exit.items()):
            try:
                act()
            except Exception:
                log.warning("%s", name, exc_info=True)
        self._end(verdict.status)

    def _end(self, status: int) -> NoReturn:
        """Lets rank 0 end its tracking and the others read the board, then ends the process."""
        assert self._board is not None
        self._ending.acquire()  # for good: one of the threads
        end = time.monotonic() + (GRACE_SECONDS if self._rank else LINGER_SECONDS)
        try:
            left = self._board.count(LEFT, 1)
            if self._rank == 0:
                self._board.count(MAIN_LEFT, 1)
            while time.monotonic() < end and (
                not self._board.count(MAIN_LEFT, 0) if self._rank else left < self._size
            ):
                time.sleep(0.1)
                left = self._board.count(LEFT, 0)
        except BoardLost:
            log.debug("rank 0 has left")
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
