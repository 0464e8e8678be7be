"""HRViT against the published implementation, and its parts written out."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath

import zoo
from benchmarks.cost import count
from zoo.hrvit import CrossAttention, DiverseShortcut, HRViTConfig, fusion, shortcut_columns, upsample_cropped

DTYPES = [torch.float64, torch.float32]


def build_empty(name: str, **options) -> torch.nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_classifier_equals_the_published_one(oracle, dtype):
    published = oracle("hrvit_b1_cls")
    model = published.fill(zoo.create_model("hrvit_b1"), dtype)
    for size in [(224, 224), (256, 320)]:
        with torch.no_grad():
            published.check(model(published.images(dtype, size)), published.runs[f"{size[0]}x{size[1]}"]["logits"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_maps_equal_the_published_ones(oracle, dtype):
    published = oracle("hrvit_b1_seg")
    model = published.fill(zoo.create_model("hrvit_b1", features_only=True), dtype)
    for size in [(224, 224), (256, 320), (160, 288)]:
        with torch.no_grad():
            maps = model(published.images(dtype, size))
        assert len(maps) == 4
        for index, output in enumerate(maps):
            published.check(output, published.runs[f"{size[0]}x{size[1]}"][f"out{index}"])


@pytest.mark.parametrize(("options", "oracle_name"), [({}, "hrvit_b1_cls"), ({"features_only": True}, "hrvit_b1_seg")])
def test_every_published_key_has_its_place(oracle, options, oracle_name):
    published = oracle(oracle_name)
    model = build_empty("hrvit_b1", **options)
    inner = getattr(model, "model", model)
    ours = {key: tuple(value.shape) for key, value in inner.to_published(inner.state_dict()).items()}
    assert ours == published.shapes
    assert sum(p.numel() for p in model.parameters()) == published.params


def test_names_go_both_ways():
    model, other = zoo.create_model("test_hrvit"), zoo.create_model("test_hrvit")
    published = model.to_published(model.state_dict())
    report = zoo.load_published(other, published)
    assert report.complete
    assert set(report.loaded) == set(other.state_dict())
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert zoo.load_published(zoo.create_model("test_hrvit"), model.state_dict()).complete
    assert set(zoo.published_keys(model).values()) == set(published)


def test_dense_backbone_takes_a_classifier_s_checkpoint_and_leaves_its_head():
    source = zoo.create_model("test_hrvit")
    model = zoo.create_model("test_hrvit", features_only=True)
    report = zoo.load_published(model, source.to_published(source.state_dict()))
    assert not report.missing
    assert report.unexpected
    assert all(key.startswith("head.") for key in report.unexpected)


COUNTS = {
    "hrvit_b1": (19_685_152, 7_758_008),
    "hrvit_b2": (32_486_408, 20_310_944),
    "hrvit_b3": (37_870_304, 25_507_960),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    models = [build_empty(name), build_empty(name, features_only=True)]
    assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == COUNTS[name]


GIGA_MACS = {
    ("hrvit_b1", 224, False): 2.7756,
    ("hrvit_b2", 224, False): 5.2883,
    ("hrvit_b3", 224, False): 5.9000,
    ("hrvit_b1", 224, True): 1.7459,
    ("hrvit_b2", 224, True): 4.2205,
    ("hrvit_b3", 224, True): 4.8061,
}


@pytest.mark.parametrize(("name", "size", "dense"), GIGA_MACS)
def test_macs(name, size, dense):
    model = build_empty(name, features_only=dense)
    assert count(model, (3, size, size)).macs / 1e9 == pytest.approx(GIGA_MACS[name, size, dense], rel=1e-4)


# The published code pads the last stripe of each direction, and multiplies the padding as well. Whole and dense
# networks of other windows: the published count for windows of 7, and what the published segmentor's count grows by.
@pytest.mark.parametrize(
    ("name", "size", "window", "published", "blocks"),
    [
        ("hrvit_b1", 512, 7, 10.5854, (20, 4)),
        ("hrvit_b2", 512, 7, 24.8237, (24, 4)),
        ("hrvit_b3", 512, 7, 28.3967, (24, 6)),
        ("hrvit_b1", 1024, 7, 52.2484, (20, 4)),
        ("hrvit_b2", 1024, 7, 118.0088, (24, 4)),
        ("hrvit_b3", 1024, 7, 135.6615, (24, 6)),
        ("hrvit_b3", 512, 9, 28.3967 + 69.818 - 68.8004, (24, 6)),
        ("hrvit_b3", 512, 11, 28.3967 + 70.435 - 68.8004, (24, 6)),
        ("hrvit_b3", 512, 13, 28.3967 + 72.398 - 68.8004, (24, 6)),
        ("hrvit_b3", 512, 15, 28.3967 + 74.688 - 68.8004, (24, 6)),
    ],
)
def test_macs_are_the_published_ones_less_the_padding(name, size, window, published, blocks):
    model = build_empty(name, features_only=True, window_size=(1, 2, window, window))
    padding = 0
    for channels, stride, depth in zip(model.feature_info.channels()[2:], (16, 32), blocks, strict=True):
        side = size // stride
        if last := side % window:  # two directions of half the channels, two products
            padding += 2 * channels * ((window * side) ** 2 - (last * side) ** 2) * depth
    assert (count(model, (3, size, size)).macs + padding) / 1e9 == pytest.approx(published, rel=1e-4)


# Table 5 with the SegFormer head, 19 classes, 512 x 512: parameters and MACs, those of the published code's padding in
# them. The same is left out everywhere here, and the head is the same.
TABLE_5 = {
    (): (8_149_451, 15_211_675_648),
    ("key_value_sharing",): (8_769_995, 15_798_878_208),
    ("efficient_patch_embed",): (9_928_139, 17_581_588_480),
    ("mix_cfn",): (7_854_539, 14_712_553_472),
    ("parallel_conv",): (8_108_491, 15_145_615_360),
    ("attention_nonlinearity",): (8_141_259, 15_211_675_648),
    ("dense_fusion",): (8_029_643, 15_158_018_048),
    ("diverse_shortcut",): (8_139_123, 15_081_652_224),
}
PARTS = tuple(name for row in TABLE_5 for name in row)
TABLE_5[PARTS] = (10_074_483, 17_419_927_552)
HEAD_AND_PADDING = (391_443, 4_626_317_312 + 196_608_000)


@pytest.mark.parametrize("left_out", TABLE_5, ids=" ".join)
def test_rows_of_table_5(left_out):
    cost = count(build_empty("hrvit_b1", features_only=True, **dict.fromkeys(left_out, False)), (3, 512, 512))
    added = tuple(own + other for own, other in zip((cost.params, cost.macs), HEAD_AND_PADDING, strict=True))
    assert added == TABLE_5[left_out]


def test_the_last_row_of_table_5_with_the_convolution_of_cswin():
    """The other network that its printed 10.1 M fit: the paper does not say whether that convolution stays."""
    model = build_empty("hrvit_b1", features_only=True, **dict.fromkeys(PARTS, False), linear_conv=True)
    cost = count(model, (3, 512, 512))
    assert cost.params + HEAD_AND_PADDING[0] == 10_115_443
    assert (cost.macs + HEAD_AND_PADDING[1]) / 1e9 == pytest.approx(17.486, abs=5e-4)


@pytest.mark.parametrize(
    ("third", "depth"), [((6, 6, 6, 2), 22), ((8, 8, 2, 2), 22), ((9, 9, 1, 1), 24), ((17, 1, 1, 1), 24)]
)
def test_rows_of_table_8(third, depth):
    """The paper's 20 blocks on the third branch, shared out otherwise: the same network but for the drop path."""
    model = build_empty("hrvit_b1", third_branch_blocks=third, drop_path_rate=0.3)
    cost = count(model, (3, 224, 224))
    assert (cost.params, cost.macs) == (COUNTS["hrvit_b1"][0], 2_775_573_440)
    assert tuple(len(module.branches[2]) for module in model.features[5::2]) == third
    last = model.features[-1].branches  # its rates are the schedule's last; the longest branch has all of them
    rates = [block.drop_path.drop_prob for block in max(last, key=len)]
    assert rates == pytest.approx(torch.linspace(0, 0.3, depth)[-len(rates) :].tolist(), abs=1e-7)
    assert build_empty("hrvit_b1").config.third_branch_blocks == ()


