"""One training step of a job's whole model in a process of its own, which ends with the memory that it took."""

from __future__ import annotations

import multiprocessing
import resource
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

from benchmarks.job import Job


@dataclass(frozen=True)
class Step:
    loss: float
    seconds: float  # forward and backward
    peak_gb: float  # 1e9 bytes: the largest resident memory of the process, Python and PyTorch included
    without_gradient: list[str]  # names of parameters
    not_finite: list[str]  # likewise, of their gradients


def one_step(job: Job, limit_gb: float, checkpointing: bool = False) -> Step:
    """Forward with loss and backward of one random image with random labels, in training mode.

    Raises:
        MemoryError: more than `limit_gb` (1e9 bytes) is needed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.measure", "benchmarks.segmentation"])  # seconds of imports, once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(job, limit_gb, checkpointing, sender))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{job.title}: the process died with status {process.exitcode}") from None
    finally:
        process.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _run(job: Job, limit_gb: float, checkpointing: bool, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gb * 1e9), resource.RLIM_INFINITY))
    try:
        sender.send(_step(job, checkpointing))
    except RuntimeError as error:
        short = any(words in str(error) for words in ("DefaultCPUAllocator", "bad_alloc"))
        sender.send(MemoryError(f"more than {limit_gb} GB") if short else error)
    except Exception as error:
        sender.send(error)


def _step(job: Job, checkpointing: bool) -> Step:
    import torch
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    from torch import nn

    from benchmarks import classification, segmentation

    torch.manual_seed(0)
    init_default_scope("mmseg")
    model = {"classification": classification, "segmentation": segmentation}[job.task].build_model(job).train()
    if checkpointing:
        able = next(part for part in model.modules() if hasattr(part, "set_grad_checkpointing"))
        able.set_grad_checkpointing(True)
    for name, norm in model.named_modules():
        # UPerNet pools a map to one position, of whose single value a batch of one has no statistics.
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and "psp_modules.0" in name:
            norm.eval()
    images = torch.randn(1, 3, *job.input_size)
    start = time.perf_counter()
    if job.task == "classification":
        loss = nn.functional.cross_entropy(model(images), torch.randint(job.num_classes, (1,)))
    else:
        labels = PixelData(data=torch.randint(job.num_classes, (1, *job.input_size)))
        losses = model(images, [SegDataSample(gt_sem_seg=labels)], mode="loss")
        loss, _ = model.parse_losses(losses)
    loss.backward()
    seconds = time.perf_counter() - start
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Step(
        loss.item(),
        seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        [name for name, gradient in gradients.items() if gradient is None],
        [name for name, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()],
    )
