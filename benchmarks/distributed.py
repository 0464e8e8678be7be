"""One job on several processes of this machine: a GPU each, or CPU threads.

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
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from timm.layers import convert_sync_batchnorm

from benchmarks.errors import Blocked, ProcessDied

if TYPE_CHECKING:
    from benchmarks.engine import Context, Outcome
    from benchmarks.job import Job


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


def measure_in_processes(job: Job, context: Context, trained: Mapping[str, str]) -> Outcome:
    """`benchmarks.measure.measure` in as many new processes as the recipe says; returns the outcome of the first.

    Raises:
        Blocked: there are fewer GPUs than processes.
        ProcessDied: one of them.
        Exception: what the first process to fail raised.
    """
    number = job.recipe.engine.processes
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and gpus < number:
        raise Blocked(f"the recipe asks for {number} processes, a GPU each, and this machine has {gpus}")
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    lock = spawn.Lock()
    places = (context.output, context.data_root)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        workers = [
            spawn.Process(target=_work, args=(rank, job, *places, dict(trained), rendezvous, sender, lock))
            for rank in range(number)
        ]
        try:
            for worker in workers:
                worker.start()
            return _listen(workers, receiver, context)
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.kill()
                    worker.join()
            receiver.close()
            sender.close()


def _listen(workers: list[multiprocessing.Process], receiver: Connection, context: Context) -> Outcome:
    """Passes on what the processes say, until all have ended well or one has not."""
    outcome = None
    while True:
        alive = [worker.sentinel for worker in workers if worker.exitcode is None]
        if receiver.poll():  # before the ends: what a process says last it says before it ends
            kind, value = receiver.recv()
            if kind == "error":
                raise value
            if kind == "outcome":
                outcome = value
            else:
                getattr(context, kind)(value)
            continue
        for rank, worker in enumerate(workers):
            if worker.exitcode:
                how = f"signal {-worker.exitcode}" if worker.exitcode < 0 else f"exit status {worker.exitcode}"
                raise ProcessDied(f"process {rank} of {len(workers)} died ({how}); {_perhaps(worker.exitcode)}")
        if not alive:
            return outcome
        wait([receiver, *alive])


def _perhaps(exitcode: int) -> str:
    return "killed, perhaps for want of memory" if exitcode == -signal.SIGKILL else "its log may tell more"


def _work(
    rank: int,
    job: Job,
    output: Path,
    data_root: Path,
    trained: Mapping[str, str],
    rendezvous: str,
    sender: Connection,
    lock: Any,
) -> None:
    """One of the processes, from its start to its end."""
    end_with_parent()
    from benchmarks.engine import Context
    from benchmarks.measure import measure

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
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(rank)
    try:
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo", init_method=rendezvous, rank=rank, world_size=number
        )
        outcome = measure(job, context, trained)
        if rank == 0:
            say("outcome", outcome)
        torch.distributed.destroy_process_group()
    except Exception as error:
        traceback.print_exc()
        say("error", _that_travels(error))


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, however it went: nobody waits for the rest."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _that_travels(error: Exception) -> Exception:
    """`error`, or what it says where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
