"""Wrong input ends in one clear line and exit status 1; what cannot run here in a row with its reason and status 2."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys

import pytest
from tests_support import ROOT, configuration

from runners import run, session
from runners.plan import make_jobs

COST = ["executor=inline", "stages=[cost]"]


@pytest.fixture
def call(command_line, capsys, monkeypatch):
    """Runs the command line in this process; returns its exit status and what it wrote to both streams."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards: `main` sets it

    def called(*overrides: str) -> tuple[int, str, str]:
        arguments = command_line.command(*overrides, miniature=False)[2:]
        monkeypatch.setattr(sys, "argv", ["run.py"])
        status = run.main(arguments)
        return status, *capsys.readouterr()

    return called


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["suite=dmo"], ["unknown suite 'dmo'", "did you mean demo?"]),
        (["suite=ade20k_segfomer"], ["did you mean ade20k_segformer"]),
        (["models=[hivit_tinny]"], ["unknown model 'hivit_tinny'", "hivit_tiny"]),
        (["stages=[costs]"], ["unknown stage 'costs'", "did you mean cost"]),
        (["suite.benchmarks.segmentation.head=segforme"], ["unknown head 'segforme'", "segformer"]),
        (["suite.benchmarks.segmentation.models.hrformer_tiny.config={depth:3}"], ["depth"]),
        (["+suite.benchmarks.classification.models.hivit_tiny.config.depth=3"], ["hivit_tiny", "'depth'", "depths"]),
        (["suite.benchmarks.segmentation.recipe.iterations=many"], ["'many'", "recipe.iterations"]),
        (["suite.seeds=x"], ["suite.seeds"]),
        (["models=[]"], ["models=[] leaves nothing to run"]),
        (["executor=slurm"], ["slurm", "inline", "ray"]),
        (["suit=demo"], ["suit"]),
        (["models=["], ["cannot read the override 'models=['"]),
        (["suite.benchmarks.segmentation.input_size=[8,8]"], ["[8, 8]", "at least 32 pixels"]),
        (["+suite.benchmarks.segmentation.data_options.canvass=9", "stages=[train]"], ["canvass", "canvas"]),
        (["suite.benchmarks.segmentation.recipe.schedule=steps", "stages=[train]"], ["schedule 'steps'", "poly"]),
        (["suite.benchmarks.segmentation.recipe.warmup_iterations=900", "stages=[train]"], ["900 warm-up iterations"]),
        (["suite.benchmarks.segmentation.recipe.optimizer=adamwx", "stages=[train]"], ["adamwx"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line(call, overrides, parts):
    status, _, written = call("executor=inline", *overrides)
    assert status == 1
    assert written.startswith("error: ")
    assert len(written.strip().splitlines()) == 1
    assert "Traceback" not in written
    for part in parts:
        assert part in written


def test_debug_brings_the_traceback(command_line):
    printed = command_line.run("suite=dmo", "--debug", miniature=False, status=1)
    assert "Traceback" in printed


def test_unknown_flag(call):
    assert call("--fast")[0] == 1


@pytest.mark.parametrize("output", ["/proc/nowhere/output", "{file}/output"])
def test_output_that_cannot_be_written(call, tmp_path, output):
    file = tmp_path / "file"
    file.touch()
    status, _, written = call(*COST, f"output={output.format(file=file)}")
    assert status == 1
    assert len(written.strip().splitlines()) == 1
    assert "cannot write" in written
    assert "choose another output=FOLDER" in written


def test_read_only_output(call, monkeypatch):
    """The answer of a read-only file system, which root gets as well."""

    def refuse(path, *arguments, **settings):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    status, _, written = call(*COST)
    assert status == 1
    assert len(written.strip().splitlines()) == 1
    assert "cannot write" in written
    assert "Read-only file system" in written


def test_full_disk(command_line):
    """A file system that refuses to take more: simulated by the largest size of a file that the process may write."""
    limit = 600  # bytes: less than a record

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = command_line.command(*COST)
    done = subprocess.run(command, cwd=command_line.folder, preexec_fn=lower, capture_output=True, text=True)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "cannot write" in errors[0]
    assert "Traceback" not in done.stderr
    assert not list((command_line.output / "ledger").glob("*.json"))  # nothing half-written


def test_no_free_memory(call, monkeypatch):
    monkeypatch.setattr(session, "free_gib", lambda: 0.3)
    status, _, written = call(*COST)
    assert status == 1
    assert "only 0.3 GiB of memory are free" in written


def test_a_size_that_one_model_cannot_take_is_a_row_with_its_reason(call, command_line):
    overrides = ["models=[maxvit_rmlp_pico_rw_256,mit_b0]", "suite.benchmarks.classification.input_size=[40,50]"]
    status, printed, written = call(*COST, *overrides)
    assert status == 2
    assert "Traceback" not in printed + written
    assert "Failed: cost maxvit_rmlp_pico_rw_256 (classification)" in printed
    assert "cannot take an input of 3x40x50" in printed
    assert "mit_b0" in printed
    assert len(list((command_line.output / "ledger").glob("*.json"))) == 4


@pytest.mark.parametrize("found", ["missing", "empty", "wrong layout"])
def test_ade20k_without_data_is_blocked_and_says_how_to_go_on(call, command_line, found):
    data = command_line.folder / "data"
    if found != "missing":
        (data / "ADEChallengeData2016").mkdir(parents=True)
    if found == "wrong layout":
        (data / "ADEChallengeData2016" / "pictures").mkdir()
    arguments = ["suite=ade20k_segformer", "models=[mit_b0]", "stages=[cost,train,evaluate,report]", "executor=inline"]
    status, printed, written = call(*arguments)
    assert status == 2
    assert not written
    assert "Traceback" not in printed
    for part in ("Not run: 2 jobs", "why: ade20k: expected the folder", "looked in:", "how to get it:"):
        assert part in printed
    assert str(data / "ADEChallengeData2016") in printed
    assert "The same command continues" in printed
    assert "3.75" in printed  # million parameters: the cost stage ran
    assert "8.39" in printed  # GMACs
    leaderboard = (command_line.output / "leaderboard_segmentation.csv").read_text()
    assert "blocked" in leaderboard
    assert call(*arguments)[0] == 2  # blocked jobs are tried again, finished ones are not repeated


def test_plan_runs_nothing(call, command_line):
    status, printed, _ = call("plan=true")
    assert status == 0
    assert printed.count("to do") == len(make_jobs(configuration("suite=demo")))
    assert not (command_line.output / "ledger").exists()


def test_the_own_paper_of_the_readme(command_line):
    """Its two files, as they stand there, under its command."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("**Your own paper.**")[2]
    rows, suite, command = (block.partition("\n")[2] for block in text.split("```")[1:6:2])
    folder = command_line.folder / "own"
    (folder / "suite").mkdir(parents=True)
    (folder / "suite" / "mine.yaml").write_text(suite)
    (command_line.folder / "mine.csv").write_text(rows)
    arguments = command.replace("FOLDER", str(folder)).split()[2:]
    assert arguments[0] == "--config-dir"
    printed = command_line.run(*arguments, "plan=true", miniature=False)
    assert "The networks of my paper (mine, version 1): 2 jobs" in printed
    printed = command_line.run(*arguments, "executor=inline", miniature=False)
    table = (command_line.output / "tables" / "papers" / "mine_table_1.md").read_text()
    assert "| 22.7 | 22.739 | +0.2 | reproduced |" in table
    assert "| 66.5 | 66.497 \\[1\\] | 0.0 | reproduced |" in table
    assert "mine.csv" not in printed  # nothing to complain of


def test_multirun(call, command_line, monkeypatch):
    monkeypatch.chdir(command_line.folder)
    sizes = "suite.benchmarks.classification.input_size=[32,32],[64,64]"
    status, printed, _ = call("-m", *COST, "models=[test_mit]", sizes)
    assert status == 0
    assert "32x32" in printed
    assert "64x64" in printed
