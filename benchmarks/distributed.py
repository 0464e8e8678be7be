"""One job on several processes of this machine, a GPU each or CPU threads; those of other machines may join them.

What runs in a process needs nothing of this file but `wrap`: it finds the process group that another launcher (Ray
Train, torchrun) has made just as well as the one that is made here.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from timm.layers import convert_sync_batchnorm

from benchmarks.errors import Blocked, WorkerLost

if TYPE_CHECKING:
    from benchmarks.engine import Context, Outcome
    from benchmarks.job import Job

SECONDS_FOR_THE_CAUSE = 5.0  # in which whoever broke a group off says why


def wrap(model: torch.nn.Module) -> MMDistributedDataParallel:
    """`model` on this process's device, its gradients averaged over the process group.

    On GPUs batch norms take their statistics from the batches of all processes; PyTorch has no such norm for CPUs.
    """
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        # timm's, since some of its norms contain the activation behind them, which PyTorch's conversion drops.
        model = convert_sync_batchnorm(model.to(device))
        where: dict[str, Any] = {"device_ids": [device]}
    else:
        model, where = revert_sync_batchnorm(model), {}
    # A backbone may have weights that its head has no use for, the norm of a map that is not taken for instance.
    return MMDistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True, **where)


@dataclass(frozen=True)
class Part:
    """The processes of a group that one machine starts."""

    first: int  # rank of the first of them
    processes: int
    rendezvous: str  # an address that the processes of all machines reach, as init_process_group has it


def measure_in_processes(
    job: Job,
    context: Context,
    trained: Mapping[str, str],
    part: Part | None = None,
    look_after_others: Callable[[], None] = lambda: None,
) -> Outcome | None:
    """`benchmarks.measure.measure` in as many new processes as the recipe says; returns the outcome of the first.

    Args:
        job: What to measure.
        context: Where to read and write, and whom to tell.
        trained: The artifacts of the training that the job depends on, where it depends on one.
        part: Those of the processes that this machine starts, where others start the rest; None: all. Of a part
            without the first process there is no outcome.
        look_after_others: Called every second; raises once the processes of another machine are lost.

    Raises:
        Blocked: there are fewer GPUs than processes.
        WorkerLost: a process died.
        Exception: what the first process to fail raised.
    """
    number = part.processes if part else job.recipe.engine.processes
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and gpus < number:
        raise Blocked(f"the recipe asks for {number} processes, a GPU each, and this machine has {gpus}")
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    lock = spawn.Lock()
    places = (context.output, context.data_root)
    with tempfile.TemporaryDirectory() as folder:
        part = part or Part(0, number, f"file://{folder}/rendezvous")
        workers = [
            spawn.Process(target=_work, args=(rank, part, job, *places, dict(trained), sender, lock))
            for rank in range(number)
        ]
        try:
            for worker in workers:
                worker.start()
            return _listen(workers, part, receiver, context, look_after_others)
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.kill()
                    worker.join()
            receiver.close()
            sender.close()


def _listen(
    workers: list[multiprocessing.Process],
    part: Part,
    receiver: Connection,
    context: Context,
    look_after_others: Callable[[], None],
) -> Outcome | None:
    """Passes on what the processes say, until all have ended well or one has not."""
    outcome, cut_off = None, None
    while True:
        alive = [worker.sentinel for worker in workers if worker.exitcode is None]
        if receiver.poll():  # before the ends: what a process says last it says before it ends
            kind, value = receiver.recv()
            if kind == "error":
                raise value
            if kind == "outcome":
                outcome = value
            elif kind == "cut off":
                cut_off = cut_off or (value, time.monotonic() + SECONDS_FOR_THE_CAUSE)
            else:
                getattr(context, kind)(value)
            continue
        for rank, worker in enumerate(workers, start=part.first):
            if worker.exitcode:
                how = f"signal {-worker.exitcode}" if worker.exitcode < 0 else f"exit status {worker.exitcode}"
                raise WorkerLost(f"process {rank} of its group died ({how}); {_perhaps(worker.exitcode)}")
        look_after_others()
        if cut_off is not None and time.monotonic() > cut_off[1]:
            raise WorkerLost(f"its group was cut off: {cut_off[0]}")
        if not alive and cut_off is None:
            return outcome
        wait([receiver, *alive], timeout=1.0)


def _perhaps(exitcode: int) -> str:
    return "killed, perhaps for want of memory" if exitcode == -signal.SIGKILL else "its log may tell more"


def _work(
    local_rank: int,
    part: Part,
    job: Job,
    output: Path,
    data_root: Path,
    trained: Mapping[str, str],
    sender: Connection,
    lock: Any,
) -> None:
    """One of the processes, from its start to its end."""
    end_with_parent()
    from benchmarks.engine import Context
    from benchmarks.measure import measure

    rank = part.first + local_rank

    def say(kind: str, value: Any) -> None:
        with lock:
            sender.send((kind, value))

    def tell(kind: str) -> dict[str, Any]:
        return {kind: lambda value: say(kind, value)} if rank == 0 else {}

    context = Context(output, data_root, **tell("progress"), **tell("report"))
    log = os.open(context.folder(job.key) / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):  # standard output and error, also of libraries that know nothing of Python
        os.dup2(log, stream)
    number = job.recipe.engine.processes
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(number)}
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
    try:
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo", init_method=part.rendezvous, rank=rank, world_size=number
        )
        outcome = measure(job, context, trained)
        if rank == 0:
            say("outcome", outcome)
        torch.distributed.destroy_process_group()
    except Exception as error:
        traceback.print_exc()
        if _is_cut_off(error):
            say("cut off", " ".join(str(error).split())[:200])
        else:
            say("error", _that_travels(error))


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, however it went: nobody waits for the rest."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _is_cut_off(error: Exception) -> bool:
    """Whether the others of the group are gone, for a reason that they know, rather than this process wrong."""
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )


def _that_travels(error: Exception) -> Exception:
    """`error`, or what it says where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
