"""A segmentation starts from a training of the suite's classification: as jobs, and with its weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from miniatures import expect, make, make_imagenet
from safetensors.torch import load_file, save_file

import zoo
from benchmarks import segmentation
from benchmarks.engine import Context
from benchmarks.errors import InputError
from benchmarks.job import Job, Recipe
from benchmarks.measure import measure
from results.ledger import Ledger
from results.rows import join
from runners.config import Benchmark, Config, ModelEntry, Suite
from runners.execute import Workplace, run_job
from runners.plan import make_jobs

RECIPE = Recipe(iterations=2, batch_size=2, warmup_iterations=0, ema={"decay": 0.5})


def suite(model: str = "test_cswin", source: str = "imagenet/test_cswin", **changes: ModelEntry) -> Config:
    """The segmentation stands before the classification that it starts from."""
    benchmarks = {
        "ade": Benchmark(
            task="segmentation",
            data="ade20k",
            head="segformer",
            input_size=[64, 64],
            models={model: ModelEntry(initialize_from=source, head={"channels": 8})} | changes,
            recipe=dataclasses.replace(RECIPE, ema={}),
        ),
        "imagenet": Benchmark(
            task="classification",
            data="imagenet1k",
            input_size=[32, 32],
            models={"test_cswin": ModelEntry(), "other": ModelEntry(name="test_mit")},
            recipe=RECIPE,
        ),
    }
    return Config(suite=Suite("small", title="Small", stages=["train", "evaluate"], benchmarks=benchmarks))


def test_a_segmentation_depends_on_the_classification_that_it_starts_from():
    jobs = make_jobs(suite())
    segmentations = [job for job in jobs if job.task == "segmentation"]
    source = next(job for job in jobs if job.task == "classification" and job.label == "test_cswin")
    assert [job.depends_on for job in segmentations] == [(source.key,), (segmentations[0].key,)]
    assert jobs.index(source) < jobs.index(segmentations[0])
    assert segmentations[0].starts_from["recipe"]["ema"] == {"decay": 0.5}
    # Another training makes another segmentation, and so does none; the classification itself stays as it is.
    longer, without = suite(), suite(source=None)
    longer.suite.benchmarks["imagenet"].recipe = dataclasses.replace(RECIPE, iterations=3)
    for other in (make_jobs(longer), make_jobs(without)):
        assert not {job.key for job in segmentations} & {job.key for job in other}
    assert source.key in {job.key for job in make_jobs(without)}
    # Alone it brings the training of the other benchmark, and of that nothing else; each seed has its own.
    alone = suite()
    alone.suite.benchmarks["imagenet"].stages = ["cost"]
    assert [job.stage for job in make_jobs(alone) if job.task == "classification"] == ["train"]
    alone.seeds = [0, 1]
    pairs = {
        job.seed: job.depends_on for job in make_jobs(alone) if job.task == "segmentation" and job.stage == "train"
    }
    assert pairs[0] != pairs[1]


def three_classes() -> tuple[str, ...]:
    return "n1", "n2", "n3"


def test_the_chain_runs_and_the_backbone_has_the_classifications_weights(tmp_path, monkeypatch):
    expect(monkeypatch, "imagenet1k", training_count=6, validation_count=3, num_classes=3, class_names=three_classes)
    expect(monkeypatch, "ade20k", training_count=2, validation_count=1)
    make_imagenet(tmp_path, three_classes())
    make("ade20k", tmp_path, training=2, validation=1)
    began: list[dict[str, torch.Tensor]] = []
    train = segmentation.train

    def look(job, context, build, *arguments, **options):
        def built():
            model = build()
            began.append({name: value.clone() for name, value in model.backbone.network.state_dict().items()})
            return model

        return train(job, context, built, *arguments, **options)

    monkeypatch.setattr(segmentation, "train", look)
    workplace = Workplace(tmp_path / "output", tmp_path, "test")
    config = suite()
    config.models = ["test_cswin"]
    records = {(job.stage, job.task): run_job(job, workplace)[0] for job in make_jobs(config)}
    assert {record.status for record in records.values()} == {"done"}
    first = load_file(workplace.output / records["train", "classification"].artifacts["weights"])
    average = {name.removeprefix("ema.module."): value for name, value in first.items() if name.startswith("ema.")}
    shared = [name for name in began[0] if name.removeprefix("model.") in average]
    assert len(shared) > 80
    assert all(torch.equal(began[0][name], average[name.removeprefix("model.")]) for name in shared)
    started = records["train", "segmentation"]
    assert started.notes == ["started from the weights of the training test_cswin"]
    assert started.details["started_from"]["weights"].endswith("/weights.safetensors")
    (row,) = join(Ledger(workplace.ledger).records(), "segmentation")
    assert row.notes == started.notes
    assert row.metric.status == "done"


def test_weights_of_another_depth_are_refused_in_one_line(tmp_path, monkeypatch):
    expect(monkeypatch, "ade20k", training_count=2, validation_count=1)
    make("ade20k", tmp_path, training=2, validation=1)
    state = zoo.create_model("test_mit", num_classes=3).state_dict()
    kept = {f"network.{name}": value for name, value in state.items() if not name.startswith("backbone.layers.3.")}
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "weights.safetensors")
    job = next(job for job in make_jobs(suite("test_mit", "imagenet/other")) if job.task == "segmentation")
    with pytest.raises(InputError, match=r"has no fitting weights for .*; start from the same model"):
        measure(job, Context(tmp_path, tmp_path), {"weights": "weights.safetensors"})


@pytest.mark.parametrize("model", ["test_convnext", "test_resnet"])
def test_baselines_of_timm_whose_maps_have_other_names(model, tmp_path):
    """timm renames `stages.0` to `stages_0` where maps are wanted."""
    state = zoo.create_model(model, num_classes=3).state_dict()
    job = Job("train", "segmentation", model, model, (64, 64), 3, head="segformer", recipe=RECIPE)
    save_file({f"network.{name}": value for name, value in state.items()}, tmp_path / "w.safetensors")
    backbone = segmentation.build_model(job).backbone.network
    report = segmentation.start_from(backbone, tmp_path / "w.safetensors", lambda name: False)
    assert f"{len(backbone.state_dict())} entries loaded" in report
    flat = {name.replace(".", "_"): value for name, value in state.items()}
    assert all(torch.equal(value, flat[name.replace(".", "_")]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (suite(source="imagnet/test_cswin"), "test_cswin: unknown initialize_from 'imagnet/test_cswin'; did you mean"),
        (suite(source="ade/test_cswin"), "unknown initialize_from 'ade/test_cswin'"),
        (suite(source="imagenet/other"), "initialize_from=imagenet/other is a test_mit, not a test_cswin; name one of"),
        (
            suite(test_mit=ModelEntry(initialize_from="imagenet/other", config={"checkpoint": "x"})),
            "it has both initialize_from and config.checkpoint; leave one of them out",
        ),
    ],
    ids=["unknown", "segmentation", "other model", "both"],
)
def test_impossible_chains_are_one_line(config, message):
    with pytest.raises(InputError, match=message) as error:
        make_jobs(config)
    assert "\n" not in str(error.value)


def test_a_circle_through_two_benchmarks_is_found():
    config = suite()
    images = config.suite.benchmarks["imagenet"]
    config.suite.benchmarks["again"] = dataclasses.replace(
        images, models={"test_mit": ModelEntry(initialize_from="imagenet/other")}
    )
    images.models["other"].initialize_from = "again/test_mit"
    with pytest.raises(InputError, match="circle: imagenet/other -> again/test_mit -> imagenet/other"):
        make_jobs(config)
