"""Both tasks are built of timm's and mmsegmentation's parts with the recipe's numbers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from mmengine.registry import init_default_scope
from mmseg.models import EncoderDecoder
from mmseg.structures import SegDataSample
from omegaconf import OmegaConf

import zoo
from benchmarks import classification, segmentation
from benchmarks.cost import count
from benchmarks.job import Job, Recipe
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


def first_of_each_family(chosen: Iterable[Job]) -> list[Job]:
    """One job for each head on each family: the others differ in numbers alone."""
    found: dict[tuple, Job] = {}
    for job in chosen:
        found.setdefault((job.task, job.head, zoo.family(job.model)), job)
    return list(found.values())


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmseg")


EVERY_SUITE = first_of_each_family(job for suite in SUITES for job in jobs(suite, "cost"))


@pytest.mark.parametrize("job", EVERY_SUITE, ids=lambda job: job.key)
def test_every_family_of_every_suite_builds(job):
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


@pytest.mark.parametrize("suite", [s for s in SUITES if not (s.endswith("_ocr") or s.startswith("ablation_"))])
def test_every_suite_that_compares_has_all_four_families(suite):
    families = {zoo.family(job.model) for job in jobs(suite, "cost")}
    assert families >= {"HRViT", "HRFormer", "HiViT", "HIRI-ViT"}


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_the_demo_trains_all_four_families_in_both_tasks(task):
    families = {zoo.family(job.model) for job in jobs("demo", "train") if job.task == task}
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


OWN_SIZE = first_of_each_family(
    job
    for suite in ("ade20k_segformer", "ade20k_upernet", "pascal_context_ocr")
    for job in jobs(suite, "evaluate")
    if job.head == "segformer" or job.label in ("hivit_tiny", "resnet50", "hrformer_tiny")
)


@pytest.mark.parametrize("job", OWN_SIZE, ids=lambda job: f"{job.label}-{job.head}")
def test_images_are_segmented_at_their_own_size(job):
    """ADE20K's validation images are not square, nor a multiple of anything."""
    model = segmentation.build_model(dataclasses.replace(job, input_size=(64, 64))).eval()
    image = torch.randint(0, 256, (3, 71, 101), dtype=torch.uint8)
    sample = SegDataSample(metainfo={"img_shape": (71, 101), "ori_shape": (71, 101)})
    with torch.no_grad():
        (predicted,) = model.test_step({"inputs": [image], "data_samples": [sample]})
    assert predicted.pred_sem_seg.data.shape == (1, 71, 101)


def test_positions_are_not_decayed():
    job = next(job for job in jobs("ade20k_segformer") if job.label == "hivit_tiny")
    model = segmentation.build_model(job)
    decays = {
        id(p): group["weight_decay"] for group in build_optimizer(job, model).param_groups for p in group["params"]
    }
    free = [name for name, p in model.named_parameters() if p.ndim > 1 and decays[id(p)] == 0.0]
    assert any("absolute_pos" in name or "pos_embed" in name for name in free)


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
