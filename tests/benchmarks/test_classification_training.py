"""Mixup, averaged weights, EMA distillation, pretraining, fine-tuning and probing, in miniature."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from training_support import SENSITIVE, curve

import zoo
from benchmarks import distributed
from benchmarks.classification import Averaging, Classifier, Mixing, start_from
from benchmarks.distillation import distilled_targets, probability_maps
from benchmarks.engine import Context
from benchmarks.errors import InputError
from benchmarks.job import Engine, Job, Recipe
from benchmarks.measure import measure
from benchmarks.optimizer import build_optimizer
from results.ledger import Ledger
from results.rows import join
from runners.config import Benchmark, Config, ModelEntry, Suite
from runners.execute import Workplace, run_job
from runners.plan import make_jobs

MIXUP = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
DATA = {"train": 40, "validation": 20}
SHORT = {
    "iterations": 8,
    "batch_size": 4,
    "warmup_iterations": 2,
    "checkpoint_every": 3,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "drop_path_rate": 0.2,
    "augmentation": {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5},
}
DISTILLED = {"mixup": MIXUP, "label_smoothing": 0.1, "ema": {"decay": 0.9}, "distillation_alpha": 0.5}


def job(model: str, stage: str = "train", side: int = 64, data: dict | None = None, **recipe) -> Job:
    return Job(
        stage=stage,
        task="classification",
        label=model,
        model=model,
        input_size=(side, side),
        num_classes=10,
        data="digit_scenes_classification",
        data_version=1,
        data_options=data or DATA,
        recipe=Recipe(**SHORT | recipe),
    )


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def mixed(number: int, mixup: dict = MIXUP, images: torch.Tensor | None = None) -> list[torch.Tensor]:
    images = torch.rand(6, 3, 16, 16) if images is None else images
    mixing = Mixing(Mixup(num_classes=10, label_smoothing=0.0, **mixup), with_mask=True)
    MessageHub.get_current_instance().update_info("iter", number)
    return mixing([images, torch.arange(6)], training=True)


@pytest.mark.parametrize("mixup", [{"mixup_alpha": 0.8}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_images_and_labels_are_mixed_with_the_mask(mixup, mode):
    """Equation 4: images M x_a + (1 - M) x_b, labels lambda y_a + (1 - lambda) y_b, lambda the mean of M."""
    images = torch.rand(6, 3, 16, 16)
    before = images.clone()
    result, targets, unmixed, mask = mixed(3, mixup | {"mode": mode}, images)
    assert torch.equal(images, before)
    assert torch.equal(unmixed, before)
    assert torch.allclose(result, mask * before + (1 - mask) * before.flip(0), atol=1e-6)
    share = mask.mean((1, 2, 3))
    assert (share < 0.999).any()
    labels = torch.eye(10)[:6]
    assert torch.allclose(targets, share[:, None] * labels + (1 - share[:, None]) * labels.flip(0), atol=1e-6)
    if "cutmix_alpha" in mixup:
        assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_a_mix_depends_on_the_step_alone():
    images = torch.rand(6, 3, 16, 16)
    np.random.seed(1)  # noqa: NPY002
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    masks = [mixed(number, images=images)[3] for number in range(8)]
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    assert all(torch.equal(mask, mixed(number, images=images)[3]) for number, mask in enumerate(masks))
    assert len({mask.mean().item() for mask in masks}) > 4


def test_what_is_evaluated_is_not_mixed():
    images, labels = torch.rand(5, 3, 16, 16), torch.arange(5)
    mixing = Mixing(Mixup(num_classes=10, **MIXUP), with_mask=False)
    assert [torch.equal(a, b) for a, b in zip(mixing([images, labels]), (images, labels), strict=True)] == [True, True]
    with pytest.raises(InputError, match="one has 5; make it even"):
        mixing([images, labels], training=True)


def test_equation_5_on_numbers_made_by_hand():
    """Two images, maps of 2 x 2 positions, two classes; M keeps the left half of the first image's 4 x 4 pixels."""
    first = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.25, 0.75]]])  # rows, columns, classes
    second = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.5, 0.5]]])
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :, :2] = 1
    # P~: the left column of one's own map, the right column of the other's; then the mean of the four positions.
    # First: class 0 of (1, 0.5) and of the other's right column (0, 0.5): 2 / 4.
    # Second: class 0 of (0, 0) and of the first's right column (0, 0.25): 0.25 / 4.
    averaged = torch.tensor([[0.5, 0.5], [0.0625, 0.9375]])
    targets = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    maps = torch.stack([first, second])
    assert torch.allclose(distilled_targets(maps, mask, targets, 0.0), averaged)
    assert torch.allclose(distilled_targets(maps, mask, targets, 1.0), targets)
    combined = torch.tensor([[0.5, 0.5], [0.75 * 0.0625, 0.25 + 0.75 * 0.9375]])
    assert torch.allclose(distilled_targets(maps, mask, targets, 0.25), combined)
    # A mask that cuts positions in two counts in parts: three of four columns kept leave half of the right column.
    mask[:, :, :, 2] = 1
    expected = (1 + 0.5 + (0.0 + 0.0) / 2 + (0.25 + 0.5) / 2) / 4
    assert distilled_targets(maps, mask, targets, 0.0)[0, 0].item() == pytest.approx(expected)
    # Mixup's mask is lambda everywhere: the mix of the two means.
    flat = distilled_targets(maps, torch.full((2, 1, 4, 4), 0.7), targets, 0.0)
    assert torch.allclose(flat[0], 0.7 * first.mean((0, 1)) + 0.3 * second.mean((0, 1)))


