"""HIRI-ViT against the reconstruction of its paper: parameters by part, MACs, and the forward written out again."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

import zoo
from benchmarks.cost import count

NUMBERS = json.loads((Path(__file__).parents[1] / "oracles" / "hiri_vit.json").read_text())
SIZES = ["small", "base", "large"]
TINY = {"depths": (2, 2, 2, 2, 2), "mlp_ratios": (2, 3, 2, 3, 2), "num_classes": 5}


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(name: str, **options) -> torch.nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name, **options)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_part_by_part(size):
    expected = NUMBERS[size]
    model = on_meta(f"hiri_vit_{size}")
    parts = {"stem": parameters(model.stem), "head": parameters(model.head)}
    for index, stage in enumerate(model.stages):
        parts |= {f"stage{index + 1}": parameters(stage.blocks), f"norm{index + 1}": parameters(stage.norm)}
        parts |= {f"down{index}": parameters(stage.downsample)} if index else {}
    assert parts == expected["params_by_part"]
    assert parameters(model) == expected["params"]
    assert parameters(on_meta(f"hiri_vit_{size}", features_only=True)) == expected["params_backbone_no_head"]


@pytest.mark.parametrize("size", SIZES)
def test_macs(size):
    expected = NUMBERS[size]
    model, dense = on_meta(f"hiri_vit_{size}"), on_meta(f"hiri_vit_{size}", features_only=True)
    for pixels, macs in expected["macs"].items():
        if size == "small" or pixels in ("448", "768"):
            assert count(model, (3, int(pixels), int(pixels))).macs == macs, pixels
    for pixels, macs in expected["macs_backbone_no_head"].items():
        width, height = map(int, pixels.split("x"))
        if size == "small" or width != height:
            assert count(dense, (3, height, width)).macs == macs, pixels


@pytest.mark.parametrize("size", SIZES)
def test_the_224_form(size):
    """The same weights; the second IRDS keeps its resolution, as the paper's MACs at 224 need."""
    model, dense = on_meta(f"hiri_vit_{size}_224"), on_meta(f"hiri_vit_{size}_224", features_only=True)
    assert count(model, (3, 224, 224)).macs == NUMBERS[size]["macs_224_down_strides_2_1_2_2"]
    maps = dense(torch.empty(1, 3, 224, 224, device="meta"))
    assert [m.shape[-1] for m in maps] == [56, 28, 28, 14, 7]
    assert dense.feature_info.reduction() == [4, 8, 8, 16, 32]
    other = on_meta(f"hiri_vit_{size}")
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert other.default_cfg["input_size"] == (3, 448, 448)


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({"down_ratios": (3, 3, 6, 6), "shortcut_kernels": (3, 3, 1, 1)}, (34.75, 54.42, 94.26)),
        ({"down_ratios": (4, 4, 4, 4), "shortcut_kernels": (2, 2, 2, 2)}, (34.71, 54.41, 94.22)),
        ({"shortcut_kernels": (1, 1, 1, 1)}, (34.73, 54.36, 94.20)),
    ],
)
def test_runners_up_of_the_reconstruction_are_settings(options, millions):
    counts = [parameters(on_meta(f"hiri_vit_{size}", **options)) / 1e6 for size in SIZES]
    assert counts == pytest.approx(millions, abs=0.02)  # given without the norms of the stages' ends


# The network once more, from the reconstruction's tables: NCHW, one plain operation after the other.


def conv(w, name, x, **options):
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), **options)


def depthwise(w, name, x, stride=1):
    return conv(w, name, x, stride=stride, padding=1, groups=x.shape[1])


def linear(w, name, x):
    return F.conv2d(x, w[f"{name}.weight"][..., None, None], w[f"{name}.bias"])


def batch_norm(w, name, x):
    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)


def layer_norm(w, name, x):
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    scale, shift = w[f"{name}.weight"][:, None, None], w[f"{name}.bias"][:, None, None]
    return (x - mean) / (var + 1e-6).sqrt() * scale + shift


def stem(w, x):
    def unit(name, x, **options):
        return batch_norm(w, f"stem.{name}.1", conv(w, f"stem.{name}.0", x, padding=1, **options)).relu()

    x = unit("trunk", x, stride=2)
    high = conv(w, "stem.high.1", unit("high.0", x, groups=x.shape[1]), stride=2, padding=1)
    low = conv(w, "stem.low.2", unit("low.1", unit("low.0", x, stride=2)))
    return batch_norm(w, "stem.norm", high + low)


