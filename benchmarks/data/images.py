"""Classification data: timm's readers of folders and tar files, and errors that name the image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset as TorchDataset

from benchmarks.data.catalogue import Dataset
from benchmarks.errors import Damaged


class Images(TorchDataset):
    """Image and label `i` of one of timm's readers, transformed.

    Where timm's own dataset takes another image in place of a damaged one, this one raises `Damaged`.
    """

    def __init__(self, reader: Reader, transform: Callable[[Image.Image], Any]):
        self.reader = reader
        self.transform = transform

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, label = self.reader[index]
        try:
            with Image.open(file) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of these for damaged files
            name = self.reader.filename(index, absolute=True)
            raise Damaged(f"cannot read the image {name}: {' '.join(str(error).split())}") from error
        return self.transform(pixels), int(label)

    @property
    def labels(self) -> list[int]:
        """The label of every image."""
        if isinstance(self.reader, ReaderImageInTar):
            return self.reader.targets.tolist()
        return [label for _, label in self.reader.samples]


def open_images(dataset: Dataset, folder: Path, training: bool, transform: Callable[[Image.Image], Any]) -> Images:
    """The images of a split below `folder`, in class folders or in tar files.

    Raises:
        Damaged: the split has not as many classes as the dataset.
    """
    place = folder / (dataset.training if training else dataset.validation)
    in_tars = any(place.glob("*.tar"))
    reader = ReaderImageInTar(str(place)) if in_tars else ReaderImageFolder(str(place))
    classes = reader.class_name_to_idx if in_tars else reader.class_to_idx
    if len(classes) != dataset.num_classes:
        raise Damaged(f"{place} holds images of {len(classes):,} classes, expected are {dataset.num_classes:,}")
    return Images(reader, transform)
