"""Relative position bias: expansion, BEiT's interpolation, and a cache that is never stale."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch

import zoo
from zoo.relative_position import BiasCache, expand_table, resize_table


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (2, 5), (6, 4)])
def test_expansion_is_the_indexed_table(grid):
    h, w = grid
    table = torch.randn((2 * h - 1) * (2 * w - 1), 3, dtype=torch.float64, requires_grad=True)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    index = (rows[:, None] - rows + h - 1) * (2 * w - 1) + columns[:, None] - columns + w - 1  # query - key
    expected, built = table[index].permute(2, 0, 1), expand_table(table, grid)
    assert torch.equal(built, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((b * weight).sum(), table)[0] for b in (built, expected)))


def beit(table: torch.Tensor, source: int, target: int) -> np.ndarray:
    """BEiT's procedure spelled out for a square table, read with scipy's interpolating surface."""
    from scipy.interpolate import RectBivariateSpline

    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        if sum(q**i for i in range(source - 1)) > target - 1:
            right = q
        else:
            left = q
    positive = [sum(q**i for i in range(n + 1)) for n in range(source - 1)]
    known = np.array([-p for p in reversed(positive)] + [0] + positive)
    wanted = np.clip(np.arange(-(target - 1), target), known[0], known[-1])
    values = table.view(2 * source - 1, 2 * source - 1, -1).double().numpy()
    surfaces = [
        RectBivariateSpline(known, known, values[..., head])(wanted, wanted) for head in range(values.shape[-1])
    ]
    return np.stack(surfaces, -1).reshape(-1, values.shape[-1])


@pytest.mark.parametrize(("source", "target"), [(14, 24), (14, 40), (14, 7), (4, 20)])
def test_resizing_is_beit_s(source, target):
    table = torch.randn((2 * source - 1) ** 2, 2, dtype=torch.float64)
    resized = resize_table(table, (source, source), (target, target))
    np.testing.assert_allclose(resized.numpy(), beit(table, source, target), rtol=1e-6, atol=1e-6)


def test_resizing_keeps_what_it_should():
    table = torch.randn(27 * 27, 2)
    assert resize_table(table, (14, 14), (14, 14)) is table
    grown = resize_table(table, (14, 14), (20, 31)).view(39, 61, 2)
    torch.testing.assert_close(grown[19, 30], table.view(27, 27, 2)[13, 13])  # the zero offset
    for source, target in [((1, 1), (3, 3)), ((2, 2), (5, 3)), ((3, 3), (1, 1))]:
        constant = torch.ones((2 * source[0] - 1) * (2 * source[1] - 1), 2)
        torch.testing.assert_close(resize_table(constant, source, target).mean(), torch.tensor(1.0))
    table.requires_grad_()
    resize_table(table, (14, 14), (20, 20)).sum().backward()
    assert table.grad.abs().sum() > 0


@pytest.fixture
def model():
    return zoo.create_model("test_hivit").eval()


def table_of(model):
    return model.blocks[-1].attn.relative_position_bias_table


def changes(model, x, edit) -> bool:
    with torch.no_grad():
        before = model(x)
        model(x)  # now certainly from the cache
        edit(model)
        after = model(x)
        fresh = zoo.create_model("test_hivit").eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(after, fresh.to(x.dtype)(x))
    return not torch.equal(before, after)


def load(model):
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: table_of(m).add_(torch.randn_like(table_of(m))),
        lambda m: table_of(m).data.mul_(-9.0),
        lambda m: setattr(table_of(m), "data", torch.randn_like(table_of(m))),
        lambda m: setattr(m.blocks[-1].attn, "relative_position_bias_table", torch.nn.Parameter(-9 * table_of(m))),
        load,
        lambda m: m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()}, assign=True),
    ],
    ids=["in place", "in place through data", "new data", "new parameter", "load", "load by assignment"],
)
def test_no_edit_meets_a_stale_bias(model, edit):
    assert changes(model, torch.rand(1, 3, 64, 64), edit)


def test_bias_is_built_once_per_size(model):
    x = torch.rand(1, 3, 64, 64)
    cache = model.blocks[-1].attn._bias_cache
    with torch.no_grad():
        model(x)
        bias = cache._entry.bias
        model(x)
        assert cache._entry.bias is bias
        model(torch.rand(1, 3, 96, 64))
        assert cache._entry.bias.shape == (2, 24, 24)
    model.train()
    assert cache._entry is None
    with torch.no_grad():
        model(x)
    assert cache._entry is None


def test_conversion_empties_the_cache_and_copies_start_empty(model):
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert copy.deepcopy(model).blocks[-1].attn._bias_cache._entry is None
        assert pickle.loads(pickle.dumps(model)).blocks[-1].attn._bias_cache._entry is None
        assert not any("cache" in key for key in model.state_dict())
        model.double()
        assert model.blocks[-1].attn._bias_cache._entry is None
        torch.testing.assert_close(model(x.double()).float(), expected)


def test_modes_do_not_share_a_bias(model):
    """A bias made in inference mode must not be met by a backward pass."""
    table_of(model).requires_grad_(False)
    x = torch.rand(1, 3, 256, 256)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()


def test_a_bias_over_the_limit_is_not_kept(model):
    cache = model.blocks[-1].attn._bias_cache
    cache.max_bytes = 100
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    assert cache._entry is None


def test_a_training_pass_empties_the_cache():
    """On a GPU values are not compared, and a fused optimizer's step leaves the version as it was."""
    cache, table = BiasCache(10**6), torch.nn.Parameter(torch.randn(49, 2))

    def bias():
        return cache.get(table, (4, 4), table.dtype, lambda: expand_table(table, (4, 4)))

    with torch.no_grad():
        bias()
        cache._entry = cache._entry._replace(values=None)  # as on a GPU
        kept = bias()
        assert cache._entry.bias is kept
    bias()
    assert cache._entry is None
    table.data.mul_(-9)
    with torch.no_grad():
        assert torch.equal(bias(), -9 * kept)


def test_transforms_are_not_served_from_the_cache(model):
    x = torch.rand(3, 1, 3, 64, 64)
    model.requires_grad_(False)
    expected = torch.stack([model(image) for image in x])
    model.train().eval()
    torch.testing.assert_close(torch.func.vmap(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert model.blocks[-1].attn._bias_cache._entry is None


def test_threads_may_share_a_cache():
    """Two threads that ask for different grids get their own bias, never the other's."""
    cache, table = BiasCache(10**6), torch.nn.Parameter(torch.randn(49, 2), requires_grad=False)
    tables = {grid: resize_table(table, (4, 4), grid) for grid in [(4, 4), (2, 3), (3, 2), (4, 3)]}
    expected = {grid: expand_table(resized, grid) for grid, resized in tables.items()}
    wrong = []

    def ask(grid):
        for _ in range(300):
            built = cache.get(table, grid, table.dtype, lambda: expand_table(tables[grid], grid))
            if not torch.equal(built, expected[grid]):
                wrong.append(grid)

    threads = [threading.Thread(target=ask, args=(grid,)) for grid in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