def hr_block(w, name, x):
    low = batch_norm(w, f"{name}.norm", depthwise(w, f"{name}.down", x, stride=2))
    low = linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", low)))
    low = low.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : x.shape[2], : x.shape[3]]
    return x + depthwise(w, f"{name}.high", x) + low


def cffn(w, name, x):
    z = F.gelu(linear(w, f"{name}.fc1", x))
    return linear(w, f"{name}.fc2", z + depthwise(w, f"{name}.dwconv", z))


def cffn_block(w, name, x):
    return x + cffn(w, f"{name}.cffn", batch_norm(w, f"{name}.norm", x))


def transformer_block(w, name, x, heads):
    normed = layer_norm(w, f"{name}.norm1", x)
    q, k, v = linear(w, f"{name}.attn.qkv", normed).flatten(2).unflatten(1, (3, heads, -1)).unbind(1)  # (B, Hd, d, n)
    maps = (q.transpose(-1, -2) @ k / q.shape[2] ** 0.5).softmax(-1)  # (B, Hd, queries, keys)
    x = x + linear(w, f"{name}.attn.proj", (v @ maps.transpose(-1, -2)).reshape(x.shape))
    return x + cffn(w, f"{name}.cffn", batch_norm(w, f"{name}.norm2", x))


def irds_a(w, name, x, stride):
    main = conv(w, f"{name}.main.0.0", x, stride=stride, padding=1)
    main = conv(w, f"{name}.main.1", batch_norm(w, f"{name}.main.0.1", main).relu())
    room = x.new_zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1)
    room[:, :, :-1, :-1] = x
    shortcut = conv(w, f"{name}.shortcut.conv", room, stride=stride)
    return batch_norm(w, f"{name}.norm", main + shortcut[:, :, : main.shape[2], : main.shape[3]])


def irds_b(w, name, x):
    main = batch_norm(w, f"{name}.main.0.1", conv(w, f"{name}.main.0.0", x)).relu()
    main = conv(w, f"{name}.main.2", depthwise(w, f"{name}.main.1", main, stride=2))
    means = torch.stack(
        [
            torch.stack([x[:, :, r : r + 2, c : c + 2].mean((2, 3)) for c in range(0, x.shape[3], 2)], -1)
            for r in range(0, x.shape[2], 2)
        ],
        -2,
    )
    return layer_norm(w, f"{name}.norm", main + conv(w, f"{name}.shortcut.conv", means))


def reference(model, x):
    """The five maps and the logits."""
    w, cfg, maps = model.state_dict(), model.config, []
    x = stem(w, x)
    for index, depth in enumerate(cfg.depths):
        name = f"stages.{index}"
        if index in (1, 2):
            x = irds_a(w, f"{name}.downsample", x, cfg.down_strides[index - 1])
        elif index:
            x = irds_b(w, f"{name}.downsample", x)
        for block in (f"{name}.blocks.{j}" for j in range(depth)):
            if index < 2:
                x = hr_block(w, block, x)
            elif index == 2:
                x = cffn_block(w, block, x)
            else:
                x = transformer_block(w, block, x, cfg.num_heads[index - 3])
        x = (batch_norm if index < 3 else layer_norm)(w, f"{name}.norm", x)
        maps.append(x)
    pooled = x.mean((2, 3), keepdim=True)
    hidden = F.gelu(layer_norm(w, "head.norm", linear(w, "head.fc1", pooled)))
    return maps, linear(w, "head.fc2", hidden).flatten(1)


def randomize(model):
    """Weights of unit gain, statistics that matter."""
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            torch.nn.init.normal_(value, std=value[0].numel() ** -0.5 if value.ndim > 1 else 0.3)
        if key.endswith("running_var"):
            value.abs_().add_(0.5)
    return model


@pytest.mark.parametrize("strides", [(2, 2, 2, 2), (2, 1, 2, 2)])
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (33, 47), (150, 201), (320, 256)])
def test_outputs_equal_plain_operations(size, strides):
    model = randomize(zoo.create_model("test_hiri_vit", down_strides=strides, **TINY).double().eval())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected, logits = reference(model, x)
        torch.testing.assert_close(model.forward_intermediates(x)[1], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(x), logits, rtol=1e-9, atol=1e-9)


