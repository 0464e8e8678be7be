"""HIRI-ViT's Tables 7, 8 and 9: every row by its fields, at the paper's cost, and small ones that run and train."""

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay

import zoo
from benchmarks.cost import count
from zoo.hiri_extended import FrontConfig

TRANSFORMERS = ("transformer", "transformer")
# What each row of Table 7 has less than the row after it, from row 6 (m_vit) down.
STEPS = {
    5: {"downsampling": ("conv", "conv", "conv")},
    4: {"stem": "vit"},
    3: {"norms": ("layer",) * 4, "ffn_norm": "layer"},
    2: {"blocks": TRANSFORMERS * 2, "num_heads": (1, 2, 5, 8), "reductions": (8, 4, 1, 1)},
    1: {"ffn_convolution": False},
}
FOUR = {row: {k: v for step in range(5, row - 1, -1) for k, v in STEPS[step].items()} for row in (6, *STEPS)}
POSITIONS = {"position_embedding": True}
CFFN = {"blocks": ("cffn", "cffn", "cffn", *TRANSFORMERS), "depths": (1, 1, 2, 9, 4)}
HR4 = {"blocks": ("hr",) * 4 + ("transformer",), "num_heads": (8,)}
# Model, fields, side of the image; parameters and MACs counted, and both as printed (M, G), None where another number
# comes out: results/papers/verdicts.csv says why.
ROWS = {
    "7.1": ("m_vit", FOUR[1], 224, 34_827_816, 4_284_585_984, None, None),
    "7.1, positions": ("m_vit", FOUR[1] | POSITIONS, 224, 35_028_520, 4_284_585_984, "35.0", None),
    "7.2": ("m_vit", FOUR[2], 224, 35_092_136, 4_332_566_784, "35.1", None),
    "7.3": ("m_vit", FOUR[3], 224, 34_155_368, 4_174_010_624, "34.2", None),
    "7.4": ("m_vit", FOUR[4], 224, 34_155_368, 4_174_010_624, "34.2", "4.2"),
    "7.5": ("m_vit", FOUR[5], 224, 34_183_880, 4_444_358_912, "34.2", None),
    "7.6": ("m_vit", FOUR[6], 224, 34_536_072, 4_678_875_264, "34.5", "4.7"),
    "7.7": ("m_vit", FOUR[6], 448, 34_536_072, 21_477_216_768, "34.5", "21.5"),
    "7.8": ("hiri_vit_small", CFFN | {"stem": "conv"}, 448, 34_717_256, 5_789_270_144, "34.7", "5.8"),
    "7.9": ("hiri_vit_small", CFFN, 448, 34_718_664, 5_122_932_864, "34.7", "5.1"),
    "8.1": ("hiri_vit_small", HR4 | {"depths": (2, 2, 2, 11, 4)}, 448, 33_021_928, 2_556_402_240, None, None),
    "8.1, nine blocks": ("hiri_vit_small", HR4, 448, 30_956_648, 2_454_639_040, None, None),
    "8.2": ("hiri_vit_small", {"blocks": ("hr",) * 3 + TRANSFORMERS}, 448, 34_749_608, 4_772_252_800, "34.7", "4.8"),
    "8.3": (
        "hiri_vit_small",
        {"blocks": ("hr", "hr", "transformer", *TRANSFORMERS), "mlp_ratios": (4, 4, 4, 5, 5), "num_heads": (2, 5, 8)},
        448,
        34_756_008,
        5_323_135_104,
        "34.8",
        "5.3",
    ),
    "9.1": ("hrnet_w18", {}, 224, 21_299_004, 4_283_537_072, "21.3", "4.3"),
    "9.2": ("hrnet_w18_hiri", {}, 448, 21_365_436, 4_595_230_384, "21.4", "4.6"),
    "9.3": ("pvt_v2_b2", {}, 224, 25_362_856, 4_026_734_592, "25.4", "4.0"),
    "9.4": ("pvt_v2_b2_hiri", {}, 448, 25_458_536, 4_446_205_952, "25.5", "4.4"),
    "9.5": ("davit_tiny", {}, 224, 28_360_168, 4_521_801_216, "28.4", "4.5"),
    "9.6": ("davit_tiny_hiri", {}, 448, 28_461_416, 4_958_633_472, "28.5", "5.0"),
}
FOUR_STAGES = {  # M-ViT in small
    "channels": (8, 16, 32, 32),
    "depths": (1, 1, 1, 1),
    "mlp_ratios": (2, 2, 2, 2),
    "reductions": (1, 1, 1, 1),
    "num_heads": (1, 2),
    "blocks": ("cffn", "cffn", *TRANSFORMERS),
    "norms": ("batch", "batch", "layer", "layer"),
    "stem": "conv",
    "downsampling": ("irds_b",) * 3,
    "down_strides": (2, 2, 2),
    "down_ratios": (2, 2, 2),
    "shortcut_kernels": (1, 1, 1),
}
TINY = {
    "7.1": FOUR_STAGES | FOUR[1] | {"num_heads": (1, 2, 2, 2)},
    "7.1, positions": FOUR_STAGES | FOUR[1] | {"num_heads": (1, 2, 2, 2)} | POSITIONS,
    "7.3": FOUR_STAGES | FOUR[3],
    "7.6": FOUR_STAGES,
    "7.8": {"blocks": CFFN["blocks"], "stem": "conv"},
    "8.1": HR4 | {"num_heads": (2,)},
}
EXTENDED = ["hrnet_w18_hiri", "pvt_v2_b2_hiri", "davit_tiny_hiri"]


