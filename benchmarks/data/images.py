"""Classification data in folders (timm's reader) and in tar files, and errors that name the image."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torch.utils.data import Dataset as TorchDataset

from benchmarks.data import tars
from benchmarks.data.catalogue import Dataset
from benchmarks.data.published import class_folders, refuse_wrong_classes, refuse_wrong_count
from benchmarks.errors import Damaged


class Images(TorchDataset):
    """Image and label `i` of a reader as timm's are, transformed.

    Where timm's own dataset takes another image in place of a damaged or lost one, this one raises `Damaged`.
    """

    def __init__(self, reader: Reader, transform: Callable[[Image.Image], Any]):
        self.reader = reader
        self.transform = transform

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            file, label = self.reader[index]
            with Image.open(file) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of these for damaged files
            name = self.reader.filename(index, absolute=True)
            why = getattr(error, "strerror", None) or error  # of a lost file, without its name once more
            raise Damaged(f"cannot read the image {name}: {' '.join(str(why).split())}") from error
        return self.transform(pixels), int(label)

    @property
    def labels(self) -> list[int]:
        """The label of every image."""
        if isinstance(self.reader, ReaderTars):
            return self.reader.targets.tolist()
        return [label for _, label in self.reader.samples]


class ReaderTars(Reader):
    """Images in tar files, sorted by class and name as timm sorts those in folders.

    A tar file is open only while an image is read: there may be more of them than a process may have open files, and
    loading processes share no position in them. What is kept are numbers, 28 bytes for an image.
    """

    def __init__(self, members: list[tars.Member], classes: Sequence[str]):
        super().__init__()
        members = sorted(members, key=lambda it: natural_key(f"{it.class_name}/{it.name.rpartition('/')[2]}"))
        number = {name: i for i, name in enumerate(classes)}
        self.tars = sorted({member.tar for member in members})
        place = {tar: i for i, tar in enumerate(self.tars)}
        self.tar = np.array([place[member.tar] for member in members], np.int32)
        self.offset = np.array([member.offset for member in members], np.int64)
        self.size = np.array([member.size for member in members], np.int64)
        self.targets = np.array([number[member.class_name] for member in members], np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        with open(self.tars[self.tar[index]], "rb") as file:
            file.seek(self.offset[index])
            return io.BytesIO(file.read(self.size[index])), self.targets[index]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The tar file, and behind a colon the image in it if that can still be found out."""
        tar = self.tars[self.tar[index]]
        try:
            (name,) = (member.name for member in tars.members([tar]) if member.offset == self.offset[index])
        except (OSError, ValueError, Damaged):
            return str(tar)
        return f"{tar}: {name}"


def open_images(dataset: Dataset, folder: Path, training: bool, transform: Callable[[Image.Image], Any]) -> Images:
    """The images of a split below `folder`, in class folders or in tar files.

    Labels are the places of the classes in `dataset.classes`, else in the natural order of their names.

    Raises:
        Damaged: the split has other classes than the dataset, or not as many images; or a tar file is damaged.
    """
    place = folder / (dataset.training if training else dataset.validation)
    found = tars.members(sorted(place.glob("*.tar")))
    names = {member.class_name for member in found} or set(class_folders(place))
    refuse_wrong_classes(dataset, place, names)
    classes = [name for name in dataset.classes or sorted(names, key=natural_key) if name in names]
    if found:
        reader = ReaderTars(found, classes)
    else:
        reader = ReaderImageFolder(str(place), class_map={name: i for i, name in enumerate(classes)})
        # What lies beside the images on some systems, such as ._n01440764_18.JPEG, has their ending.
        reader.samples = [sample for sample in reader.samples if not Path(sample[0]).name.startswith(".")]
    refuse_wrong_count(place, len(reader), dataset.training_count if training else dataset.validation_count)
    return Images(reader, transform)
