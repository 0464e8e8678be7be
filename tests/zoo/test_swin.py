"""HRFormer's Table 8: Swin-T without shifts, and with the depth-wise convolution, beside timm's."""

import pytest
import timm
import torch

import zoo
from benchmarks.cost import count

SMALL = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 3}

ROWS = [
    ("swin_tiny_patch4_window7_224", {}, 28_288_354, 4_490_566_656),  # timm's own: Swin-T
    ("intrawin_tiny", {}, 28_288_354, 4_490_566_656),
    ("swin_tiny_dw", {}, 28_544_482, 4_542_047_232),
    ("intrawin_tiny_dw", {}, 28_544_482, 4_542_047_232),
    ("intrawin_tiny_dw", {"normed_ffn": False}, 28_464_994, 4_542_047_232),
]


@pytest.mark.parametrize(("name", "options", "params", "macs"), ROWS)
def test_rows_of_table_8(name, options, params, macs):
    with torch.device("meta"):
        cost = count(zoo.create_model(name, **options), (3, 224, 224))
    assert (cost.params, cost.macs) == (params, macs)


def test_only_the_shift_is_another():
    theirs = timm.create_model("swin_tiny_patch4_window7_224", img_size=112, **SMALL).eval()
    x = torch.rand(1, 3, 112, 112)
    outputs = []
    for shifted in (True, False):
        ours = zoo.create_model("intrawin_tiny", img_size=112, shifted=shifted, **SMALL).eval()
        assert zoo.load_published(ours, theirs.state_dict()).complete
        with torch.no_grad():
            outputs.append(ours(x))
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], theirs(x))
    assert not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("name", "options"),
    [("intrawin_tiny", {}), ("swin_tiny_dw", {}), ("intrawin_tiny_dw", {"normed_ffn": False})],
)
def test_any_size_trains(name, options):
    model = zoo.create_model(name, **SMALL, **options)
    model.train()(torch.rand(2, 3, 72, 100)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    sizes = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    maps = zoo.create_model(name, features_only=True, img_size=(72, 100), **sizes, **options)(torch.rand(1, 3, 72, 100))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 18, 25), (1, 16, 9, 13), (1, 32, 5, 7), (1, 64, 3, 4)]
    assert zoo.family(name) == "Swin"


def test_an_unknown_option_is_told():
    with pytest.raises(zoo.ZooError, match="shifts"):
        zoo.create_model("intrawin_tiny", shifts=False)


@pytest.mark.parametrize("field", ["shifted", "depthwise_ffn", "normed_ffn"])
def test_a_switch_that_is_none_is_told(field):
    with pytest.raises(zoo.ZooError, match=f"^swin_tiny_dw: {field}='no' must be True or False$"):
        zoo.create_model("swin_tiny_dw", **{field: "no"})


def test_a_form_of_a_convolution_that_is_not_there_is_told():
    with pytest.raises(zoo.ZooError, match=r"intrawin_tiny: normed_ffn=False .* needs depthwise_ffn=True$"):
        zoo.create_model("intrawin_tiny", normed_ffn=False)
