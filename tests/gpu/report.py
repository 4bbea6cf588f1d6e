"""What a check is given, and what it reports.

In: the arguments of `python -m tests.gpu`. Out: a line `PASS|FAIL|INFO check.name values (limit)` for each result,
and the same in OUT/CHECK/results.jsonl.
"""

import gc
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def line_of(result: dict[str, str]) -> str:
    """A result as it is shown."""
    limit = f" ({result['limit']})" if result["limit"] else ""
    return f"{result['status']} {result['check']}.{result['name']} {result['values']}{limit}"


@dataclass(frozen=True)
class Check:
    """One check under way, in a process of its own.

    Attributes:
        name: Of its module in tests/gpu.
        out: Its own directory.
        shards: Generated clips of 10 s (of 1 s in the rehearsal), 8 of 10 of them to train on.
        small: The rehearsal: on the CPU, in sizes that take seconds.
        gpus: Of this host, for checks of several ranks.
    """

    name: str
    out: Path
    shards: Path
    small: bool
    gpus: int

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.small else "cuda")

    @property
    def size(self) -> str:
        """`model.size` of runs that are no measurement of speed."""
        return "micro" if self.small else "small"

    def info(self, name: str, values: object) -> None:
        """A measurement without a limit."""
        self._write("INFO", name, values, "")

    def test(self, name: str, holds: bool, values: object, limit: str) -> None:
        """A result that must hold; `limit` says what, in words such as "< 1e-3"."""
        self._write("PASS" if holds else "FAIL", name, values, limit)

    def below(self, name: str, value: float, limit: float) -> None:
        """A number that must be at most `limit`; NaN is not."""
        self.test(name, value <= limit, f"{value:.3g}", f"<= {limit:.3g}")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What breaks inside is the result `name`, and the check's other parts go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - is a result
            traceback.print_exc()
            self.test(name, False, f"{type(error).__name__}: {error}"[:300].replace("\n", " "), "no exception")
        finally:
            gc.collect()  # engines hold cycles of references; their memory is to be the next part's
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def attempt(self, name: str, function: Callable[..., object], *args: Any) -> None:
        """Runs `function(check, *args)` as a part."""
        with self.part(name):
            function(self, *args)

    def _write(self, status: str, name: str, values: object, limit: str) -> None:
        line = {"check": self.name, "name": name, "status": status, "values": str(values), "limit": limit}
        print(line_of(line), flush=True)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
