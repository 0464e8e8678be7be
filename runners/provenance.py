"""Where a measurement comes from: code revision, versions, hardware, command, time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "timm", "onedl-mmengine", "onedl-mmcv", "onedl-mmsegmentation", "ray", "numpy")


@cache
def revision() -> str:
    """The commit of this checkout, with '+' behind it where files differ from it.

    Outside a checkout, as in a copy that was submitted to a cluster: what HIRES_VIT_REVISION says, else 'unknown'.
    """
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HIRES_VIT_REVISION", "unknown")
    return commit + ("+" if changed.stdout.strip() else "")


@cache
def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide a number."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def provenance(command: str, started: str, seconds: float) -> dict[str, Any]:
    """The provenance block of a record, as of this process and machine."""
    from benchmarks.speed import hardware

    return {
        "revision": revision(),
        "command": command,
        "versions": versions(),
        "hardware": hardware(),
        "started": started,
        "seconds": round(seconds, 3),
    }
