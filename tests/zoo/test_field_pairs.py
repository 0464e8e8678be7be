"""Any two fields of a family's ablations: a network in which both count, or a refusal of one line."""

import itertools

import pytest
import torch

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
    "low_attention": {"low_attention": True, "num_heads": 4},
    "mid_attention": {"mid_attention": True},
    "last_depth": {"last_depth": 1},
}
HIRI = {
    "cffn": {"blocks": ("cffn", "cffn", "cffn", T, T)},
    "hr": {"blocks": ("hr", "hr", "hr", "hr", T), "num_heads": (2,)},
    "conv_stem": {"stem": "conv"},
    "vit_stem": {"stem": "vit"},
    "downsampling": {"downsampling": ("conv", "conv", "conv", "conv")},
    "norms": {"norms": ("layer",) * 5},
    "ffn_norm": {"ffn_norm": "layer"},
    "ffn_convolution": {"ffn_convolution": False},
    "reductions": {"reductions": (1, 1, 1, 2, 1)},
    "position_embedding": {"position_embedding": True},
    "down_strides": {"down_strides": (2, 1, 2, 2)},
}


def pairs(changes, *others):
    return {frozenset(pair) for pair in itertools.product([changes], others)}


def with_any(change: str, changes: dict, *but: str) -> set[frozenset]:
    """The change alone, and beside any other but those."""
    return {frozenset({change}), *(frozenset({change, other}) for other in changes if other not in (change, *but))}


REFUSED = {
    "test_hrvit": with_any("linear_conv", HRVIT, "parallel_conv"),
    "test_hrformer": {
        *with_any("shifts_of_no_block", HRFORMER, "shifted_windows"),
        *pairs("one_token", "shifted_windows"),
    },
    "test_hivit": {
        *pairs("plain", "low_attention", "published_taps", "shallow_mlp_ratio"),
        *pairs("low_attention", "relative_position_bias", "published_taps", "shallow_mlp_ratio"),
        *with_any("mid_attention", HIVIT, "low_attention"),
        *with_any("last_depth", HIVIT, "low_attention"),
    },
    "test_hiri_vit": {
        *with_any("position_embedding", HIRI, "vit_stem"),
        *pairs("reductions", "hr"),
    },
}
ALL = {"test_hrvit": HRVIT, "test_hrformer": HRFORMER, "test_hivit": HIVIT, "test_hiri_vit": HIRI}


def outcome(name: str, fields: dict, oracle, told: list[str]) -> list[torch.Tensor] | None:
    """The maps of the network with weights that follow from its parameters' names; None where it is refused.

    What the refusal says is added to `told`.
    """
    try:
        model = zoo.create_model(name, features_only=True, **fields).eval()
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
