"""Files that are either whole or absent: what every writer of `results/` uses."""

import csv
import io
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
STALE_SECONDS = 3600.0  # A temporary file older than this belongs to a writer that was killed.


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new one, never a part.

    Creates the parent folder. Raises `OSError` that carries `path` (disk full, read-only folder, a file in the way).
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    # Hidden and in the same folder: os.replace is atomic only within one file system.
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        # A failed write or fsync names no file, and a user never heard of the temporary one.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def csv_text(columns: Sequence[str], lines: Iterable[Mapping[str, object]]) -> str:
    """A CSV file with a header; what a line lacks is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale_temporaries(folder: Path, older_than: float = STALE_SECONDS) -> list[Path]:
    """Remove what killed writers left behind in `folder`; younger files may belong to a living writer and stay."""
    removed = []
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        try:
            if time.time() - path.stat().st_mtime > older_than:
                path.unlink()
                removed.append(path)
        except OSError:
            continue  # Another process removed it first, or the folder is read-only: it does no harm.
    return removed