def test_gradients_equal_plain_operations():
    """What is recomputed in the backward pass, and attention in training, changes no gradient."""
    model = randomize(zoo.create_model("test_hiri_vit", drop_path_rate=0.0, **TINY).double().eval())
    x = torch.randn(2, 3, 400, 72, dtype=torch.float64)
    names = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x).square().sum(), list(names.values()))
    weights = {key: value.clone().requires_grad_(key in names) for key, value in model.state_dict().items()}

    class Frozen:
        config = model.config
        state_dict = staticmethod(lambda: weights)

    expected = torch.autograd.grad(reference(Frozen, x)[1].square().sum(), [weights[name] for name in names])
    for name, ours, theirs in zip(names, grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9 * theirs.abs().max().item(), msg=name)


@pytest.mark.parametrize(("size", "rate", "blocks"), [("small", 0.15, 19), ("base", 0.15, 28), ("large", 0.3, 43)])
def test_drop_path_grows_block_by_block(size, rate, blocks):
    model = on_meta(f"hiri_vit_{size}")
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, rate, blocks).tolist(), abs=1e-7)


def test_initialisation():
    model = zoo.create_model("hiri_vit_small", depths=(1, 1, 1, 1, 1))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            std = 0.02
            if isinstance(module, torch.nn.Conv2d):
                std = (2 / (module.kernel_size[0] ** 2 * module.out_channels / module.groups)) ** 0.5
            measured = module.weight.std().item()
            assert measured == pytest.approx(std, rel=5 / module.weight.numel() ** 0.5), name
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
            assert module.eps == (1e-5 if isinstance(module, torch.nn.BatchNorm2d) else 1e-6)


