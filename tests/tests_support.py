"""Shared by all tests: a command line as a user has it, and the miniature of the demo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from results.ledger import Ledger
from runners.config import Config, register
from runners.run import CONF

ROOT = Path(__file__).resolve().parent.parent

# The demo suite with models, data and trainings of seconds; everything else as it is.
MINIATURE = [
    "models=[test_hivit,test_mit]",
    "suite.speed.repeats=5",
    "suite.speed.warmup=1",
    "suite.speed.max_seconds=0.2",
    "suite.must_gain=-100",
    *(
        f"{prefix}suite.benchmarks.{task}.{setting}"
        for task in ("classification", "segmentation")
        for prefix, setting in (
            ("", "input_size=[32,32]"),
            ("", "recipe.iterations=12"),
            ("", "recipe.warmup_iterations=2"),
            ("", "recipe.batch_size=4"),
            ("", "recipe.checkpoint_every=3"),
            ("+", "data_options={train:40,validation:20}"),
        )
    ),
    "suite.benchmarks.classification.recipe.drop_path_rate=0.1",
]


def may_mount() -> bool:
    """Whether a user of this machine may mount a file system that only their own processes see."""
    tried = ["unshare", "-rm", "true"]
    return shutil.which(tried[0]) is not None and subprocess.run(tried, capture_output=True).returncode == 0


class CommandLine:
    """`python runners/run.py` in a folder of its own, as a real process, `settings` before all others."""

    def __init__(self, folder: Path, settings: Sequence[str] = ()):
        self.folder = folder
        self.output = folder / "output"
        self.settings = settings

    def command(self, *overrides: str, miniature: bool = True) -> list[str]:
        settings = [*self.settings, *MINIATURE, *overrides] if miniature else list(overrides)
        places = [f"output={self.output}", f"data_root={self.folder / 'data'}"]
        places = [place for place in places if not any(o.startswith(place.split("=")[0] + "=") for o in overrides)]
        return [sys.executable, str(ROOT / "runners" / "run.py"), *settings, *places]

    def start(self, *overrides: str, miniature: bool = True) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*overrides, miniature=miniature),
            cwd=self.folder,
            env=os.environ | {"COLUMNS": "120"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *overrides: str, miniature: bool = True, status: int | None = 0, timeout: float = 600) -> str:
        """Everything printed; fails unless the exit status is `status`. It may take `timeout` seconds."""
        process = self.start(*overrides, miniature=miniature)
        printed, _ = process.communicate(timeout=timeout)
        if status is not None:
            assert process.returncode == status, f"exit status {process.returncode}\n{printed}"
        return printed


def configuration(*overrides: str) -> Config:
    """What the command line would run with these overrides."""
    register()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return OmegaConf.to_object(compose("config", list(overrides)))


def comparable(output: Path, but: Collection[str] = ()) -> dict[str, dict]:
    """All that finished records say but provenance, times, and the details `but`."""
    ledger = Ledger(output / "ledger")
    found = {}
    for record in ledger.records():
        assert record.done, record.reason
        plain = record.to_dict() | {"provenance": None}
        plain["artifacts"] = {k: v for k, v in record.artifacts.items() if k != "curves"}  # called after the time
        plain["details"] = {k: v for k, v in record.details.items() if k not in (*but, "foreign_load")}
        if record.stage == "speed":
            plain |= {"metrics": sorted(record.metrics), "samples": sorted(record.samples), "notes": None}
        found[record.key] = plain
    assert not ledger.reports
    return found
