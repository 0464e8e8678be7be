"""CSWin against the published implementation, its parameters and MACs, and HRViT's Tables 4 and 9."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath

import zoo
from benchmarks.cost import count
from zoo.baselines.cswin import CrossAttention

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_classifier_equals_the_published_one(oracle, dtype):
    published = oracle("cswin_t_cls")
    model = published.fill(zoo.create_model("cswin_tiny"), dtype)
    with torch.no_grad():  # the published classifier takes no other size
        published.check(model(published.images(dtype)), published.runs["224x224"]["logits"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_maps_equal_the_published_ones(oracle, dtype):
    published = oracle("cswin_t_seg")
    model = published.fill(zoo.create_model("cswin_tiny", features_only=True), dtype)
    for size in [(224, 224), (256, 320), (200, 264)]:  # the last two have no whole number of stripes
        with torch.no_grad():
            maps = model(published.images(dtype, size))
        assert len(maps) == 4
        for index, output in enumerate(maps):
            published.check(output, published.runs[f"{size[0]}x{size[1]}"][f"out{index}"])


@pytest.mark.parametrize(("options", "name"), [({}, "cswin_t_cls"), ({"features_only": True}, "cswin_t_seg")])
def test_every_published_key_has_its_place(oracle, options, name):
    published = oracle(name)
    with torch.device("meta"):
        model = zoo.create_model("cswin_tiny", **options)
    names, own = zoo.published_keys(model), getattr(model, "model", model).state_dict()
    assert {names[key]: tuple(value.shape) for key, value in own.items()} == published.shapes
    assert sum(p.numel() for p in model.parameters()) == published.params


def test_published_checkpoints_load(tmp_path):
    """As published: averaged weights in a container, beside what the training needs to go on."""
    source = zoo.create_model("test_cswin")
    torch.save({"state_dict_ema": source.to_published(source.state_dict()), "epoch": 300}, tmp_path / "t.pth")
    classifier, dense = zoo.create_model("test_cswin"), zoo.create_model("test_cswin", features_only=True)
    assert zoo.load_published(classifier, tmp_path / "t.pth").complete
    torch.testing.assert_close(classifier.state_dict(), source.state_dict(), rtol=0, atol=0)
    # The norms of the dense maps are their own, and start anew.
    report = zoo.load_published(dense, tmp_path / "t.pth")
    assert report.unexpected == ("norm.weight", "norm.bias", "head.weight", "head.bias")
    assert report.missing == tuple(f"stages.{i}.norm.{leaf}" for i in range(4) for leaf in ("weight", "bias"))
    torch.testing.assert_close(dense.model.stages[3].blocks.state_dict(), source.stages[3].blocks.state_dict())


# Parameters and MACs at 224 of the published classifiers; cswin_nano is HRViT's CSWin-Ti.
COUNTS = {
    "cswin_nano": (5_747_912, 1_155_370_240),
    "cswin_tiny": (22_320_552, 4_324_203_008),
    "cswin_small": (34_643_304, 6_800_714_752),
    "cswin_base": (77_382_184, 14_955_348_480),
    "cswin_large": (173_262_664, 33_130_144_512),
}


def test_parameters_and_macs():
    assert zoo.list_models("cswin_*") == sorted(COUNTS)
    for name, expected in COUNTS.items():
        with torch.device("meta"):
            cost = count(zoo.create_model(name), (3, 224, 224))
        assert (cost.params, cost.macs) == expected, name


@pytest.mark.parametrize("width", [3, None])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_written_out(width, fused, monkeypatch):
    """Stripe by stripe and head by head; padded tokens are keys and values of zero."""
    monkeypatch.setattr("zoo.baselines.cswin.use_fused_attn", lambda: fused)
    dim, heads, (h, w) = 8, 4, (7, 5)
    module = CrossAttention(dim, heads, width).double()
    x = torch.randn(1, h, w, dim, dtype=torch.float64)
    expected = torch.zeros(h, w, dim, dtype=torch.float64)
    directions = [(h, w)] if width is None else [(h, width), (width, w)]  # vertical stripes first
    with torch.no_grad():
        q, k, v = module.qkv(x)[0].chunk(3, -1)
        for d, (rows, columns) in enumerate(directions):
            share = dim // len(directions)
            own = slice(d * share, (d + 1) * share)
            pad_h, pad_w = -h % rows, -w % columns
            pads = (0, 0, pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2)
            query, key, value = (F.pad(t[..., own], pads) for t in (q, k, v))
            attended = torch.zeros_like(query)
            for top in range(0, h + pad_h, rows):
                for left in range(0, w + pad_w, columns):
                    cut = slice(top, top + rows), slice(left, left + columns)
                    local = module.stripes[d].local(value[cut].permute(2, 0, 1)[None])[0].permute(1, 2, 0)
                    size = share // (heads // len(directions))
                    for c in range(0, share, size):
                        qs, ks, vs = (t[cut][..., c : c + size].flatten(0, 1) for t in (query, key, value))
                        weights = (qs @ ks.T / size**0.5).softmax(-1)
                        attended[(*cut, slice(c, c + size))] = (weights @ vs).unflatten(0, (rows, columns))
                    attended[cut] += local
            expected[..., own] = attended[pad_h // 2 :, pad_w // 2 :][:h, :w]
        torch.testing.assert_close(module(x)[0], module.proj(expected))


def test_sides_that_4_does_not_divide_are_padded_with_zeros():
    model, x = zoo.create_model("test_cswin", features_only=True).eval(), torch.rand(1, 3, 61, 66)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(F.pad(x, (0, 2, 0, 3))))


def test_classifiers_have_a_norm_for_the_last_map_alone():
    model, x = zoo.create_model("test_cswin").eval(), torch.rand(1, 3, 64, 64)
    assert [isinstance(stage.norm, torch.nn.LayerNorm) for stage in model.stages] == [False, False, False, True]
    with pytest.raises(zoo.ZooError, match="norm=True"):
        model.forward_intermediates(x, norm=True)
    dense = zoo.create_model("test_cswin", features_only=True).model
    assert len(dense.forward_intermediates(x, norm=True, intermediates_only=True)) == 4


def test_drop_path_grows_block_by_block():
    with torch.device("meta"):
        model = zoo.create_model("cswin_tiny", drop_path_rate=0.3)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]  # the first block has none
    assert rates == pytest.approx(torch.linspace(0, 0.3, 25).tolist()[1:], abs=1e-7)


def test_initialisation():
    model = zoo.create_model("cswin_nano")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert not module.bias.any(), name


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stripe_width": (1, 2, 0)}, ["stripe_width=(1, 2, 0)", "positive"]),
        ({"stripe_width": 7}, ["stripe_width=7", "3 ints"]),
        ({"depths": (1, 2, 0, 1)}, ["depths=(1, 2, 0, 1)", "positive"]),
        ({"num_heads": (1, 2, 4, 8)}, ["num_heads=(1, 2, 4, 8)", "even"]),
        ({"num_heads": (6, 6, 6, 6)}, ["num_heads=(6, 6, 6, 6)", "embed_dim=64"]),
        ({"embed_dim": 0}, ["embed_dim=0"]),
        ({"mlp_ratio": 0}, ["mlp_ratio=0"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate=1.0"]),
        ({"img_size": 16}, ["img_size", "32"]),
        ({"stripes": 7}, ["stripes", "stripe_width"]),
    ],
)
def test_impossible_values_are_told_in_one_line(options, told):
    with pytest.raises(zoo.ZooError) as error:
        zoo.create_model("cswin_tiny", **options)
    assert all(part in str(error.value) for part in ["cswin_tiny", *told])
    assert "\n" not in str(error.value)
