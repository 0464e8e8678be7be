"""HRNet against timm's, and the networks of HRViT's Table 6 and HRFormer's Table 11."""

from functools import cache
from statistics import fmean

import pytest
import timm
import torch
import torch.nn.functional as F

import zoo
from benchmarks.conventions import BATCH_NORM, HRVIT
from benchmarks.cost import Cost, count
from zoo.baselines.hrnet import BasicBlock, ReducedAttention

SMALL = {
    "channels": (8, 16, 24, 32),
    "num_modules": (1, 1, 1, 1),
    "num_blocks": (1, 1, 1, 1),
    "head_widths": (4, 4, 8, 8),
    "head_features": 16,
}
KINDS = ["hrnet_small", "hrnet_mit_w18", "hrnet_cswin_w18"]


def build_empty(name: str, **options) -> torch.nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name, **options)


def test_it_equals_timm_s():
    """HRNet-T is timm's hrnet_w18_small_v2, whose weights load."""
    theirs = timm.create_model("hrnet_w18_small_v2").double().eval()
    for name, value in theirs.state_dict().items():  # batch norms that do something
        if name.endswith(("running_mean", "bias")):
            torch.nn.init.normal_(value, std=0.1)
        elif name.endswith("running_var"):
            torch.nn.init.uniform_(value, 0.8, 1.2)
    ours = zoo.create_model("hrnet_tiny").double().eval()
    assert zoo.load_published(ours, theirs.state_dict()).complete
    assert set(zoo.published_keys(ours).values()) == set(theirs.state_dict())
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


# HRFormer, Table 11: classifiers at 224.
TABLE_11 = {
    "hrnet_tiny": (15_597_464, 2_595_712_864),
    "hrnet_small": (24_469_416, 4_924_514_304),
    "hrnet_base": (85_291_352, 20_147_813_920),
}


@pytest.mark.parametrize("name", TABLE_11)
def test_rows_of_table_11(name):
    cost = count(build_empty(name), (3, 224, 224))
    assert (cost.params, cost.macs) == TABLE_11[name]


# HRViT, Table 6: what is printed (M, G); of the reconstruction with the paper's SegFormer head and 19 classes the
# parameters, the GMACs and the GFLOPs in HRViT's way, the latter with batch norms that are not synchronised: they count
# 2 per element, which `HRVIT` leaves out.
TABLE_6 = {
    ("cswin", 18): (8.1, 22.3, 8_159_151, 23.449, 20.71),
    ("cswin", 32): (23.9, 42.2, 24_355_667, 46.399, 41.90),
    ("cswin", 40): (39.5, 96.3, 40_053_619, 99.393, 93.94),
    ("mit", 18): (8.4, 29.3, 8_422_735, 27.465, 27.71),
    ("mit", 32): (24.4, 52.4, 24_804_947, 51.812, 52.19),
    ("mit", 40): (40.1, 108.0, 40_609_011, 105.128, 105.64),
}


@cache
def counted(kind: str, width: int) -> tuple[Cost, float]:
    """The cost of the maps at 512 pixels, and GFLOPs in HRViT's way."""
    model = build_empty(f"hrnet_{kind}_w{width}", features_only=True)
    cost = count(model, (3, 512, 512))
    return cost, HRVIT.macs(model, cost) / 1e9


def head(width: int) -> tuple[int, float]:
    """Parameters and GMACs of the SegFormer head at 512 pixels, 19 classes: projections, fusion, classifier."""
    channels, hidden = [width * 2**i for i in range(4)], 768 if width == 40 else 256
    params = sum(c * hidden + hidden for c in channels) + 4 * hidden**2 + 2 * hidden + 19 * hidden + 19
    macs = sum(c * hidden * (128 >> i) ** 2 for i, c in enumerate(channels)) + (4 * hidden + 19) * hidden * 128**2
    return params, macs / 1e9


def head_elements(width: int) -> float:
    """Elements, in 1e9, that HRViT counts in that head: biases, a ReLU, and four maps of stride 4 by resizing."""
    hidden = 768 if width == 40 else 256
    return (hidden * sum((128 >> i) ** 2 for i in range(4)) + (hidden + 19 + 4 * hidden) * 128**2) / 1e9


