"""Files that survive a crash: checkpoints written whole, checked when read, never unpickled; finished weights."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import save_file

WEIGHTS = "weights.safetensors"  # of the last iteration
BEST = "best.safetensors"  # of the iteration that scored highest on the validation images
TEMPORARY = ".tmp"


class AtomicBackend(LocalBackend):
    """Local files that are there in full or not at all: a kill while writing leaves the file of before."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        # First the digest: a checkpoint without one counts as damaged, since torch.load does not notice flipped bits.
        write_atomically(_digest_file(Path(filepath)), hashlib.sha256(obj).hexdigest().encode())
        write_atomically(Path(filepath), obj)

    def remove(self, filepath: str | Path) -> None:
        super().remove(filepath)
        _digest_file(Path(filepath)).unlink(missing_ok=True)


def _digest_file(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".sha256")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that any reader, at any moment and after any crash, sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A name of its own: a worker that was given up may still write when its successor does."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")


def load_checkpoint_safely(filename: str, map_location: Any = None, logger: Any = None) -> dict[str, Any]:
    """torch.load that never unpickles: mmengine's own loader falls back to doing so."""
    return torch.load(filename, map_location=map_location, weights_only=True)


def install() -> None:
    """Makes mmengine write checkpoints atomically and read them without unpickling (idempotent, per process)."""
    register_backend("atomic", AtomicBackend, force=True)
    CheckpointLoader.register_scheme(prefixes="", loader=load_checkpoint_safely, force=True)


def newest_checkpoint(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `folder`; a damaged one is reported by name and set aside."""
    numbered = {
        int(number): path for path in folder.glob("iter_*.pth") if (number := path.stem.removeprefix("iter_")).isdigit()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        digest = _digest_file(path)
        if digest.is_file() and digest.read_text() == sha256(path):
            return path
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        report(f"the checkpoint {path} is damaged: set aside as {aside.name}")
    return None


def check_finite(weights: Mapping[str, Any], when: str) -> None:
    """Raises FloatingPointError if a weight is no number: nothing that was trained further would be one."""
    for name, value in weights.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise FloatingPointError(f"{name} became infinite or NaN {when}; lower the learning rate")


def discard(folder: Path) -> None:
    """Removes all checkpoints of a finished training, damaged ones too: hundreds of MB, and of no more use."""
    for path in [found for suffix in ("pth", "sha256", "damaged") for found in folder.glob(f"iter_*.{suffix}")]:
        path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Removes what a process left that was killed while it wrote."""
    for leftover in folder.glob(f"*{TEMPORARY}"):
        leftover.unlink()


def save_weights(state: Mapping[str, torch.Tensor], path: Path, said: dict[str, str] | None = None) -> str:
    """Writes a model's state as safetensors, atomically, with what is `said` of it; returns the file's SHA-256."""
    temporary = _temporary(path)
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary, said)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the checkpoints are discarded for it
        digest = sha256(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
