"""Published datasets: is everything where it should be, and whole?

Folders are listed, and the first and last bytes of the files read (of `MOST_OPENED` of them in a split), so that the
answer takes seconds. Whatever does not end as its format ends is decoded before it is called damaged. Of tar files all
headers are read, and no image.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data.catalogue import Dataset
from benchmarks.data.tars import IMAGES, members
from benchmarks.errors import Damaged

MOST_OPENED = 50_000  # of the images and of the annotations of a split, evenly spread
_THREADS = 16  # a shared file system answers many questions at once
_AT_ONCE = 256  # files for a thread: handing them out one by one takes longer than reading them
_FORMATS = ((b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"))  # first and last bytes


@dataclass(frozen=True)
class Found:
    """What lies in a dataset's folder: the problem in one line, or None, and what is there."""

    problem: str | None = None
    there: str = ""


def locate(dataset: Dataset, root: Path) -> Path:
    """The dataset's folder: `root/<published name>`, or `root` itself where that is the published folder."""
    top = dataset.folder or dataset.name
    return root if root.name == top else root / top


def inspect(dataset: Dataset, folder: Path) -> Found:
    """Whether the dataset in `folder` can be used."""
    try:
        if not folder.is_dir():
            raise Damaged(_missing(folder.parent, folder.name))
        splits = ((dataset.training, dataset.training_count), (dataset.validation, dataset.validation_count))
        look = _classification if dataset.task == "classification" else _segmentation
        (training, classes), (validation, others) = (look(dataset, folder, *split) for split in splits)
        if differing := sorted(classes ^ others):
            where = f"{folder / dataset.training} and {folder / dataset.validation}"
            raise Damaged(f"{where} have not the same classes: only one of them has {_first(differing)}")
    except Damaged as problem:
        return Found(str(problem))
    except OSError as error:
        return Found(f"cannot read {error.filename}: {error.strerror}")
    return Found(there=f"{training} training and {validation} validation images")


def class_folders(place: Path) -> list[str]:
    """The names of the folders of classes in a split's folder."""
    return sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def refuse_wrong_classes(dataset: Dataset, place: Path, found: Collection[str]) -> None:
    """Raises `Damaged` unless `found`, the names of the classes in `place`, are those of the dataset."""
    known = set(dataset.classes)
    if known and (others := sorted(set(found) - known)):
        raise Damaged(
            f"{place} holds images of {len(others):,} classes that {dataset.name} has not: {_first(others)}; "
            f"the folders or tar files must be called after its classes, as {_first(dataset.classes)}"
        )
    if len(found) != dataset.num_classes:
        lacking = f"; none of {_first(sorted(known - set(found)))}" if len(known) > len(found) else ""
        raise Damaged(f"{place} holds images of {len(found):,} classes, expected are {dataset.num_classes:,}{lacking}")


def refuse_wrong_count(place: Path, found: int, expected: int | None) -> None:
    """Raises `Damaged` unless `place` holds as many images as expected, where a number is."""
    if expected is not None and found != expected:
        raise Damaged(f"{place} holds {found:,} images, expected are {expected:,}")


def _classification(dataset: Dataset, folder: Path, split: str, count: int | None) -> tuple[str, set[str]]:
    """ImageNet's layout: a folder for each class, with images in it, or tar files. Also returns the classes."""
    place = folder / split
    if not place.is_dir():
        raise Damaged(_missing(folder, split))
    if tars := sorted(place.glob("*.tar")):
        return _tars(dataset, place, tars, count)
    classes = class_folders(place)
    refuse_wrong_classes(dataset, place, classes)
    with ThreadPoolExecutor(_THREADS) as pool:
        listed = pool.map(lambda name: _sizes(place / name, IMAGES), classes)
        sizes = dict(zip(classes, listed, strict=True))
    if empty := [name for name, images in sizes.items() if not images]:
        raise Damaged(f"{len(empty):,} folders of {place} hold no image: {_first(empty)}")
    images = {f"{name}/{image}": size for name, found in sizes.items() for image, size in found.items()}
    refuse_wrong_count(place, len(images), count)
    opened = _refuse_damaged(place, images)
    return f"{len(images):,}" + (f" ({opened:,} of them opened)" if opened < len(images) else ""), set(sizes)


