"""Suites become jobs: every suite file plans, and a job's key is its content."""

from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from tests_support import ROOT, configuration

from benchmarks.errors import InputError
from benchmarks.job import HEADS, SEGMENTATION_SETTINGS, STAGES, TASKS
from runners.config import ModelEntry
from runners.plan import COMMON_OPTIMIZERS, make_jobs
from runners.run import CONF

PAPERS = CONF.parent.parent / "results" / "papers"
SUITES = sorted(path.stem for path in (CONF / "suite").glob("*.yaml"))
SHORT = "suite.benchmarks.segmentation.recipes.short"
DEMO_STAGES = [stage for stage in STAGES if stage != "pretrain"]
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_composes_and_plans(suite):
    config = configuration(f"suite={suite}")
    assert config.suite.name == suite
    assert config.output == f"runs/{suite}"
    assert config.suite.title
    assert config.suite.description
    jobs = make_jobs(config)
    keys = [job.key for job in jobs]
    assert len(set(keys)) == len(keys)
    for job in jobs:
        assert job.stage in STAGES
        assert job.task in TASKS
        assert job.head in (None, *HEADS)
        assert all(keys.index(before) < keys.index(job.key) for before in job.depends_on)
    planned = [
        (len(benchmark.models), {*config.suite.stages} & {*(benchmark.stages or STAGES)} - {"report"})
        for benchmark in config.suite.benchmarks.values()
    ]
    pretrained = [label for benchmark in config.suite.benchmarks.values() for label in benchmark.pretraining]
    assert len(jobs) == sum(models * len(stages) for models, stages in planned) + len(pretrained)
    assert config.suite.expected.cost
    assert config.suite.expected.source
    for benchmark, scores in config.suite.expected.scores.items():
        assert scores.keys() <= config.suite.benchmarks[benchmark].models.keys()


@pytest.mark.parametrize("suite", SUITES)
def test_expected_scores_are_printed_in_a_paper(suite):
    """Each is that of its model in a table of a paper, but for the demo's, which are its own."""
    tables = [path for path in PAPERS.glob("*.csv") if "label" in path.read_text().partition("\n")[0]]
    if suite == "demo" or not tables:
        pytest.skip("no paper's scores to compare with")
    printed: dict[str, set[float]] = defaultdict(set)
    for path in tables:
        for row in csv.DictReader(path.open()):
            printed[row["model"]] |= {float(row[name]) for name in ("top1", "miou", "miou_ms") if row[name]}
    config = configuration(f"suite={suite}").suite
    for name, scores in config.expected.scores.items():
        for label, score in scores.items():
            entry = config.benchmarks[name].models[label]
            assert score in printed[entry.name or label], (label, score)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_used(recipe):
    named = re.compile(rf"^  - /recipe@\S+: {recipe}$", re.MULTILINE)
    assert any(named.search((CONF / "suite" / f"{suite}.yaml").read_text()) for suite in SUITES)


def keys(*overrides: str) -> dict[str, set[str]]:
    jobs = make_jobs(configuration(*overrides))
    return {stage: {job.key for job in jobs if job.stage == stage} for stage in STAGES}


def test_keys_are_stable_across_processes():
    program = f"import runpy; module = runpy.run_path({__file__!r}); print(*map(sorted, module['keys']().values()))"
    seen = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "tests")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in "12"
    ]
    assert seen == [" ".join(str(sorted(found)) for found in keys().values())] * 2


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("suite.benchmarks.segmentation.recipe.learning_rate=0.123", {"train", "evaluate"}),
        ("suite.speed.repeats=7", {"speed"}),
        ("seeds=[5]", {"train", "evaluate"}),
        ("suite.precision=bfloat16", {"train", "evaluate"}),
        ("+suite.benchmarks.segmentation.data_options.seed=1", {"train", "evaluate"}),
        ("suite.benchmarks.segmentation.input_size=[96,96]", {"cost", "speed", "train", "evaluate"}),
        ("suite.title=another", set()),
        ("suite.must_gain=1", set()),
        ("executor=inline", set()),
        # How a training runs on a machine, all at once: no part of the key but what a batch norm sees.
        (
            "suite.benchmarks.segmentation.recipe.engine="
            "{processes:2,gradient_checkpointing:true,channels_last:true,compile:true,wandb:x,gpu_type:H100}",
            set(),
        ),
        ("suite.benchmarks.segmentation.recipe.engine.accumulate=2", {"train", "evaluate"}),
    ],
)
def test_a_key_changes_with_what_decides_the_outcome_and_with_nothing_else(override, changed):
    before, after = keys(), keys(override)
    assert {stage for stage in STAGES if before[stage] != after[stage]} == changed


