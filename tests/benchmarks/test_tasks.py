"""Both tasks are built of timm's and mmsegmentation's parts with the recipe's numbers."""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from mmengine.registry import init_default_scope
from mmseg.datasets import ADE20KDataset
from mmseg.models import EncoderDecoder
from mmseg.structures import SegDataSample
from omegaconf import OmegaConf

import zoo
from benchmarks import classification, segmentation
from benchmarks.cost import count
from benchmarks.engine import Context
from benchmarks.job import Job, Recipe
from benchmarks.measure import measure
from benchmarks.optimizer import build_optimizer
from runners.config import Config, register
from runners.plan import make_jobs
from runners.run import CONF

SUITES = sorted(path.stem for path in (CONF / "suite").glob("*.yaml"))


@cache
def configuration(suite: str) -> Config:
    register()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return OmegaConf.to_object(compose("config", [f"suite={suite}"]))


def jobs(suite: str, stage: str = "train") -> list[Job]:
    return [job for job in make_jobs(configuration(suite)) if job.stage == stage]


def different() -> list[Job]:
    """A job for each network that any suite names, whatever its size and number of classes."""
    found: dict[str, Job] = {}
    for job in (job for suite in SUITES for job in jobs(suite, "cost")):
        content = [job.task, job.model, job.model_config, job.head, job.head_config]
        found.setdefault(json.dumps(content, sort_keys=True), job)
    return list(found.values())


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmseg")


