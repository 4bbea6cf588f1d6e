"""Signals and faults of ranks: what ends a run, how all ranks learn of it, and how it starts again.

    stop_signals    SIGTERM, SIGINT and Slurm's SIGUSR1 are noted, and the training loop saves before it leaves
    Faults          one rank fails, hangs, dies or loses its network: all ranks end within seconds and name it
    supervise       `--max-restarts N`: a run that a fault ended goes on by itself, from its newest checkpoint

A rank that fails says its reason first, then sets it in a key-value store on rank 0's host (no collective: the others
may hang in one), and ends with `os._exit`: leaving the process group would wait for ranks that wait for this one. A
thread of each rank reads that key every other second. Where several ranks fail, the first one's reason counts: a
broken connection is most often the consequence of another rank's end, so who meets one first looks for that rank.
Launchers kill all ranks when one exits, so each waits a bounded time until rank 0 has closed its tracking.

While a run trains, the thread also sets a key of its own every few seconds, with the step and the place that its rank
is at, and reads the next rank's: two small requests, whatever the number of ranks. A key that stops changing is a
process that is dead, stopped or out of reach. A rank that sets it but stays at one place for `run.timeout` is stuck;
all of them are then compared, and the rank that is behind the others is the one they wait for.

This module imports no torch: `supervise` forks before that.
"""

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock, Thread, current_thread, main_thread
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from pipeline.errors import GRACE_SECONDS, UserError, exit_status, say
from pipeline.files import die_with

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
FAULT_STATUS = 70  # EX_SOFTWARE
POLL_SECONDS = 2.0
LINGER_SECONDS = 4 * POLL_SECONDS  # rank 0 holds the store: so long the others may take to read it
SILENCE = 120.0  # seconds without a change, at most, after which a rank counts as lost
BROKEN = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")  # in errors of gloo and nccl
PLACES = ("data", "step", "evaluation", "checkpoint")  # in the order in which a rank comes by
VERDICT, LEFT, MAIN_LEFT = "verdict", "left", "rank 0 left"  # keys
ATTEMPT = "CRAFT_ATTEMPT"  # variable: which attempt of which supervised run, in words that all its ranks share


@contextmanager
def stop_signals(also: Callable[[int], object] | None = None) -> Iterator[list[int]]:
    """Notes the stop signals that come while it is open, the first one first, and calls `also` with each.

    A launcher signals its ranks at different times and some twice; only a step that all ranks agree on ends a run, so
    that no rank waits for one that has left.
    """
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if also is not None:
            also(number)

    if current_thread() is not main_thread():  # which alone may set handlers
        yield told
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Verdict(NamedTuple):
    """Why the run ends: `text` names rank, host and reason; `rank` set it; `status` is every rank's."""

    rank: int
    text: str
    status: int