@pytest.mark.parametrize("left_out", [(name,) for name in PARTS] + [PARTS], ids=" ".join)
def test_without_its_parts_it_trains(left_out):
    options = dict.fromkeys(left_out, False)
    model = zoo.create_model("test_hrvit", num_classes=3, **options)
    model(torch.rand(2, 3, 40, 64)).square().mean().backward()
    # Where the batch norm starts from zero, nothing behind it has a gradient but zero.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    report = zoo.load_published(zoo.create_model("test_hrvit", **options), model.to_published(model.state_dict()))
    assert not report.missing


def test_sparse_fusion_joins_neighbours_alone():
    paths = [[path is not None for path in row] for row in fusion((4, 8, 16, 32), 3, 4, dense=False)]
    assert paths == [[True, True, False], [True, True, True], [False, True, True], [False, False, True]]
    branches = [torch.rand(1, c, s, s) for c, s in ((4, 8), (8, 4), (16, 2))]
    fused = fusion((4, 8, 16), 3, 3, dense=False).eval()
    before = fused(branches)
    branches[2] += 1
    after = fused(branches)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


ATTENTIONS = [
    {},
    {"key_value_sharing": False},
    {"parallel_conv": False},
    {"parallel_conv": False, "linear_conv": True},
    {"attention_nonlinearity": False},
]


