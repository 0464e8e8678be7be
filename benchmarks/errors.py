"""The errors that a user of the benchmarks may see; each is one clear line."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """The user's input is wrong. The message is one line: what was wrong, where, and what to do next."""


class Blocked(Exception):
    """A job cannot run for a reason outside it, for example because a dataset is not there.

    The message is one line that names the reason. `looked_in` says where what is missing was looked for and
    `how_to_get` how to get it; both are shown in a suite's closing summary.
    """

    def __init__(self, reason: str, *, looked_in: str = "", how_to_get: str = ""):
        super().__init__(reason)
        self.looked_in = looked_in
        self.how_to_get = how_to_get

    def __reduce__(self):
        # The default would drop the keyword arguments, and the error has to travel between processes.
        return _rebuild_blocked, (str(self), self.looked_in, self.how_to_get)


class Damaged(Blocked):
    """A file of a dataset cannot be used. The message names the file.

    A data loader's worker process wraps the message into its traceback; what is kept of that is the last line.
    """

    def __init__(self, reason: str, **where: str):
        super().__init__(reason.rpartition(f"{type(self).__name__}: ")[2].strip(), **where)


class WorkerLost(RuntimeError):
    """A process that was at a job is gone: killed, out of memory, or its machine is. Elsewhere the job may go on."""


def _rebuild_blocked(reason: str, looked_in: str, how_to_get: str) -> Blocked:
    return Blocked(reason, looked_in=looked_in, how_to_get=how_to_get)


def unsupported_size(model: str, input_size: tuple[int, ...], error: Exception) -> InputError:
    """The error for a model that cannot take `input_size` (channels, height, width); `error` is what it raised."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(f"{model} cannot take an input of {'x'.join(map(str, input_size))}: {lines[0].strip()}")


def choose(what: str, value: str, known: Iterable[str], where: str = "") -> str:
    """`value`, if it is among `known`.

    Raises:
        InputError: it is not; the message has the near matches, or all that is known where none is near.
    """
    known = sorted(known)
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
    raise InputError(f"{where + ': ' if where else ''}unknown {what} '{value}'; {hint}")
