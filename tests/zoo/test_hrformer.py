"""HRFormer against the published implementation and the paper's Tables 1, 2, 7 and 12."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath, set_fused_attn
from timm.models.swin_transformer import SwinTransformerBlock

import zoo
from benchmarks.cost import count
from zoo.multi_resolution import upsample_bilinear, upsample_nearest
from zoo.windows import ShiftedWindowAttention, WindowAttention

DTYPES = [torch.float64, torch.float32]


def parameters(name: str, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in zoo.create_model(name, **options).parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_classifier_equals_the_published_one(oracle, dtype):
    published = oracle("hrformer_t_cls")
    model = published.fill(zoo.create_model("hrformer_tiny"), dtype)
    for size in [(224, 224), (224, 448)]:  # the published classifier fails where windows need padding
        with torch.no_grad():
            published.check(model(published.images(dtype, size)), published.runs[f"{size[0]}x{size[1]}"]["logits"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_maps_equal_the_published_ones(oracle, dtype):
    published = oracle("hrformer_t_seg")
    model = published.fill(zoo.create_model("hrformer_tiny", features_only=True), dtype)
    for size in [(224, 224), (256, 320), (200, 264)]:
        with torch.no_grad():
            maps = model(published.images(dtype, size))
        assert len(maps) == 4
        for index, output in enumerate(maps):
            published.check(output, published.runs[f"{size[0]}x{size[1]}"][f"out{index}"])


@pytest.mark.parametrize(
    ("options", "oracle_name"), [({}, "hrformer_t_cls"), ({"features_only": True}, "hrformer_t_seg")]
)
def test_every_published_key_has_its_place(oracle, options, oracle_name):
    published = oracle(oracle_name)
    with torch.device("meta"):
        model = zoo.create_model("hrformer_tiny", **options)
    inner = getattr(model, "model", model)
    ours = {key: tuple(value.shape) for key, value in inner.to_published(inner.state_dict()).items()}
    index = {key for key in published.shapes if key.endswith("relative_position_index")}  # derived from the window
    assert ours == {key: shape for key, shape in published.shapes.items() if key not in index}
    assert sum(p.numel() for p in model.parameters()) == published.params


def test_names_go_both_ways():
    model, other = zoo.create_model("test_hrformer"), zoo.create_model("test_hrformer")
    published = model.to_published(model.state_dict())
    report = zoo.load_published(other, published)
    assert report.complete
    assert not report.resized
    assert set(report.loaded) == set(other.state_dict())
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    own = zoo.load_published(zoo.create_model("test_hrformer"), model.state_dict())
    assert own.complete
    assert set(zoo.published_keys(model).values()) <= set(published)


def test_what_a_checkpoint_lacks_is_named():
    published = (source := zoo.create_model("test_hrformer")).to_published(source.state_dict())
    name = "stage2.0.branches.0.0.attn.attn"
    published.pop(f"{name}.k_proj.weight")
    published = {key: value for key, value in published.items() if not key.endswith("num_batches_tracked")}
    published[f"{name}.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    report = zoo.load_published(zoo.create_model("test_hrformer"), published)
    assert report.missing == (f"{name}.qkv.weight",)
    assert set(report.unexpected) == {f"{name}.q_proj.weight", f"{name}.v_proj.weight"}
    assert report.derived == (f"{name}.relative_position_index",)


def test_dense_backbone_takes_a_classifier_s_checkpoint_and_leaves_its_head():
    source = zoo.create_model("test_hrformer")
    model = zoo.create_model("test_hrformer", features_only=True)
    report = zoo.load_published(model, source.to_published(source.state_dict()))
    assert not report.missing
    heads = ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.")
    assert report.unexpected
    assert all(key.startswith(heads) for key in report.unexpected)


def test_tables_of_another_window_are_resized():
    source = zoo.create_model("test_hrformer", window_size=3)
    model = zoo.create_model("test_hrformer", window_size=(5, 3, 3, 3))
    report = zoo.load_published(model, source.to_published(source.state_dict()))
    assert report.complete
    assert len(report.resized) == 3  # the first branch has a block in each of the three stages
    assert all("branches.0." in key and key.endswith("relative_position_bias_table") for key in report.resized)


def test_parameter_counts():
    def sizes(**options):
        return tuple(parameters(f"hrformer_{size}", **options) for size in ("tiny", "small", "base"))

    assert sizes() == (8_035_820, 13_544_882, 50_320_098)
    assert sizes(features_only=True) == (2_572_388, 7_891_050, 44_040_666)
    pose = {"features_only": True, "out_indices": (0,), "bilinear_fusion": True}
    assert sizes(**pose) == (2_524_436, 7_746_218, 43_210_434)
    assert parameters("hrformer_tiny", depthwise_ffn=False) == 7_942_508  # Table 7


# Table 12, HRFormer-B with the OCR head, less those of the same network with windows of 7 (56,032,512).
WINDOWS = {
    5: 56_011_040,
    7: 56_032_512,
    15: 56_196_480,
    (15, 13, 11, 9): 56_110_656,
    (21, 17, 13, 9): 56_177_824,
    (17, 15, 13, 11): 56_157_088,
}


def test_windows_change_the_tables_alone():
    head = WINDOWS[7] - parameters("hrformer_base", features_only=True)
    counts = {w: parameters("hrformer_base", features_only=True, window_size=w) + head for w in WINDOWS}
    assert counts == WINDOWS


GIGA_MACS = {
    ("hrformer_tiny", 224): 1.7080,
    ("hrformer_small", 224): 3.3643,
    ("hrformer_base", 224): 13.3082,
    ("hrformer_tiny", 512): 7.7587,
    ("hrformer_small", 512): 16.7936,
    ("hrformer_base", 512): 71.5376,
    ("hrformer_tiny", 1024): 30.4910,
    ("hrformer_small", 1024): 65.5769,
    ("hrformer_base", 1024): 278.0017,
}


@pytest.mark.parametrize(("name", "size"), GIGA_MACS)
def test_macs(name, size):
    with torch.device("meta"):
        model = zoo.create_model(name, features_only=size >= 512)
    assert count(model, (3, size, size)).macs / 1e9 == pytest.approx(GIGA_MACS[name, size], rel=1e-4)


@pytest.mark.parametrize(("height", "width", "giga_macs"), [(256, 192, 1.4844), (384, 288, 3.2882)])
def test_pose_macs(height, width, giga_macs):
    with torch.device("meta"):
        model = zoo.create_model("hrformer_tiny", features_only=True, out_indices=(0,), bilinear_fusion=True)
    assert count(model, (3, height, width)).macs / 1e9 == pytest.approx(giga_macs, rel=1e-4)


@pytest.mark.parametrize(("name", "blocks"), [("hrformer_tiny", 12), ("hrformer_base", 14)])
def test_drop_path_grows_block_by_block_alike_in_all_branches(name, blocks):
    with torch.device("meta"):
        model = zoo.create_model(name, drop_path_rate=0.3)
    modules = [*model.stage2, *model.stage3, *model.stage4]
    by_branch = [[[getattr(b.drop_path, "drop_prob", 0.0) for b in branch] for branch in m.branches] for m in modules]
    assert all(branch == branches[0] for branches in by_branch for branch in branches)
    rates = [rate for branches in by_branch for rate in branches[0]]
    assert rates == pytest.approx(torch.linspace(0, 0.3, blocks).tolist(), abs=1e-7)


def test_default_drop_path_rates_are_the_published_classifiers():
    with torch.device("meta"):
        models = {size: zoo.create_model(f"hrformer_{size}") for size in ("tiny", "small", "base")}
    rates = {size: [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] for size, model in models.items()}
    assert (rates["tiny"], rates["small"], max(rates["base"])) == ([], [], 0.2)


def test_initialisation():
    model = zoo.create_model("hrformer_tiny")
    tables = torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith("bias_table")])
    assert tables.std().item() == pytest.approx(0.02, rel=0.05)
    for name, p in model.named_parameters():
        if name.endswith(".qkv.weight"):  # PyTorch's default, as of three separate layers
            bound = p.shape[1] ** -0.5
            assert p.abs().max() <= bound
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        elif "norm" in name or ".bn" in name:
            assert (p == name.endswith("weight")).all(), name


@pytest.mark.parametrize("window", [3, 17])  # explicit and fused attention
def test_attention_written_out(window):
    heads, size, dim = 2, (20, 18), 8
    module = WindowAttention(dim, heads, window).double().eval()
    w = {key: torch.randn_like(value) for key, value in module.state_dict().items()}
    module.load_state_dict(w)
    x, pads = torch.randn(1, *size, dim, dtype=torch.float64), [-side % window for side in size]
    padded = F.pad(x, (0, 0, pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
    q, k, v = (padded @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).unflatten(-1, (3, heads, -1)).unbind(-3)
    expected = torch.zeros_like(padded)
    places = [(row, column) for row in range(window) for column in range(window)]
    offsets = torch.tensor(
        [[(a - c + window - 1) * (2 * window - 1) + b - d + window - 1 for c, d in places] for a, b in places]
    )
    bias = w["attn.relative_position_bias_table"][offsets]  # (query, key, head)
    for top in range(0, padded.shape[1], window):
        for left in range(0, padded.shape[2], window):
            cut = (0, slice(top, top + window), slice(left, left + window))
            for head in range(heads):
                query, key, value = (t[cut][..., head, :].flatten(0, 1) for t in (q, k, v))
                attended = (query @ key.T * (dim // heads) ** -0.5 + bias[:, :, head]).softmax(-1) @ value
                part = slice(head * dim // heads, (head + 1) * dim // heads)
                expected[(*cut, part)] = attended.unflatten(0, (window, window))
    expected = expected @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    top, left = pads[0] // 2, pads[1] // 2
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected[:, top : top + size[0], left : left + size[1]])


@pytest.mark.parametrize("size", [(8, 12), (4, 12), (4, 4), (20, 16)])
def test_shifted_windows_are_swin_s(size):
    """timm's block with its windows shifted by half; where a side is one window, not along that side."""
    heads, dim, window = 2, 8, 4
    ours = ShiftedWindowAttention(dim, heads, window).double().eval()
    theirs = SwinTransformerBlock(dim, size, heads, window_size=window, shift_size=window // 2).double().eval()
    weights = {name: torch.randn_like(value) for name, value in ours.attn.state_dict().items()}
    ours.attn.load_state_dict(weights)
    theirs.attn.load_state_dict(weights, strict=False)
    x = torch.randn(2, *size, dim, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs._attn(x)
        torch.testing.assert_close(ours(x), expected)
        plain = WindowAttention(dim, heads, window).double().eval()
        plain.attn.load_state_dict(weights)
        assert torch.allclose(plain(x), expected) == (size == (4, 4))


def test_shifted_windows_agree_fused_and_explicit():
    """Padded maps, too; windows of 17 are large enough for the fused product."""
    module = ShiftedWindowAttention(8, 2, 17).eval()
    torch.nn.init.normal_(module.attn.relative_position_bias_table)
    with torch.no_grad():
        fused = module(x := torch.randn(2, 30, 40, 8))
        set_fused_attn(False)
        try:
            torch.testing.assert_close(module(x), fused)
        finally:
            set_fused_attn(True)


def test_row_of_table_9():
    """Without the convolution, every second block of a branch with shifted windows: the cost of Table 7's row."""
    with torch.device("meta"):
        model = zoo.create_model("hrformer_tiny", depthwise_ffn=False, shifted_windows=True)
    cost = count(model, (3, 224, 224))
    assert (cost.params, cost.macs) == (7_942_508, 1_665_357_508)
    shifted = [
        [isinstance(block.attn, ShiftedWindowAttention) for block in branch]
        for module in (*model.stage2, *model.stage3, *model.stage4)
        for branch in module.branches
    ]
    assert shifted == [[False, True]] * len(shifted)


def test_without_the_convolution_and_with_shifts_it_trains():
    options = {"depthwise_ffn": False, "shifted_windows": True, "num_blocks": (1, 2, 2, 2)}
    model = zoo.create_model("test_hrformer", num_classes=3, drop_path_rate=0.0, **options).train()
    model(x := torch.rand(2, 3, 72, 96)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    other = zoo.create_model("test_hrformer", num_classes=3, **options)
    assert zoo.load_published(other, model.to_published(model.state_dict())).complete
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), model.eval()(x))


def test_upsampling_resamples_only_where_sizes_do_not_divide():
    x = torch.rand(1, 2, 3, 5)
    whole = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(upsample_nearest(x, 4, (12, 20)), whole)
    resampled = F.interpolate(whole, size=(11, 18), mode="bilinear", align_corners=True)
    torch.testing.assert_close(upsample_nearest(x, 4, (11, 18)), resampled)
    torch.testing.assert_close(upsample_bilinear(x, 4, (12, 20)), F.interpolate(x, size=(12, 20), mode="bilinear"))


def test_pose_form_differs_in_the_upsampling_alone():
    nearest, bilinear = (
        zoo.create_model("test_hrformer", features_only=True, bilinear_fusion=pose).eval() for pose in (False, True)
    )
    bilinear.load_state_dict(nearest.state_dict())
    a, b = nearest(x := torch.rand(1, 3, 64, 64)), bilinear(x)
    assert all((p - q).abs().max() > 1e-4 for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputing_moves_running_statistics_once(checkpointing):
    model = zoo.create_model("test_hrformer", drop_path_rate=0.0).train()
    plain = copy.deepcopy(model)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain(x)
    model.set_grad_checkpointing(checkpointing)
    model(x).mean().backward()
    for (key, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"window_size": 0}, ["window_size", "positive"]),
        ({"window_size": (7, 7)}, ["window_size=(7, 7)", "4 ints"]),
        ({"window_size": "7"}, ["window_size='7'", "an int, or 4 ints"]),
        ({"window_size": True}, ["window_size=True"]),
        ({"num_heads": (1, 2, 5, 8)}, ["num_heads=(1, 2, 5, 8)", "channels="]),
        ({"channels": (18, 36, 72)}, ["channels=(18, 36, 72)", "4 ints"]),
        ({"num_modules": (1, 0, 1, 1)}, ["num_modules", "positive"]),
        ({"mlp_ratio": 0}, ["mlp_ratio"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate=1.0"]),
        ({"head_features": 0}, ["head_features=0"]),
        ({"img_size": 16}, ["img_size", "32"]),
        ({"windows": 7}, ["windows", "window_size"]),
    ],
)
def test_impossible_values_are_told_in_one_line(options, told):
    with pytest.raises(zoo.ZooError) as error:
        zoo.create_model("hrformer_tiny", **options)
    assert all(part in str(error.value) for part in ["hrformer_tiny", *told])
    assert "\n" not in str(error.value)


def test_a_window_for_each_branch():
    model = zoo.create_model("test_hrformer", window_size=[5, 4, 3, 2], img_size=64).eval()
    assert [branch[0].attn.window for branch in model.stage4[-1].branches] == [5, 4, 3, 2]
    assert model(torch.rand(1, 3, 70, 41)).shape == (1, 1000)


def test_pruned_maps_are_named():
    model = zoo.create_model("test_hrformer", features_only=True, out_indices=(0, 2))
    assert model.model(torch.rand(1, 3, 64, 64)).shape == (1, 16)
    with pytest.raises(zoo.ZooError, match="pruned"):
        model.model.forward_intermediates(torch.rand(1, 3, 64, 64), indices=[1])
