"""Images in tar files: which there are, of which classes, and where in the files their bytes lie.

Only the headers are read, from one to the next: of ImageNet's 138 GB so in a minute, where timm's reader reads every
byte in every process, or writes what it found as a pickle beside the files, where several processes are in each other's
way. Nothing is written here.
"""

import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.errors import Damaged

IMAGES = (".jpg", ".jpeg", ".png")  # of a classification
_END = 512  # bytes, all of them zero, behind the last file


class Member(NamedTuple):
    """An image in a tar file."""

    tar: Path
    name: str  # in the tar file, folders included
    offset: int  # of its first byte in the tar file
    size: int  # bytes

    @property
    def class_name(self) -> str:
        """The folder that it lies in inside, else the name of the tar file."""
        *folders, _ = self.name.removeprefix("./").split("/")
        return folders[-1] if folders else self.tar.stem


def members(tars: Iterable[Path]) -> list[Member]:
    """The images in `tars`, file by file, in the order in which they lie there.

    Raises:
        Damaged: a tar file is empty, cut off or damaged; the message names it.
    """
    with ThreadPoolExecutor(16) as pool:  # a shared file system answers many questions at once
        return [member for found in pool.map(_members, tars) for member in found]


def _members(path: Path) -> list[Member]:
    found = []
    try:
        with tarfile.open(path, "r:") as tar:
            while info := tar.next():
                tar.members.clear()  # tarfile would keep them all
                base = info.name.rpartition("/")[2]
                if info.isreg() and base.lower().endswith(IMAGES) and not base.startswith("."):
                    found.append(Member(path, info.name, info.offset_data, info.size))
            end = tar.offset
    except tarfile.TarError as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    with open(path, "rb") as file:
        file.seek(end)
        behind = file.read(_END)
    if len(behind) < _END or any(behind):  # tarfile takes a header that it cannot read for the end
        raise Damaged(f"{path} is cut off or damaged behind its first {len(found):,} images")
    return found
