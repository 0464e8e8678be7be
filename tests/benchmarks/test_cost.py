"""Costs against published and independently computed numbers, and that counting leaves no trace."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import DeformConv2d

import zoo
from benchmarks.cost import count
from benchmarks.errors import InputError

SWIN_UPERNET = {
    "backbone": {
        "type": "SwinTransformer",
        "embed_dims": 96,
        "patch_size": 4,
        "window_size": 7,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "strides": (4, 2, 2, 2),
        "out_indices": (0, 1, 2, 3),
    },
    "decode_head": {
        "type": "UPerHead",
        "in_channels": [96, 192, 384, 768],
        "in_index": [0, 1, 2, 3],
        "pool_scales": (1, 2, 3, 6),
        "channels": 512,
        "num_classes": 150,
        "norm_cfg": {"type": "BN"},
        "align_corners": False,
    },
    "auxiliary_head": {
        "type": "FCNHead",
        "in_channels": 384,
        "in_index": 2,
        "channels": 256,
        "num_convs": 1,
        "concat_input": False,
        "num_classes": 150,
        "norm_cfg": {"type": "BN"},
        "align_corners": False,
    },
}
SEGFORMER_B0 = {
    "backbone": {
        "type": "MixVisionTransformer",
        "embed_dims": 32,
        "num_layers": [2, 2, 2, 2],
        "num_heads": [1, 2, 5, 8],
        "patch_sizes": [7, 3, 3, 3],
        "sr_ratios": [8, 4, 2, 1],
        "qkv_bias": True,
    },
    "decode_head": {
        "type": "SegformerHead",
        "in_channels": [32, 64, 160, 256],
        "in_index": [0, 1, 2, 3],
        "channels": 256,
        "num_classes": 150,
        "norm_cfg": {"type": "BN"},
        "align_corners": False,
    },
}


def build_segmentor(config: dict) -> nn.Module:
    import mmseg.models  # noqa: F401  (registers its modules)
    from mmseg.registry import MODELS

    return MODELS.build({"type": "EncoderDecoder", "test_cfg": {"mode": "whole"}, **copy.deepcopy(config)})


def on_meta(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


class Tiny(nn.Module):
    """Every count of this one can be done by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).mT  # (B, N, 8)
        for block in self.blocks:
            x = block(x)
        return self.dropout(x @ x.mT)


def test_by_hand():
    cost = count(Tiny(), (3, 16, 16))
    conv, linear, product = 64 * 8 * 27, 64 * 8 * 8, 64 * 64 * 8
    assert cost.macs == conv + 2 * linear + product
    assert cost.by_operator == {"aten.convolution": conv, "aten.mm": 2 * linear, "aten.bmm": product}
    assert cost.by_module == {
        "stem": conv,
        "stem.0": conv,
        "blocks": 2 * linear,
        "blocks.0": linear,
        "blocks.1": linear,
    }
    assert cost.activations == 3 * 64 * 8 + 64 * 64
    assert cost.params == 8 * 27 + 8 + 16 + 2 * 64
    assert cost.params_auxiliary == 0
    assert cost.uncounted["aten.relu"] == 64 * 8
    assert not {"aten.convolution", "aten.mm", "aten.bmm", "aten.transpose"} & cost.uncounted.keys()
    assert "MACs" in cost.convention


@pytest.mark.parametrize("fused", [False, True])
def test_vit_base_with_attention_fused_or_not(fused):
    timm.layers.set_fused_attn(fused)
    try:
        cost = count(on_meta("vit_base_patch16_224"), (3, 224, 224))
    finally:
        timm.layers.set_fused_attn(True)
    assert cost.macs / 1e9 == pytest.approx(17.564, abs=5e-4)
    assert cost.params == 86_567_656
    assert cost.by_operator["aten.bmm"] == 12 * 2 * 197 * 197 * 768
    attention = 12 * (12 * 197 * 197 + 197 * 768)
    linear = 12 * 197 * (3 + 1 + 4 + 1) * 768 + 1000
    assert cost.activations == attention + linear + 196 * 768


