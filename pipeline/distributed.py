"""Ranks, seeds and collectives: the only file that talks to other processes.

In: the environment of `deepspeed`, `torchrun` or Slurm. Out: a process group and a few collectives.

Every function here that communicates must be reached by all ranks in the same order; none stands
under a rank-dependent branch. Cost: one gather of G vectors a step, and scalars.
"""

import ipaddress
import logging
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from pipeline.errors import UserError
from pipeline.faults import ATTEMPT, VERDICT, Faults

log = logging.getLogger(__name__)

DEVICES = Path("/dev")
JOIN_SECONDS = 300.0  # between the first rank and the last one at the start
STORE_SECONDS = 10.0  # to wait for an answer of the key-value store
RETRY_SECONDS = 2.0  # between two tries to join, of a run that restarts itself
RUN = "run"  # key of the name by which a run's ranks know their store
_alone = False
ValueT = TypeVar("ValueT")
_gather_into: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # older name


@dataclass(frozen=True)
class World:
    """One process among the others.

    Attributes:
        rank: 0 .. size - 1.
        size: R.
        device: Of this rank's tensors.
        faults: Ends all ranks where one fails.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    faults: Faults = field(default_factory=Faults)

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes files and talks to MLflow."""
        return self.rank == 0


def local_rank() -> int:
    """The rank on this node, from the launcher's environment; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _local_size() -> int:
    """Ranks on this node, by the name that deepspeed or torchrun gives it."""
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


@contextmanager
def session(timeout: float, seed: int, deterministic: bool = False) -> Iterator[World]:
    """Joins the process group that the launcher describes, and leaves it at the end.

    Args:
        timeout: Seconds a collective may take.
        seed: Of the host's generators. All ranks share it: weights start equal, and draws that
            must differ between clips are keyed by position (`pipeline.rng`).
        deterministic: GPUs compute the same bits each time; see `_same_bits`.

    Without a launcher's environment the world is this one process.

    Raises:
        UserError: more ranks than GPUs here, or tasks of `srun` that do not know where rank 0 is.
    """
    _from_slurm()
    _own_programs()
    _same_bits(deterministic)
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank()} needs a GPU of its own, this process sees {torch.cuda.device_count()}; "
                "start one rank a GPU, and in Slurm take --gpus-per-node, not --gpus-per-task", local=True
            )  # fmt: skip
        torch.cuda.set_device(local_rank())
        device = torch.device("cuda", local_rank())
    else:
        _refuse_lost_gpus()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # ranks of one host share its cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _local_size()))
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    seed_host(seed)
    alone = "RANK" not in os.environ
    words = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0" if alone else "29500", "RANK": "0", "WORLD_SIZE": "1",
             "LOCAL_RANK": "0"}  # fmt: skip
    added = {name: value for name, value in words.items() if name not in os.environ}
    os.environ |= added
    _choose_interface()
    # A little longer: whoever hangs is named (`pipeline.faults`) before the collective gives up.
    patience = timedelta(seconds=timeout + 60)
    _join(device, patience)
    rank, size = dist.get_rank(), dist.get_world_size()
    faults = Faults(_open_store(rank) if size > 1 else None, rank, size)
    barrier()  # every rank has set its key
    try:
        yield World(rank, size, device, faults)
    except Exception as error:
        faults.leave(error)  # does not come back where other ranks may wait for this one
        raise
    except KeyboardInterrupt as error:
        faults.leave(error)
        raise
    finally:
        faults.close()
        dist.destroy_process_group()
        for name in added if alone else ():  # what this process starts later is no rank of a world that is over
            os.environ.pop(name, None)


def _join(device: torch.device, patience: timedelta) -> None:
    """Meets the other ranks at MASTER_ADDR:MASTER_PORT, for no longer than they take to start.

    Under `faults.supervise` a rank that meets others than its own tries again until that time is over, so that all
    ranks come to the next attempt, and its port, together.

    Raises:
        UserError: the port is taken, or a rank does not come.
    """
    end = time.monotonic() + min(patience.total_seconds(), JOIN_SECONDS)
    while True:
        try:
            store, rank, size = _meet(max(1.0, end - time.monotonic()))
            break
        except UserError as error:
            if ATTEMPT not in os.environ or time.monotonic() > end - RETRY_SECONDS:
                raise
            log.warning("%s; trying again for %.0f s", error, end - time.monotonic())
        time.sleep(RETRY_SECONDS)
    store.set_timeout(patience)
    gpu = device.type == "cuda"
    # Groups that are made later wait as long: DeepSpeed's, which sums the gradients, is given no time, and torch's own
    # with nccl is ten minutes. Then the process would be killed, long before `run.timeout` names who keeps it waiting.
    vars(distributed_c10d).update(default_pg_timeout=patience, default_pg_nccl_timeout=patience)
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=size, timeout=patience,
                            device_id=device if gpu else None)  # fmt: skip


def _meet(seconds: float) -> tuple[Store, int, int]:
    """The store of this run's ranks, own rank and their number.

    What listens at the port may be a program that does not answer, which torch waits for without end: hence the thread.
    Or it is the store of another run, which answers: hence the name, of what this run's ranks share.

    Raises:
        UserError: see `_join`.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    name = f"{os.environ.get(ATTEMPT, '')}, {os.environ['WORLD_SIZE']} ranks"
    met: futures.Future[tuple[Store, int, int]] = futures.Future()

    def meet() -> None:
        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
            if rank == 0:
                store.set(RUN, name)
            elif store.get(RUN).decode(errors="replace") != name:
                raise dist.DistNetworkError("another run's ranks meet there")
            met.set_result((store, rank, size))
        except Exception as error:  # noqa: BLE001 - raised below
            met.set_exception(error)

    Thread(target=meet, name="rendezvous", daemon=True).start()
    try:
        return met.result(seconds + RETRY_SECONDS)
    except futures.TimeoutError as error:
        reason = f"no answer in {seconds:.0f} s: rank 0 is not there, or its port is another program's"
        raise UserError(f"{place}: {reason}", local=True, transient=True) from error
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise UserError(
                f"port {os.environ['MASTER_PORT']} of this host is taken, perhaps by another job; give another one: "
                "deepspeed --master_port N ..., torchrun --master-port N ..., or MASTER_PORT=N",
                local=True, transient=True,
            ) from error  # fmt: skip
        raise UserError(f"{place}: {str(error).splitlines()[0]}", local=True, transient=True) from error
    except dist.DistStoreError as error:
        raise UserError(
            f"{place}: not all of the {os.environ['WORLD_SIZE']} ranks have come in {seconds:.0f} s: "
            f"{str(error).splitlines()[0]}", local=True, transient=True,
        ) from error  # fmt: skip


