"""`python -m benchmarks.data check NAME root=FOLDER [option=value ...]`: what of a dataset is there, what is missing.

Exit status 0: complete; 2: missing or incomplete; 1: wrong input.
"""

import json
import sys
from pathlib import Path

from benchmarks.data import check, describe
from benchmarks.errors import InputError

_USAGE = "usage: python -m benchmarks.data check NAME root=FOLDER [option=value ...]"


def main(arguments: list[str]) -> int:
    """Prints the answer and returns the exit status."""
    try:
        name, root, options = _parse(arguments)
        complete, line = check(name, root, options)
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{name}: {'complete' if complete else 'not complete'}: {line}")
    if not complete:
        print(f"how to get it: {describe(name).source}")
    return 0 if complete else 2


def _parse(arguments: list[str]) -> tuple[str, Path, dict[str, object]]:
    if len(arguments) < 2 or arguments[0] != "check" or "=" in arguments[1]:
        raise InputError(_USAGE)
    pairs = dict(argument.partition("=")[::2] for argument in arguments[2:])
    root = pairs.pop("root", "")
    if not root:
        raise InputError(f"root=FOLDER is missing; {_USAGE}")
    return arguments[1], Path(root), {key: _value(text) for key, text in pairs.items()}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
