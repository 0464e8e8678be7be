"""Heads: counts of published segmentors, OCR against its formula, auxiliary heads trained and counted apart."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.models import FCNHead
from mmseg.structures import SegDataSample
from torch import nn
from torch.nn import functional as F

from benchmarks import segmentation
from benchmarks.cost import count
from benchmarks.errors import InputError
from benchmarks.heads import settings
from benchmarks.job import Job, Recipe
from benchmarks.optimizer import build_optimizer


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmseg")


def job(model: str, head: str, num_classes: int = 150, side: int = 512, recipe: Recipe | None = None, **config) -> Job:
    return Job(
        stage="train" if recipe else "cost",
        task="segmentation",
        label=model,
        model=model,
        input_size=(side, side),
        num_classes=num_classes,
        head=head,
        head_config=config.pop("head_config", {}),
        model_config=config,
        recipe=recipe,
    )


def build(job: Job) -> nn.Module:
    with torch.device("meta"):
        return segmentation.build_model(job)


def fcn(channels: int) -> int:
    """Parameters of the auxiliary head: 3x3 to 256 channels, a norm, 150 classes."""
    return channels * 256 * 9 + 2 * 256 + 256 * 150 + 150


OCR = {"head": "ocr", "num_classes": 19, "side": 1024}


@pytest.mark.parametrize(
    ("model", "window", "params", "gmacs"),
    [
        # HRFormer, Tables 5 and 12, as its published code counts to more digits; 19 classes, 1024 x 1024.
        ("hrformer_base", 15, 56_196_480, 1106.5574),
        ("hrformer_base", [21, 17, 13, 9], 56_177_824, 1131.9138),
        ("hrformer_small", 7, 13_523_856, 413.8781),
    ],
)
def test_hrformer_with_ocr_counts_as_published(model, window, params, gmacs):
    cost = count(build(job(model, **OCR, window_size=window)), (3, 1024, 1024))
    assert (cost.params, cost.params_auxiliary) == (params, 0)
    assert round(cost.macs / 1e9, 4) == gmacs


@pytest.mark.parametrize(
    ("model", "params", "auxiliary", "backbone", "gmacs"),
    [
        # mmsegmentation's head on the published backbones: parameters with the auxiliary head, MACs of both parts.
        ("hrvit_b1", 35_952_100, fcn(128), 10.5854, 220.4),
        ("hrvit_b2", 49_696_972, fcn(240), 24.8237, 235.0),
        ("hrvit_b3", 55_815_588, fcn(256), 28.3967, 239.0),
    ],
)
def test_hrvit_with_upernet_counts_as_published(model, params, auxiliary, backbone, gmacs):
    cost = count(build(job(model, "upernet")), (3, 512, 512))
    assert (cost.params + cost.params_auxiliary, cost.params_auxiliary) == (params, auxiliary)
    # The published backbone computes whole stripes of padding that ours leaves out.
    assert round(backbone + cost.by_module["decode_head"] / 1e9, 1) == gmacs


@pytest.mark.parametrize(
    ("window", "params"),
    [
        # HRFormer, Table 12: 56.0, 56.0 (56.06), 56.1, 56.1, 56.1, 56.2; the integers are its published code's.
        (7, 56_032_512),
        (9, 56_061_792),
        (11, 56_098_880),
        (13, 56_143_776),
        ([15, 13, 11, 9], 56_110_656),
        ([17, 15, 13, 11], 56_157_088),
    ],
)
def test_parameters_of_ocr_by_window(window, params):
    model = build(job("hrformer_base", **OCR, window_size=window))
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize(
    ("model", "head", "params", "giga_macs"),
    [
        # HRViT, Table 9. mmsegmentation's SegFormer head has norms that the paper's lacks, 4 per channel of the head.
        ("cswin_nano", {}, 5_916_470 + 4 * 256, 12.2003),
        ("cswin_tiny", {}, 22_356_438 + 4 * 256, 29.9959),
        ("cswin_small", {"channels": 768}, 37_347_734 + 4 * 768, 80.7655),
        ("cswin_nano", None, 33_685_452, 216.8302),
        ("cswin_tiny", None, 52_116_076, 235.1524),  # printed as 59.9 M, which is Swin-T's
        ("cswin_small", None, 64_438_828, 249.2974),
    ],
)
def test_cswin_with_either_head(model, head, params, giga_macs):
    kind = "upernet" if head is None else "segformer"
    cost = count(build(job(model, kind, head_config=head or {})), (3, 512, 512))
    assert cost.params + cost.params_auxiliary == params
    assert round(cost.macs / 1e9, 4) == giga_macs


def test_swin_with_upernet():
    """mmsegmentation's Swin-T and UPerNet have 59.02 M parameters, 59.94 M with the auxiliary head."""
    model = build(job("swin_tiny_patch4_window7_224", "upernet", strict_img_size=False))
    square, wide = (count(model, (3, 512, width)) for width in (512, 2048))
    norms = 2 * (96 + 192 + 384 + 768)  # of the four maps, which timm's Swin has no norms for
    assert (square.params + norms) / 1e6 == pytest.approx(59.02, abs=5e-3)
    assert (square.params + norms + square.params_auxiliary) / 1e6 == pytest.approx(59.94, abs=5e-3)
    assert square.macs / 1e9 == pytest.approx(236.86, abs=1e-2)
    assert wide.macs / 1e9 == pytest.approx(944.39, abs=1e-2)


