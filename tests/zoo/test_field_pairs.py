"""Fields that change nothing are refused: each field alone, and any two of a family's ablations beside each other."""

import dataclasses
import itertools

import pytest
import torch
from timm.layers import DropPath

import zoo

T = "transformer"
# What one ablation changes in the family's test variant, and the pairs (or single ones) that make no network.
TABLE_5 = ("key_value_sharing", "efficient_patch_embed", "mix_cfn", "parallel_conv")
TABLE_5 += ("attention_nonlinearity", "dense_fusion", "diverse_shortcut")
HRVIT = {
    **{name: {name: False} for name in TABLE_5},
    "linear_conv": {"linear_conv": True},
    "window_size": {"window_size": (1, 2, 2, 2)},
    "third_branch_blocks": {"third_branch_blocks": (1, 2)},
    "num_blocks": {"num_blocks": (1, 1, 3, 1)},
}
HRFORMER = {
    "depthwise_ffn": {"depthwise_ffn": False},
    "shifted_windows": {"shifted_windows": True, "num_blocks": (2, 2, 2, 2)},
    "shifts_of_no_block": {"shifted_windows": True},
    "window_size": {"window_size": (3, 5, 7, 2)},
    "one_token": {"window_size": 1},
    "bilinear_fusion": {"bilinear_fusion": True},
}
HIVIT = {
    "plain": {"hierarchical": False, "depths": (0, 0, 2)},
    "patch_norm": {"patch_norm": False},
    "relative_position_bias": {"relative_position_bias": False},
    "absolute_position": {"absolute_position": False},
    "published_taps": {"published_taps": True},
    "shallow_mlp_ratio": {"shallow_mlp_ratio": 2.0},
    "no_shallow_blocks": {"depths": (0, 0, 3)},
    "low_attention": {"low_attention": True, "num_heads": 4},
    "mid_attention": {"mid_attention": True},
    "last_depth": {"last_depth": 1},
}
HIRI = {
    "cffn": {"blocks": ("cffn", "cffn", "cffn", T, T)},
    "hr": {"blocks": ("hr", "hr", "hr", "hr", T), "num_heads": (2,)},
    "hr_alone": {"blocks": ("hr",) * 5, "num_heads": ()},
    "conv_stem": {"stem": "conv"},
    "vit_stem": {"stem": "vit"},
    "stem_width": {"stem_width": 16},
    "downsampling": {"downsampling": ("conv", "conv", "conv", "conv")},
    "one_downsampling": {"downsampling": ("conv", "irds_a", "irds_b", "irds_b")},
    "down_ratios": {"down_ratios": (4, 2, 6, 6)},
    "shortcut_kernels": {"shortcut_kernels": (3, 2, 1, 1)},
    "norms": {"norms": ("layer",) * 5},
    "ffn_norm": {"ffn_norm": "layer"},
    "ffn_convolution": {"ffn_convolution": False},
    "reductions": {"reductions": (1, 1, 1, 2, 1)},
    "position_embedding": {"position_embedding": True},
    "down_strides": {"down_strides": (2, 1, 2, 2)},
}
HRNET = {
    "channels": {"channels": (8, 16, 32, 32)},
    "num_modules": {"num_modules": (2, 1, 1, 1)},
    "num_blocks": {"num_blocks": (1, 1, 1, 2)},
}
SWIN = {
    "shifted": {"shifted": False},
    "depthwise_ffn": {"depthwise_ffn": False},
    "normed_ffn": {"normed_ffn": False},
    "window_size": {"window_size": 3},
}
# Where a family has no variant for tests, a small network of another.
SMALL = {
    "hrnet_tiny": {"channels": (4, 8, 16, 32), "num_modules": (1, 1, 1, 1), "num_blocks": (1, 1, 1, 1)},
    "hrnet_mit_w18": {"channels": (4, 8, 16, 32), "num_modules": (1, 1, 1, 1), "num_blocks": (1, 1, 1, 1)},
    "swin_tiny_dw": {"embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
}


def pairs(changes, *others):
    return {frozenset(pair) for pair in itertools.product([changes], others)}


def with_any(change: str, changes: dict, *but: str) -> set[frozenset]:
    """The change alone, and beside any other but those."""
    return {frozenset({change}), *(frozenset({change, other}) for other in changes if other not in (change, *but))}


REFUSED = {
    "test_hrvit": with_any("linear_conv", HRVIT, "parallel_conv") | pairs("third_branch_blocks", "num_blocks"),
    "test_hrformer": {
        *with_any("shifts_of_no_block", HRFORMER, "shifted_windows"),
        *pairs("one_token", "shifted_windows"),
    },
    "test_hivit": {
        *pairs("plain", "low_attention", "published_taps", "shallow_mlp_ratio"),
        *pairs("low_attention", "relative_position_bias", "published_taps", "shallow_mlp_ratio", "no_shallow_blocks"),
        *pairs("no_shallow_blocks", "published_taps", "shallow_mlp_ratio"),
        *with_any("mid_attention", HIVIT, "low_attention"),
        *with_any("last_depth", HIVIT, "low_attention"),
    },
    "test_hiri_vit": {
        *with_any("position_embedding", HIRI, "vit_stem"),
        *pairs("reductions", "hr", "hr_alone"),
        *pairs("hr_alone", "ffn_norm", "ffn_convolution"),
        *pairs("vit_stem", "stem_width"),
        *pairs("downsampling", "down_ratios", "shortcut_kernels"),
        *pairs("one_downsampling", "shortcut_kernels"),
    },
    "hrnet_tiny": set(),
    "hrnet_mit_w18": set(),
    "swin_tiny_dw": pairs("depthwise_ffn", "normed_ffn"),
}
ALL = {"test_hrvit": HRVIT, "test_hrformer": HRFORMER, "test_hivit": HIVIT, "test_hiri_vit": HIRI}
ALL |= {"hrnet_tiny": HRNET, "hrnet_mit_w18": HRNET, "swin_tiny_dw": SWIN}


def outcome(name: str, fields: dict, oracle, told: list[str]) -> list[torch.Tensor] | None:
    """The maps of the network with weights that follow from its parameters' names; None where it is refused.

    What the refusal says is added to `told`.
    """
    try:
        model = zoo.create_model(name, features_only=True, **SMALL.get(name, {}) | fields).eval()
    except zoo.ZooError as error:
        told.append(str(error))
        return None
    model.load_state_dict(oracle.state({key: tuple(value.shape) for key, value in model.state_dict().items()}), False)
    with torch.no_grad():
        # HiViT's windows of 7 tokens differ from the whole map where this has more.
        maps = model(oracle.images(torch.float32, (128, 128) if name == "test_hivit" else (64, 64))[:1])
    assert all(m.isfinite().all() for m in maps)
    return maps


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return [m.shape for m in one] == [m.shape for m in other] and all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", ALL)
def test_two_fields_count_together_or_are_refused(name, oracle):
    changes, told = ALL[name], []
    default = outcome(name, {}, oracle, told)
    alone = {change: outcome(name, fields, oracle, told) for change, fields in changes.items()}
    for change, maps in alone.items():
        assert maps is None or not same(maps, default), f"{change} changes nothing"
    refused = {frozenset({change}) for change, maps in alone.items() if maps is None}
    for first, second in itertools.combinations(changes, 2):
        if changes[first].keys() & changes[second].keys():
            continue  # two values of one field
        maps = outcome(name, changes[first] | changes[second], oracle, told)
        if maps is None:
            refused.add(frozenset({first, second}))
            continue
        for one, other in ((first, second), (second, first)):
            assert alone[one] is None or not same(maps, alone[one]), f"{other} changes nothing beside {one}"
    assert refused == REFUSED[name]
    assert all(line.startswith(f"{name}: ") and "\n" not in line for line in told)


# Every field that is in no list above, with another value, by family; drop paths, heads and initial values do not show
# in a dense network that is evaluated, and where no parameter depends on `img_size`, that does not.
OTHERS = {
    "test_hrvit": [
        {"channels": (8, 16, 24, 64)},
        {"num_modules": (1, 1, 2, 1)},
        {"last_blocks": (1, 1, 2, 1)},
        {"head_dim": 4},
        {"mlp_ratio": (2, 2, 2, 4)},
    ],
    "test_hrformer": [
        {"channels": (16, 16, 16, 32)},
        {"num_modules": (2, 1, 1, 1)},
        {"num_blocks": (1, 1, 1, 2)},
        {"num_heads": (1, 2, 2, 8)},
        {"mlp_ratio": 4.0},
    ],
    "test_hivit": [{"embed_dim": 64}, {"depths": (1, 1, 3)}, {"num_heads": 4}, {"mlp_ratio": 2.0}, {"img_size": 128}],
    "test_hiri_vit": [
        {"channels": (8, 16, 16, 32, 64)},
        {"depths": (1, 1, 1, 2, 1)},
        {"mlp_ratios": (2, 2, 2, 2, 4)},
        {"num_heads": (2, 2)},
    ],
    "hrnet_tiny": [],
    "hrnet_mit_w18": [],
}
UNSEEN = {"drop_path_rate", "head_widths", "head_features", "head_ratio", "dense_init", "img_size"}


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_counts(name, oracle):
    told = []
    default = outcome(name, {}, oracle, told)
    for fields in OTHERS[name]:
        assert not same(outcome(name, fields, oracle, told), default), f"{fields} change nothing"
    tried = {field for fields in (*OTHERS[name], *ALL[name].values()) for field in fields}
    known = {field.name for field in dataclasses.fields(zoo.create_model(name, **SMALL.get(name, {})).config)}
    assert tried | UNSEEN >= known, "a new field: change it here, in a list of its family"
    assert not told


def test_what_changes_nothing_is_told_with_the_value_to_keep():
    for name, fields, told in (
        ("hrvit_b1", {"third_branch_blocks": (9, 9, 1, 1), "num_blocks": (1, 1, 4, 2)}, "num_blocks=.* at position 3"),
        ("hrvit_b1", {"third_branch_blocks": (9, 9, 1, 1), "last_blocks": (1, 1, 4, 2)}, "last_blocks=.*leave it at 2"),
        ("hiri_vit_small", {"stem": "vit", "stem_width": 64}, "stem_width=64 changes nothing, .*: leave it at 32"),
        ("m_vit", {"downsampling": ("conv",) * 3, "down_ratios": (6, 6, 4)}, "at position 3, .*: leave it at 6"),
        ("davit_tiny_hiri", {"depth": 0, "mlp_ratio": 2}, "mlp_ratio=2 changes nothing, .*: leave it at 4"),
        ("hivit_base", {"low_attention": True, "depths": (0, 0, 24)}, "needs blocks in the first two stages"),
    ):
        with pytest.raises(zoo.ZooError, match=f"^{name}: .*{told}") as error:
            zoo.create_model(name, **fields)
        assert "\n" not in str(error.value)
    # What the variant has is not said by the user.
    with torch.device("meta"):
        zoo.create_model("hiri_vit_base", stem="vit")
        zoo.create_model("hiri_vit_base", stem="vit", stem_width=64)


def test_drop_paths_of_blocks_that_have_none_are_accepted():
    """Recipes set them for all models."""
    for name, drops in (("hrnet_tiny", False), ("hrnet_mit_w18", True)):
        model = zoo.create_model(name, **SMALL[name], drop_path_rate=0.3)
        assert any(isinstance(module, DropPath) for module in model.modules()) == drops
