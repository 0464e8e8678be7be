"""The ledger: one JSON file per job, safe for concurrent writers and for a crash at any moment."""

import errno
import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from .files import remove_stale_temporaries, sync_folder, write_atomic
from .record import NewerSchemaError, Record, RecordError, parse_json

LOCK_SECONDS = 60.0
_WORTH = {"done": 2, "stopped": 1}


class Ledger:
    """Records by job key in `folder/<key>.json`.

    A file is `{"checksum": ..., "record": ...}`: this envelope never changes, so that a record of a later schema can
    still be told from a damaged one. Readers take no lock, since a file is replaced as a whole. Writers, and whoever
    sets a damaged file aside, hold one lock of the operating system, which dies with its process.

    `reports` collects one line per record that could not be read; `on_report` is called with each as it comes up.
    """

    def __init__(self, folder: str | Path, on_report: Callable[[str], None] | None = None) -> None:
        self.folder = Path(folder)
        self.reports: list[str] = []
        self._on_report = on_report

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def get(self, key: str) -> Record | None:
        """The record of `key`; None where there is none that can be read (`reports` says when one was damaged)."""
        try:
            return self._read(key)
        except NewerSchemaError as error:
            self._report(f"Record {self.path(key)} was left alone and not used: {error}; update the code to use it.")
        except RecordError:
            # Another process may have repaired the file since: look again under the lock before moving anything.
            return self._repair(key)
        return None

    def put(self, record: Record) -> Record:
        """Keep `record` on the disk and return the record that now stands in the ledger.

        A done record is never replaced by another, nor a stopped one by a blocked or failed one (two runs may share a
        ledger, and a result is worth more than the news that somebody else could not get it): then the record that
        stands is returned and nothing is written. Otherwise the latest wins. A record that cannot be read is moved
        aside first, never overwritten.
        Raises `OSError` with the path: disk full, read-only folder, or the lock not free within `LOCK_SECONDS`.
        """
        with self._lock():
            try:
                standing = self._read(record.key)
            except NewerSchemaError as error:
                standing = None
                self._move(record.key, "newer", error)
            except RecordError as error:
                standing = None
                self._move(record.key, "damaged", error)
            if standing is not None and _WORTH.get(standing.status, 0) > _WORTH.get(record.status, 0):
                return standing
            write_atomic(self.path(record.key), _seal(record))
        return record

    def records(self, keys: Iterable[str] | None = None) -> list[Record]:
        """All readable records sorted by key, or those of `keys` in that order (absent ones are left out)."""
        if keys is None:
            # Hidden files are temporaries of writers, living or killed.
            keys = sorted(path.stem for path in self.folder.glob("*.json") if not path.name.startswith("."))
        records = []
        for key in dict.fromkeys(keys):
            try:
                record = self.get(key)
            except OSError as error:  # a folder of that name, or no permission to read
                self._report(f"Record {self.path(key)} cannot be read and is not used: {error.strerror or error}.")
            else:
                records += [] if record is None else [record]
        remove_stale_temporaries(self.folder)
        return records

    def retire(self, key: str, reason: str) -> None:
        """Move a record aside that can be read but is no longer true; `reports` says so."""
        with self._lock():
            if self.path(key).exists():
                self._move(key, "damaged", RecordError(reason))

    def set_aside(self) -> list[Path]:
        """The files that were moved aside as damaged, in this run or an earlier one."""
        return sorted((self.folder / "damaged").glob("*.json"))

    def _read(self, key: str) -> Record | None:
        try:
            content = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        return _unseal(content, key)

    def _repair(self, key: str) -> Record | None:
        try:
            with self._lock():
                try:
                    return self._read(key)
                except NewerSchemaError:
                    return None
                except RecordError as error:
                    self._move(key, "damaged", error)
        except OSError as error:
            reason = error.strerror or error
            self._report(f"Record {self.path(key)} is damaged and could not be set aside ({reason}); it is not used.")
        return None

    def _move(self, key: str, subfolder: str, error: RecordError) -> None:
        """Move a file aside under a name that is not taken. Call it with the lock held."""
        target = self.folder / subfolder / f"{key}.{secrets.token_hex(4)}.json"
        target.parent.mkdir(exist_ok=True)
        self.path(key).rename(target)
        sync_folder(self.folder)
        self._report(f"Record {self.path(key)} was set aside as {target} and is not used: {error}.")

    @contextmanager
    def _lock(self) -> Iterator[None]:
        path = self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A new lock object each time: threads of one process would share a kept one and not exclude each other.
            lock = FileLock(path, timeout=LOCK_SECONDS)
            lock.acquire()
        except TimeoutError as error:
            message = f"another process has held the ledger's lock for {LOCK_SECONDS:g} seconds"
            raise TimeoutError(errno.ETIMEDOUT, message, str(path)) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        try:
            yield
        finally:
            lock.release()

    def _report(self, message: str) -> None:
        if message not in self.reports:
            self.reports.append(message)
            if self._on_report is not None:
                self._on_report(message)


def _checksum(record: object) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _seal(record: Record) -> str:
    return f'{{"checksum": "{_checksum(record.to_dict())}",\n"record": {record.to_json()}}}\n'


def _unseal(content: bytes, key: str) -> Record:
    envelope = parse_json(content)
    if not isinstance(envelope, dict) or envelope.keys() != {"checksum", "record"}:
        raise RecordError("it is not a ledger file")
    if envelope["checksum"] != _checksum(envelope["record"]):
        raise RecordError("its checksum does not match its content")
    record = Record.from_dict(envelope["record"])
    if record.key != key:
        raise RecordError(f"it holds the record of another key, {record.key}")
    return record