def test_adding_a_model_adds_its_jobs_and_touches_no_other():
    before, after = keys("models=[hivit_tiny]"), keys("models=[hivit_tiny,resnet18]")
    for stage in DEMO_STAGES:
        assert before[stage] < after[stage]
        assert len(after[stage] - before[stage]) == 2  # one for each task


def test_seeds_repeat_trainings_only():
    counts = {stage: len(found) for stage, found in keys("seeds=[0,1,2]").items()}
    once = {stage: len(found) for stage, found in keys().items()}
    assert counts == {stage: once[stage] * (3 if stage in ("train", "evaluate") else 1) for stage in STAGES}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages=[trian]"], "unknown stage 'trian'; did you mean train"),
        (["stages=[evaluate]"], "'evaluate' needs 'train'"),
        (["suite.benchmarks.segmentation.head=segformr"], "unknown head 'segformr'; did you mean segformer"),
        (["suite.benchmarks.segmentation.task=segment"], "unknown task 'segment'; did you mean segmentation"),
        (["suite.benchmarks.segmentation.data=ade20"], "ade20k"),
        (["suite.benchmarks.segmentation.data=digit_scenes_classification"], "is for classification, not segmentation"),
        (["suite.benchmarks.segmentation.input_size=[64]"], r"input_size \[64\] must be \[height, width\]"),
        (["suite.benchmarks.segmentation.input_size=[16,64]"], "at least 32 pixels"),
        (["suite.benchmarks.segmentation.recipe.batch_size=0"], "recipe.batch_size is 0; it must be at least 1"),
        (["suite.benchmarks.segmentation.recipe.learning_rate=-1"], "learning_rate is -1.0; it must be above 0"),
        (["suite.benchmarks.segmentation.recipe.engine.processes=0"], "engine.processes is 0; it must be at least 1"),
        (["suite.benchmarks.segmentation.recipe.engine.gpu_fraction=1.5"], "gpu_fraction is 1.5 with processes=1"),
        (["suite.benchmarks.segmentation.recipe.engine={gpu_fraction:0.5,processes:2}"], "a GPU each"),
        (
            ["suite.benchmarks.segmentation.recipe.engine={processes:2,accumulate:3}"],
            "8 cannot be shared by 2",
        ),
        (
            ["+suite.benchmarks.segmentation.recipe.augmentation.photometric=true"],
            r"recipe\.augmentation: unknown setting 'photometric'; did you mean photometric_distortion\?",
        ),
        (
            ["+suite.benchmarks.segmentation.recipe.evaluation.scale=[0.5,1]"],
            r"recipe\.evaluation: unknown setting 'scale'; did you mean scales",
        ),
        (["+suite.benchmarks.segmentation.recipe.evaluation.strides=[64,64]"], "'strides'; did you mean stride"),
        (
            ["+recipe@suite.benchmarks.segmentation.recipes.short=ade20k_hrvit", f"+{SHORT}.evaluation.modus=slide"],
            r"recipes\.short\.evaluation: unknown setting 'modus'; did you mean mode",
        ),
        (
            ["suite.benchmarks.classification.recipe.head_learning_rate_multiplier=10"],
            "recipe.head_learning_rate_multiplier is for segmentations only",
        ),
        (
            ["suite.benchmarks.segmentation.recipe.clip_gradient_value=1"],
            "recipe has clip_gradient_norm and clip_gradient_value; set one of them to null",
        ),
        (["suite.benchmarks.classification.head=segformer"], "a classification has no head"),
        (["suite.precision=half"], "unknown precision 'half'"),
        (["suite.speed.device=gpu"], "demo: speed: unknown device 'gpu'; did you mean cpu"),
        (["suite.speed.device=cuda:"], "unknown device 'cuda:'; did you mean cuda"),
        (["suite.benchmarks.segmentation.head=bare"], "head=bare has nothing to train"),
        (["suite.benchmarks.segmentation.stages=[costs]"], "segmentation: stages: unknown stage 'costs'"),
        (["suite.benchmarks.segmentation.stages=[evaluate]"], "'evaluate' needs 'train'"),
        (["suite.benchmarks.segmentation.models.mit_b0.input_size=[8,64]"], "at least 32 pixels"),
    ],
)
def test_impossible_settings_are_one_line(overrides, message):
    with pytest.raises(InputError, match=message) as error:
        make_jobs(configuration(*overrides))
    assert "\n" not in str(error.value)


