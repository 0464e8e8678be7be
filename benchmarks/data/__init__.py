"""Datasets: what they are (`describe`), and having them ready in a folder (`prepare`)."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.data import digit_scenes, folder, published
from benchmarks.data.catalogue import DATASETS, Dataset, describe
from benchmarks.errors import Blocked, InputError

__all__ = ["DATASETS", "Dataset", "check", "describe", "prepare"]


def prepare(
    name: str, root: Path, options: Mapping[str, Any] | None = None, report: Callable[[str], None] = print
) -> Path:
    """Has dataset `name` ready and returns its folder; `Dataset` tells the sub-folders.

    Generated data are made below `root` on first use, in seconds, in a folder of their own for every set of options
    (the fields of `digit_scenes.ClassificationOptions` and `SegmentationOptions`), and checked in full at every later
    use. A published dataset is only looked for. `report` gets one line for whatever is made, remade or waited for.

    Raises:
        InputError: unknown name or option; `root` cannot be written or its place is taken by other files.
        Blocked: a published dataset is missing or incomplete.
    """
    dataset, root = describe(name), Path(root)
    if dataset.generated:
        chosen, target = _generated(dataset, root, options or {})
        folder.ensure(target, _stamp(dataset, chosen), lambda: digit_scenes.files(chosen), report)
        return target
    _refuse_options(dataset, options)
    target = published.locate(dataset, root)
    if problem := published.inspect(dataset, target).problem:
        raise Blocked(f"{name}: {problem}", looked_in=str(target), how_to_get=dataset.source)
    return target


def check(name: str, root: Path, options: Mapping[str, Any] | None = None) -> tuple[bool, str]:
    """Whether `prepare` would find dataset `name` complete, and one line on what is there; changes nothing.

    Raises:
        InputError: unknown name or option.
    """
    dataset, root = describe(name), Path(root)
    if dataset.generated:
        chosen, target = _generated(dataset, root, options or {})
        state = folder.inspect(target, _stamp(dataset, chosen))
        return state.kind == "complete", f"{target}: {state.detail}"
    _refuse_options(dataset, options)
    target = published.locate(dataset, root)
    found = published.inspect(dataset, target)
    return found.problem is None, found.problem or f"{target}: {found.there}"


def _generated(
    dataset: Dataset, root: Path, options: Mapping[str, Any]
) -> tuple[digit_scenes.ClassificationOptions | digit_scenes.SegmentationOptions, Path]:
    """The options, complete, and the folder that they have for themselves."""
    chosen = digit_scenes.read_options(dataset.name, options)
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(chosen), sort_keys=True).encode()).hexdigest()[:8]
    return chosen, root / f"{dataset.name}_{chosen.canvas}px_{digest}"


def _stamp(dataset: Dataset, options: Any) -> dict[str, Any]:
    # Through JSON, as the manifest is, so that both compare equal: tuples are lists there.
    stamp = {"name": dataset.name, "version": dataset.version, "options": dataclasses.asdict(options)}
    return json.loads(json.dumps(stamp))


def _refuse_options(dataset: Dataset, options: Mapping[str, Any] | None) -> None:
    if options:
        raise InputError(f"{dataset.name} is a published dataset and has no options; given: {', '.join(options)}")
