"""The published datasets in miniature: a few small images and label maps in exactly the published layouts."""

from __future__ import annotations

import dataclasses
import io
import itertools
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from benchmarks import data

VOID = 255  # a pixel without a class, in what is drawn
SIZES = [(60, 90), (84, 63), (64, 64)]  # height, width; not all the same, as in the published data
PUBLISHED = ("ade20k", "cityscapes", "pascal_context_59", "pascal_context_60", "coco_stuff10k")

# The images' and label maps' files, and the label of a void pixel in a file (None: every pixel has a class).
_LAYOUTS = {
    "ade20k": (
        "ADEChallengeData2016/images/{split}/ADE_{tag}_{n:08d}.jpg",
        "ADEChallengeData2016/annotations/{split}/ADE_{tag}_{n:08d}.png",
        0,
    ),
    "cityscapes": (
        "cityscapes/leftImg8bit/{split}/{city}/{city}_{n:06d}_000019_leftImg8bit.png",
        "cityscapes/gtFine/{split}/{city}/{city}_{n:06d}_000019_gtFine_labelTrainIds.png",
        255,
    ),
    "pascal_context_59": (
        "VOC2010/JPEGImages/2010_{m:06d}.jpg",
        "VOC2010/SegmentationClassContext/2010_{m:06d}.png",
        0,
    ),
    "pascal_context_60": (
        "VOC2010/JPEGImages/2010_{m:06d}.jpg",
        "VOC2010/SegmentationClassContext/2010_{m:06d}.png",
        None,
    ),
    "coco_stuff10k": (
        "coco_stuff10k/images/{split}/COCO_train2014_{m:012d}.jpg",
        "coco_stuff10k/annotations/{split}/COCO_train2014_{m:012d}_labelTrainIds.png",
        0,
    ),
}


@dataclass(frozen=True)
class Miniature:
    """A dataset of segmentation: its files by split, and the classes (`VOID` for none) that were drawn."""

    name: str
    root: Path  # what data_root is
    images: dict[str, list[Path]]
    labels: dict[str, list[Path]]
    drawn: dict[str, list[np.ndarray]]

    @property
    def folder(self) -> Path:
        return self.root / (data.describe(self.name).folder or self.name)

    def draw(self, split: str, index: int, classes: np.ndarray) -> None:
        """Writes a label map as the published files have it."""
        self.drawn[split][index] = classes
        write(self.labels[split][index], _encode(self.name, classes))


def _encode(name: str, classes: np.ndarray) -> np.ndarray:
    """Cityscapes' train ids and PASCAL-Context's 60 classes are as they are; the others' classes start at 1."""
    void = _LAYOUTS[name][2]
    if void is None:
        assert VOID not in classes
        return classes
    return classes if void == VOID else np.where(classes == VOID, 0, classes + 1).astype(np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def make(name: str, root: Path, training: int = 3, validation: int = 2) -> Miniature:
    """The segmentation dataset `name` below `root`, with so many images in its splits."""
    described = data.describe(name)
    image, label, void = _LAYOUTS[name]
    dice = np.random.default_rng(7)
    made = Miniature(name, root, {}, {}, {})
    for split, count in ((described.training, training), (described.validation, validation)):
        made.images[split], made.labels[split], made.drawn[split] = [], [], []
        for n in range(count):
            tag, city = ("train", "aachen") if split == described.training else ("val", "ulm")
            names = {"split": split, "n": n, "m": n + 1000 * (tag == "val"), "tag": tag, "city": city}
            height, width = SIZES[n % len(SIZES)]
            made.images[split].append(root / image.format(**names))
            made.labels[split].append(root / label.format(**names))
            write(made.images[split][n], dice.integers(0, 256, (height, width, 3), dtype=np.uint8))
            classes = dice.integers(0, described.num_classes, (height, width), dtype=np.uint8)
            classes.flat[: described.num_classes] = np.arange(described.num_classes)  # every class, the last one too
            if void is not None:
                classes[-5:] = VOID
            made.drawn[split].append(classes)
            made.draw(split, n, classes)
        if described.split_list:
            listed = made.folder / described.split_list.format(split=split)
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_text("".join(f"{path.stem}\n" for path in made.images[split]))
    _add_what_lies_beside(made)
    return made


def _add_what_lies_beside(made: Miniature) -> None:
    """Files of the published archives that no reader may take for its own."""
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    if made.name == "cityscapes":
        for path in itertools.chain(*made.labels.values()):
            for kind in ("color", "labelIds"):
                write(path.with_name(path.name.replace("labelTrainIds", kind)), pixels)
        (made.folder / "leftImg8bit" / "train" / "aachen" / "._x_leftImg8bit.png").write_bytes(b"x")
    if made.name.startswith("pascal_context"):
        write(made.folder / "JPEGImages" / "2007_000027.jpg", pixels)  # in neither list
    if made.name == "coco_stuff10k":
        made.labels["train2014"][0].with_suffix(".mat").write_bytes(b"x")


def make_imagenet(root: Path, classes: Sequence[str], tars: bool = False) -> Path:
    """ImageNet in miniature, two training images and one for validation in each class; tars as the published ones."""
    dice = np.random.default_rng(7)
    for split, count in (("train", 2), ("val", 1)):
        for name in classes:
            files = {}
            for n in range(count):
                pixels = dice.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                files[f"{name}_{n}.JPEG"] = cv2.imencode(".jpg", pixels)[1].tobytes()
            place = root / "imagenet" / split
            place.mkdir(parents=True, exist_ok=True)
            if tars:
                with tarfile.open(place / f"{name}.tar", "w") as tar:
                    for file, content in files.items():
                        member = tarfile.TarInfo(file)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            else:
                (place / name).mkdir()
                for file, content in files.items():
                    (place / name / file).write_bytes(content)
    return root / "imagenet"


def expect(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """Makes the catalogue expect a miniature: `training_count`, `validation_count`, `num_classes`, `class_names`."""
    monkeypatch.setitem(data.DATASETS, name, dataclasses.replace(data.describe(name), **changes))
