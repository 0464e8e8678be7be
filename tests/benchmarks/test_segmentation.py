"""Segmentation on the published datasets in miniature: trainings, and scores against an independent computation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from miniatures import PUBLISHED, VOID, Miniature, expect, make
from mmengine.registry import init_default_scope
from safetensors.torch import save_file
from torch.nn.functional import interpolate, pad

import zoo
from benchmarks import data, segmentation
from benchmarks.engine import Context
from benchmarks.errors import Blocked, InputError
from benchmarks.job import Job, Recipe
from benchmarks.measure import measure


@pytest.fixture(autouse=True)
def process_of_a_job():
    """One thread, for small images, and mmengine's registry of mmsegmentation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    init_default_scope("mmseg")
    yield
    torch.set_num_threads(before)


MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


def make_job(name: str, evaluation: dict[str, Any], **changes: Any) -> Job:
    recipe = Recipe(evaluation=evaluation, iterations=2, batch_size=2, warmup_iterations=0)
    job = Job(
        stage="evaluate",
        task="segmentation",
        label="test_mit",
        model="test_mit",
        input_size=(64, 64),
        num_classes=data.describe(name).num_classes,
        head="segformer",
        head_config={"channels": 8},
        data=name,
        recipe=recipe,
        depends_on=("training",),
    )
    return dataclasses.replace(job, **changes)


def probabilities(model: torch.nn.Module, image: np.ndarray, evaluation: dict[str, Any]) -> np.ndarray:
    """What `model` says of one image (H, W, BGR) at one scale: softmax (classes, H, W), computed here step by step."""
    height, width = image.shape[:2]
    long, short = evaluation["resize"]
    factor = min(long / max(height, width), short / min(height, width))
    size = (int(width * factor + 0.5), int(height * factor + 0.5))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    pixels = torch.from_numpy(((resized[..., ::-1] - MEAN) / STD).astype(np.float32)).permute(2, 0, 1)[None]
    divisor = evaluation.get("size_divisor", 1)
    down, right = (-side % divisor for side in pixels.shape[2:])
    padded = pad(pixels, (0, right, 0, down))
    if evaluation["mode"] == "whole":
        logits = run(model, padded)
    else:
        window, (step_down, step_right) = 64, evaluation["stride"]
        logits, seen = torch.zeros(1, model.num_classes, *padded.shape[2:]), torch.zeros(1, 1, *padded.shape[2:])
        for top in starts(padded.shape[2], window, step_down):
            for left in starts(padded.shape[3], window, step_right):
                here = np.s_[:, :, top : top + window, left : left + window]
                logits[here] += run(model, padded[here])
                seen[here] += 1
        logits = logits / seen
    logits = logits[:, :, : pixels.shape[2], : pixels.shape[3]]
    return interpolate(logits, (height, width), mode="bilinear").softmax(1)[0].numpy()


def starts(side: int, window: int, step: int) -> list[int]:
    """Where windows begin: every `step`, the last one moved back to end with the image."""
    if side <= window:
        return [0]
    return [*range(0, side - window, step), side - window]