@pytest.mark.parametrize(("kind", "width"), TABLE_6)
def test_rows_of_table_6(kind, width):
    """What is built is the reconstruction, whose costs are near the printed ones and no more."""
    cost, flops = counted(kind, width)
    params, giga = head(width)
    _, _, expected_m, expected_g, expected_flops = TABLE_6[kind, width]
    assert cost.params + params == expected_m
    assert cost.macs / 1e9 + giga == pytest.approx(expected_g, abs=1e-3)
    norms = 2 * cost.trace.sum(*BATCH_NORM).elements / 1e9
    assert flops + norms + giga + head_elements(width) == pytest.approx(expected_flops, abs=6e-3)


def test_the_reconstruction_is_as_near_as_is_said():
    """3 % root mean square with the 19 classes of the table, at most 7 %."""
    errors = []
    for (kind, width), (printed_m, printed_g, *_) in TABLE_6.items():
        (cost, flops), (params, giga) = counted(kind, width), head(width)
        errors.append((cost.params + params) / 1e6 / printed_m - 1)
        errors.append((flops + giga + head_elements(width)) / printed_g - 1)
    assert fmean(error**2 for error in errors) ** 0.5 == pytest.approx(0.030, abs=5e-4)
    assert max(errors, key=abs) == pytest.approx(-0.072, abs=5e-4)


@pytest.mark.parametrize("width", [18, 32, 40])
def test_differences_of_table_6(width):
    """MiT less CSWin leaves the blocks alone, and comes out as printed: numbers that are rounded to one decimal."""
    more, less = TABLE_6["mit", width], TABLE_6["cswin", width]
    (mit, mit_giga), (cswin, cswin_giga) = counted("mit", width), counted("cswin", width)
    assert (mit.params - cswin.params) / 1e6 == pytest.approx(more[0] - less[0], abs=0.1)
    assert mit_giga - cswin_giga == pytest.approx(more[1] - less[1], abs=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_any_size_trains(name):
    model = zoo.create_model(name, num_classes=3, **SMALL)
    model.set_grad_checkpointing()
    model.train()(torch.rand(2, 3, 33, 47)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    dense = zoo.create_model(name, features_only=True, **SMALL).eval()
    shapes = [tuple(y.shape) for y in dense(torch.rand(1, 3, 72, 104))]
    assert shapes == [(1, 8, 18, 26), (1, 16, 9, 13), (1, 24, 5, 7), (1, 32, 3, 4)]
    names = {"hrnet_small": "HRNet"}
    assert zoo.family(name) == names.get(name, "HRNet-ViT")


def test_checkpointing_gives_the_same_gradients():
    model, x = zoo.create_model("hrnet_mit_w18", num_classes=3, **SMALL).train(), torch.rand(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_attention_to_a_smaller_map_written_out():
    dim, heads, reduction = 8, 2, 2
    module = ReducedAttention(dim, heads, reduction).double()
    w, x = module.state_dict(), torch.randn(2, 4, 6, dim, dtype=torch.float64)
    small = F.conv2d(x.permute(0, 3, 1, 2), w["reduce.weight"], w["reduce.bias"], reduction, groups=dim)
    small = F.layer_norm(small.flatten(2).transpose(1, 2), (dim,), w["norm.weight"], w["norm.bias"])
    q = x.flatten(1, 2) @ w["q.weight"].T + w["q.bias"]
    k, v = (small @ w["kv.weight"].T + w["kv.bias"]).chunk(2, -1)
    parts = []
    for own in (slice(0, 4), slice(4, 8)):
        logits = q[..., own] @ k[..., own].transpose(1, 2) / 2
        parts.append(logits.softmax(-1) @ v[..., own])
    expected = torch.cat(parts, -1) @ w["proj.weight"].T + w["proj.bias"]
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected.view(x.shape))


def test_a_residual_block_keeps_the_layout():
    block, x = BasicBlock(4).eval(), torch.randn(1, 3, 5, 4)
    with torch.no_grad():
        assert block(x).shape == x.shape
        assert (block(x) >= 0).all()


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("hrnet_mit_w18", {"channels": (18, 36, 72, 146)}, ["channels=(18, 36, 72, 146)", "heads"]),
        ("hrnet_small", {"num_blocks": (4, 4, 0, 4)}, ["num_blocks", "positive"]),
        ("hrnet_small", {"head_features": 0}, ["head_features=0"]),
        ("hrnet_small", {"drop_path_rate": 1.0}, ["drop_path_rate=1.0"]),
        ("hrnet_small", {"window_size": 7}, ["window_size", "channels"]),
    ],
)
def test_impossible_values_are_told_in_one_line(name, options, told):
    with pytest.raises(zoo.ZooError) as error:
        zoo.create_model(name, **options)
    assert all(part in str(error.value) for part in [name, *told])
    assert "\n" not in str(error.value)