class Faults:
    """Ends this rank with the others; a world of one rank has no others, and nothing happens here.

    Args:
        store: Key-value store of all ranks, torch's, with the key `VERDICT` = ""; its methods raise RuntimeError where
            rank 0's host does not answer. None: one rank.
        rank: Own.
        size: Ranks.
    """

    def __init__(self, store: Any = None, rank: int = 0, size: int = 1) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._verdict: _Verdict | None = None  # set by the failing rank itself
        self._before_exit: list[Callable[[], None]] = []
        self._closed, self._ending, self._setting = Event(), Lock(), Lock()
        self._at, self._since = (0, "data"), time.monotonic()
        self._timeout: float | None = None  # while the run is watched
        self._thread = Thread(target=self._listen, name="faults", daemon=True)
        if store is not None:
            self._set_place(-1)
            self._thread.start()

    def at(self, step: int, place: str) -> None:
        """Notes where this rank is: the step it is working on, and one of PLACES. No cost."""
        self._at, self._since = (step, place), time.monotonic()

    @contextmanager
    def watch(self, run_dir: Path, timeout: float) -> Iterator[None]:
        """Watches the ranks while it is open; stacks go to `run_dir`/logs.

        Args:
            run_dir: Run directory.
            timeout: Seconds at one place that count as hanging.
        """
        if self._store is None:
            yield
            return

        def dump_stacks() -> None:
            with (run_dir / "logs" / f"rank-{self._rank}.log").open("a", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)

        with self.before_exit(dump_stacks):
            self._since, self._timeout = time.monotonic(), timeout
            try:
                self._set_place(0)  # at once: one that is lost before the thread's next round is missed, too
                yield
            except BaseException as error:
                self.report(error)
                raise
            finally:
                with self._setting:
                    self._timeout = None
                    try:
                        self._set_place(-1)  # left, not lost
                    except RuntimeError:
                        log.debug("rank 0 left first")

    @contextmanager
    def before_exit(self, act: Callable[[], None]) -> Iterator[None]:
        """While open, another rank's fault calls `act`, which takes a bounded time, before it ends this process."""
        self._before_exit.append(act)
        try:
            yield
        finally:
            self._before_exit.remove(act)

    def report(self, error: BaseException) -> None:
        """Says what ended this rank and tells the others; to be called before anything is closed. Acts once."""
        if self._store is None or self._verdict is not None or isinstance(error, SystemExit):
            return
        reason = " ".join(str(error).split())
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        own = _Verdict(self._rank, f"rank {self._rank} on {socket.gethostname()}: {reason}", exit_status(error))
        if isinstance(error, RuntimeError) and any(words in reason for words in BROKEN):
            gone = self._who_is_gone()
            own = own._replace(text=f"{gone}: dead, stopped or out of reach") if gone else own
        self._verdict, reached = self._agree_on(own)
        if isinstance(error, UserError):
            if error.local or self._rank == 0 or not reached:  # else rank 0 says it: all met it, or it reads the store
                say(str(error))
        elif self._verdict == own:
            log.critical("%s", own.text, exc_info=error)
            if self._rank and log.hasHandlers():  # which go to its file alone
                with suppress(OSError):  # as in `say`
                    traceback.print_exception(error)
            say(own.text)
        else:
            log.error("after the fault of another rank: %s", reason, exc_info=error)
            say(f"rank {self._rank}: {self._verdict.text}")

    def leave(self, error: BaseException) -> None:
        """Reports `error` and ends this process; returns in a world of one rank."""
        if self._store is None:
            return
        self.report(error)
        assert self._verdict is not None
        self._end(self._verdict.status)

    def close(self) -> None:
        """Ends the thread: this rank leaves in the regular way."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _agree_on(self, verdict: _Verdict) -> tuple[_Verdict, bool]:
        """The verdict that counts, and whether the store has it."""
        try:
            return _Verdict(*json.loads(self._store.compare_set(VERDICT, "", json.dumps(verdict)))), True
        except RuntimeError:
            return verdict, False

    def _set_place(self, count: int) -> None:
        """Sets this rank's key; `count` < 0: it is not watched."""
        step, place = self._at
        note = {"rank": self._rank, "host": socket.gethostname(), "step": step, "place": place, "count": count}
        self._store.set(f"place/{self._rank}", json.dumps(note))

    def _listen(self) -> None:
        """The thread: reads the verdict, and while the run is watched finds who is lost or stuck."""
        neighbour, last, count = f"place/{(self._rank + 1) % self._size}", b"", 0
        due = heard = answered = time.monotonic()
        wait = POLL_SECONDS
        while not self._closed.wait(wait):
            now, blamed = time.monotonic(), ""
            with self._setting:
                timeout = self._timeout
                # Shorter than the timeout, by more than two of the rounds: who is silent is not said to be stuck.
                silence = SILENCE if timeout is None else min(SILENCE, timeout * 2 / 3)
                wait = min(POLL_SECONDS, silence / 6)
                if timeout is None:
                    heard = answered = now
                try:
                    text = self._store.get(VERDICT)
                    if timeout is not None and now >= due:
                        due, count = now + silence / 6, count + 1
                        self._set_place(count)
                        note = self._store.get(neighbour)
                        if note != last or json.loads(note)["count"] < 0:
                            heard, last = now, note
                        if now - heard > silence:
                            silent = f"not heard of for {now - heard:.0f} s: dead, stopped or out of reach"
                            blamed = f"{_name(json.loads(note))}: {silent}"
                        elif now - self._since > timeout:
                            blamed = self._who_is_behind(timeout)
                    answered = now
                except RuntimeError as lost:  # rank 0 has ended, or its host is gone
                    if now - answered <= silence:
                        continue
                    text, blamed = b"", f"the host of rank 0 does not answer: {str(lost).splitlines()[0]}"
            if blamed and not text:  # the main thread may never come back
                verdict, reached = self._agree_on(_Verdict(self._rank, blamed, FAULT_STATUS))
                if not reached:
                    log.warning("the verdict reaches no other rank")
                self._follow(verdict)
            if not text:
                continue
            if self._verdict is None:
                self._follow(_Verdict(*json.loads(text)))
            # The main thread reports, closes what is open and ends the process; unless that hangs too.
            if not self._closed.wait(GRACE_SECONDS):
                self._end(self._verdict.status)

    def _who_is_behind(self, timeout: float) -> str:
        """Who keeps the others waiting."""
        notes = self._notes()
        order = {note["rank"]: (note["step"], PLACES.index(note["place"])) for note in notes}
        behind = [note for note in notes if order[note["rank"]] < max(order.values())]
        if not behind:
            return f"all ranks stand still for {timeout:.0f} s: {_name(notes[0])}; a collective hangs"
        return f"run.timeout = {timeout:.0f} s: the ranks wait for {'; '.join(map(_name, behind[:8]))}"

    def _who_is_gone(self) -> str:
        """Whose key has stopped changing, after a connection broke; empty: nobody's, or the ranks are not watched.

        Meanwhile the thread ends this process where another rank says what happened.
        """
        if self._timeout is None:
            return ""
        try:
            before = self._notes()
            time.sleep(min(SILENCE, self._timeout * 2 / 3) / 4 + POLL_SECONDS)  # keys change at a sixth of the silence
            return "; ".join(_name(now) for now, then in zip(self._notes(), before, strict=True)
                             if now == then and now["count"] >= 0 and now["rank"] != self._rank)  # fmt: skip
        except RuntimeError:
            return ""  # rank 0 has ended, or its host is gone

    def _notes(self) -> list[dict[str, Any]]:
        """All ranks' keys."""
        return [json.loads(self._store.get(f"place/{rank}")) for rank in range(self._size)]

    def _follow(self, verdict: _Verdict) -> NoReturn:
        """Ends this process for another rank's fault."""
        mended = verdict.status == exit_status(UserError(""))  # only by other words
        said = verdict.text if mended else f"{verdict.text}; the same command goes on from the newest checkpoint"
        log.critical("%s", said)
        say(f"rank {self._rank}: {said}")
        for act in reversed(self._before_exit):
            try:
                act()
            except Exception:
                log.warning("before the end", exc_info=True)
        self._end(verdict.status)

    def _end(self, status: int) -> NoReturn:
        """Lets rank 0 end its tracking and the others read the store, then ends the process."""
        self._ending.acquire()  # for good: one of the threads
        end = time.monotonic() + (GRACE_SECONDS if self._rank else LINGER_SECONDS)
        try:
            left = self._store.add(LEFT, 1)
            if self._rank == 0:
                self._store.add(MAIN_LEFT, 1)
            while time.monotonic() < end and (not self._store.add(MAIN_LEFT, 0) if self._rank else left < self._size):
                time.sleep(0.1)
                left = self._store.add(LEFT, 0)
        except RuntimeError:
            log.debug("rank 0 has left")
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(status)