def run(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return interpolate(model.decode_head(model.backbone(pixels)), pixels.shape[2:], mode="bilinear")


def mean_iou(predicted: list[np.ndarray], labels: list[np.ndarray], classes: int) -> float:
    """In percent, from the confusion matrix; classes that are neither labelled nor predicted do not count."""
    confusion = np.zeros((classes, classes), dtype=np.int64)
    for guess, truth in zip(predicted, labels, strict=True):
        np.add.at(confusion, (truth[truth != VOID], guess[truth != VOID]), 1)
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return 100 * float(np.mean(hits[union > 0] / union[union > 0]))


def bold_model(job: Job, seed: int) -> torch.nn.Module:
    """Random weights, large enough that many classes win somewhere."""
    torch.manual_seed(seed)
    model = segmentation.build_model(job).eval()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=3.0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return model


WHOLE = {"resize": [128, 64], "mode": "whole", "size_divisor": 32}
SLIDE = {"resize": [160, 80], "mode": "slide", "stride": [48, 40], "size_divisor": 32}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    "evaluation",
    [WHOLE | {"scales": [0.5, 1.0, 1.75], "flip": True}, SLIDE | {"scales": [0.75, 1.25]}],
    ids=["whole", "slide"],
)
def test_scores_are_those_of_an_independent_computation(name, evaluation, tmp_path, monkeypatch):
    """Whole images, sliding windows, several scales and flips on every dataset's layout and labels."""
    expect(monkeypatch, name, training_count=1, validation_count=2)
    miniature = make(name, tmp_path, training=1, validation=2)
    job = make_job(name, evaluation)
    model = bold_model(job, seed=len(name))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    split = data.describe(name).validation
    images = [cv2.imread(str(path)) for path in miniature.images[split]]

    one, several = [], []
    for image in images:
        one.append(probabilities(model, image, evaluation))
        ways = []
        for scale in evaluation["scales"]:
            scaled = evaluation | {"resize": [side * scale for side in evaluation["resize"]]}
            ways.append(probabilities(model, image, scaled))
            if evaluation.get("flip"):
                ways.append(probabilities(model, image[:, ::-1], scaled)[..., ::-1])
        several.append(np.mean(ways, axis=0))
    guesses = [[maps.argmax(0).astype(np.uint8) for maps in both] for both in (one, several)]
    assert len(np.unique(np.concatenate([guess.ravel() for guess in guesses[0]]))) > 5

    # Labels that both agree with in most places, neither everywhere; every dataset but one has pixels of no class.
    for index, guess in enumerate(guesses[0]):
        classes = guess.copy()
        classes[:20] = np.roll(guess[:20], 7, axis=1)
        classes[20:24] = miniature.drawn[split][index][20:24]
        if name != "pascal_context_60":
            classes[30:36] = VOID
        miniature.draw(split, index, classes)
    labels, classes = miniature.drawn[split], job.num_classes
    expected = [mean_iou(guess, labels, classes) for guess in guesses]
    assert 1 < expected[0] < 99
    assert abs(expected[0] - expected[1]) > 0.05  # several scales see something else

    told: list[float] = []
    context = Context(tmp_path, tmp_path, progress=lambda state: told.append(state["fraction"]))
    outcome = measure(job, context, {"weights": "weights.safetensors"})
    assert outcome.metrics["mIoU"] == pytest.approx(expected[0], abs=0.02)  # both are rounded, and pixels lie on edges
    assert outcome.metrics["mIoU_ms"] == pytest.approx(expected[1], abs=0.02)
    counts = np.bincount(np.concatenate([map_[map_ != VOID] for map_ in labels]), minlength=classes)
    baseline = 100 * counts.max() / counts.sum() / np.count_nonzero(counts)
    assert outcome.metrics["baseline_mIoU"] == pytest.approx(baseline)
    assert outcome.details["images"] == 2
    assert outcome.details["several_scales"] == {"scales": evaluation["scales"], "flip": evaluation.get("flip", False)}
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_one_scale_alone_has_no_score_of_several(tmp_path, monkeypatch):
    expect(monkeypatch, "ade20k", training_count=1, validation_count=1)
    make("ade20k", tmp_path, training=1, validation=1)
    job = make_job("ade20k", WHOLE)
    save_file(bold_model(job, 0).state_dict(), tmp_path / "weights.safetensors")
    outcome = measure(job, Context(tmp_path, tmp_path), {"weights": "weights.safetensors"})
    assert outcome.metrics.keys() == {"mIoU", "mAcc", "aAcc", "baseline_mIoU"}
    assert outcome.details == {"images": 1, "evaluated": "the weights of the last iteration"}


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (WHOLE | {"mode": "slides"}, "recipe.evaluation: unknown mode 'slides'; did you mean slide"),
        (WHOLE | {"scales": [1.0, 0]}, r"recipe.evaluation.scales are \[1.0, 0\]; each must be above 0"),
        (WHOLE | {"mode": "slide"}, "recipe.evaluation: mode slide needs a stride"),
    ],
)
def test_impossible_evaluations_are_one_line(evaluation, message, tmp_path, monkeypatch):
    expect(monkeypatch, "ade20k", training_count=1, validation_count=1)
    make("ade20k", tmp_path, training=1, validation=1)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=message):
        measure(make_job("ade20k", evaluation), Context(tmp_path, tmp_path), {"weights": "weights.safetensors"})


