"""How fast a model runs on this machine, and how much memory it takes: latency, throughput, peak memory.

Times on shared machines drift, so the model alternates with a yardstick that anyone has; their ratio travels better
between machines and days than either time. Forward and training step both run in evaluation mode: no batch statistics,
dropout or drop path, so that batch 1 works, every repeat does the same and the model is left as it was.
"""

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from benchmarks.cpus import usable_cores
from benchmarks.errors import Blocked, InputError, unsupported_size

_FEWEST_REPEATS = 5  # kept even where `max_seconds` is over: below, a median says little
_FOREIGN_SHARE = 0.1  # of all cores: above, a measurement is noted as disturbed


@dataclass(frozen=True)
class Timing:
    """Raw samples of one quantity, in seconds per batch, in the order in which they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds per batch."""
        return statistics.median(self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """Lowest and highest plausible median (order statistics, no assumption on the distribution), seconds."""
        rank, _ = _interval_rank(len(self.samples))
        ordered = sorted(self.samples)
        return ordered[rank], ordered[-1 - rank]

    @property
    def coverage(self) -> float:
        """Probability that `interval` holds the true median: at least 0.95 from six samples on, less below."""
        return _interval_rank(len(self.samples))[1]


@dataclass(frozen=True)
class Speed:
    """One model's speed. Memory is in bytes; the training step is a forward with autograd and its backward.

    `peak_memory` and `train_peak_memory` are the largest sums of allocated bytes: weights, buffers, the images and all
    that the forward or the training step allocates (gradients included; no optimizer takes part). On CUDA they are
    from `torch.cuda.max_memory_allocated`, on the CPU from the allocations that `torch.profiler` sees. `saved_bytes` is
    what autograd keeps of one forward for the backward: storages counted once, parameters left out.
    """

    input_size: tuple[int, ...]  # channels, height, width
    batch_size: int
    device: str
    threads: int  # CPU threads of the measurement
    forward: Timing
    train_step: Timing | None
    yardstick_forward: Timing | None
    yardstick_train_step: Timing | None
    peak_memory: int
    train_peak_memory: int | None
    saved_bytes: int | None
    foreign_load: float  # CPU cores that other processes kept busy meanwhile
    notes: tuple[str, ...]  # what may have disturbed the measurement

    @property
    def throughput(self) -> float:
        """Images per second of the forward."""
        return self.batch_size / self.forward.median

    @property
    def ratio(self) -> float | None:
        """Forward time over the yardstick's: the median over pairs taken one after the other."""
        return _ratio(self.forward, self.yardstick_forward)

    @property
    def train_step_ratio(self) -> float | None:
        """The same of the training step."""
        return _ratio(self.train_step, self.yardstick_train_step)


def default_yardstick() -> nn.Module:
    """ConvNeXt-T's feature extractor, a model that anyone has (timm), with random weights."""
    import timm

    with torch.random.fork_rng(devices=[]):
        return timm.create_model("convnext_tiny", features_only=True)


def measure(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    repeats: int = 20,
    warmup: int = 3,
    min_seconds: float = 0.0,
    max_seconds: float = 20.0,
    train_step: bool = True,
    yardstick: nn.Module | None = None,
    threads: int | None = None,
) -> Speed:
    """Measures `model` on random images (batch_size, *input_size), alternating with `yardstick`.

    Forward and training step each get `warmup` unmeasured rounds, then `repeats` rounds, more until `min_seconds` are
    over, and fewer (at least five) where they would take more than `max_seconds`, of which warming up adds a quarter at
    most, or one round. `threads` is the number of CPU
    threads, by default one for each physical core that this process may use, whatever OMP_NUM_THREADS says. Afterwards
    everything is as before: the models' devices, modes and gradients, the number of threads, the random state.

    Raises:
        InputError: the model cannot take this size, or has nothing to train; the device is not there.
        Blocked: there is not enough memory.
    """
    input_size, device = tuple(input_size), torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={device}: this machine has no usable CUDA device; use device=cpu")
    threads = threads or usable_cores()
    models = [model] if yardstick is None else [model, yardstick]
    rounds = _Rounds(repeats, warmup, min_seconds, max_seconds)
    with ExitStack() as stack:
        stack.enter_context(_memory_explained(type(model).__name__, input_size, batch_size))
        stack.enter_context(_threads(threads))
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        for each in models:
            stack.enter_context(_borrowed(each, device))
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((batch_size, *input_size), generator=generator).to(device, dtype)
        _try(models, images)

        forwards = [lambda each=each: _forward(each, images) for each in models]
        steps = [lambda each=each: _train_step(each, images) for each in models] if train_step else []
        resident = _bytes((*model.parameters(), *model.buffers(), images))
        # The first run of an operator may allocate caches of its library: memory is measured on the second.
        peak_memory = resident + _peak_allocated(forwards[0], device)
        saved_bytes = train_peak_memory = None
        if steps:
            steps[0]()
            train_peak_memory = resident + _peak_allocated(steps[0], device)
            saved_bytes = count_saved_bytes(model, images)
        with _foreign_load() as load:
            forward = rounds.sample(forwards, device)
            step = rounds.sample(steps, device) if steps else []
        notes = _notes(load[0], device)
    return Speed(
        input_size=input_size,
        batch_size=batch_size,
        device=str(device),
        threads=threads,
        forward=forward[0],
        train_step=step[0] if step else None,
        yardstick_forward=forward[1] if yardstick is not None else None,
        yardstick_train_step=step[1] if step and yardstick is not None else None,
        peak_memory=peak_memory,
        train_peak_memory=train_peak_memory,
        saved_bytes=saved_bytes,
        foreign_load=load[0],
        notes=notes,
    )


def count_saved_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that autograd keeps of one forward for the backward: storages counted once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss(model, images)
    return sum(storage.nbytes() for storage in saved.values())


def hardware() -> dict[str, Any]:
    """This machine: `name` (short label), `cpu`, `cores`, `usable_cores`, `memory_gb` (1e9 bytes), `gpus` (names)."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    cpu = _cpu_name()
    return {
        "name": gpus[0] if gpus else f"{cpu} ({usable_cores()} cores)",
        "cpu": cpu,
        "cores": cores,
        "usable_cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
    }


@dataclass(frozen=True)
class _Rounds:
    repeats: int
    warmup: int
    min_seconds: float
    max_seconds: float

    def sample(self, calls: Sequence[Callable[[], None]], device: torch.device) -> list[Timing]:
        """Times all `calls` once per round, so that a drift of the machine meets them alike."""
        start = time.perf_counter()
        for done in range(self.warmup):
            if done and time.perf_counter() - start > self.max_seconds / 4:
                break
            for call in calls:
                call()
        samples: list[list[float]] = [[] for _ in calls]
        with _no_garbage_collection():
            start = time.perf_counter()
            while self._goes_on(len(samples[0]), time.perf_counter() - start):
                for times, call in zip(samples, calls, strict=True):
                    times.append(_time(call, device))
        return [Timing(tuple(times)) for times in samples]

    def _goes_on(self, done: int, seconds: float) -> bool:
        if done < min(self.repeats, _FEWEST_REPEATS):
            return True
        return seconds < self.max_seconds and (done < self.repeats or seconds < self.min_seconds)


def _time(call: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _try(models: Sequence[nn.Module], images: torch.Tensor) -> None:
    """One forward of each model, where a size that it cannot take shows."""
    for model in models:
        try:
            _forward(model, images)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            if _is_out_of_memory(error):
                raise
            raise unsupported_size(type(model).__name__, tuple(images.shape[1:]), error) from error


def _forward(model: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        model(images)


def _loss(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Sum of the means of all outputs, however nested."""
    outputs = [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not outputs:
        raise InputError(f"{type(model).__name__} has no output with a gradient: nothing to train")
    return sum(output.mean() for output in outputs)


def _train_step(model: nn.Module, images: torch.Tensor) -> None:
    _loss(model, images).backward()
    for parameter in model.parameters():
        parameter.grad = None


def _peak_allocated(call: Callable[[], None], device: torch.device) -> int:
    """Largest sum of bytes that `call` has allocated and not yet freed, at any moment."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()  # negative where memory is freed
        peak = max(peak, allocated)
    return peak


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _interval_rank(count: int) -> tuple[int, float]:
    """Order statistics around the median of `count` samples: distance from either end, and their coverage.

    The number of samples below the true median is binomial with p = 1/2; the narrowest interval of at least 95 %.
    """
    rank, tail = 0, 0.5**count
    while (wider := tail + math.comb(count, rank + 1) * 0.5**count) <= 0.025:
        rank, tail = rank + 1, wider
    return rank, 1 - 2 * tail


def _ratio(timing: Timing | None, yardstick: Timing | None) -> float | None:
    if timing is None or yardstick is None:
        return None
    return statistics.median(one / other for one, other in zip(timing.samples, yardstick.samples, strict=True))


def _notes(foreign_load: float, device: torch.device) -> tuple[str, ...]:
    notes = []
    cores = psutil.cpu_count() or 1
    if foreign_load > _FOREIGN_SHARE * cores:
        notes.append(f"other processes kept {foreign_load:.1f} of {cores} CPU cores busy: times may be too long")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        foreign = total - free - torch.cuda.memory_reserved(device)
        if foreign > 2e9:  # this process's own CUDA context takes some 0.5 GB
            notes.append(f"other processes hold about {foreign / 1e9:.1f} GB of {device}: times may be too long")
    return tuple(notes)


@contextmanager
def _foreign_load() -> Iterator[list[float]]:
    """Yields a list that afterwards holds the CPU cores which other processes kept busy, on average."""
    load: list[float] = []
    start, busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
    yield load
    seconds = time.perf_counter() - start
    foreign = (_busy_seconds() - busy) - (time.process_time() - own)
    load.append(max(0.0, foreign / seconds))


def _busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used."""
    times = psutil.cpu_times()._asdict()
    # Guests' seconds are in user's and nice's already.
    return sum(value for name, value in times.items() if name not in ("idle", "iowait", "guest", "guest_nice"))


@contextmanager
def _borrowed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device`, in evaluation mode, without gradients; all as before afterwards."""
    origin = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), device)
    if origin.type == "meta":
        raise InputError(f"{type(model).__name__} lies on the meta device and has no weights to run with")
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        model.to(device).eval()
        yield
    finally:
        model.to(origin)
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def _threads(number: int) -> Iterator[None]:
    # Ray sets OMP_NUM_THREADS=1 in its workers, which would falsify every CPU time.
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler's library writes to stderr unless told not to before its first use."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


@contextmanager
def _memory_explained(model: str, input_size: tuple[int, ...], batch_size: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        size = "x".join(map(str, input_size))
        raise Blocked(f"not enough memory for {model} with {batch_size} images of {size}") from error


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