@pytest.mark.parametrize(
    ("model", "channels", "params", "giga_macs"),
    [
        # HRViT, Tables 4 and 9: 3.8, 13.7, 27.5, 47.3 and 64.1 M, for which B2 and later need wider heads.
        ("mit_b0", 256, 3_753_718, 8.3878),
        ("mit_b1", 256, 13_716_822, 15.8781),
        ("mit_b2", 768, 27_465_046, 62.3378),
        ("mit_b3", 768, 47_340_886, 78.9630),
        ("mit_b4", 768, 64_111_446, 95.5675),
    ],
)
def test_mit_with_the_segformer_head(model, channels, params, giga_macs):
    cost = count(build(job(model, "segformer", head_config={"channels": channels})), (3, 512, 512))
    assert (cost.params, round(cost.macs / 1e9, 4)) == (params, giga_macs)


@pytest.mark.parametrize(
    ("model", "params", "gmacs"), [("hiri_vit_small", 61.4, 242.7), ("hiri_vit_base", 80.6, 273.3)]
)
def test_hiri_vit_with_upernet(model, params, gmacs):
    """Parameters as HIRI-ViT's Table 6 prints them, which has the auxiliary head; MACs of both heads at 1024."""

    def both(segmentor: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
        maps = segmentor.extract_feat(image)
        return [segmentor.decode_head(maps), segmentor.auxiliary_head(maps)]

    described = job(model, "upernet", side=1024, out_indices=[1, 2, 3, 4])
    cost = count(build(described), (3, 1024, 1024), forward=both)
    assert round((cost.params + cost.params_auxiliary) / 1e6, 1) == params
    assert round(cost.macs / 1e9, 1) == gmacs


def test_every_map_of_a_head_is_used():
    """HiViT as its published segmentation code takes it: four maps; a head for each sees all of their channels."""
    model = build(job("hivit_base", "upernet", published_taps=True))
    assert model.backbone.channels == [128, 256, 512, 512]
    assert model.decode_head.in_channels == [128, 256, 512, 512]
    assert (model.auxiliary_head.in_channels, model.auxiliary_head.in_index) == (512, 2)
    assert build(job("hrformer_base", **OCR)).decode_head[0].in_channels == 78 + 156 + 312 + 624


def training_recipe() -> Recipe:
    return Recipe(iterations=2, batch_size=2, warmup_iterations=0, head_learning_rate_multiplier=10.0)


def samples(labels: torch.Tensor) -> list[SegDataSample]:
    from mmengine.structures import PixelData

    return [SegDataSample(gt_sem_seg=PixelData(data=label[None]), metainfo={}) for label in labels]


@pytest.mark.parametrize("head", ["upernet", "ocr"])
def test_the_auxiliary_loss_counts_0_4(head):
    """Its share of the training's loss is the cross-entropy of its logits, times 0.4; all parts get gradients."""
    torch.manual_seed(0)
    described = job("test_hrformer", head, num_classes=5, side=64, recipe=training_recipe(), drop_path_rate=0.0)
    model = segmentation.build_model(described)
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    losses = model.loss(images, samples(labels))
    maps = model.extract_feat(images)
    auxiliary: FCNHead = model.auxiliary_head if head == "upernet" else model.decode_head[0]
    logits = F.interpolate(auxiliary(maps), (64, 64), mode="bilinear", align_corners=auxiliary.align_corners)
    name = "aux.loss_ce" if head == "upernet" else "decode_0.loss_ce"
    torch.testing.assert_close(losses[name], 0.4 * F.cross_entropy(logits, labels))
    sum(loss for key, loss in losses.items() if "loss" in key).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("head", ["upernet", "ocr"])
def test_all_heads_learn_faster(head):
    recipe = training_recipe()
    described = job("test_hrformer", head, num_classes=5, side=64, recipe=recipe)
    model = segmentation.build_model(described)
    rates = {id(p): g["lr"] for g in build_optimizer(described, model).param_groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        factor = 1.0 if name.startswith("backbone.") else 10.0
        assert rates[id(parameter)] == pytest.approx(recipe.learning_rate * factor), name


def test_ocr_is_that_of_hrformer():
    """Against the formula written out: regions, their relation to the pixels, context, classes."""
    torch.manual_seed(0)
    model = segmentation.build_model(job("test_hrformer", "ocr", num_classes=5, side=64)).eval()
    coarse, head = model.decode_head
    for module in head.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):  # as after a training: nothing is 0 or 1
            nn.init.normal_(module.weight, std=0.2)
            nn.init.normal_(module.bias, std=0.2)
    maps = [torch.randn(2, channels, 8 >> i, 8 >> i) for i, channels in enumerate(model.backbone.channels)]
    stacked = torch.cat([F.interpolate(m, (8, 8), mode="bilinear", align_corners=True) for m in maps], dim=1)
    with torch.no_grad():
        rough = coarse.conv_seg(coarse.convs(stacked))
        torch.testing.assert_close(coarse(maps), rough)
        pixels = head.bottleneck(stacked)
        weights = rough.flatten(2).softmax(-1)  # (B, classes, positions): over positions
        regions = (weights @ pixels.flatten(2).mT).mT[..., None]  # (B, 512, classes, 1)
        block = head.object_context_block
        query, key = block.query_project(pixels).flatten(2), block.key_project(regions).flatten(2)
        relation = (query.mT @ key / math.sqrt(256)).softmax(-1)  # (B, positions, classes)
        context = (relation @ block.value_project(regions).flatten(2).mT).mT.unflatten(2, (8, 8))
        joined = block.bottleneck(torch.cat([block.out_project(context), pixels], dim=1))
        torch.testing.assert_close(head(maps, rough), head.conv_seg(joined), rtol=1e-4, atol=1e-4)
    convolutions = {name: m for name, m in model.decode_head.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(m.bias is not None for m in convolutions.values())
    assert {m.kernel_size for name, m in convolutions.items() if "bottleneck.conv" in name and "block" not in name} == {
        (3, 3)
    }
    assert coarse.convs[0].conv.kernel_size == (3, 3)
    assert (coarse.dropout, head.dropout.p) == (None, 0.05)


def test_a_bare_job_is_its_backbone():
    described = job("test_hrformer", "bare", side=64)
    model = build(described)
    maps = model(torch.zeros(1, 3, 64, 64, device="meta"))
    assert [tuple(m.shape) for m in maps] == [(1, c, 16 >> i, 16 >> i) for i, c in enumerate(model.channels)]
    with_head = build(dataclasses.replace(described, head="upernet"))
    bare, whole = (count(each, (3, 64, 64)) for each in (model, with_head))
    assert bare.macs == whole.by_module["backbone"]


def test_an_unknown_head():
    with pytest.raises(InputError, match="unknown head 'upernett'; did you mean upernet"):
        settings("upernett", [8, 16], 5, {})