def _open_store(rank: int) -> TCPStore:
    """A key-value store on rank 0's host for `Faults`, which answers while the process group hangs."""
    host, patience = os.environ["MASTER_ADDR"], timedelta(seconds=STORE_SECONDS)
    store = TCPStore(host, 0, None, True, patience, wait_for_workers=False) if rank == 0 else None
    if store is not None:
        store.set(VERDICT, "")
    port = broadcast(store.port if store is not None else 0)
    return store or TCPStore(host, port, None, False, patience, wait_for_workers=False)


def seed_host(seed: int) -> None:
    """Seeds Python's, numpy's and torch's generators, as at the start of a run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _from_slurm() -> None:
    """`srun` without a launcher: take ranks from the step's variables.

    Raises:
        UserError: see `session`.
    """
    slurm = os.environ
    if "RANK" in slurm or int(slurm.get("SLURM_STEP_NUM_TASKS", "1")) == 1:  # a batch script has a SLURM_PROCID too
        return
    if "MASTER_ADDR" not in slurm:
        raise UserError(
            f"srun started {slurm['SLURM_STEP_NUM_TASKS']} tasks, and MASTER_ADDR is not set; export it (the host of "
            "rank 0), or use launchers/slurm.sbatch"
        )
    slurm |= {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_SIZE": slurm["SLURM_STEP_TASKS_PER_NODE"].split(",")[0].split("(")[0],  # such as 8(x3),4
    }


def _refuse_lost_gpus() -> None:
    """A host with GPUs that torch cannot use would train on its CPU, a hundred times slower.

    Raises:
        UserError: see above, unless DS_ACCELERATOR=cpu or, outside a Slurm job with GPUs, an empty CUDA_VISIBLE_DEVICES
            asks for the CPU. Slurm itself sets an empty one for a step that was given none of the job's GPUs.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    slurm = {name: os.environ.get(name, "") for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")}
    slurm["SLURM_GPUS_ON_NODE"] = slurm["SLURM_GPUS_ON_NODE"].strip("0")  # a number; the others are lists from 0 on
    given = next((name for name, value in slurm.items() if value), "")
    if not given and os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    found = sorted(str(device) for device in DEVICES.glob("nvidia[0-9]*"))
    if not given and not found:
        return
    reason = "this torch is built without CUDA" if torch.version.cuda is None else "the driver does not answer"
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
    raise UserError(
        f"{socket.gethostname()} has GPUs ({given or found[0]}), but torch cannot use them: {reason}; mend that, or "
        "set DS_ACCELERATOR=cpu to train on the CPU", local=True
    )  # fmt: skip


def _choose_interface() -> None:
    """Over several hosts: gloo connects from the interface that leads to rank 0, unless GLOO_SOCKET_IFNAME is set.

    By itself it takes the address of the host's own name, which is 127.0.1.1 on Debian and Ubuntu: no other host can
    reach that. nccl looks for interfaces itself, and may use several.
    """
    if int(os.environ["WORLD_SIZE"]) <= _local_size() or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    host = os.environ["MASTER_ADDR"]
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        if ipaddress.ip_address(address[0]).is_loopback:
            if host in ("localhost", address[0]):  # all ranks are here
                return
            family, address = socket.AF_INET, ("192.0.2.1", 9)  # rank 0's own name, seen from its host: any other host
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the kernel chooses a route
            own = probe.getsockname()[0]
    except OSError as error:
        log.warning("MASTER_ADDR = %s: %s; gloo chooses its interface itself", host, error)
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _own_programs() -> None:
    """Puts the interpreter's directory first in PATH: over ssh a rank has the bare PATH of a login.

    DeepSpeed compiles with the `ninja` it finds there. Without one it fails; with a system's of another version,
    ranks that share a cache would each compile anew what the other one just did.
    """
    own, paths = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath).split(os.pathsep)
    if paths[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, *paths])