def _tars(dataset: Dataset, place: Path, tars: list[Path], count: int | None) -> tuple[str, set[str]]:
    """No image is opened; which there are the headers tell."""
    found = members(tars)
    classes = {member.class_name for member in found}
    refuse_wrong_classes(dataset, place, classes)
    refuse_wrong_count(place, len(found), count)
    if empty := [f"{member.tar.name}: {member.name}" for member in found if not member.size]:
        raise Damaged(f"{len(empty):,} images in {place} are empty: {_first(empty)}")
    return f"{len(found):,} (in {len(tars):,} tar files)", classes


def _segmentation(dataset: Dataset, folder: Path, split: str, count: int | None) -> tuple[str, set[str]]:
    """Images and annotations of the same names in two folders; a list may say which of them are the split's."""
    places = [folder / place.format(split=split) for place in (dataset.images, dataset.annotations)]
    for place in places:
        if not place.is_dir():
            raise Damaged(_missing(place.parent, place.name))
    suffixes = (dataset.image_suffix, dataset.annotation_suffix)
    images, annotations = (_sizes(place, (suffix,)) for place, suffix in zip(places, suffixes, strict=True))
    images, annotations = (
        {name.removesuffix(suffix): size for name, size in found.items()}
        for found, suffix in zip((images, annotations), suffixes, strict=True)
    )
    if not images:
        expected = f", expected are {count:,}" if count else ""
        raise Damaged(f"{places[0]} holds no {suffixes[0]} image{expected}")
    if dataset.split_list:
        listed = folder / dataset.split_list.format(split=split)
        if not listed.is_file():
            raise Damaged(f"expected the file {listed}, which names the images of the split")
        names = set(listed.read_text(errors="replace").split())
        if without := sorted(names - images.keys()):
            raise Damaged(f"{len(without):,} images of the split are not in {places[0]}: {_first(without)}")
        images, annotations = ({name: found[name] for name in names & found.keys()} for found in (images, annotations))
    if without := sorted(images.keys() - annotations.keys()):
        raise Damaged(f"{len(without):,} images have no {suffixes[1]} in {places[1]}: {_first(without)}")
    if without := sorted(annotations.keys() - images.keys()):
        raise Damaged(f"{len(without):,} annotations have no {suffixes[0]} in {places[0]}: {_first(without)}")
    refuse_wrong_count(places[0], len(images), count)
    for place, suffix, sizes in zip(places, suffixes, (images, annotations), strict=True):
        _refuse_damaged(place, {f"{name}{suffix}": size for name, size in sizes.items()})
    return f"{len(images):,}", set()


def _refuse_damaged(place: Path, sizes: Mapping[str, int]) -> int:
    """Raises for empty files below `place`, and for damaged ones among those that are opened; returns how many are."""
    names = sorted(sizes)
    if empty := [name for name in names if not sizes[name]]:
        raise Damaged(f"{len(empty):,} files in {place} are empty: {_first(empty)}")
    chosen = names[:: -(-len(names) // MOST_OPENED)]
    parts = [chosen[start : start + _AT_ONCE] for start in range(0, len(chosen), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        ends = pool.map(lambda part: [name for name in part if not _ends_well(f"{place}/{name}")], parts)
        suspects = [name for found in ends for name in found]
    if damaged := {name: error for name in suspects if (error := _decoding_error(place / name))}:
        why = next(iter(damaged.values()))
        raise Damaged(f"{len(damaged):,} files in {place} are damaged: {_first(damaged)} ({why})")
    return len(chosen)


def _ends_well(path: str) -> bool:
    file = os.open(path, os.O_RDONLY)  # without Python's buffers: a quarter of the time
    try:
        first = os.pread(file, 8, 0)
        last = os.pread(file, 8, max(0, os.fstat(file).st_size - 8))
    finally:
        os.close(file)
    return any(first.startswith(begin) and last.endswith(end) for begin, end in _FORMATS)


def _decoding_error(path: Path) -> str | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError:
        return "no image"
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of these for damaged files
        return " ".join(str(error).split())
    return None


def _missing(parent: Path, name: str) -> str:
    expected = parent / name
    if not parent.is_dir():
        return f"expected the folder {expected}, but {parent} does not exist"
    there = sorted(path.name for path in parent.iterdir() if not path.name.startswith("."))
    return f"expected the folder {expected}; {parent} holds {_first(there) if there else 'nothing'}"


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _sizes(folder: Path, suffixes: tuple[str, ...], below: str = "") -> dict[str, int]:
    """File name, behind the folders that it lies in -> bytes."""
    sizes: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                sizes |= _sizes(Path(entry.path), suffixes, f"{below}{entry.name}/")
            elif entry.name.endswith(suffixes) or entry.name.lower().endswith(suffixes):
                sizes[below + entry.name] = entry.stat().st_size
    return sizes
