"""The command line: `python runners/run.py suite=NAME [stages=[...]] [models=[...]] [output=DIR] ...`.

Exit status: 0 complete, 2 incomplete (some jobs could not run; the same command continues), 1 wrong input, or a place
that does not work (a full disk, a lost head). Either is one line; `--debug` brings the traceback.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from benchmarks.errors import InputError, choose
from runners.config import Config, register
from runners.search import SearchSession
from runners.session import Session

COMPLETE, WRONG_INPUT, INTERRUPTED = 0, 1, 130  # 2, incomplete, is for a session to say
EXPECTED = (InputError, HydraException, OmegaConfBaseException, OSError)  # the user's input, or the place it is run in
UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ENOENT,
}
CONF = Path(__file__).parent / "conf"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("HYDRA_FULL_ERROR") == "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    command = shlex.join(["python", "runners/run.py", *arguments])
    statuses: list[int] = []
    failures: list[Exception] = []
    started = time.monotonic()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def application(config: DictConfig) -> None:
        if failures:  # in an earlier run of a sweep
            return
        swept = " " + " ".join(HydraConfig.get().overrides.task) if HydraConfig.get().mode.name == "MULTIRUN" else ""
        console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
        try:
            settings: Config = OmegaConf.to_object(config)
            kind = Session if settings.search is None else SearchSession
            statuses.append(kind(settings, command + swept, console, started).run())
        except EXPECTED as error:  # kept for below: Hydra would print lines of its own
            failures.append(error)

    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and the lines below say it in one
    sys.argv[1:] = arguments
    try:
        application()
        if failures:
            raise failures[0]
    except SystemExit as error:  # argparse: a flag that does not exist
        return WRONG_INPUT if error.code else COMPLETE
    except KeyboardInterrupt:
        print("\nInterrupted. Finished jobs are kept; the same command continues.", file=sys.stderr)
        return INTERRUPTED
    except EXPECTED as error:
        if debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return WRONG_INPUT
    return max(statuses, default=COMPLETE)


def one_line(error: BaseException) -> str:
    """What was wrong, where and what to do next, in one line."""
    group, _, name = (getattr(error, "missing_cfg_file", None) or "").partition("/")
    if isinstance(error, MissingConfigException) and group in ("suite", "recipe", "search"):
        try:
            choose(group, name, (path.stem for path in (CONF / group).glob("*.yaml")), f"{group}={name}")
        except InputError as unknown:
            return str(unknown)
    if isinstance(error, OSError):
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        if error.errno in UNWRITABLE:
            return f"cannot write {what}; free some space or choose another output=FOLDER"
        return f"cannot use {what}"
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read the override '{error.override}'; write KEY=VALUE, and quote it for the shell if need be"
    cause = error.__cause__
    text = str(error if cause is None or str(cause) in str(error) else f"{error}\n{cause}")
    lines = [line.strip() for line in text.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(("object_type", "reference_type")))


if __name__ == "__main__":
    sys.exit(main())
