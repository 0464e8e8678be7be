"""Names, errors, families, and baselines through the same call."""

import subprocess
import sys

import pytest
import torch

import zoo


def test_names():
    assert zoo.list_models("hivit_*") == sorted(
        f"hivit_{size}{suffix}" for size in ("tiny", "small", "base", "large") for suffix in ("", "_mae")
    )
    assert {f"mit_b{i}" for i in range(6)} <= set(zoo.list_models())
    assert zoo.list_models("nothing*") == []


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("hivit_tny", {}, ["hivit_tny", "hivit_tiny"]),
        (None, {}, ["None", "hivit_tiny"]),
        ("hivit_tiny", {"embed_dims": 96}, ["hivit_tiny", "embed_dims", "embed_dim", "depths", "published_taps"]),
        ("hivit_tiny", {"num_heads": 5}, ["hivit_tiny", "num_heads=5", "embed_dim=384"]),
        ("hivit_tiny", {"num_heads": 0}, ["num_heads=0"]),
        ("hivit_tiny", {"embed_dim": 386, "num_heads": 2}, ["embed_dim=386", "multiple of 4"]),
        ("hivit_tiny", {"depths": (1, 1)}, ["depths=(1, 1)"]),
        ("hivit_tiny", {"depths": 3}, ["depths=3", "3 ints"]),
        ("hivit_tiny", {"depths": "123"}, ["depths='123'", "3 ints"]),
        ("hivit_tiny", {"embed_dim": "x"}, ["embed_dim='x'", "an int"]),
        ("hivit_tiny", {"num_heads": 6.0}, ["num_heads=6.0", "an int"]),
        ("hivit_tiny", {"mlp_ratio": "3"}, ["mlp_ratio='3'", "a number"]),
        ("hivit_tiny", {"mlp_ratio": float("inf")}, ["mlp_ratio=inf", "a number"]),
        ("hivit_tiny", {"published_taps": 1}, ["published_taps=1", "True or False"]),
        ("hivit_tiny_mae", {"decoder_dim": 30}, ["decoder_dim=30", "multiple of 4"]),
        ("hivit_tiny_mae", {"decoder_depth": 0}, ["decoder_depth=0", "at least 1"]),
        ("hivit_tiny_mae", {"global_pool": ""}, ["hivit_tiny_mae", "global_pool"]),
        ("mit_b0", {"embed_dim": "x"}, ["embed_dim='x'"]),
        ("mit_b0", {"depths": 2}, ["depths=2", "4 ints"]),
        ("mit_b0", {"drop_path_rate": 2}, ["drop_path_rate=2"]),
        ("hivit_tiny", {"depths": (1, 1, 0)}, ["depths=(1, 1, 0)"]),
        ("hivit_tiny", {"drop_path_rate": 1.5}, ["drop_path_rate=1.5"]),
        ("hivit_tiny", {"mlp_ratio": 0}, ["mlp_ratio"]),
        ("hivit_tiny", {"img_size": 0}, ["img_size", "32"]),
        ("hivit_tiny", {"img_size": 31}, ["img_size", "32"]),
        ("hivit_tiny", {"img_size": (224, 224, 3)}, ["img_size"]),
        ("hivit_tiny", {"img_size": "big"}, ["img_size"]),
        ("hivit_tiny", {"num_classes": -1}, ["num_classes=-1"]),
        ("hivit_tiny", {"global_pool": "max"}, ["global_pool"]),
        ("hivit_tiny", {"out_indices": (0,)}, ["features_only"]),
        ("hivit_tiny", {"features_only": True, "out_indices": (7,)}, ["hivit_tiny", "out of range"]),
        ("mit_b0", {"depths": (1, 2)}, ["depths=(1, 2)"]),
        ("resnet18", {"no_such_thing": 1}, ["resnet18", "no_such_thing"]),
    ],
)
def test_errors_are_one_line_that_names_the_mistake(name, options, parts):
    with pytest.raises(zoo.ZooError) as error:
        zoo.create_model(name, **options)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_baselines_through_the_same_call():
    maps = zoo.create_model("resnet18", features_only=True, img_size=64)(torch.rand(1, 3, 64, 64))
    assert maps[-1].shape == (1, 512, 2, 2)
    with torch.device("meta"):
        swin = zoo.create_model("swin_tiny_patch4_window7_224", img_size=256, num_classes=10)
        assert swin(torch.empty(1, 3, 256, 256)).shape == (1, 10)


def test_mit_is_mmsegmentation_s():
    dense = zoo.create_model("mit_b0", features_only=True)
    assert sum(p.numel() for p in dense.parameters()) == 3_319_392  # the backbone of mmsegmentation's SegFormer-B0
    with torch.device("meta"):
        model = zoo.create_model("mit_b0")
    assert sum(p.numel() for p in model.parameters()) == 3_319_392 + 256 * 1000 + 1000
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "display"),
    [
        ("hivit_base", "HiViT"),
        ("hivit_base_mae", "HiViT"),
        ("mit_b0", "SegFormer (MiT)"),
        ("cswin_tiny", "CSWin"),
        ("deit_small_patch16_224", "DeiT"),
        ("swin_tiny_patch4_window7_224", "Swin"),
        ("swin_tiny_patch4_window7_224.ms_in1k", "Swin"),
        ("swinv2_tiny_window8_256", "Swin V2"),
        ("vit_base_patch16_224", "ViT"),
        ("pvt_v2_b1", "PVTv2"),
        ("convnext_tiny", "ConvNeXt"),
        ("hrnet_w48", "HRNet"),
        ("maxvit_tiny_tf_224", "MaxViT"),
        ("mvitv2_tiny", "MViTv2"),
        ("davit_tiny", "DaViT"),
        ("twins_svt_small", "Twins"),
        ("volo_d1_224", "Volo"),
    ],
)
def test_family(name, display):
    assert zoo.family(name) == display


def test_family_of_an_unknown_model():
    with pytest.raises(zoo.ZooError, match="hivit_tiny"):
        zoo.family("hivit_tinny")


def test_import_is_light():
    code = "import sys, zoo; sys.exit(any(m in sys.modules for m in ('mmseg', 'mmengine', 'mmcv', 'scipy', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "deit_tiny_patch16_224", "convnext_atto", "mit_b0"])
def test_maps_are_nchw(name):
    """timm's Swin gives NHWC by itself; the zoo's contract is NCHW for every backbone."""
    with torch.device("meta"):
        model = zoo.create_model(name, features_only=True, img_size=64)
        maps = model(torch.empty(1, 3, 64, 64))
    expected = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(channels, 64 // r, 64 // r) for channels, r in expected]
