"""HiViT against the published implementation and the paper's Table 7."""

import pytest
import timm
import torch

import zoo
from benchmarks.cost import count
from zoo.hivit import resize_position

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_classifier_equals_the_published_one(oracle, dtype):
    published = oracle("hivit_t_cls")
    model = published.fill(zoo.create_model("hivit_tiny"), dtype)
    with torch.no_grad():
        published.check(model(published.images(dtype)), published.runs["224x224"]["logits"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_maps_equal_the_published_ones(oracle, dtype):
    published = oracle("hivit_t_seg224")
    model = published.fill(zoo.create_model("hivit_tiny", features_only=True, published_taps=True), dtype)
    with torch.no_grad():
        maps = model(published.images(dtype))
    assert len(maps) == 4
    for index, output in enumerate(maps):
        published.check(output, published.runs["224x224"][f"out{index}"])


def test_maps_at_the_stage_ends_end_like_the_published_ones(oracle):
    published = oracle("hivit_t_seg224")
    model = published.fill(zoo.create_model("hivit_tiny", features_only=True), torch.float64)
    with torch.no_grad():
        maps = model(published.images(torch.float64))
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 56, 56), (192, 28, 28), (384, 14, 14)]
    published.check(maps[2], published.runs["224x224"]["out2"])


@pytest.mark.parametrize(
    ("name", "options", "oracle_name"),
    [
        ("hivit_tiny", {}, "hivit_t_cls"),
        ("hivit_tiny", {"features_only": True, "published_taps": True}, "hivit_t_seg224"),
        ("hivit_tiny_mae", {}, "hivit_t_mae"),
    ],
)
def test_every_published_key_has_its_place(oracle, name, options, oracle_name):
    published = oracle(oracle_name)
    with torch.device("meta"):
        model = zoo.create_model(name, **options)
    inner = getattr(model, "model", model)
    ours = {zoo.published_keys(model)[key]: tuple(value.shape) for key, value in inner.state_dict().items()}
    index = {key for key in published.shapes if key.endswith("relative_position_index")}  # derived from the size
    assert ours == {key: shape for key, shape in published.shapes.items() if key not in index}
    assert sum(p.numel() for p in model.parameters()) == published.params


CLASSIFIER = {"tiny": 19_181_668, "small": 37_526_464, "base": 66_418_952, "large": 266_763_352}
MAE = {"tiny": 39_544_480, "small": 57_845_536, "base": 87_041_152, "large": 287_851_840}
DENSE = {
    ("tiny", 224): 18_795_900,
    ("tiny", 512): 18_990_300,
    ("tiny", 640): 19_126_620,
    ("tiny", 1024): 19_719_900,
    ("small", 224): 37_140_696,
    ("small", 512): 37_529_496,
    ("small", 640): 37_802_136,
    ("small", 1024): 38_988_696,
    ("base", 224): 65_904_928,
    ("base", 512): 66_423_328,
    ("base", 640): 66_786_848,
    ("base", 1024): 68_368_928,
    ("large", 224): 265_992_816,
    ("large", 512): 267_392_496,
    ("large", 640): 268_374_000,
    ("large", 1024): 272_645_616,
}
SHALLOW = {(0, 0, 24): 77_076_520, (1, 1, 22): 71_747_736, (3, 3, 18): 61_090_168, (4, 4, 16): 55_761_384}


def parameters(name: str, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in zoo.create_model(name, **options).parameters())


def test_parameter_counts():
    assert {size: parameters(f"hivit_{size}") for size in CLASSIFIER} == CLASSIFIER
    assert {size: parameters(f"hivit_{size}_mae") for size in MAE} == MAE
    assert {
        (size, pixels): parameters(f"hivit_{size}", features_only=True, img_size=pixels) for size, pixels in DENSE
    } == DENSE
    assert {depths: parameters("hivit_base", depths=depths) for depths in SHALLOW} == SHALLOW  # Table 9


@pytest.mark.parametrize("depths", [(0, 0, 2), (0, 1, 1), (2, 0, 1)])
def test_stages_without_blocks_have_maps(depths):
    maps = zoo.create_model("test_hivit", depths=depths, features_only=True)(torch.rand(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 16, 16), (1, 16, 8, 8), (1, 32, 4, 4)]


@pytest.mark.parametrize(("name", "units"), [("hivit_base", 28), ("hivit_tiny", 14), ("hivit_large", 52)])
def test_drop_path_grows_unit_by_unit(name, units):
    with torch.device("meta"):
        model = zoo.create_model(name, drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in model.blocks if hasattr(b, "drop_path")]
    assert rates == pytest.approx(torch.linspace(0, 0.4, units).tolist(), abs=1e-7)


def test_default_drop_path_rates_are_the_paper_s():
    rates = {}
    for size in ("tiny", "small", "base"):
        with torch.device("meta"):
            rates[size] = zoo.create_model(f"hivit_{size}").blocks[-1].drop_path.drop_prob
    assert rates == {"tiny": 0.05, "small": 0.3, "base": 0.5}