def test_a_benchmark_has_no_other_stages_than_its_own():
    jobs = make_jobs(configuration("suite.benchmarks.segmentation.stages=[cost,report]"))
    assert {job.stage for job in jobs if job.task == "segmentation"} == {"cost"}
    assert {job.stage for job in jobs if job.task == "classification"} == set(DEMO_STAGES)


def test_a_model_may_have_a_size_and_a_drop_path_of_its_own():
    entry = "suite.benchmarks.segmentation.models.mit_b0"
    plain = make_jobs(configuration())
    special = make_jobs(configuration(f"{entry}.input_size=[96,128]", f"{entry}.drop_path_rate=0.3"))
    changed = [job for job in special if job.key not in {job.key for job in plain}]
    assert [(job.label, job.task) for job in changed] == [("mit_b0", "segmentation")] * len(DEMO_STAGES)
    assert {job.input_size for job in changed} == {(96, 128)}
    assert {job.recipe.drop_path_rate for job in changed if job.recipe} == {0.3}
    rated = make_jobs(configuration(f"{entry}.drop_path_rate=0.3"))
    assert {job.stage for job in rated if job.key not in {job.key for job in plain}} == {"train", "evaluate"}


def test_a_pretraining_has_no_labels_to_smooth():
    config = configuration("suite.benchmarks.classification.recipe.label_smoothing=0.1", "stages=[pretrain]")
    config.suite.benchmarks["classification"].pretraining["hivit_base_mae"] = ModelEntry()
    with pytest.raises(InputError, match=r"hivit_base_mae: recipe\.label_smoothing is for what has labels"):
        make_jobs(config)


def test_the_settings_of_a_segmentation_are_those_that_are_read():
    """What a recipe may hold, what benchmarks/segmentation.py tells of, and what it looks up."""
    code = (ROOT / "benchmarks" / "segmentation.py").read_text(encoding="utf-8")
    told, _, read = code.partition('"""\n\nfrom')
    augmentation, _, evaluation = told.partition("`Recipe.evaluation`")
    for part, text in (("augmentation", augmentation), ("evaluation", evaluation)):
        assert {*re.findall(r"`(\w+)`", text)} == {*SEGMENTATION_SETTINGS[part]}
    looked_up = {*re.findall(r'(?:settings|evaluation|\{\}\))(?:\.get\(|\[)"(\w+)"', read)}
    assert looked_up == {name for names in SEGMENTATION_SETTINGS.values() for name in names}


def test_the_own_recipe_of_the_readme(tmp_path):
    """Its two files, as they stand there, in a folder beside the suite's own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("**Your own recipe.**")[2]
    block = text.partition("```yaml\n")[2].partition("```")[0]
    for part in block.split("# runners/conf/")[1:]:
        name, _, content = part.partition("\n")
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    config = configuration("suite=mine", f"hydra.searchpath=[file://{tmp_path}]")
    trained = {job.label: job for job in make_jobs(config) if job.stage == "train"}
    assert list(trained) == ["resnet50", "hivit_small", "hivit_small_tuned"]
    assert (trained["resnet50"].recipe.iterations, trained["resnet50"].recipe.ema) == (375_300, {})  # imagenet1k's
    mine = trained["hivit_small"].recipe
    assert (mine.iterations, mine.ema, mine.learning_rate) == (125_100, {"decay": 0.999}, 1e-3)
    assert (mine.mixup["mixup_alpha"], mine.mixup["cutmix_alpha"]) == (0.2, 1.0)  # the rest is imagenet_hivit's
    tuned = trained["hivit_small_tuned"]
    assert tuned.depends_on == (trained["hivit_small"].key,)
    assert (tuned.recipe, tuned.input_size) == (mine, (384, 384))


def test_jobs_are_frozen_data():
    job = make_jobs(configuration())[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.seed = 1


def test_common_optimizers_are_timms():
    from timm.optim import list_optimizers

    assert set(list_optimizers()) >= COMMON_OPTIMIZERS


def test_planning_what_is_counted_needs_no_torch(tmp_path):
    """Which takes seconds to load, as the others do: the whole command, on a machine without a GPU."""
    program = (
        "import sys; from runners import machine, run; import runners.session, results.report; machine.DRIVERS = ();"
        f"status = run.main(['suite=ade20k_segformer', 'stages=[train,evaluate]', 'plan=true', 'output={tmp_path}']);"
        "print(status, *(name in sys.modules for name in ('torch', 'timm', 'ray', 'pandas')))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "To do: 40 of 40 jobs" in printed
    assert printed.splitlines()[-1] == "0 False False False False"