def tiny(row: str, **options) -> torch.nn.Module:
    return zoo.create_model("test_hiri_vit", **TINY[row], **options)


@pytest.mark.parametrize("row", ROWS)
def test_rows_cost_what_the_reconstruction_says_and_what_is_printed(row):
    name, fields, side, params, macs, *printed = ROWS[row]
    with torch.device("meta"):
        model = zoo.create_model(name, **fields)
    cost = count(model, (3, side, side))
    assert (cost.params, cost.macs) == (params, macs)
    for value, text in zip((params / 1e6, macs / 1e9), printed, strict=True):
        assert text in (None, f"{value:.1f}")


@pytest.mark.parametrize("row", TINY)
def test_rows_run_at_any_size_and_train(row):
    model = tiny(row, features_only=True).eval()
    for size in ((64, 64), (33, 47), (200, 136)):
        maps = model(torch.rand(1, 3, *size))
        strides, channels = model.feature_info.reduction(), model.feature_info.channels()
        assert [tuple(m.shape[1:]) for m in maps] == [
            (c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(channels, strides, strict=True)
        ]
    model, x = tiny(row, num_classes=5, drop_path_rate=0.0), torch.rand(2, 3, 96, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert all(g.isfinite().all() for g in gradients[0])
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(gradients[0])
    assert scale[id(next(model.stem.parameters()))] == min(scale.values())


def conv(w, name, x, **options):
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), **options)


def norm(w, name, x):
    """BatchNorm where there are running statistics, LayerNorm over the channels elsewhere."""
    weight, bias = w[f"{name}.weight"][:, None, None], w[f"{name}.bias"][:, None, None]
    if f"{name}.running_mean" in w:
        mean, var, eps = w[f"{name}.running_mean"][:, None, None], w[f"{name}.running_var"][:, None, None], 1e-5
    else:
        mean, var, eps = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False), 1e-6
    return (x - mean) / (var + eps).sqrt() * weight + bias


def linear(w, name, x):
    return torch.einsum("oc,bchw->bohw", w[f"{name}.weight"], x) + w[f"{name}.bias"][:, None, None]