def test_initialisation():
    model = zoo.create_model("hivit_tiny")
    for name, p in model.named_parameters():
        if name.startswith("patch_embed.proj"):
            bound = (3 * 4 * 4) ** -0.5  # PyTorch's default for a convolution
            assert p.abs().max() <= bound
            assert p.ndim == 1 or p.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        elif name.endswith(".bias"):
            assert (p == 0).all(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(p.mean().item()) < 0.002, name


def test_published_taps_sit_one_unit_per_block():
    def taps(name, **options):
        with torch.device("meta"):
            return zoo.create_model(name, published_taps=True, **options).taps

    assert taps("hivit_tiny") == (0, 2, 15, 15)
    assert taps("hivit_base") == (1, 4, 29, 29)
    assert taps("hivit_large") == (3, 8, 53, 53)
    with pytest.raises(zoo.ZooError, match="published_taps"):
        taps("hivit_base", depths=(2, 1, 4))


def test_last_published_map_is_pooled_and_pruning_keeps_what_is_needed():
    model = zoo.create_model("test_hivit", features_only=True, published_taps=True).eval()
    maps = model(torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(maps[3], torch.nn.functional.max_pool2d(maps[2], 2))
    shallow = zoo.create_model("test_hivit", features_only=True, out_indices=(0,))
    assert len(shallow.model.blocks) == 2
    assert shallow.model.absolute_pos_embed is None
    assert shallow(torch.rand(1, 3, 64, 64))[0].shape == (1, 8, 16, 16)


def test_switches_remove_positions():
    plain = zoo.create_model("test_hivit", relative_position_bias=False, absolute_position=False).eval()
    assert not plain.no_weight_decay()
    assert plain(torch.rand(1, 3, 80, 48)).shape == (1, 1000)


def test_absolute_position_is_sampled_with_the_published_scale():
    model = zoo.create_model("test_hivit", img_size=224).eval()
    embedding = model.absolute_pos_embed.reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(embedding, scale_factor=(20.1 / 14, 10.1 / 14), mode="bicubic")
    torch.testing.assert_close(model.position((20, 10)), expected.flatten(2).transpose(1, 2))
    assert model.position((14, 14)) is model.absolute_pos_embed


@pytest.mark.parametrize(("features_only", "rows"), [(False, 5 * 6), (True, 14 * 14)])
def test_image_size_sizes_the_positions(features_only, rows):
    """The published dense backbone keeps the absolute positions of 224 pixels, whatever the crop."""
    model = zoo.create_model("test_hivit", img_size=(72, 96), features_only=features_only)
    model = getattr(model, "model", model)
    assert model.blocks[-1].attn.relative_position_bias_table.shape == (9 * 11, 2)
    assert model.absolute_pos_embed.shape == (1, rows, 32)


def test_dense_backbone_starts_with_zero_tables():
    torch.manual_seed(3)
    dense = zoo.create_model("test_hivit", features_only=True)
    tables = [p for name, p in dense.named_parameters() if name.endswith("bias_table")]
    assert len(tables) == 2
    assert not any(table.any() for table in tables)
    torch.manual_seed(3)
    again = zoo.create_model("test_hivit", features_only=True)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), again.parameters(), strict=True))


def test_resized_positions_keep_their_precision():
    embedding = torch.randn(1, 16, 3, dtype=torch.float64)
    resized = resize_position(embedding, (4, 4), (6, 5))
    rounded = resize_position(embedding.float(), (4, 4), (6, 5))
    assert (resized.dtype, resized.shape) == (torch.float64, (1, 30, 3))
    assert 1e-10 < (resized - rounded).abs().max() < 1e-5


def test_padding_lies_to_the_right_and_below():
    """The part of a map that no padding touches is that of the unpadded image, without attention to mix them."""
    model = zoo.create_model("test_hivit", features_only=True, out_indices=(0, 1)).eval()
    x = torch.rand(1, 3, 50, 70)
    padded = torch.nn.functional.pad(x, (0, 10, 0, 14))
    for cropped, full in zip(model(x), model(padded), strict=True):
        torch.testing.assert_close(cropped, full[:, :, : cropped.shape[2], : cropped.shape[3]])


@pytest.mark.parametrize("size", [64, 256])
def test_attention_kernels_agree(size):
    """Fused (no autograd, many tokens), explicit, and recomputed (training) give one result and one gradient."""
    model = zoo.create_model("test_hivit", img_size=size, drop_path_rate=0.0).double().eval()
    x = torch.rand(1, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        fused = model(x)
    outputs, grads = [], []
    for mode in (False, True):
        model.train(mode)
        out = model(x)
        outputs.append(out)
        grads.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
    timm.layers.set_fused_attn(False)
    try:
        with torch.no_grad():
            outputs.append(model.eval()(x))
    finally:
        timm.layers.set_fused_attn(True)
    for out in outputs:
        torch.testing.assert_close(out, fused, rtol=1e-10, atol=1e-12)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


GIGA_MACS = {  # of the published implementation: the classifier at 224, the dense backbone at 512 and 1024
    "hivit_tiny": (4.5873, 30.4758, 218.5400),
    "hivit_small": (9.0441, 60.2721, 434.3621),
    "hivit_base": (15.8096, 99.9587, 657.5326),
    "hivit_large": (63.6560, 379.4503, 2213.5859),
}


@pytest.mark.parametrize("name", GIGA_MACS)
def test_macs_equal_the_published_ones(name):
    with torch.device("meta"):
        models = [zoo.create_model(name)]
        models += [zoo.create_model(name, features_only=True, published_taps=True, img_size=s) for s in (512, 1024)]
    counted = [count(model, (3, size, size)).macs / 1e9 for model, size in zip(models, (224, 512, 1024), strict=True)]
    assert counted == pytest.approx(GIGA_MACS[name], rel=1e-4)
