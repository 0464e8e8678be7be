"""Published datasets: is everything where it should be?"""

import os
from pathlib import Path

from benchmarks.data.catalogue import Dataset

_IMAGES = (".jpg", ".jpeg", ".png")  # of a classification


def locate(dataset: Dataset, root: Path) -> Path:
    """The dataset's folder: `root/<published name>`, or `root` itself where that is the published folder."""
    top = dataset.folder or dataset.name
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
        if dataset.task == "classification":
            problem = _classes(folder, split, dataset.num_classes)
            if problem:
                return problem
            continue
        places = [folder / place.format(split=split) for place in (dataset.images, dataset.annotations)]
        for place in places:
            if not place.is_dir():
                return _missing(place.parent, place.name)
        names = None
        if dataset.split_list:
            listed = folder / dataset.split_list.format(split=split)
            if not listed.is_file():
                return f"expected the file {listed}, which names the images of the split"
            names = set(listed.read_text().split())
        problem = _compare(*places, dataset.image_suffix, dataset.annotation_suffix, names, count)
        if problem:
            return problem
    return None


def _classes(folder: Path, split: str, num_classes: int) -> str | None:
    """ImageNet's layout: a folder for each class, with images in it."""
    if not (folder / split).is_dir():
        return _missing(folder, split)
    classes = sorted(path for path in (folder / split).iterdir() if path.is_dir())
    if len(classes) != num_classes:
        return f"{folder / split} holds {len(classes):,} folders of classes, expected are {num_classes:,}"
    empty = [path.name for path in classes if not any(p.suffix.lower() in _IMAGES for p in path.iterdir())]
    return f"{len(empty):,} folders of {folder / split} hold no image: {_first(empty)}" if empty else None


def _compare(
    images_folder: Path,
    annotations_folder: Path,
    image: str,
    annotation: str,
    names: set[str] | None,
    count: int | None,
) -> str | None:
    """What is wrong between two folders whose files end in `image` and `annotation`; `names` restricts both."""
    images, annotations = _sizes(images_folder, image), _sizes(annotations_folder, annotation)
    if not images:
        return f"{images_folder} holds no {image} image" + (f", expected are {count:,}" if count else "")
    if names is not None:
        if without := sorted(names - images.keys()):
            return f"{len(without):,} images of the split are not in {images_folder}: {_first(without)}"
        images, annotations = ({name: found[name] for name in names & found.keys()} for found in (images, annotations))
    if without := sorted(images.keys() - annotations.keys()):
        return f"{len(without):,} images have no {annotation} in {annotations_folder}: {_first(without)}"
    if without := sorted(annotations.keys() - images.keys()):
        return f"{len(without):,} annotations have no {image} in {images_folder}: {_first(without)}"
    for folder, sizes in ((images_folder, images), (annotations_folder, annotations)):
        if empty := sorted(stem for stem, size in sizes.items() if not size):
            return f"{len(empty):,} files in {folder} are empty: {_first(empty)}"
    if count is not None and len(images) != count:
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


def _sizes(folder: Path, suffix: str, below: str = "") -> dict[str, int]:
    """File name without suffix, behind the folders that it lies in -> bytes."""
    sizes: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                sizes |= _sizes(Path(entry.path), suffix, f"{below}{entry.name}/")
            elif entry.name.endswith(suffix):
                sizes[below + entry.name.removesuffix(suffix)] = entry.stat().st_size
    return sizes
