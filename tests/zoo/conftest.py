"""Oracles: outputs of the published implementations for weights that follow from the names of the parameters."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo

ORACLES = Path(__file__).parents[1] / "oracles"


class Oracle:
    """One recorded model: its state dict's keys and shapes, and its outputs per input size."""

    def __init__(self, name: str):
        record = json.loads((ORACLES / f"{name}.json").read_text())
        self.params: int = record["params"]
        self.shapes = {key: tuple(shape) for key, shape, _ in record["state_dict"]}
        self.runs: dict = record["runs"]

    @staticmethod
    def state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """float64 weights for published keys: norms near 1, matrices of unit gain, the rest small."""
        state = {}
        for key, shape in shapes.items():
            leaf = key.rpartition(".")[2]
            if leaf in ("relative_position_index", "num_batches_tracked"):
                continue
            x = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
            if leaf == "running_var":
                x = 1 + 0.1 * np.abs(x)
            elif leaf == "running_mean":
                x = 0.1 * x
            elif leaf == "weight":
                x = 1 + 0.1 * x if len(shape) == 1 else x / np.sqrt(np.prod(shape[1:]))
            else:
                x = 0.02 * x
            state[key] = torch.from_numpy(x)
        return state

    def fill(self, model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        model = model.to(dtype).eval()
        assert zoo.load_published(model, self.state(self.shapes)).complete
        return model

    @staticmethod
    def images(dtype: torch.dtype, size: tuple[int, int] = (224, 224)) -> torch.Tensor:
        return torch.from_numpy(np.random.Generator(np.random.PCG64(0)).standard_normal((2, 3, *size))).to(dtype)

    @staticmethod
    def check(output: torch.Tensor, record: dict) -> None:
        """float64 to 1e-9 of the largest value; float32 to five times the published float32 run's own error."""
        assert list(output.shape) == record["shape"]
        if "flat_idx" in record:
            values, expected = output.flatten()[record["flat_idx"]], record["values"]
        else:
            values, expected = output[:, :64], [record["first64_of_row0"], record["first64_of_row1"]]
        double = output.dtype == torch.float64
        limit = 1e-9 * record["absmax"] if double else 5 * record["f32_max_abs_diff_to_f64"]
        assert (values.double() - torch.tensor(expected, dtype=torch.float64)).abs().max() <= limit
        assert output.double().norm().item() == pytest.approx(record["l2"], rel=1e-9 if double else 1e-6)


@pytest.fixture(scope="session")
def oracle():
    return Oracle


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Small models: a second thread gains nothing, and loses much beside other work on the same cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
