"""HiViT's Table 2, the path from ViT-B to Swin-B: every row by its fields, and the two ends against timm's networks."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

import zoo
from benchmarks.conventions import HIVIT
from benchmarks.cost import count
from zoo.hivit_windows import WindowHiViT

PLAIN = {"hierarchical": False}
WINDOWS = {"low_attention": True, "absolute_position": False}
# Row: the fields of hivit_base, parameters, FLOPs as the paper counts, and both as printed (M, G). Table 9 is in
# test_hivit.py and tests/benchmarks/test_conventions.py.
ROWS = {
    "o": (
        PLAIN
        | {"patch_norm": False, "depths": (0, 0, 12), "embed_dim": 768, "num_heads": 12}
        | {"relative_position_bias": False},
        (86_566_120, 17_489_716_992, "86.6", "17.5"),
    ),
    "a": (
        PLAIN | {"depths": (0, 0, 24), "relative_position_bias": False},
        (76_666_344, 15_843_787_264, "76.7", "15.8"),
    ),
    "b": (PLAIN | {"depths": (0, 0, 24)}, (76_806_312, 15_843_787_264, "76.8", "15.8")),
    "c'": (WINDOWS, (66_321_396, 15_964_711_424, "66.3", "16.0")),
    "d": (
        WINDOWS | {"mid_attention": True, "depths": (2, 2, 18), "last_depth": 2, "num_heads": 16},
        (87_768_224, 15_467_580_416, "87.8", "15.5"),
    ),
}
# The same kinds of network in small.
TINY = {
    "a": {"hierarchical": False, "depths": (0, 0, 2), "relative_position_bias": False},
    "b": {"hierarchical": False, "depths": (0, 0, 2)},
    "c'": {"low_attention": True, "depths": (2, 2, 2), "num_heads": 4},  # with absolute positions
    "d": {"low_attention": True, "mid_attention": True, "depths": (2, 2, 2), "last_depth": 2, "num_heads": 4},
}


def tiny(row: str, **options) -> torch.nn.Module:
    return zoo.create_model("test_hivit", **TINY[row], **options)


@pytest.mark.parametrize("row", ROWS)
def test_rows_cost_what_the_reconstruction_says_and_what_is_printed(row):
    fields, (params, flops, *printed) = ROWS[row]
    with torch.device("meta"):
        model = zoo.create_model("hivit_base", **fields)
    cost = count(model, (3, 224, 224))
    assert (cost.params, HIVIT.macs(model, cost)) == (params, flops)
    assert [f"{params / 1e6:.1f}", f"{flops / 1e9:.1f}"] == printed


@pytest.mark.parametrize("row", TINY)
def test_rows_run_at_any_size_and_train(row):
    model = tiny(row, features_only=True).eval()
    for size in ((64, 64), (33, 47), (200, 136)):
        maps = model(torch.rand(1, 3, *size))
        strides, channels = model.feature_info.reduction(), model.feature_info.channels()
        assert [tuple(m.shape[1:]) for m in maps] == [
            (c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(channels, strides, strict=True)
        ]
    first = tiny(row, features_only=True, out_indices=(0,))
    first(torch.rand(1, 3, 64, 64))[0].mean().backward()
    assert all(p.grad is not None for p in first.parameters())  # nothing unused is left
    model, x = tiny(row, num_classes=5, drop_path_rate=0.0), torch.rand(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert all(g.isfinite().all() and g.any() for g in gradients[0])
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(gradients[0])
    assert scale[id(model.head.weight)] == 1.0
    assert scale[id(model.patch_embed.proj.weight)] == min(scale.values())
    positions = {name for name, _ in model.named_parameters() if "position_bias" in name or "pos_embed" in name}
    assert model.no_weight_decay() == positions
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


def transferred(model: torch.nn.Module, source: torch.nn.Module, names: dict[str, str]) -> torch.nn.Module:
    """`model` with the weights of `source`, under its own names; every weight finds its place."""
    state = {}
    for key, value in source.state_dict().items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        state[key] = value.reshape(model.state_dict()[key].shape)
    model.load_state_dict(state, strict=True)
    return model.eval()


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.3)
    return model.double().eval()


def test_the_path_begins_with_a_plain_vision_transformer():
    vit = timm.models.VisionTransformer(
        img_size=64, embed_dim=32, depth=2, num_heads=2, class_token=False, global_pool="avg", num_classes=5
    )
    names = {"patch_embed.proj": "patch_embed.proj", "pos_embed": "absolute_pos_embed"}
    model = tiny("a", patch_norm=False, num_classes=5).double()
    model = transferred(model, randomized(vit), names)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x), vit(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [64, 96, 224])
def test_the_path_ends_with_swin(size):
    swin = timm.models.SwinTransformer(
        img_size=size, embed_dim=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=5
    )
    names = {"layers": "stages", "downsample": "merge", "head.fc": "head"}
    model = tiny("d", num_classes=5, img_size=size, absolute_position=False).double()
    assert isinstance(model, WindowHiViT)
    swin.norm, model.fc_norm = torch.nn.Identity(), torch.nn.Identity()  # Swin's is before the pooling
    model = transferred(model, randomized(swin), names)
    for module in swin.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6  # HiViT's
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(model(x), swin(x), rtol=1e-8, atol=1e-8)


def test_windows_in_the_low_stages_leave_the_third_global():
    """Far corners see each other in the third stage, and not in the first two."""
    model = tiny("c'", features_only=True, img_size=224).double().eval()
    x = torch.rand(1, 3, 224, 224, dtype=torch.float64)
    other = x.clone()
    other[..., -4:, -4:] += 1
    changed = [(a != b)[..., 0, 0].any().item() for a, b in zip(model(x), model(other), strict=True)]
    assert changed == [False, False, True]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"hierarchical": False}, ["hierarchical=False", "depths=(2, 2, 20)", "(0, 0, n)"]),
        ({"hierarchical": False, "depths": (0, 0, 4), "low_attention": True}, ["low_attention=True"]),
        ({"mid_attention": True}, ["mid_attention", "low_attention=True"]),
        ({"last_depth": 2}, ["last_depth", "low_attention=True"]),
        ({"last_depth": -1, "low_attention": True}, ["last_depth=-1"]),
        ({"low_attention": True, "num_heads": 2}, ["num_heads=2", "multiple of 4"]),
        ({"low_attention": True, "relative_position_bias": False}, ["relative_position_bias=True"]),
        ({"low_attention": True, "published_taps": True, "features_only": True}, ["published_taps=False"]),
        ({"low_attention": 1}, ["low_attention=1", "True or False"]),
        ({"mae": True, "low_attention": True}, ["autoencoder", "low_attention=False"]),
        ({"mae": True, "hierarchical": False, "depths": (0, 0, 4)}, ["autoencoder", "hierarchical=True"]),
    ],
)
def test_what_makes_no_network_is_told_in_one_line(options, parts):
    name = "hivit_base_mae" if options.pop("mae", False) else "hivit_base"
    with pytest.raises(zoo.ZooError) as error:
        zoo.create_model(name, **options)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in [name, *parts]), str(error.value)