@pytest.mark.parametrize("job", different(), ids=lambda job: job.key)
def test_every_network_of_every_suite_builds(job):
    """Without weights; the maps fit the head, and the logits the classes."""
    if job.task == "classification":
        with torch.device("meta"):
            model = classification.build_model(job).eval()  # at its own size: some take no other
        assert model.num_classes == job.num_classes
        if max(job.input_size) <= 64:
            assert model(torch.zeros(1, 3, *job.input_size, device="meta")).shape == (1, job.num_classes)
        return
    images = torch.zeros(1, 3, 64, 64, device="meta")
    with torch.device("meta"):
        model = segmentation.build_model(dataclasses.replace(job, input_size=(64, 64))).eval()
    backbone = model if job.head == "bare" else model.backbone
    sides = [64 // reduction for reduction in backbone.network.feature_info.reduction()]
    if job.head == "bare":
        assert [m.shape for m in model(images)] == [
            (1, channels, side, side) for channels, side in zip(model.channels, sides, strict=True)
        ]
    else:
        assert isinstance(model, EncoderDecoder)
        assert model(images).shape == (1, job.num_classes, sides[0], sides[0])


@pytest.mark.parametrize("suite", ["demo", "ade20k_segformer"])
def test_every_suite_has_all_four_families(suite):
    families = {zoo.family(job.model) for job in jobs(suite)}
    assert families >= {"HRViT", "HRFormer", "HiViT", "HIRI-ViT"}


@pytest.mark.parametrize(
    ("label", "params", "head_gmacs"),
    [
        # Counts of the published segmentors, 150 classes, 512 x 512; the head's MACs are whole less backbone.
        ("hrvit_b1", 8_183_118, 15.7611 - 10.5854),
        ("hrvit_b2", 20_809_782, 30.1379 - 24.8237),
        ("hrvit_b3", 28_724_494, 70.4488 - 28.3967),
    ],
)
def test_hrvit_with_the_segformer_head_counts_as_published(label, params, head_gmacs):
    (job,) = (job for job in jobs("ade20k_segformer") if job.label == label)
    with torch.device("meta"):
        model = segmentation.build_model(job)
    whole, backbone = (count(part, (3, 512, 512)) for part in (model, model.backbone))
    # The published head projects each map with a bias; mmsegmentation's with a norm, which has two values per channel.
    assert whole.params == params + 4 * model.decode_head.channels
    assert (whole.macs - backbone.macs) / 1e9 == pytest.approx(head_gmacs, rel=1e-3)


OWN_SIZE = [
    *jobs("ade20k_segformer", "evaluate"),
    *(job for job in jobs("ade20k_upernet", "evaluate") if job.label in ("hivit_tiny", "twins_svt_small", "resnet50")),
    *(job for job in jobs("pascal_context_ocr", "evaluate") if job.label == "hrformer_tiny"),
]


@pytest.mark.parametrize("job", OWN_SIZE, ids=lambda job: f"{job.label}-{job.head}")
def test_images_are_segmented_at_their_own_size(job):
    """ADE20K's validation images are not square, nor a multiple of anything."""
    model = segmentation.build_model(dataclasses.replace(job, input_size=(64, 64))).eval()
    image = torch.randint(0, 256, (3, 71, 101), dtype=torch.uint8)
    sample = SegDataSample(metainfo={"img_shape": (71, 101), "ori_shape": (71, 101)})
    with torch.no_grad():
        (predicted,) = model.test_step({"inputs": [image], "data_samples": [sample]})
    assert predicted.pred_sem_seg.data.shape == (1, 71, 101)


def test_ade20k_recipe_is_that_of_the_paper():
    """HRViT, supplementary material A.2."""
    job = next(job for job in jobs("ade20k_segformer") if job.label == "mit_b0")
    recipe = job.recipe
    assert (recipe.iterations, recipe.batch_size, recipe.warmup_iterations) == (160_000, 16, 1500)
    assert (recipe.optimizer, recipe.learning_rate, recipe.weight_decay) == ("adamw", 6e-5, 0.01)
    model = segmentation.build_model(job)
    optimizer = build_optimizer(job, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(6e-4 if name.startswith("decode_head") else 6e-5)
        assert decays[id(parameter)] == (0.0 if parameter.ndim <= 1 else 0.01), name


@pytest.mark.parametrize(
    ("suite", "benchmark", "size", "expected"),
    [
        # HRViT A.1 and HIRI-ViT 4.1: 300 epochs; HRViT A.2; HIRI-ViT 4.3; HRFormer 4.2.
        ("imagenet_classification", "classification", (224, 224), (300 * 1251, 1024, 1e-3, 0.05, 20 * 1251, 1.0)),
        ("cityscapes_segformer", "segmentation", (1024, 1024), (160_000, 8, 6e-5, 0.01, 1500, 10.0)),
        ("ade20k_upernet", "segmentation", (512, 512), (160_000, 16, 6e-5, 0.01, 1500, 10.0)),
        ("ade20k_upernet", "doubled_input", (1024, 1024), (160_000, 16, 6e-5, 0.01, 1500, 1.0)),
        ("cityscapes_ocr", "segmentation", (512, 1024), (80_000, 8, 1e-4, 0.01, 0, 1.0)),
        ("pascal_context_ocr", "segmentation", (520, 520), (60_000, 16, 1e-4, 0.01, 0, 1.0)),
        ("coco_stuff_ocr", "segmentation", (520, 520), (60_000, 16, 1e-4, 0.01, 0, 1.0)),
    ],
)
def test_recipes_are_those_of_the_papers(suite, benchmark, size, expected):
    chosen = configuration(suite).suite.benchmarks[benchmark]
    recipe = chosen.recipe
    assert tuple(chosen.input_size) == size
    assert expected == (
        recipe.iterations,
        recipe.batch_size,
        recipe.learning_rate,
        recipe.weight_decay,
        recipe.warmup_iterations,
        recipe.head_learning_rate_multiplier,
    )
    assert recipe.optimizer == "adamw"


def test_positions_are_not_decayed():
    job = next(job for job in jobs("demo") if job.label == "hivit_tiny" and job.task == "segmentation")
    model = segmentation.build_model(job)
    decays = {
        id(p): group["weight_decay"] for group in build_optimizer(job, model).param_groups for p in group["params"]
    }
    free = [name for name, p in model.named_parameters() if p.ndim > 1 and decays[id(p)] == 0.0]
    assert any("absolute_pos" in name or "pos_embed" in name for name in free)


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory) -> Path:
    """Three images and labels in ADE20K's published layout, of different sizes."""
    root = tmp_path_factory.mktemp("ade") / "ADEChallengeData2016"
    dice = np.random.default_rng(0)
    for split in ("training", "validation"):
        for index, (height, width) in enumerate([(90, 120), (150, 100), (64, 64)]):
            for kind in ("images", "annotations"):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            image = dice.integers(0, 256, (height, width, 3), dtype=np.uint8)
            labels = dice.integers(0, 151, (height, width), dtype=np.uint8)
            cv2.imwrite(root / "images" / split / f"ADE_{index}.jpg", image)
            cv2.imwrite(root / "annotations" / split / f"ADE_{index}.png", labels)
    return root


def test_ade20k_in_miniature(ade20k, tmp_path, monkeypatch):
    """The suite's own recipe, shortened, trains and evaluates on data in ADE20K's layout."""
    job = next(job for job in jobs("ade20k_segformer") if job.label == "mit_b0")
    recipe = dataclasses.replace(job.recipe, iterations=3, warmup_iterations=1, batch_size=2, workers=0)
    recipe.augmentation = {**recipe.augmentation, "resize": [128, 64]}
    recipe.evaluation = {**recipe.evaluation, "resize": [128, 64]}
    job = dataclasses.replace(job, model="test_mit", label="test_mit", input_size=(64, 64), recipe=recipe)

    dataset = segmentation._dataset(job, ade20k, training=False)
    assert isinstance(dataset, ADE20KDataset)
    raw = cv2.imread(ade20k / "annotations" / "validation" / "ADE_0.png", cv2.IMREAD_UNCHANGED)
    labels = dataset[0]["data_samples"].gt_sem_seg.data[0].numpy()
    assert labels.shape == raw.shape  # metrics are computed at the labels' own size
    assert np.array_equal(labels, np.where(raw == 0, 255, raw - 1))  # 0 is "no class", the classes are 1 to 150
    train = segmentation._dataset(job, ade20k, training=True)
    assert train[0]["inputs"].shape == (3, 64, 64) or max(train[0]["inputs"].shape) <= 64

    monkeypatch.setattr(segmentation.data, "prepare", lambda *arguments: ade20k)
    context = Context(tmp_path, ade20k.parent)
    trained = measure(job, context)
    evaluated = measure(dataclasses.replace(job, stage="evaluate", depends_on=(job.key,)), context, trained.artifacts)
    assert 0 <= evaluated.metrics["mIoU"] <= 100
    most = np.bincount(
        np.concatenate(
            [
                cv2.imread(path, cv2.IMREAD_UNCHANGED).ravel()
                for path in (ade20k / "annotations" / "validation").glob("*.png")
            ]
        ),
        minlength=151,
    )[1:]
    expected = 100 * most.max() / most.sum() / np.count_nonzero(most)
    assert evaluated.metrics["baseline_mIoU"] == pytest.approx(expected)


def write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(path, values)


@pytest.mark.parametrize(
    ("suite", "image", "label", "lists", "void", "shift"),
    [
        (
            "cityscapes_ocr",
            "leftImg8bit/{split}/ulm/ulm_{n}_leftImg8bit.png",
            "gtFine/{split}/ulm/ulm_{n}_gtFine_labelTrainIds.png",
            None,
            255,
            0,
        ),
        (
            "pascal_context_ocr",
            "JPEGImages/{split}_{n}.jpg",
            "SegmentationClassContext/{split}_{n}.png",
            "ImageSets/SegmentationContext/{split}.txt",
            0,
            1,
        ),
        ("coco_stuff_ocr", "images/{split}/{n}.jpg", "annotations/{split}/{n}_labelTrainIds.png", None, 0, 1),
    ],
)
def test_published_layouts_are_read(suite, image, label, lists, void, shift, tmp_path):
    """Each split has its own images; labels are the classes' numbers, and 255 where there is none."""
    job = next(job for job in jobs(suite) if job.label == "hrformer_base")
    described = segmentation.data.describe(job.data)
    dice = np.random.default_rng(0)
    for split, number in ((described.training, 3), (described.validation, 2)):
        for n in range(number):
            names = {"split": split, "n": n}
            write(tmp_path / image.format(**names), dice.integers(0, 256, (60, 90, 3), dtype=np.uint8))
            labels = dice.integers(shift, described.num_classes + shift, (60, 90), dtype=np.uint8)
            labels[:5] = void
            write(tmp_path / label.format(**names), labels)
        if lists:
            path = tmp_path / lists.format(split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{split}_{n}\n" for n in range(number)))
    train, validation = (segmentation._dataset(job, tmp_path, training) for training in (True, False))
    assert (len(train), len(validation)) == (3, 2)
    assert train[0]["data_samples"].gt_sem_seg.data.shape[0] == 1
    found = validation[1]["data_samples"].gt_sem_seg.data[0].numpy()
    assert (found == 255).sum() == 5 * 90
    assert np.array_equal(found[5:], labels[5:] - shift)
    assert len(validation.metainfo["classes"]) == job.num_classes


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_learning_rate_over_the_training(schedule, tmp_path):
    """Linear warm-up, then the schedule, at the steps where it can be said by hand."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import PARAM_SCHEDULERS

    from benchmarks.engine import param_scheduler

    job = jobs("demo")[0]
    recipe = dataclasses.replace(
        job.recipe, iterations=110, warmup_iterations=10, schedule=schedule, minimum_learning_rate=0.0
    )
    job = dataclasses.replace(job, recipe=recipe)
    model = torch.nn.Linear(1, 1)
    wrapper = build_optim_wrapper(model, {"optimizer": {"type": "SGD", "lr": 1.0}})
    schedulers = [PARAM_SCHEDULERS.build({**s, "optimizer": wrapper}) for s in param_scheduler(job)]
    rates = []
    for _ in range(110):
        rates.append(wrapper.optimizer.param_groups[0]["lr"])
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(1e-3)
    assert rates[9] == pytest.approx(1.0, abs=0.01)
    assert rates[60] == pytest.approx(0.5, abs=0.02)
    assert rates[-1] < 0.02
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(rates[10:]))


def test_classifier_metrics():
    metric = classification.TopK()
    scores = torch.tensor([[0.1, 0.9, 0, 0, 0, 0, 0], [6.0, 5, 4, 3, 2, 1, 0]])
    metric.process(None, [{"scores": scores[0], "label": 1}, {"scores": scores[1], "label": 4}])
    assert metric.compute_metrics(metric.results) == {"top1": 50.0, "top5": 100.0}
    few = classification.TopK()
    few.process(None, [{"scores": torch.tensor([1.0, 0.0]), "label": 1}])  # fewer than five classes
    assert few.compute_metrics(few.results) == {"top1": 0.0, "top5": 100.0}
    assert Recipe().label_smoothing == 0.0