def test_batch_one_trains_where_a_map_is_one_pixel():
    model = zoo.create_model("test_hiri_vit").train()
    norm = model.stages[4].blocks[0].norm2
    model(torch.rand(1, 3, 32, 32)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not norm.running_mean.any()  # one value per channel is no statistic
    model(torch.rand(2, 3, 32, 32))
    assert norm.running_mean.any()


def test_gradient_checkpointing_moves_running_statistics_once():
    models = [zoo.create_model("test_hiri_vit", drop_path_rate=0.0) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].set_grad_checkpointing()
    x = torch.rand(2, 3, 64, 64)
    for model in models:
        model.train()(x).square().mean().backward()
    for (key, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    assert models[1].stages[4].blocks[0].norm2.num_batches_tracked == 1


def test_less_is_kept_for_the_backward_pass_under_checkpointing():
    def kept(model):
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(x)
        return sum(sizes.values()), out

    model, x = zoo.create_model("test_hiri_vit", depths=(6, 6, 6, 6, 6)).train(), torch.rand(2, 3, 128, 128)
    plain, _keep = kept(model)
    model.set_grad_checkpointing()
    less, _keep = kept(model)
    assert less < 0.8 * plain


def test_maps_are_channels_last_and_normalised():
    model = zoo.create_model("test_hiri_vit", features_only=True).eval()
    maps = model(torch.rand(1, 3, 256, 256))
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    torch.testing.assert_close(maps[-1].mean(1), torch.zeros(1, 4, 4), atol=1e-5, rtol=0)


def test_reset_classifier_keeps_the_hidden_layer():
    model = zoo.create_model("test_hiri_vit", num_classes=4)
    hidden = model.head.fc1.weight.clone()
    model.reset_classifier(3)
    assert torch.equal(model.head.fc1.weight, hidden)
    model.reset_classifier(0)
    model.reset_classifier(6)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 6)
    assert model.head.fc1.out_features == 5 * model.num_features


def test_own_checkpoints_load(tmp_path):
    """Nothing is published for HIRI-ViT: `load_published` takes our names, for a classifier and a dense backbone."""
    model = randomize(zoo.create_model("test_hiri_vit", num_classes=10)).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "weights.pth")
    other = zoo.create_model("test_hiri_vit", num_classes=10).eval()
    report = zoo.load_published(other, tmp_path / "weights.pth")
    assert report.complete
    assert set(report.loaded) == set(model.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(other(x), model(x))
    dense = zoo.create_model("test_hiri_vit", features_only=True).eval()
    report = zoo.load_published(dense, tmp_path / "weights.pth")
    assert not report.missing
    left = ("fc1.weight", "fc1.bias", "norm.weight", "norm.bias", "fc2.weight", "fc2.bias")
    assert {key.removeprefix("module.") for key in report.unexpected} == {f"head.{key}" for key in left}
    torch.testing.assert_close(dense(x)[-1], model.forward_features(x))
    assert zoo.published_keys(model) == {key: key for key in model.state_dict()}


@pytest.mark.parametrize("stem", ["hr", "conv", "vit"])
@pytest.mark.parametrize("dense", [False, True])
def test_pretrained_weights_are_fitted_to_images_of_one_channel(stem, dense, tmp_path):
    """timm sums the kernels of the convolution that `first_conv` names, which is another in each stem."""
    model = zoo.create_model("test_hiri_vit", stem=stem)
    state = {key: value for key, value in model.state_dict().items() if not dense or not key.startswith("head.")}
    torch.save(state, tmp_path / "weights.pth")
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    grey = timm.create_model("test_hiri_vit", stem=stem, in_chans=1, features_only=dense, **options)
    first = grey.default_cfg["first_conv"]
    kernel = (grey.model if dense else grey).get_submodule(first).weight
    torch.testing.assert_close(kernel, state[f"{first}.weight"].sum(1, keepdim=True))
    with torch.device("meta"):  # the variant's own stem is another
        assert zoo.create_model("m_vit", stem=stem).default_cfg["first_conv"] == first


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"channel": 3}, ["unknown option 'channel'", "channels"]),
        ({"channels": (32, 64, 128, 320)}, ["depths=(2, 2, 2, 9, 4)", "each of channels=(32, 64, 128, 320)"]),
        ({"channels": 32}, ["channels=32", "ints"]),
        ({"blocks": "hr"}, ["blocks='hr'", "names"]),
        ({"blocks": ("hr", "hr", "cfn", "transformer", "transformer")}, ["blocks=", "hr, cffn, transformer"]),
        ({"blocks": ("hr", "hr", "transformer", "transformer", "transformer")}, ["num_heads=(5, 8)", "blocks="]),
        ({"reductions": (8, 1, 1, 1, 1)}, ["reductions=(8, 1, 1, 1, 1)", "no attention"]),
        ({"down_ratios": (4, 4, 6)}, ["down_ratios=(4, 4, 6)", "5 stages but the first"]),
        ({"norms": ("batch",) * 4}, ["norms=", "channels="]),
        ({"ffn_norm": "group"}, ["ffn_norm='group'", "batch, layer"]),
        ({"stem": 1}, ["stem=1", "a name"]),
        ({"stem": "cnv"}, ["stem='cnv'", "hr, conv, vit"]),
        ({"downsampling": ("irds_a", "irds_a", "irds_b", "pool")}, ["downsampling=", "irds_a, irds_b, conv"]),
        ({"channels": (32, 64, 128, 320, 0)}, ["channels=", "positive"]),
        ({"num_heads": (5, 7)}, ["num_heads=(5, 7)", "divide", "512"]),
        ({"num_heads": (0, 8)}, ["num_heads=(0, 8)", "positive"]),
        ({"depths": (2, 2, 2, 0, 4)}, ["depths=", "positive"]),
        ({"stem_width": 0}, ["stem_width=0"]),
        ({"head_ratio": 0}, ["head_ratio=0"]),
        ({"down_strides": (2, 3, 2, 2)}, ["down_strides=(2, 3, 2, 2)", "1 or 2"]),
        ({"shortcut_kernels": (2, 2, 1, 4)}, ["shortcut_kernels=", "1, 2 or 3"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate=1.0"]),
        ({"img_size": 31}, ["img_size", "32"]),
    ],
)
def test_errors_are_one_line_that_names_the_mistake(options, parts):
    with pytest.raises(zoo.ZooError) as error:
        zoo.create_model("hiri_vit_small", **options)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in ["hiri_vit_small", *parts]), str(error.value)


def test_names():
    sizes = [f"hiri_vit_{size}" for size in SIZES]
    assert zoo.list_models("hiri_vit_*") == sorted([*sizes, *(f"{name}_224" for name in sizes)])
    assert {zoo.family(name) for name in [*sizes, "test_hiri_vit"]} == {"HIRI-ViT"}
    dense = on_meta("hiri_vit_small", features_only=True, img_size=768)
    assert dense.feature_info.reduction() == [4, 8, 16, 32, 64]
    assert dense.feature_info.channels() == [32, 64, 128, 320, 512]
