"""One timing at a time on a device of this machine, whichever run, user or output folder it belongs to."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# Of all processes, whatever TMPDIR a user or a scheduler gives each.
FOLDER = Path("/tmp" if os.name == "posix" else tempfile.gettempdir())
SECONDS = 1.0  # between two words of who waits


@contextmanager
def alone_on(device: str, waiting: Callable[[], None]) -> Iterator[str | None]:
    """Holds the machine's lock of a device, which the operating system takes back however the process ends.

    Args:
        device: As PyTorch names it.
        waiting: Called every second while another timing holds the lock; what it raises ends the wait.

    Yields:
        None, or a line that says why there is no lock here: a timing is taken without it.
    """
    path = FOLDER / f"hires-vit-benchmark-{_name(device)}.lock"
    lock = FileLock(path, mode=0o666)  # for all users
    problem = None
    while True:
        try:
            lock.acquire(timeout=SECONDS)
        except Timeout:
            waiting()
            continue
        except OSError as error:
            problem = f"timed without the lock {path} ({error.strerror or error}): another run may have timed meanwhile"
        break
    try:
        yield problem
    finally:
        lock.release()


def _name(device: str) -> str:
    """What tells a device from all others of this machine, whatever a process may see of them."""
    if not device.startswith("cuda"):
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        return "cpu"  # the measurement itself says that there is no GPU
    return f"gpu-{torch.cuda.get_device_properties(device).uuid}"
