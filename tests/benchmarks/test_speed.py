"""Speed: what is timed in which order, memory against known amounts, and that measuring leaves no trace."""

import gc
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from benchmarks import speed
from benchmarks.errors import Blocked, InputError
from benchmarks.speed import Timing, hardware, measure


class Recorder(nn.Module):
    """Notes every call, and gives nested outputs as third-party models do."""

    def __init__(self, name: str = "", log: list | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.name, self.log = name, log if log is not None else []

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        self.log.append((self.name, torch.is_grad_enabled()))
        self.seen = (self.training, torch.get_num_threads(), gc.isenabled())
        y = self.norm(self.conv(x))
        return {"maps": [y, (y.mean(), None)], "size": tuple(x.shape), "indices": y.argmax(1)}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_what_is_measured():
    model = Recorder().train()
    model.conv.eval()
    gradient = model.conv.weight.grad = torch.ones_like(model.conv.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    yardstick = Recorder()
    random_state = torch.get_rng_state()
    result = measure(model, (3, 16, 12), batch_size=2, repeats=8, yardstick=yardstick, threads=2)

    assert (result.input_size, result.batch_size, result.device, result.threads) == ((3, 16, 12), 2, "cpu", 2)
    for timing in (result.forward, result.train_step, result.yardstick_forward, result.yardstick_train_step):
        assert len(timing.samples) == 8
        low, high = timing.interval
        assert 0 < low <= timing.median <= high
    assert result.throughput == 2 / result.forward.median
    assert result.ratio > 0
    assert result.train_step_ratio > 0
    assert result.foreign_load >= 0
    assert model.seen == (False, 2, False)

    assert torch.get_num_threads() == 1
    assert gc.isenabled()
    assert (model.training, model.conv.training, model.norm.training) == (True, False, True)
    assert model.conv.weight.grad is gradient
    assert model.conv.bias.grad is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_model_and_yardstick_alternate():
    log: list = []
    measure(Recorder("model", log), (3, 8, 8), repeats=6, warmup=0, yardstick=Recorder("yardstick", log))
    pairs = [("model", False), ("yardstick", False)] * 6 + [("model", True), ("yardstick", True)] * 6
    assert log[-len(pairs) :] == pairs


def test_forward_alone():
    result = measure(Recorder(), (3, 8, 8), repeats=2, warmup=0, train_step=False)
    assert len(result.forward.samples) == 2
    assert result.train_step is result.train_peak_memory is result.saved_bytes is result.yardstick_forward is None
    assert result.ratio is result.train_step_ratio is None


class Sleeper(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x


def test_time_limits():
    assert len(measure(Sleeper(), (1,), repeats=2, min_seconds=0.3, train_step=False).forward.samples) > 5
    short = measure(Sleeper(), (1,), repeats=1000, max_seconds=0.1, train_step=False)
    assert 5 <= len(short.forward.samples) <= 7
    assert 0.02 <= short.forward.median < 0.2


@pytest.mark.parametrize(
    ("count", "rank", "coverage"), [(1, 0, 0.0), (5, 0, 0.9375), (6, 0, 0.96875), (9, 1, 0.9609375), (20, 5, 0.9586)]
)
def test_interval_of_the_median(count, rank, coverage):
    """Ranks and coverages as in tables of the sign test's confidence interval of a median."""
    timing = Timing(tuple(float(value) for value in reversed(range(count))))
    assert timing.interval == (rank, count - 1 - rank)
    assert timing.coverage == pytest.approx(coverage, abs=1e-4)
    assert timing.median == (count - 1) / 2


class Doubler(nn.Module):
    """Allocates known amounts: 3 maps at once at the most; saves one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))
        self.register_buffer("table", torch.ones(500))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x + 1
        second = first + 1
        third = second + 1
        del second
        return third * self.weight[0]


def test_memory_is_what_was_allocated():
    image = 4 * 3 * 100 * 100
    result = measure(Doubler(), (3, 100, 100), repeats=1, warmup=0)
    resident = 4 * (1000 + 500) + image
    assert result.peak_memory == pytest.approx(resident + 3 * image, abs=64)  # the ones added are 4 bytes each
    assert result.saved_bytes == pytest.approx(image, abs=64)
    assert result.train_peak_memory >= resident + image + 4 * 1000
    assert result.train_peak_memory <= resident + 4 * image + 8 * 1000


def test_saved_bytes_count_storages_once_and_leave_out_parameters():
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    # The images, which the first layer keeps, and the ReLU's output, which the ReLU and the second layer keep.
    assert measure(model, (10,), batch_size=7, repeats=1).saved_bytes == 2 * 4 * 7 * 10


def test_foreign_load_is_noted():
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        result = measure(Sleeper(), (1,), min_seconds=1.0, train_step=False)
    finally:
        burner.kill()
        burner.wait()
    assert result.foreign_load > 0.3
    assert speed._notes(result.foreign_load, torch.device("cpu")) == result.notes
    assert "busy" in speed._notes(1000.0, torch.device("cpu"))[0]
    assert speed._notes(0.0, torch.device("cpu")) == ()


class Greedy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.empty(2**50)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(4, 4), InputError, r"^Linear cannot take an input of 5: .*shapes cannot be multiplied"),
        (nn.Linear(4, 4, device="meta"), InputError, r"meta device"),
        (nn.Identity(), InputError, r"nothing to train"),
        (Greedy(), Blocked, r"^not enough memory for Greedy with 1 images of 5"),
    ],
)
def test_errors(model, error, message):
    threads = torch.get_num_threads()
    with pytest.raises(error, match=message) as caught:
        measure(model, (5,))
    assert "\n" not in str(caught.value)
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu():
    with pytest.raises(InputError, match="no usable CUDA device"):
        measure(nn.Identity(), (5,), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model = Doubler()
    result = measure(model, (3, 100, 100), device="cuda", yardstick=Recorder())
    resident, image = 4 * (1000 + 500), 4 * 3 * 100 * 100
    assert result.peak_memory == pytest.approx(resident + 4 * image, abs=4096)
    assert result.saved_bytes == pytest.approx(image, abs=64)
    assert model.weight.device.type == "cpu"


def test_hardware():
    machine = hardware()
    assert machine["name"]
    assert 1 <= machine["usable_cores"] <= os.cpu_count()
    assert machine["memory_gb"] > 0
    json.dumps(machine)


def test_in_a_worker_with_one_openmp_thread():
    """As in Ray's workers; and nothing but the result is printed."""
    program = """
import torch
from benchmarks.speed import default_yardstick, measure, hardware
state = torch.get_rng_state()
yardstick = default_yardstick()
assert torch.equal(state, torch.get_rng_state())
assert len(yardstick(torch.zeros(1, 3, 32, 32))) == 4
result = measure(torch.nn.Linear(4, 4), (4,), repeats=2)
assert result.threads == hardware()["usable_cores"]
assert torch.get_num_threads() == 1
print("fine")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout, done.stderr) == ("fine\n", "")
