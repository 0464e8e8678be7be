"""Data folders that we make: complete or absent, never half-written; checked by content; safe for two makers at once.

A folder is written beside its final place, its manifest last, and then renamed. The manifest (`dataset.json`) names the
dataset, its version and options, and every file with its size and SHA-256.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.errors import InputError

MANIFEST = "dataset.json"


@dataclass(frozen=True)
class State:
    """What lies in a folder: `kind` is absent, complete, damaged (ours, to be remade) or foreign (not ours)."""

    kind: str
    detail: str  # one line


def inspect(folder: Path, stamp: dict[str, Any]) -> State:
    """Compares every file of `folder` with its manifest, and the manifest with `stamp` (name, version, options)."""
    if not folder.is_dir():
        return State("foreign", "is a file, not a folder") if folder.exists() else State("absent", "not there yet")
    found = {path: size for path, size in _list_files(folder) if not _is_hidden(path)}
    if MANIFEST not in found:
        if not found:
            return State("absent", "empty")
        return State("foreign", f"holds {len(found)} files (such as {min(found)}) but no {MANIFEST}: not made by us")
    manifest = _read_manifest(folder)
    if manifest is None:
        return State("damaged", f"{MANIFEST} cannot be read")
    files = manifest["files"]
    extra = sorted(found.keys() - files.keys() - {MANIFEST})
    if extra:
        return State("foreign", f"holds {len(extra)} files that are not part of it, such as {extra[0]}")
    for key, value in stamp.items():
        if manifest.get(key) != value:
            return State("damaged", f"is of {key} {manifest.get(key)}, needed is {value}")
    bad = sorted(path for path, (size, digest) in files.items() if not _matches(folder, path, size, digest, found))
    if bad:
        return State("damaged", f"{len(bad)} of {len(files)} files missing or changed, such as {bad[0]}")
    return State("complete", f"{len(files):,} files")


def ensure(
    folder: Path, stamp: dict[str, Any], files: Callable[[], Iterable[tuple[str, bytes]]], report: Callable[[str], None]
) -> None:
    """Makes `folder` from `files` (relative path, content) unless it is complete already.

    A damaged or outdated folder of ours is reported by name and remade; what an interrupted run left is removed. When
    two processes come at once, the second waits and uses what the first has made.

    Raises:
        InputError: the place is taken by files that are not ours, or cannot be read or written.
    """
    try:
        if inspect(folder, stamp).kind == "complete":
            return  # needs no lock, so data on a read-only disk can be used
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"waiting for another process that is making {folder}")
            lock.acquire()
        try:
            _ensure_locked(folder, stamp, files, report)
        finally:
            lock.release()
    except OSError as error:
        where = error.filename or folder.parent
        raise InputError(
            f"cannot read or write the data in {folder}: {error.strerror or error} ({where}); "
            "choose a data folder that can be written and has free space"
        ) from error


def _ensure_locked(
    folder: Path, stamp: dict[str, Any], files: Callable[[], Iterable[tuple[str, bytes]]], report: Callable[[str], None]
) -> None:
    # The lock is ours, so nobody is writing these: they are what a killed process left.
    partial, discarded = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "discarded"))
    if partial.exists():
        report(f"{folder}: an earlier run was interrupted while making it; starting it afresh")
        shutil.rmtree(partial)
    if discarded.exists():
        shutil.rmtree(discarded)
    state = inspect(folder, stamp)
    if state.kind == "complete":
        return
    if state.kind == "foreign":
        raise InputError(f"{folder} {state.detail}; move these away or choose another data folder")
    if state.kind == "damaged":
        report(f"{folder}: {state.detail}; making it again")
    report(f"making {stamp['name']} in {folder}")
    start = time.perf_counter()
    try:
        count = _write(partial, stamp, files())
        if state.kind == "damaged":
            os.replace(folder, discarded)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if discarded.exists():
        shutil.rmtree(discarded)
    report(f"made {stamp['name']}: {count:,} files in {time.perf_counter() - start:.1f} s")


def _write(folder: Path, stamp: dict[str, Any], files: Iterable[tuple[str, bytes]]) -> int:
    folder.mkdir()
    entries: dict[str, tuple[int, str]] = {}
    parents: set[Path] = set()
    for path, content in files:
        target = folder / path
        if target.parent not in parents:
            target.parent.mkdir(parents=True, exist_ok=True)
            parents.add(target.parent)
        target.write_bytes(content)
        entries[path] = (len(content), hashlib.sha256(content).hexdigest())
    (folder / MANIFEST).write_text(json.dumps({**stamp, "files": entries}, indent=1))
    return len(entries)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for size, digest in manifest["files"].values():
            if not (isinstance(size, int) and isinstance(digest, str)):
                return None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return manifest


def _matches(folder: Path, path: str, size: int, digest: str, found: dict[str, int]) -> bool:
    # The size comes first: it is free, and tells most damage without reading the file.
    return found.get(path) == size and hashlib.sha256((folder / path).read_bytes()).hexdigest() == digest


def _list_files(folder: Path, prefix: str = "") -> Iterable[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _list_files(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}", entry.stat(follow_symlinks=False).st_size


def _is_hidden(path: str) -> bool:
    return path.rpartition("/")[2].startswith(".")  # .DS_Store and the like: no reader of ours opens them