def test_the_teacher_speaks_at_every_position():
    network = zoo.create_model("test_hiri_vit", num_classes=7).eval()
    images = torch.rand(2, 3, 128, 192)
    maps = probability_maps(network, images)
    assert maps.shape == (2, 2, 3, 7)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 2, 3))
    assert not maps.requires_grad
    single = probability_maps(network, images[:, :, :64, :64])
    pooled = network(images[:, :, :64, :64]).softmax(-1)  # of one position the mean is the position
    assert torch.allclose(single[:, 0, 0], pooled, atol=1e-6)
    with pytest.raises(InputError, match="distillation_alpha needs a HIRI-ViT, not HiViT"):
        probability_maps(zoo.create_model("test_hivit"), images)


def test_the_target_is_taken_from_the_average_and_from_the_unmixed_images():
    """The loss of a whole step, computed once more with plain formulas."""
    torch.manual_seed(0)
    recipe = Recipe(**SHORT | DISTILLED | {"distillation_alpha": 0.3})
    model = Classifier(zoo.create_model("test_hiri_vit", num_classes=10, drop_path_rate=0.0), recipe).train()
    with torch.no_grad():
        for parameter in model.ema.module.parameters():
            parameter.mul_(1.1)  # a teacher that differs
    data = [torch.rand(4, 3, 64, 64), torch.arange(4)]
    result, targets, unmixed, mask = model.data_preprocessor(data, True)
    loss = model(result, targets, unmixed, mask, mode="loss")["loss"]
    with torch.no_grad():
        said = model.ema.module(data[0]).softmax(-1)  # at 64 pixels the last map has one position
        share = mask.mean((1, 2, 3))[:, None]
        target = 0.3 * targets + 0.7 * (share * said + (1 - share) * said.flip(0))
    expected = -(target * model.network(result).log_softmax(-1)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.ema.parameters())
    assert not model.ema.module.training


class Killed(BaseException):
    """Stands for a kill in the middle of a training: nothing catches it."""


