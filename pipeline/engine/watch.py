"""A rank that hangs, dies or loses its network is found and named, instead of all ranks waiting for ever.

In: notes of where each rank is (`Watch.at`: one attribute, no cost). Out: one line that names the rank, its
host and its last step, stacks in `logs/rank-N.log`, and exit status 70 of every rank (`pipeline.faults`).

A thread per rank posts its note to a store on rank 0's host every few seconds and looks at the next
rank's: two small requests, whatever the number of ranks. A note that stops changing is a process that
is dead, stopped or out of reach. A rank that posts but stays at one place for `run.timeout` is stuck;
all notes are then compared, and the rank that is behind the others is the one they wait for.
"""

import faulthandler
import json
import logging
import socket
import time
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

from pipeline.distributed import World
from pipeline.faults import BoardLost

log = logging.getLogger(__name__)

SILENCE = 120.0  # seconds without a note, at most, after which a rank counts as lost
PLACES = ("data", "step", "evaluation", "checkpoint")  # in the order in which a rank comes by


class Watch:
    """Watches the ranks while it is open; a context manager.

    Args:
        run_dir: Run directory.
        world: Ranks.
        timeout: Seconds at one place that count as hanging.
    """

    def __init__(self, run_dir: Path, world: World, timeout: float) -> None:
        self._log = run_dir / "logs" / f"rank-{world.rank}.log"
        self._world, self._timeout = world, timeout
        self._silence = min(SILENCE, timeout)
        self._period = self._silence / 6
        self._at, self._since = (0, "data"), time.monotonic()
        self._closed = Event()
        self._thread = Thread(target=self._watch, name="watch", daemon=True)

    def at(self, step: int, place: str) -> None:
        """Notes where this rank is: the step it is working on, and one of PLACES."""
        self._at, self._since = (step, place), time.monotonic()

    def __enter__(self) -> "Watch":
        if self._world.board is not None:
            self._post(0)
            self._world.board.ready()
            self._world.faults.before_exit("stacks", self._dump)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._world.faults.report(error)
        self._closed.set()
        if self._thread.ident is None:
            return
        self._thread.join()
        self._world.faults.before_exit("stacks", None)
        try:
            self._post(-1)  # left, not lost
        except BoardLost:  # rank 0 left first
            log.debug("no board to leave")

    def _post(self, count: int) -> None:
        step, place = self._at
        note = {"rank": self._world.rank, "host": socket.gethostname(), "step": step, "place": place, "count": count}
        assert self._world.board is not None
        self._world.board.post(f"note/{self._world.rank}", json.dumps(note))

    def _watch(self) -> None:
        assert self._world.board is not None
        count, heard, last, answered = 0, time.monotonic(), "", time.monotonic()
        neighbour = (self._world.rank + 1) % self._world.size
        while not self._closed.wait(self._period):
            count += 1
            now = time.monotonic()
            try:
                self._post(count)
                note = self._world.board.read(f"note/{neighbour}")
                answered = now
            except BoardLost as lost:
                if now - answered > self._silence:
                    self._world.faults.blame(f"the host of rank 0 does not answer: {lost}")
                continue
            if note != last or json.loads(note)["count"] < 0:
                heard, last = now, note
            if now - heard > self._silence:
                silent = f"not heard of for {now - heard:.0f} s: dead, stopped or out of reach"
                self._world.faults.blame(f"{_name(json.loads(note))}: {silent}")
            elif now - self._since > self._timeout:
                self._world.faults.blame(self._compare())

    def _compare(self) -> str:
        """Who keeps the others waiting."""
        assert self._world.board is not None
        notes = [json.loads(self._world.board.read(f"note/{rank}")) for rank in range(self._world.size)]
        order = {note["rank"]: (note["step"], PLACES.index(note["place"])) for note in notes}
        behind = [note for note in notes if order[note["rank"]] < max(order.values())]
        if not behind:
            return f"all ranks stand still for {self._timeout:.0f} s: {_name(notes[0])}; a collective hangs"
        names = "; ".join(_name(note) for note in behind[:8])
        return f"run.timeout = {self._timeout:.0f} s: the ranks wait for {names}"

    def _dump(self) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)


def _name(note: dict[str, Any]) -> str:
    return f"rank {note['rank']} on {note['host']} (last at step {note['step']}, {note['place']})"
