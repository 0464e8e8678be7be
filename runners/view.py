"""What a run shows while it runs: jobs done, running and left, each running job's progress, the time left."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from benchmarks.job import Job

SECONDS_BETWEEN_LINES = 20.0  # where the output is no terminal


class View:
    """A live view on a terminal; elsewhere a line per finished job, and one now and then.

    Running jobs say how far they are in files of `progress` (see runners.execute), wherever they run.
    """

    def __init__(
        self,
        console: Console,
        jobs: Sequence[Job],
        before: int,
        total: int,
        seconds: Mapping[str, float],
        slots: int,
        progress: Path,
    ):
        self.console = console
        self.jobs = {job.key: job for job in jobs}
        self.total = total  # jobs of the suite, `jobs` among them
        self.seconds = dict(seconds)  # a first guess of what each job takes
        self.slots = slots  # jobs that run side by side
        self.progress = progress
        self.left = set(self.jobs)
        self.before = before  # jobs that the ledger had already
        self.started = time.monotonic()
        self._live: Live | None = None
        self._ended = threading.Event()

    def __enter__(self) -> View:
        if self.console.is_terminal:
            # Jobs redirect the standard streams themselves; rich must not do so too.
            self._live = Live(
                get_renderable=self.render,
                console=self.console,
                refresh_per_second=2,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.__enter__()
        else:
            threading.Thread(target=self._print_lines, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._live is not None:
            self._live.__exit__(*exception)

    def finished(self, key: str) -> None:
        """Job `key` has a record now."""
        self.left.discard(key)

    def _print_lines(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LINES):
            states = self._running()
            running = "; ".join(
                f"{self.jobs[key].title} {state['fraction']:.0%} {state['text']}" for key, state in states.items()
            )
            self.console.print(f"{self._headline(states).plain}" + (f": {running}" if running else ""), soft_wrap=True)

    def render(self) -> RenderableType:
        states = self._running()
        rows = Table.grid(padding=(0, 1))
        for key, state in states.items():
            rows.add_row(
                Text(self.jobs[key].title),
                ProgressBar(total=1.0, completed=state["fraction"], width=20),
                Text(f"{state['fraction']:4.0%}"),
                Text(state["text"], style="dim"),
            )
        return Group(self._headline(states), rows)

    def _headline(self, states: Mapping[str, dict]) -> Text:
        done = self.before + len(self.jobs) - len(self.left)
        text = Text()
        text.append(f"{done} of {self.total} jobs done", style="bold")
        text.append(f" · {len(states)} running · {self.total - done - len(states)} left")
        text.append(f" · about {_duration(self._seconds_left(states))} left")
        return text

    def _seconds_left(self, states: Mapping[str, dict]) -> float:
        """The guess for what is left, corrected by how wrong it was for what this run has done so far."""
        total = sum(self.seconds.values())
        waiting = tuple(self.left)  # the main thread takes some out meanwhile
        left = sum(self.seconds[key] * (1.0 - states.get(key, {}).get("fraction", 0.0)) for key in waiting)
        elapsed = time.monotonic() - self.started
        correction = elapsed * self.slots / (total - left) if total - left > 0.1 * total and elapsed > 20 else 1.0
        return left / self.slots * correction

    def _running(self) -> dict[str, dict]:
        states = {}
        written = {path.stem for path in self.progress.glob("*.json")}  # one look, however many jobs wait
        for key in sorted(self.left & written):
            try:
                states[key] = json.loads((self.progress / f"{key}.json").read_text())
            except (OSError, ValueError):
                continue  # it has not begun, or has just ended
        return states


def _duration(seconds: float) -> str:
    """A rounded time for people: '40 s', '3 min', '5 h'."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