def _same_bits(wanted: bool) -> None:
    """Kernels that add up in a fixed order, or none of this.

    Of attention those of flash and memory-efficient attention have such a backward pass, which torch takes without
    `warn_only` alone; an operation that has none raises an error with its name. cuBLAS reads the variable when CUDA
    starts.
    """
    if wanted or torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler: 1.6 s
        torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def gather(local: torch.Tensor) -> torch.Tensor:
    """All ranks' rows in rank order, without gradient: [n, ...] -> [R n, ...]; n is equal on all ranks."""
    size = world_size()
    local = local.detach().contiguous()
    if size == 1:
        return local
    out = local.new_empty(size * len(local), *local.shape[1:])
    _gather_into(out, local)  # a list of outputs would be copied out of one such buffer by nccl
    return out


def add_up(values: torch.Tensor, owner: int) -> None:
    """Sums over ranks in place, on rank `owner`; what the others have then is of no use."""
    if world_size() > 1:
        dist.reduce(values, owner)


def mean(values: Mapping[str, torch.Tensor | float], device: torch.device) -> dict[str, float]:
    """Mean over ranks of named scalars, one collective for all of them; same names on all ranks."""
    names = sorted(values)
    packed = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(packed)
        packed /= dist.get_world_size()
    return dict(zip(names, packed.tolist(), strict=True))


def mean_on_device(value: torch.Tensor) -> torch.Tensor:
    """Mean over ranks of a scalar: float64, and nobody waits for the device."""
    found = value.detach().to(torch.float64, copy=True)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(found)
        found /= dist.get_world_size()
    return found


class Agreement:
    """Small numbers that all ranks agree on once a step, without waiting for each other.

    What a rank posts at one step all know, as the maximum over ranks, at the next: the exchange runs
    beside the step, between the hosts' processes (gloo), so no GPU is synchronised for it.
    """

    def __init__(self) -> None:
        self._shared = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if self._shared else None
        self._numbers: torch.Tensor | None = None
        self._work: Any = None

    def exchange(self, *numbers: int) -> list[int] | None:
        """Posts this step's numbers; returns what all posted at the step before, None at the first."""
        agreed = self.take()
        self._numbers = torch.tensor(numbers, dtype=torch.int64)
        if self._shared:
            self._work = dist.all_reduce(self._numbers, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def take(self) -> list[int] | None:
        """Returns what was posted last, and forgets it."""
        if self._numbers is None:
            return None
        if self._work is not None:
            self._work.wait()
        agreed, self._numbers, self._work = self._numbers.tolist(), None, None
        return [int(number) for number in agreed]


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank is a world of its own and sends nothing: for what others do not compute beside it."""
    global _alone  # noqa: PLW0603 - as the process group is
    _alone = True
    try:
        yield
    finally:
        _alone = False


def rank() -> int:
    """Own rank; 0 where no group was joined."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world_size() -> int:
    """R; 1 where no group was joined."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank (small, picklable)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def decide(check: Callable[[], ValueT]) -> ValueT:
    """What `check` returns on rank 0, where alone it runs, on every rank; a collective.

    So that what is read from a disk is read once, and all ranks go the same way.

    Raises:
        UserError: `check` raised it on rank 0; on every rank.
    """
    value: Any = None
    refusal: tuple[str, bool] | None = None
    if rank() == 0:
        try:
            value = check()
        except UserError as error:
            refusal = str(error), error.transient
    value, refusal = broadcast((value, refusal))
    if refusal is not None:
        raise UserError(refusal[0], transient=refusal[1])
    return value  # type: ignore[no-any-return]


def check_same(values: Mapping[str, object], remedy: str) -> None:
    """Refuses a rank that has read something else than rank 0; a collective.

    Each host reads its own copies of settings, shards and runs, or a later state of a run that goes on. Where these
    differ nothing else would tell, and what the ranks make together is of neither.

    Args:
        values: By name, for the message.
        remedy: For the message.

    Raises:
        UserError: this rank's are not rank 0's.
    """
    theirs = broadcast(dict(values))
    for key in {**theirs, **values}:
        was, now = (str(found.get(key, "nothing")) for found in (theirs, values))
        if was != now:
            where = f"rank {rank()} on {socket.gethostname()}"
            raise UserError(f"{where} has {key} = {now}, rank 0 has {was}; {remedy}", local=True)


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if it is on one."""
    value = torch.tensor(float(flag), device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