@pytest.mark.parametrize(
    ("name", "params", "gmacs"), [("resnet50", 25_557_032, 4.089), ("convnext_tiny", 28_589_128, 4.4555)]
)
def test_published_classifiers(name, params, gmacs):
    cost = count(on_meta(name), (3, 224, 224))
    assert cost.params == params
    assert cost.macs / 1e9 == pytest.approx(gmacs, abs=1e-3)
    assert sum(macs for path, macs in cost.by_module.items() if "." not in path) == cost.macs


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_hrvit", 72), ("test_hrformer", 72), ("test_hivit", 64), ("test_hiri_vit", 72), ("test_vit", 160)],
)
def test_the_same_as_torch_s_own_counter(name, size):
    """Blocks whose operators are not run again count like the first; modules have what they run."""
    with torch.device("meta"):
        model = zoo.create_model(name).eval()
    cost = count(model, (3, size, size))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.empty(1, 3, size, size, device="meta"))
    flops = counter.get_flop_counts()
    assert {name: 2 * macs for name, macs in cost.by_operator.items()} == {
        str(operator): value for operator, value in flops["Global"].items()
    }
    for path, macs in cost.by_module.items():
        called = flops.get(f"{type(model).__name__}.{path}")  # lists of modules are not called
        assert called is None or 2 * macs == sum(called.values()), path


def test_segformer_b0():
    cost = count(build_segmentor(SEGFORMER_B0))
    assert cost.input_size == (3, 512, 512)
    assert cost.params / 1e6 == pytest.approx(3.754, abs=5e-4)
    assert cost.macs / 1e9 == pytest.approx(8.388, abs=5e-4)
    assert cost.by_module["backbone"] + cost.by_module["decode_head"] == cost.macs


def test_swin_upernet():
    model = build_segmentor(SWIN_UPERNET)
    cost = count(model, (3, 512, 512))
    assert cost.params / 1e6 == pytest.approx(59.02, abs=5e-3)
    assert (cost.params + cost.params_auxiliary) / 1e6 == pytest.approx(59.94, abs=5e-3)
    assert cost.macs / 1e9 == pytest.approx(236.86, abs=1e-2)
    assert "auxiliary_head" not in cost.by_module
    wide = count(model, (3, 512, 2048))
    assert wide.macs / 1e9 == pytest.approx(944.39, abs=1e-2)


class Keeper(nn.Module):
    """What third-party models do: plain tensors, values made on the CPU, caches, tied weights, in-place buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tied = self.linear
        self.register_buffer("calls", torch.zeros(1))
        self.plain = torch.ones(4)
        self.made_by_autograd = self.linear.weight * 2
        self.cache: dict[int, torch.Tensor] = {}
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.linspace(0, 1, 3).tolist()  # needs real values
        self.calls += 1
        self.last = x
        self.cache[x.shape[-1]] = x
        x = self.tied(self.linear(x)) * self.plain + torch.rand(4) * steps[1]
        return x @ self.made_by_autograd


def test_the_model_is_left_as_it_was():
    model = Keeper()
    model.linear.eval()
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    cost = count(model, (3, 2, 4))
    assert torch.equal(torch.rand(5), expected)
    assert cost.params == 20
    assert cost.macs == 3 * 3 * 2 * 4 * 4
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.training, model.linear.training, model.cache, model.last) == (True, False, {}, None)
    assert torch.backends.mha.get_fastpath_enabled()


def test_other_modes_and_devices_give_the_same():
    expected = count(Tiny().eval(), (3, 16, 16))
    assert count(Tiny().train(), (3, 16, 16)) == expected
    assert count(Tiny().to("meta"), (3, 16, 16)) == expected
    assert count(Tiny().double(), (3, 16, 16)) == expected
    with torch.inference_mode():
        assert count(Tiny(), (3, 16, 16)) == expected


def test_multihead_attention_is_counted_on_its_fast_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    cost = count(layer, (8, 16), forward=lambda model, x: model(x))
    assert cost.macs == 8 * 16 * (4 * 16 + 2 * 32) + 2 * 8 * 8 * 16


def test_forward_of_ones_own_keeps_module_paths():
    cost = count(Tiny(), (3, 16, 16), forward=lambda model, image: model.blocks[0](model.stem(image).flatten(2).mT))
    assert cost.by_module == {"stem": 13824, "stem.0": 13824, "blocks": 4096, "blocks.0": 4096}


def test_operators_that_are_not_counted_are_named():
    cost = count(
        DeformConv2d(3, 4, 3), (3, 8, 8), forward=lambda model, x: model(x, torch.zeros(1, 18, 6, 6, device="meta"))
    )
    assert cost.macs == 0
    assert cost.uncounted["torchvision.deform_conv2d"] == 4 * 6 * 6


def test_a_size_that_the_model_cannot_take():
    with pytest.raises(
        InputError, match=r"^VisionTransformer cannot take an input of 3x225x224: Input height"
    ) as caught:
        count(on_meta("vit_tiny_patch16_224"), (3, 225, 224))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^ResNet cannot take an input of 4x64x64"):
        count(on_meta("resnet18"), (4, 64, 64))


def test_a_model_that_needs_values():
    with pytest.raises(InputError, match=r"cannot take|cannot be counted"):
        count(nn.Linear(4, 4), (2, 4), forward=lambda model, x: model(x).sum().item())
