"""Every segmentation recipe, composed as a run composes it, against the papers' text, setting by setting.

What has no sentence beside it is not printed in the paper: it is mmsegmentation's, as the recipe's file says.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import expect, make
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmseg.datasets import BaseSegDataset
from tests_support import configuration

from benchmarks import data, segmentation
from benchmarks.engine import param_scheduler
from benchmarks.heads import BiasedConv2d
from benchmarks.job import BARE, Job
from benchmarks.optimizer import build_optimizer
from runners.plan import make_jobs
from runners.run import CONF

SIX = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
DATA = ("ade20k", "cityscapes", "pascal_context", "coco_stuff")
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml") if path.stem.startswith(DATA))


@dataclass(frozen=True)
class Printed:
    """What a recipe must come to. Sizes of images are (width, height), those of crops and windows (height, width)."""

    place: tuple[str, str]  # suite and benchmark
    model: str  # a small one of the paper's family, to look at the groups of its parameters
    iterations: int
    batch_size: int
    rates: dict[int, float]  # step -> learning rate of the backbone's last layer
    weight_decay: float
    head_rate: float  # times the backbone's
    resize: tuple[int, int]
    crop: tuple[int, int]
    mode: str = "whole"
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = ()
    layer_decay: float | None = None
    drop_path_rate: float | None = None  # of the recipe; None: each model's, checked below


# HRViT, supplementary material, A.2: "We use an AdamW optimizer for 160 k iterations using a 'poly' learning rate
# schedule, 1,500 steps of linear warm-up, an initial learning rate of 6e-5, and a weight decay rate of 0.01."
# "[We] increase the initial learning rate for the segmentation head by 10 x."
LINE = {0: 6e-8, 750: 3e-5, 1500: 6e-5, 80_750: 3e-5, 159_999: 0.0}
HRVIT = {
    "model": "test_hrvit",
    "iterations": 160_000,
    "rates": LINE,
    "weight_decay": 0.01,
    "head_rate": 10.0,
}
ADE20K = HRVIT | {
    "batch_size": 16,  # "The mini-batch size is set to 16 and 8 for ADE20K and Cityscapes, respectively."
    "crop": (512, 512),  # "The training image size [...] are cropped to 512 x 512 and 1024 x 1024, respectively."
    "resize": (
        2048,
        512,
    ),  # "[...] the image size for ADE20K val and Cityscapes val is set to 512 x 2048 and 1024 x 2048"
}
# HRFormer, 4.2, Cityscapes: "We set the initial learning rate as 0.0001, weight decay as 0.01, crop size as 1024 x 512,
# batch size as 8, and training iterations as 80K by default." Table 5: "All results are evaluated with multi-scale
# testing."
HRFORMER = {"model": "test_hrformer", "weight_decay": 0.01, "head_rate": 1.0, "scales": tuple(SIX)}
# PASCAL-Context and COCO-Stuff: "[...] learning rate as 0.0001, weight decay as 0.01, crop size as 520 x 520, batch
# size as 16, and training iterations as 60K by default."
SHORTER = HRFORMER | {"iterations": 60_000, "batch_size": 16, "crop": (520, 520)}
SHORTER["rates"] = {0: 1e-4, 30_000: 1e-6 + 9.9e-5 * 0.5**0.9, 59_999: 1e-6}

CASES = {
    "ade20k_hrvit": Printed(place=("ade20k_segformer", "segmentation"), **ADE20K),
    # "We evaluate HRViT on ADE20K val with SegFormer and UperNet head" (B.2): one setting for both.
    "ade20k_hrvit with UPerNet": Printed(place=("ade20k_upernet", "segmentation"), **ADE20K),
    "cityscapes_hrvit": Printed(
        place=("cityscapes_segformer", "segmentation"),
        batch_size=8,
        crop=(1024, 1024),
        resize=(2048, 1024),
        mode="slide",  # "We do inference on Cityscapes with sliding window test by cropping 1024 x 1024 patches."
        stride=(768, 768),
        **HRVIT,
    ),
    # HIRI-ViT, 5.3: "trained with 160K iterations over 8 V100 GPUs via AdamW optimizer. We utilize the linear learning
    # rate decay scheduler with 1,500 iterations linear warmup for optimization. The batch size, weight decay, and
    # initial learning rate are set as 16, 0.01, and 0.00006." "All the other hyperparameters [...] as in Swin".
    "ade20k_hiri_vit": Printed(
        place=("ade20k_upernet", "doubled_input"),
        model="test_hiri_vit",
        iterations=160_000,
        batch_size=16,
        rates=LINE,
        weight_decay=0.01,
        head_rate=1.0,
        resize=(4096, 1024),
        crop=(1024, 1024),
        scales=tuple(SIX),
        drop_path_rate=0.3,
    ),
    # HiViT, appendix A: "For ADE20K, we employ the UperNet head following BEiT. The AdamW optimizer with a learning
    # rate 4 x 10^-5 to train the model for 80 iterations [80,000] with a batch size 32."
    "ade20k_hivit": Printed(
        place=("ade20k_upernet", "hivit_own"),
        model="test_hivit",
        iterations=80_000,
        batch_size=32,
        rates={0: 0.9 * 4e-8, 1500: 0.9 * 4e-5, 40_750: 0.9 * 2e-5, 79_999: 0.0},
        weight_decay=0.05,
        head_rate=1 / 0.9,
        resize=(2560, 640),
        crop=(640, 640),
        mode="slide",
        stride=(426, 426),
        layer_decay=0.9,
        drop_path_rate=0.1,
    ),
    "cityscapes_hrformer": Printed(
        place=("cityscapes_ocr", "segmentation"),
        iterations=80_000,
        batch_size=8,
        rates={0: 1e-4, 40_000: 1e-6 + 9.9e-5 * 0.5**0.9, 79_999: 1e-6},
        crop=(512, 1024),
        resize=(2048, 1024),
        **HRFORMER,
    ),
    "pascal_context_hrformer": Printed(place=("pascal_context_ocr", "segmentation"), resize=(520, 520), **SHORTER),
    "coco_stuff_hrformer": Printed(place=("coco_stuff_ocr", "segmentation"), resize=(2080, 520), **SHORTER),
}
EVERY = pytest.mark.parametrize("printed", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmseg")


def first_job(printed: Printed) -> Job:
    """A training of the recipe, as the suite plans it."""
    return planned(*printed.place)


@cache
def planned(suite: str, name: str) -> Job:
    benchmark = configuration(f"suite={suite}").suite.benchmarks[name]
    config = configuration(f"suite={suite}", f"models=[{next(iter(benchmark.models))}]")
    for other in set(config.suite.benchmarks) - {name}:
        del config.suite.benchmarks[other]
    return next(job for job in make_jobs(config) if job.stage == "train")


def miniature(job: Job, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    expect(monkeypatch, job.data, training_count=1, validation_count=1)
    return make(job.data, root, training=1, validation=1).folder


def test_every_recipe_is_here():
    assert {name.split()[0] for name in CASES} == set(RECIPES)


@EVERY
def test_numbers(printed):
    job = first_job(printed)
    recipe = job.recipe
    assert (recipe.iterations, recipe.batch_size) == (printed.iterations, printed.batch_size)
    assert job.input_size == printed.crop
    assert recipe.optimizer == "adamw"
    assert recipe.layer_decay == printed.layer_decay
    assert recipe.clip_gradient_norm is recipe.clip_gradient_value is None  # no paper clips a segmentation's gradients
    if printed.drop_path_rate is not None:
        assert recipe.drop_path_rate == printed.drop_path_rate


@EVERY
def test_learning_rate_and_decay_of_each_parameter(printed):
    """At the given steps, of all steps that mmengine's schedulers take, for a small model of the family."""
    job = first_job(printed)
    width = {"channels": 8} | ({"ocr_channels": 8} if job.head == "ocr" else {})
    small = {"model": printed.model, "model_config": {}, "input_size": (64, 64), "head_config": width}
    model = segmentation.build_model(dataclasses.replace(job, **small))
    optimizer = build_optimizer(job, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    norms = {
        id(parameter)
        for module in model.modules()
        if "Norm" in type(module).__name__
        for parameter in module.parameters(recurse=False)
    }
    assert norms
    for name, parameter in named.items():
        # "We set the weight decay rate for BatchNorm layers to 0" (HRViT, A.2); biases and positions as timm has it.
        free = id(parameter) in norms or name.endswith(("bias", "relative_position_bias_table", "absolute_pos_embed"))
        assert groups[id(parameter)]["weight_decay"] == (0.0 if free else printed.weight_decay), name

    in_head = [id(p) for name, p in named.items() if name.startswith(("decode_head.", "auxiliary_head."))]
    assert in_head
    in_backbone = {id(p) for name, p in named.items() if name.startswith("backbone.")}
    assert len(in_head) + len(in_backbone) == len(named)
    wrapper = OptimWrapper(optimizer)
    schedulers = [PARAM_SCHEDULERS.build({**settings, "optimizer": wrapper}) for settings in param_scheduler(job)]
    found = {}
    for step in range(printed.iterations):
        if step in printed.rates:
            rates = [groups[key]["lr"] for key in in_backbone]
            found[step] = max(rates)
            if printed.layer_decay is None:
                assert min(rates) == max(rates)
            heads = [groups[key]["lr"] for key in in_head]
            assert min(heads) == max(heads) == pytest.approx(max(rates) * printed.head_rate, rel=1e-4)
        for scheduler in schedulers:
            scheduler.step()
    assert found == pytest.approx(printed.rates, rel=2e-3, abs=1e-15)


def test_layers_learn_the_slower_the_deeper_they_lie():
    """HiViT's fine-tuning: 0.9 per layer, from the head (1) down to the stem."""
    job = first_job(CASES["ade20k_hivit"])
    small = {"model": "test_hivit", "model_config": {}, "input_size": (64, 64), "head_config": {"channels": 8}}
    model = segmentation.build_model(dataclasses.replace(job, **small))
    rates = {id(p): group["lr"] for group in build_optimizer(job, model).param_groups for p in group["params"]}
    blocks = len(model.backbone.network.model.blocks)
    expected = {f"backbone.network.model.blocks.{i}.": 0.9 ** (blocks - i) for i in range(blocks)}
    expected |= {"decode_head.": 1.0, "auxiliary_head.": 1.0}
    for name, parameter in model.named_parameters():
        rate = next((rate for prefix, rate in expected.items() if name.startswith(prefix)), 0.9 ** (blocks + 1))
        assert rates[id(parameter)] == pytest.approx(4e-5 * rate), name


def settings(dataset: BaseSegDataset) -> list[tuple[str, dict[str, Any]]]:
    """The transforms with their plain arguments."""
    plain = (int, float, str, tuple, list, type(None))
    return [
        (
            type(step).__name__,
            {
                name: value
                for name, value in vars(step).items()
                if isinstance(value, plain) and not name.startswith("_")
            },
        )
        for step in dataset.pipeline.transforms
    ]


@EVERY
def test_augmentation(printed, tmp_path, monkeypatch):
    """HRViT, A.2: "we use random horizontal flipping, random re-scaling within the ratio range of [0.5, 2.0], and
    random photometric distortion"; HIRI-ViT, 5.3: the same words."""
    job = first_job(printed)
    steps = settings(segmentation.training_data(job, miniature(job, tmp_path, monkeypatch)))
    assert [name for name, _ in steps] == [
        "LoadImage",
        "LoadLabels",
        "RandomResize",
        "RandomCrop",
        "RandomFlip",
        "PhotoMetricDistortion",
        "PackSegInputs",
    ]
    arguments = dict(steps)
    assert arguments["RandomResize"]["scale"] == printed.resize
    assert arguments["RandomResize"]["ratio_range"] == (0.5, 2.0)
    assert arguments["RandomCrop"] == {"crop_size": printed.crop, "cat_max_ratio": 0.75, "ignore_index": 255}
    assert arguments["RandomFlip"]["prob"] == 0.5
    assert arguments["RandomFlip"]["direction"] == "horizontal"
    distortion = arguments["PhotoMetricDistortion"]  # of mmsegmentation, which all of the papers use
    assert distortion == {
        "brightness_delta": 32,
        "contrast_lower": 0.5,
        "contrast_upper": 1.5,
        "saturation_lower": 0.5,
        "saturation_upper": 1.5,
        "hue_delta": 18,
    }


@EVERY
def test_evaluation(printed, tmp_path, monkeypatch):
    """Sizes, windows, scales and flips."""
    job = first_job(printed)
    folder = miniature(job, tmp_path, monkeypatch)
    steps = settings(segmentation.evaluation_data(job, folder))
    assert [name for name, _ in steps] == ["LoadImage", "Resize", "LoadLabels", "PackSegInputs"]
    assert dict(steps)["Resize"]["scale"] == printed.resize
    assert dict(steps)["Resize"]["keep_ratio"] is True
    with torch.device("meta"):
        test = segmentation.build_model(dataclasses.replace(job, stage="evaluate")).test_cfg
    assert test["mode"] == printed.mode
    if printed.mode == "slide":
        assert test["crop_size"] == printed.crop  # windows of the training's size
        assert test["stride"] == printed.stride
    assert tuple(job.recipe.evaluation.get("scales", ())) == printed.scales
    if not printed.scales:
        return
    several = segmentation.evaluation_data(job, folder, list(printed.scales)).pipeline.transforms
    assert [type(step).__name__ for step in several] == ["LoadImage", "TestTimeAug"]
    ways = [[*way.transforms] for way in several[1].subroutines]
    width, height = printed.resize
    assert [(way[0].scale, way[1].prob) for way in ways] == [
        ((round(width * scale), round(height * scale)), flip) for scale in SIX for flip in (0.0, 1.0)
    ]


HRVIT_ADE20K = {"hrvit_b1": 0.1, "hrvit_b2": 0.1, "hrvit_b3": 0.25}
HRVIT_CITYSCAPES = {"hrvit_b1": 0.15, "hrvit_b2": 0.15, "hrvit_b3": 0.25}
HRFORMER_ALL = {"hrformer_tiny": 0.2, "hrformer_small": 0.2, "hrformer_base": 0.2}
HIVIT_ALL = {"hivit_tiny": 0.1, "hivit_small": 0.1, "hivit_base": 0.1}
CSWIN_ALL = {"cswin_nano": None, "cswin_tiny": 0.3, "cswin_small": 0.4}
WINDOWS = ("7", "9", "11", "13", "15_13_11_9", "21_17_13_9", "17_15_13_11")


@pytest.mark.parametrize(
    ("suite", "rates"),
    [
        # HRViT, A.2: "On ADE20K, the stochastic drop path rates are set to 0.1, 0.1, 0.25 for HRViT-b1, HRViT-b2, and
        # HRViT-b3, respectively. On Cityscapes, [...] 0.15, 0.15, 0.25".
        # HRFormer's published segmentation code: 0.2, and 0.4 for B on Cityscapes with OCR.
        # The others' sources stand in the suites; None is the model's own.
        (
            "ade20k_segformer",
            HRVIT_ADE20K
            | HRFORMER_ALL
            | HIVIT_ALL
            | CSWIN_ALL
            | {"swin_tiny": 0.3, **dict.fromkeys(("hiri_vit_small", "hiri_vit_base"))}
            | dict.fromkeys(f"mit_b{size}" for size in range(5)),
        ),
        (
            "ade20k_upernet",
            HRVIT_ADE20K
            | HRFORMER_ALL
            | HIVIT_ALL
            | CSWIN_ALL
            | {"hivit_large": 0.1, "swin_tiny": 0.3, "swin_small": 0.3, "swin_base": 0.3}
            | {"twins_svt_small": 0.2, "twins_svt_base": 0.2}
            | dict.fromkeys(("davit_tiny", "davit_small", "resnet50", "resnet101", "convnextv2_base"))
            | {"hiri_vit_small": 0.3, "hiri_vit_base": 0.3, "hiri_vit_large": 0.3},
        ),
        (
            "cityscapes_segformer",
            HRVIT_CITYSCAPES
            | HRFORMER_ALL
            | HIVIT_ALL
            | CSWIN_ALL
            | dict.fromkeys(("hiri_vit_small", "hiri_vit_base", *(f"mit_b{size}" for size in range(5)))),
        ),
        ("cityscapes_ocr", HRVIT_CITYSCAPES | HRFORMER_ALL | {"hrformer_base": 0.4, "hrnet_w48": None}),
        (
            "pascal_context_ocr",
            HRFORMER_ALL | {f"hrformer_base_{window}": 0.2 for window in WINDOWS} | {"hrnet_w48": None},
        ),
        ("coco_stuff_ocr", {"hrformer_small": 0.2, "hrformer_base": 0.2, "hrnet_w48": None}),
    ],
)
def test_drop_path_is_each_models(suite, rates):
    assert {job.label: job.recipe.drop_path_rate for job in trainings(suite)} == rates


@cache
def trainings(suite: str) -> list[Job]:
    return [job for job in make_jobs(configuration(f"suite={suite}")) if job.stage == "train"]


def test_drop_path_reaches_every_model():
    """Each backbone, as it is built for training, with each rate that a suite has for it."""
    suites = {printed.place[0] for printed in CASES.values()}
    jobs = {(job.model, job.recipe.drop_path_rate): job for suite in suites for job in trainings(suite)}
    for (name, rate), job in jobs.items():
        if rate is not None:
            with torch.device("meta"):
                backbone = segmentation.build_model(dataclasses.replace(job, head=BARE))
            dropped = [module.drop_prob for module in backbone.modules() if type(module).__name__ == "DropPath"]
            assert max(dropped) == pytest.approx(rate), name


def test_hivits_upernet_is_as_wide_as_its_network():
    """ "Following BEiT": 768 channels for BEiT-B, 1,024 for BEiT-L, in mmsegmentation; HiViT-B has 512."""
    with torch.device("meta"):
        model = segmentation.build_model(first_job(CASES["ade20k_hivit"]))
    assert model.decode_head.channels == model.backbone.channels[-1] == 512


def test_ocr_keeps_the_published_head():
    """A crop of 512 x 1024 is height x width: the wider side is the street's."""
    job = first_job(CASES["cityscapes_hrformer"])
    with torch.device("meta"):
        model = segmentation.build_model(job)
    assert any(isinstance(module, BiasedConv2d) for module in model.modules())
    assert model.data_preprocessor.size == (512, 1024)
    assert data.describe(job.data).num_classes == 19