def attention(w, name, x, heads, reduction):
    """PVT's: keys and values of a map that a strided convolution and a LayerNorm have made smaller."""
    b, c = x.shape[:2]
    small = conv(w, f"{name}.sr", x, stride=reduction) if reduction > 1 else x
    if reduction > 1:
        mean, var = small.mean(1, keepdim=True), small.var(1, keepdim=True, unbiased=False)
        small = (small - mean) / (var + 1e-5).sqrt() * w[f"{name}.norm.weight"][:, None, None]
        small = small + w[f"{name}.norm.bias"][:, None, None]
        q, (k, v) = linear(w, f"{name}.q", x), linear(w, f"{name}.kv", small).chunk(2, 1)
    else:
        q, k, v = linear(w, f"{name}.qkv", x).chunk(3, 1)
    q, k, v = (t.reshape(b, heads, c // heads, -1) for t in (q, k, v))
    maps = ((q.transpose(2, 3) @ k) * (c // heads) ** -0.5).softmax(-1)
    return linear(w, f"{name}.proj", (v @ maps.transpose(2, 3)).reshape(x.shape))


def test_the_base_model_equals_plain_operations():
    """Table 7, row 1: ViT-stem, spatially reduced attention, FFN, LayerNorm, strided convolutions."""
    model = tiny("7.1", num_classes=5).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.3)
    w, cfg = model.state_dict(), model.config
    images = torch.randn(2, 3, 96, 160, dtype=torch.float64)
    x, expected = norm(w, "stem.1", conv(w, "stem.0", images, stride=4, padding=3)), []
    for stage in range(4):
        name = f"stages.{stage}"
        if stage:
            x = conv(w, f"{name}.downsample.0", x, stride=2, padding=1)
            x = norm(w, f"{name}.downsample.1", x)
        block = f"{name}.blocks.0"
        x = x + attention(w, f"{block}.attn", norm(w, f"{block}.norm1", x), cfg.num_heads[stage], cfg.reductions[stage])
        hidden = F.gelu(linear(w, f"{block}.cffn.fc1", norm(w, f"{block}.norm2", x)))
        x = norm(w, f"{name}.norm", x + linear(w, f"{block}.cffn.fc2", hidden))
        expected.append(x)
    torch.testing.assert_close(model.forward_intermediates(images)[1], expected, rtol=1e-8, atol=1e-8)


def test_positions_are_added_after_the_stem_and_go_to_other_sizes():
    """Table 7, row 1 may have had a position embedding: the printed parameters are those with one."""
    model, images = tiny("7.1, positions", img_size=64).eval(), torch.rand(1, 3, 64, 64)
    table = model.stem[2].table
    assert table.shape == (1, 8, 16, 16)
    torch.testing.assert_close(model.stem(images), model.stem[:2](images) + table)
    assert model.no_weight_decay() == {"stem.2.table"} <= model.state_dict().keys()
    other = tiny("7.1, positions", img_size=(96, 32))
    report = zoo.load_published(other, model.state_dict())
    assert report.complete
    assert report.resized == ("stem.2.table",)
    expected = F.interpolate(table, (24, 8), mode="bilinear")
    torch.testing.assert_close(other.stem[2].table, expected)
    with torch.no_grad():
        torch.testing.assert_close(model.stem[2](torch.zeros(1, 8, 24, 8)), expected)
    assert zoo.load_published(tiny("7.1"), model.state_dict()).unexpected == ("stem.2.table",)
    with pytest.raises(zoo.ZooError, match="m_vit: position_embedding=True needs stem='vit'") as error:
        zoo.create_model("m_vit", position_embedding=True)
    assert "\n" not in str(error.value)


def test_the_final_four_stages_have_their_parts_where_the_table_says():
    model = tiny("7.6")
    kinds = [type(stage.blocks[0]).__name__ for stage in model.stages]
    assert kinds == ["CFFNBlock", "CFFNBlock", "TransformerBlock", "TransformerBlock"]
    norms = [type(stage.norm).__name__ for stage in model.stages]
    assert norms == ["BatchNorm2d", "BatchNorm2d", "LayerNorm2d", "LayerNorm2d"]
    assert [type(stage.downsample).__name__ for stage in model.stages[1:]] == ["IRDSb"] * 3
    assert [type(stage.downsample.norm) for stage in model.stages[1:]] == [type(s.norm) for s in model.stages[1:]]
    convolutions = [m for m in model.stem.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.stride[0] for c in convolutions] == [2, 1, 1, 2]
    assert len([m for m in model.stem.modules() if isinstance(m, torch.nn.ReLU)]) == 3


@pytest.mark.parametrize("name", EXTENDED)
def test_extended_networks_keep_all_but_the_stem(name):
    model, original = (
        zoo.create_model(name, num_classes=5, img_size=64),
        zoo.create_model(name.removesuffix("_hiri"), num_classes=5),
    )
    stem = model.default_cfg["first_conv"].split(".")[0]
    own = {key: value.shape for key, value in model.state_dict().items() if not key.startswith(stem)}
    theirs = {key: value.shape for key, value in original.state_dict().items() if key in own}
    assert own == theirs
    front = model.get_submodule(stem)
    seen = []
    front.register_forward_hook(lambda *hook: seen.append(hook[2].shape))
    model(torch.rand(2, 3, 64, 128)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(seen[0][1:]) >= {8, 16}  # stride 8
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {scale[id(p)] for p in front.parameters()} == {min(scale.values())}
    assert model.default_cfg["input_size"] == (3, 448, 448)
    assert model.get_classifier().out_features == 5
    with pytest.raises(zoo.ZooError, match=f"{name} has no dense maps"):
        zoo.create_model(name, features_only=True)


def test_the_front_is_configurable_as_in_the_reconstruction():
    """Its other candidate, HIRI-ViT-S' own stem, fits the parameters and not the MACs."""
    with torch.device("meta"):
        model = zoo.create_model("hrnet_w18_hiri", stem_width=32, down_ratio=4)
    assert sum(p.numel() for p in model.parameters()) == 21_362_364
    assert model.config == FrontConfig(stem_width=32, down_ratio=4)
    for options, part in (({"channels": 0}, "channels=0"), ({"depth": -1}, "depth=-1"), ({"width": 3}, "'width'")):
        with pytest.raises(zoo.ZooError, match=f"hrnet_w18_hiri: .*{part}") as error:
            zoo.create_model("hrnet_w18_hiri", **options)
        assert "\n" not in str(error.value)