@pytest.mark.parametrize(
    ("model", "stage", "recipe"),
    [
        ("test_hiri_vit", "train", DISTILLED),
        ("test_hivit_mae", "pretrain", {"drop_path_rate": None, "optimizer_options": {"betas": [0.9, 0.95]}}),
    ],
)
def test_an_interrupted_training_ends_in_the_same_bits(model, stage, recipe, data_root, tmp_path):
    """Mixing, averages, teacher and masks included; the interrupted training loads with another number of workers."""

    def kill(state):
        if state["fraction"] > 0.8:  # after the checkpoints of iterations 3 and 6
            raise Killed

    whole = measure(job(model, stage, **recipe), Context(tmp_path / "whole", data_root))
    with pytest.raises(Killed):
        measure(job(model, stage, **recipe, workers=1), Context(tmp_path / "broken", data_root, progress=kill))
    torch.manual_seed(999)  # another process would have another state
    np.random.seed(999)  # noqa: NPY002
    resumed = measure(job(model, stage, **recipe), Context(tmp_path / "broken", data_root))
    assert resumed.details["resumed_from"] == "iter_6.pth"
    assert resumed.details["weights_sha256"] == whole.details["weights_sha256"]
    assert resumed.metrics == whole.metrics


def test_the_average_moves_with_each_step():
    model = Classifier(zoo.create_model("test_hivit", num_classes=10), Recipe(ema={"decay": 0.75}))
    weight, averaged = model.network.head.weight, model.ema.module.head.weight
    found = []
    for iteration, value in enumerate((1.0, 3.0, 4.0)):
        weight.data.fill_(value)
        Averaging().after_train_iter(SimpleNamespace(model=model), iteration)
        found.append(averaged[0, 0].item())
    assert found == pytest.approx([1.0, 0.75 * 1.0 + 0.25 * 3.0, 0.75 * 1.5 + 0.25 * 4.0])  # a copy at first