@pytest.mark.parametrize(
    ("size", "options"), [*(((4, 6), o) for o in ATTENTIONS), ((7, 5), {}), ((2, 9), {}), ((7, 5), ATTENTIONS[1])]
)
def test_attention_written_out(size, options):
    """Tokens see their stripe alone, as the published mask has it: rows for half of the channels, then columns."""
    dim, heads, width = 8, 2, 3
    module = CrossAttention(dim, heads, width, HRViTConfig(**options)).double().eval()
    w = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    module.load_state_dict(w)
    x = torch.randn(2, *size, dim, dtype=torch.float64)
    tokens = x.flatten(1, 2)
    projected = tokens @ w["qv.weight"].T + w["qv.bias"]
    q, k, v = projected[..., :dim], projected[..., dim : 2 * dim], projected[..., -dim:]
    index = torch.arange(size[0] * size[1])
    expected = torch.zeros_like(v)
    for direction, stripe in enumerate((index // size[1] // width, index % size[1] // width)):
        mask = torch.where(stripe[:, None] == stripe, 0.0, -torch.inf).double()
        for head in range(heads):
            first = direction * dim // 2 + head * 2
            part = slice(first, first + 2)
            logits = q[..., part] @ k[..., part].transpose(1, 2) * 2**-0.5 + mask
            expected[..., part] = logits.softmax(-1) @ v[..., part]
    assert ("local.weight" in w) == (options.get("parallel_conv", True) or "linear_conv" in options)
    if "local.weight" in w:
        local = (v if "linear_conv" in options else F.hardswish(v)).unflatten(1, size).permute(0, 3, 1, 2)
        local = F.conv2d(local, w["local.weight"], w["local.bias"], padding=1, groups=dim)
        expected = expected + local.flatten(2).transpose(1, 2)
    plain = "attention_nonlinearity" in options
    expected = (expected if plain else F.hardswish(expected)) @ w["proj.weight"].T + w["proj.bias"]
    assert ("norm.weight" in w) != plain
    if not plain:
        expected = (expected - w["norm.running_mean"]) / (w["norm.running_var"] + 1e-5).sqrt()
        expected = expected * w["norm.weight"] + w["norm.bias"]
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected.unflatten(1, size))


def test_shortcut_is_a_product_from_both_sides():
    sizes = {dim: (dim // shortcut_columns(dim), shortcut_columns(dim)) for dim in (32, 48, 64, 96, 128, 240, 384, 512)}
    assert list(sizes.values()) == [(4, 8), (6, 8), (8, 8), (12, 8), (8, 16), (15, 16), (24, 16), (16, 32)]
    module, x = DiverseShortcut(48), torch.randn(2, 3, 48)
    inner = F.gelu(x.view(2, 3, 6, 8) @ module.right.weight.T + module.right.bias)
    expected = module.left.weight @ inner + module.left.bias[:, None]
    torch.testing.assert_close(module(x), expected.flatten(-2))


def test_maps_from_below_are_enlarged_pixel_by_pixel():
    x = torch.rand(1, 2, 3, 5)
    whole = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(upsample_cropped(x, 4, (12, 20)), whole)
    assert torch.equal(upsample_cropped(x, 4, (11, 18)), whole[..., :11, :18])


@pytest.mark.parametrize(("name", "depth"), [("hrvit_b1", 22), ("hrvit_b2", 26), ("hrvit_b3", 26)])
def test_short_branches_have_the_first_drop_path_rates_of_their_module(name, depth):
    model = build_empty(name, drop_path_rate=0.3)
    rates = []
    for module in model.features[1::2]:
        branches = [[getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] for blocks in module.branches]
        longest = max(branches, key=len)
        assert all(branch == longest[: len(branch)] for branch in branches)
        rates += longest
    assert rates == pytest.approx(torch.linspace(0, 0.3, depth).tolist(), abs=1e-7)
    assert max(m.drop_prob for m in build_empty(name).modules() if isinstance(m, DropPath)) == 0.1


def test_initialisation():
    models = {dense: zoo.create_model("hrvit_b1", dense_init=dense) for dense in (False, True)}
    for dense, model in models.items():
        assert model.head_drop.p == 0.1
        for name, module in model.named_modules():
            if isinstance(module, CrossAttention):
                assert not module.norm.weight.any()
                assert not module.norm.bias.any()
            elif isinstance(module, torch.nn.Linear) and module.weight.numel() > 1000:
                expected = 0.02 if dense else (3 * module.in_features) ** -0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.1), name
                assert module.bias.any() != dense


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"window_size": 0}, ["window_size", "positive"]),
        ({"window_size": (7, 7)}, ["window_size=(7, 7)", "4 ints"]),
        ({"window_size": "7"}, ["window_size='7'", "an int, or 4 ints"]),
        ({"channels": (18, 36, 72)}, ["channels=(18, 36, 72)", "4 ints"]),
        ({"channels": (33, 64, 128, 256)}, ["channels=(33, 64, 128, 256)", "33"]),
        ({"head_dim": 24}, ["head_dim=24"]),
        ({"head_dim": 0}, ["head_dim=0", "positive"]),
        ({"num_modules": (1, 0, 1, 1)}, ["num_modules", "positive"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate=1.0"]),
        ({"img_size": 16}, ["img_size", "32"]),
        ({"windows": 7}, ["windows", "window_size"]),
        ({"mix_cfn": 0}, ["mix_cfn=0", "True or False"]),
        ({"linear_conv": True}, ["linear_conv=True", "parallel_conv=False"]),
        ({"third_branch_blocks": (6, 6, 6)}, ["third_branch_blocks=(6, 6, 6)", "4 positive ints"]),
        ({"third_branch_blocks": (20, 0, 0, 0)}, ["third_branch_blocks=(20, 0, 0, 0)", "4 positive ints"]),
        ({"third_branch_blocks": 6}, ["third_branch_blocks=6", "ints"]),
    ],
)
def test_impossible_values_are_told_in_one_line(options, told):
    with pytest.raises(zoo.ZooError) as error:
        zoo.create_model("hrvit_b1", **options)
    assert all(part in str(error.value) for part in ["hrvit_b1", *told])
    assert "\n" not in str(error.value)


def test_a_stripe_width_for_each_branch():
    model = zoo.create_model("test_hrvit", window_size=[5, 4, 3, 2], img_size=64).eval()
    assert [blocks[0].attn.width for blocks in model.features[-1].branches] == [5, 4, 3, 2]
    assert model(torch.rand(1, 3, 70, 41)).shape == (1, 1000)


def test_pruned_maps_are_named():
    model = zoo.create_model("test_hrvit", features_only=True, out_indices=(0, 2))
    assert model.model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 24)
    with pytest.raises(zoo.ZooError, match="pruned"):
        model.model.forward_intermediates(torch.rand(1, 3, 64, 64), indices=[1])