def _name(note: dict[str, Any]) -> str:
    return f"rank {note['rank']} on {note['host']} (last at step {note['step']}, {note['place']})"


def supervise(restarts: int) -> None:
    """Returns in a forked child, as often as `restarts` allows; the parent leaves with the last child's status.

    It works under any launcher (deepspeed, torchrun, srun) and over any hosts without a word between the parents: when
    one rank dies, the others' collectives fail, or `Faults` ends them, so each parent comes to the same attempt. Each
    attempt has a rendezvous port of its own, MASTER_PORT + attempt, where no late rank of the attempt before can be
    met. A rank that meets nobody there, or finds the port taken, gives up after `distributed.JOIN_SECONDS`: all do, and
    meet at the next port.

    Not restarted: success (0), bad input (2), a signal to stop. Restarted: any other end, also a fault that may pass by
    itself, such as a store out of reach (75). To be called before threads or a GPU context exist: neither survives a
    fork. Cost: a sleeping parent per rank, which shares its memory with the child.

    Args:
        restarts: Most restarts; 0: none, and no parent.

    Raises:
        SystemExit: in the parent, at the end.
    """
    if not restarts:
        return
    port, parent = int(os.environ.get("MASTER_PORT", "29500")), os.getpid()
    for attempt in range(restarts + 1):
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            die_with(parent)
            if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
                os.environ |= {"MASTER_PORT": str(port + attempt), ATTEMPT: f"port {port}, attempt {attempt}"}
                if attempt:  # torchrun's own store is at the first port; from now on rank 0 opens one
                    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            return
        with stop_signals(lambda number, child=child: os.kill(child, number)) as told:  # type: ignore[misc]
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # -N: signal N
        if status in (0, 2) or told:
            break
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        what = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        then = f"restart {attempt + 1} of {restarts}" if attempt < restarts else f"{restarts} restarts are used up"
        sys.stderr.write(f"rank {rank} {what}; {then}\n")
        sys.stderr.flush()
    sys.exit(status if status >= 0 else 128 - status)