@pytest.mark.parametrize("engine", [{"accumulate": 2}, {"processes": 2}], ids=str)
def test_mixing_and_averaging_do_not_depend_on_how_a_step_is_shared(engine, data_root, tmp_path, monkeypatch):
    """The same pairs, mixed by the same share, and one move of the average for each step."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(distributed.multiprocessing, "get_context", lambda kind: fork)
    recipe = SENSITIVE | {"mixup": MIXUP, "ema": {"decay": 0.9}, "batch_size": 8}
    found = []
    for name, how in (("whole", Engine()), ("shared", Engine(**engine))):
        context = Context(tmp_path / name, data_root)
        outcome = measure(job("test_hivit", "train", **recipe, engine=how), context)
        found.append((curve(context.output), load_file(context.output / outcome.artifacts["weights"])))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_training_with_distillation_learns_and_its_average_scores(data_root, tmp_path):
    recipe = {"iterations": 70, "batch_size": 8, "learning_rate": 2e-3, "checkpoint_every": 500}
    recipe |= {"augmentation": {"scale": [0.9, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0, "color_jitter": None}}
    recipe |= {"evaluation": {"crop_pct": 1.0}, "drop_path_rate": 0.0}
    trained = job("test_hiri_vit", side=32, data={"train": 300, "validation": 100}, **DISTILLED | recipe)
    context = Context(tmp_path, data_root)
    outcome = measure(trained, context)
    evaluation = dataclasses.replace(trained, stage="evaluate", depends_on=(trained.key,))
    scored = measure(evaluation, context, outcome.artifacts)
    assert scored.metrics["top1"] > scored.metrics["baseline_top1"] + 8
    assert scored.details["evaluated"] == "the moving average of the weights"
    file = tmp_path / outcome.artifacts["weights"]
    state = load_file(file)
    for without, score in (("network.", scored.metrics["top1"]), ("ema.", 10.0)):
        kept = {name: torch.zeros_like(value) if name.startswith(without) else value for name, value in state.items()}
        save_file(kept, file)
        assert measure(evaluation, context, outcome.artifacts).metrics["top1"] == pytest.approx(score)


MAE = Recipe(**SHORT | {"drop_path_rate": None, "augmentation": {"scale": [0.2, 1.0], "color_jitter": None}})
TUNING = Recipe(**SHORT, mixup=MIXUP, layer_decay=0.85)
PROBING = Recipe(**SHORT | {"optimizer": "lars", "weight_decay": 0.0}, linear_probe=True)


def suite(**changes) -> Config:
    """A pretraining, and a fine-tuning and a probe that start from it."""
    settings = {
        "task": "classification",
        "data": "digit_scenes_classification",
        "data_options": DATA,
        "input_size": [64, 64],
        "recipe": Recipe(**SHORT),
        "recipes": {"mae": MAE, "tuning": TUNING, "probing": PROBING},
        "pretraining": {"test_hivit_mae": ModelEntry(recipe="mae")},
        "models": {
            "tuned": ModelEntry(name="test_hivit", recipe="tuning", initialize_from="test_hivit_mae"),
            "probed": ModelEntry(name="test_hivit", recipe="probing", initialize_from="test_hivit_mae"),
        },
    }
    stages = ["pretrain", "train", "evaluate"]
    return Config(suite=Suite("small", title="Small", stages=stages, benchmarks={"a": Benchmark(**settings | changes)}))


def test_pretraining_fine_tuning_and_probing_are_dependent_jobs(data_root, tmp_path):
    jobs = make_jobs(suite())
    assert [(job.stage, job.label) for job in jobs] == [
        ("pretrain", "test_hivit_mae"),
        *(("train", "tuned"), ("train", "probed"), ("evaluate", "tuned"), ("evaluate", "probed")),
    ]
    pretraining, tuning, probing, *evaluations = jobs
    assert tuning.depends_on == probing.depends_on == (pretraining.key,)
    assert [job.depends_on for job in evaluations] == [(tuning.key,), (probing.key,)]
    workplace = Workplace(tmp_path, data_root, "test")
    records = [run_job(job, workplace)[0] for job in jobs]
    assert [(record.status, record.reason) for record in records] == [("done", None)] * 5
    first, tuned, probed = (load_file(tmp_path / record.artifacts["weights"]) for record in records[:3])
    name = "blocks.6.mlp.fc1.weight"
    assert torch.equal(probed[f"network.{name}"], first[f"network.encoder.{name}"])  # never trained
    assert not torch.equal(tuned[f"network.{name}"], first[f"network.encoder.{name}"])
    report = records[1].details["started_from"]["report"]
    assert "2 zeroed" in report  # the relative positions, which pretraining lacks
    assert "4 missing (fc_norm.weight, fc_norm.bias, head.weight, head.bias)" in report
    # Neither row shows a pretraining as a model, and each says where its weights come from.
    rows = {row.model: row for row in join(Ledger(workplace.ledger).records(), "classification")}
    assert set(rows) == {"tuned", "probed"}
    assert rows["tuned"].notes == ["started from the weights of the pretraining test_hivit_mae"]
    assert rows["probed"].notes == [*rows["tuned"].notes, "linear probe: the classifier alone was trained"]
    # A model alone brings what it starts from, and a pretraining may be made alone.
    config = suite()
    config.models, config.stages = ["probed"], ["train"]
    assert make_jobs(config) == [pretraining, probing]
    config.models, config.stages = None, ["pretrain"]
    assert make_jobs(config) == [pretraining]
    # Another pretraining makes other jobs of all that start from it.
    longer = dataclasses.replace(MAE, iterations=9)
    others = make_jobs(suite(recipes={"mae": longer, "tuning": TUNING, "probing": PROBING}))
    assert not {job.key for job in others} & {job.key for job in jobs}


def test_a_fine_tuning_starts_from_averaged_weights_of_another_size(data_root, tmp_path):
    small = job("test_hiri_vit", side=32, iterations=3, ema={"decay": 0.5})
    state = load_file(tmp_path / measure(small, Context(tmp_path, data_root)).artifacts["weights"])
    network = zoo.create_model("test_hiri_vit", num_classes=10, img_size=64)
    start_from(network, tmp_path / "jobs" / small.key / "weights.safetensors")
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[f"ema.module.{name}"]), name
    with pytest.raises(zoo.ZooError, match=r"none of its .* fits"):
        start_from(zoo.create_model("test_hivit"), tmp_path / "jobs" / small.key / "weights.safetensors")


def test_the_weights_of_a_smaller_network_are_refused(tmp_path):
    save_file({f"network.{k}": v for k, v in zoo.create_model("test_hivit").state_dict().items()}, tmp_path / "w")
    deeper = zoo.create_model("test_hivit", depths=(1, 1, 3))
    with pytest.raises(InputError, match=r"has no fitting weights for blocks\.8"):
        start_from(deeper, tmp_path / "w")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"a": ModelEntry(initialize_from="b")}}, "model a: unknown initialize_from 'b'"),
        (
            {"models": {"a": ModelEntry(initialize_from="b"), "b": ModelEntry(initialize_from="a")}},
            "initialize_from goes round in a circle: a/a -> a/b -> a/a",
        ),
        ({"models": {"a": ModelEntry(recipe="tunning")}}, "unknown recipe 'tunning'; did you mean tuning"),
        ({"models": {"test_hivit_mae": ModelEntry()}}, "test_hivit_mae is both in models and in pretraining"),
        ({"recipe": Recipe(batch_size=7, mixup=MIXUP)}, "batch_size is 7, 7 images per forward; Mixup pairs"),
        ({"recipe": Recipe(distillation_alpha=0.5)}, "needs mixup and ema"),
        ({"recipes": {"mae": MAE, "tuning": Recipe(learning_rate=0)}}, "recipes.tuning.learning_rate is 0"),
        (
            {"task": "segmentation", "head": "segformer", "data": "digit_scenes_segmentation"},
            "only classifications can have pretraining",
        ),
        ({"pretraining": {"a": ModelEntry(input_size=[8, 64])}}, "at least 32 pixels"),
        (
            {
                **{"task": "segmentation", "head": "segformer", "data": "digit_scenes_segmentation"},
                **{"models": {"a": ModelEntry()}, "pretraining": {}, "recipes": {}, "recipe": Recipe(mixup=MIXUP)},
            },
            "recipe.mixup is for classifications only",
        ),
    ],
)
def test_impossible_settings_are_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        make_jobs(suite(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"mixup": {"alpha": 1.0}}, "recipe.mixup: timm's Mixup does not take"),
        ({"ema": {"decays": 0.9}}, "recipe.ema: timm's ModelEmaV3 does not take"),
        ({"optimizer_options": {"beta": 0.9}}, "adamw does not take these optimizer_options"),
    ],
)
def test_what_timm_does_not_take_is_one_line(recipe, message):
    with pytest.raises(InputError, match=message):
        build_optimizer(job("test_hivit", **recipe), Classifier(zoo.create_model("test_hivit"), Recipe(**recipe)))


def test_what_is_no_autoencoder_cannot_be_pretrained(data_root, tmp_path):
    with pytest.raises(InputError, match="test_hivit is no masked autoencoder; those are hivit_base_mae"):
        measure(job("test_hivit", "pretrain"), Context(tmp_path, data_root))


def test_a_field_at_its_default_is_no_part_of_a_key():
    @dataclasses.dataclass
    class Later(Recipe):
        added: float = 0.5

    trained = job("test_hivit")
    recipe = trained.content()["recipe"]
    assert recipe["iterations"] == 8
    assert "ema" not in recipe
    later = [dataclasses.replace(trained, recipe=Later(**SHORT, added=value)) for value in (0.5, 0.6)]
    assert later[0].key == trained.key
    assert later[1].key != trained.key
    written = dataclasses.replace(trained.recipe, optimizer=Recipe().optimizer)
    assert dataclasses.replace(trained, recipe=written).key == trained.key


def test_a_learning_rate_may_be_for_so_many_images():
    """Linear scaling, as MAE has it: 1.5e-4 for 256 images is 2.4e-3 for 4,096."""
    assert Recipe(learning_rate=1.5e-4, learning_rate_images=256, batch_size=4096).peak_learning_rate == 2.4e-3
    assert Recipe(learning_rate=1e-3, batch_size=4096).peak_learning_rate == 1e-3


def test_masks_do_not_depend_on_how_a_batch_is_shared(data_root, tmp_path):
    losses = [
        measure(
            job("test_hivit_mae", "pretrain", drop_path_rate=None, engine=engine), Context(tmp_path / name, data_root)
        )
        for name, engine in (("whole", Engine()), ("parts", Engine(accumulate=2)))
    ]
    assert losses[0].metrics["final_loss"] == pytest.approx(losses[1].metrics["final_loss"], rel=1e-5)
