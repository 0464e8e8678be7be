"""Published segmentation datasets: is everything where it should be?"""

import os
from pathlib import Path

from benchmarks.data.catalogue import Dataset

_TOP_FOLDERS = {"ade20k": "ADEChallengeData2016"}


def locate(dataset: Dataset, root: Path) -> Path:
    """The dataset's folder: `root/<published name>`, or `root` itself where that is the published folder."""
    top = _TOP_FOLDERS[dataset.name]
    return root if root.name == top else root / top


def find_problem(dataset: Dataset, folder: Path) -> str | None:
    """What keeps the dataset in `folder` from being used, in one line; None when it is complete."""
    try:
        return _find_problem(dataset, folder)
    except OSError as error:
        return f"cannot read {error.filename}: {error.strerror}"


def _find_problem(dataset: Dataset, folder: Path) -> str | None:
    if not folder.is_dir():
        return _missing(folder.parent, folder.name)
    for split, count in ((dataset.training, dataset.training_count), (dataset.validation, dataset.validation_count)):
        for kind in ("images", "annotations"):
            if not (folder / kind / split).is_dir():
                return _missing(folder / kind, split)
        problem = _compare(folder / "images" / split, folder / "annotations" / split, count)
        if problem:
            return problem
    return None


def _compare(images_folder: Path, annotations_folder: Path, count: int) -> str | None:
    images, annotations = _sizes(images_folder, ".jpg"), _sizes(annotations_folder, ".png")
    if not images:
        return f"{images_folder} holds no .jpg image, expected are {count:,}"
    if without := sorted(images.keys() - annotations.keys()):
        return f"{len(without):,} images have no .png in {annotations_folder}: {_first(without)}"
    if without := sorted(annotations.keys() - images.keys()):
        return f"{len(without):,} annotations have no .jpg in {images_folder}: {_first(without)}"
    for folder, sizes in ((images_folder, images), (annotations_folder, annotations)):
        if empty := sorted(stem for stem, size in sizes.items() if not size):
            return f"{len(empty):,} files in {folder} are empty: {_first(empty)}"
    if len(images) != count:
        return f"{images_folder} holds {len(images):,} images, expected are {count:,}"
    return None


def _missing(parent: Path, name: str) -> str:
    expected = parent / name
    if not parent.is_dir():
        return f"expected the folder {expected}, but {parent} does not exist"
    there = sorted(path.name for path in parent.iterdir() if not path.name.startswith("."))
    return f"expected the folder {expected}; {parent} holds {_first(there) if there else 'nothing'}"


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _sizes(folder: Path, suffix: str) -> dict[str, int]:
    """File name without suffix -> bytes."""
    with os.scandir(folder) as entries:
        return {
            entry.name.removesuffix(suffix): entry.stat().st_size
            for entry in entries
            if entry.name.endswith(suffix) and not entry.name.startswith(".")
        }