@pytest.fixture
def ade20k(tmp_path, monkeypatch) -> Miniature:
    expect(monkeypatch, "ade20k", training_count=3, validation_count=2)
    return make("ade20k", tmp_path)


AUGMENTATION = {
    "resize": [128, 64],
    "ratio_range": [0.5, 2.0],
    "maximum_class_share": 0.75,
    "flip": 0.5,
    "photometric_distortion": True,
}


@pytest.mark.parametrize("head", ["segformer", "upernet", "ocr"])
def test_ade20k_in_miniature(head, ade20k, tmp_path):
    """The papers' augmentation; every head trains and is evaluated."""
    job = make_job("ade20k", WHOLE, head=head, stage="train", depends_on=())
    job = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, augmentation=AUGMENTATION))
    context = Context(tmp_path / "output", ade20k.root)
    trained = measure(job, context)
    assert np.isfinite(trained.metrics["final_loss"])
    after = dataclasses.replace(job, stage="evaluate", depends_on=(job.key,))
    assert 0 <= measure(after, context, trained.artifacts).metrics["mIoU"] <= 100


def test_augmented_labels_stay_with_their_images(ade20k, tmp_path):
    """Images that show their own labels still do so after rescaling, cropping and flipping."""
    for path, classes in zip(ade20k.images["training"], ade20k.drawn["training"], strict=True):
        blocks = cv2.resize(classes[:4, :4] % 150, classes.shape[::-1], interpolation=cv2.INTER_NEAREST)
        ade20k.draw("training", ade20k.images["training"].index(path), blocks)
        cv2.imwrite(str(path), np.repeat(blocks[..., None], 3, axis=2), [cv2.IMWRITE_JPEG_QUALITY, 100])
    plain = AUGMENTATION | {"photometric_distortion": False, "maximum_class_share": 1.0}
    job = make_job("ade20k", WHOLE, stage="train")
    scenes = segmentation.training_data(
        dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, augmentation=plain)), ade20k.folder
    )
    np.random.seed(0)  # noqa: NPY002 - mmsegmentation's transforms draw from this generator
    sizes = set()
    for draw in range(12):
        sample = scenes[draw % 3]
        labels, image = sample["data_samples"].gt_sem_seg.data[0].numpy(), sample["inputs"][0].numpy()
        sizes.add(labels.shape)
        assert max(labels.shape) <= 64
        assert np.mean(np.abs(labels.astype(int) - image) <= 3) > 0.75  # but at the edges of the blocks
    assert len(sizes) > 1


def test_a_damaged_file_blocks_the_job_in_one_line(ade20k, tmp_path):
    """Whether it is seen before the training, or only when it is read."""
    job = make_job("ade20k", WHOLE, stage="train", depends_on=())
    path: Path = ade20k.labels["training"][1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(Blocked, match=r"1 files in .*training are damaged: ADE_train_00000001\.png"):
        measure(job, Context(tmp_path / "output", ade20k.root))
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])  # its end looks well
    with pytest.raises(Blocked, match=r"^cannot read the labels .*ADE_train_00000001\.png: "):
        measure(job, Context(tmp_path / "output", ade20k.root))


@pytest.mark.parametrize("published", [True, False])
def test_a_backbone_starts_from_weights_of_imagenet(published, ade20k, tmp_path):
    """Those of a published file, or those that a classification here kept: the average where there is one."""
    classifier = zoo.create_model("test_mit", num_classes=10)
    state = classifier.state_dict()
    if published:
        path = tmp_path / "published.pth"
        torch.save({"model": state}, path)
    else:
        path = tmp_path / "weights.safetensors"
        average = {f"ema.module.{name}": value for name, value in state.items()}
        save_file({f"network.{name}": torch.zeros_like(value) for name, value in state.items()} | average, path)
    job = make_job("ade20k", WHOLE, stage="train", depends_on=(), model_config={"checkpoint": str(path)})
    backbone = segmentation.build_model(job).backbone.network.model.state_dict()
    assert backbone
    assert all(torch.equal(value, state[name]) for name, value in backbone.items() if name in state)
    outcome = measure(job, Context(tmp_path / "output", ade20k.root))
    assert outcome.notes == [f"the backbone started from {path}"]
