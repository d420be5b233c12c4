"""What the command line says on stderr: progress, warnings, errors. stdout is left to results."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from entropy_fast.errors import EntropyFastWarning


class StageBars:
    """A progress bar for each stage of the work; call it with (stage, done, total)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move the stage's bar, which appears with its first call."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)


@contextmanager
def stage_bars() -> Iterator[StageBars]:
    """Progress bars on stderr while entered; where stderr is no terminal, only their final state is printed."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield StageBars(progress)


def say(message: str, *, style: str | None = None) -> None:
    """A line on stderr, never cut or interpreted as markup."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(message, style=style, markup=False)


def say_error(message: str) -> None:
    """One line, `error: ...`, on stderr."""
    say("error: " + " ".join(message.split()), style="red")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While entered, our warnings are one line each on stderr, and other libraries keep theirs to themselves."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        say(f"warning: {message}", style="yellow")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", EntropyFastWarning)
        warnings.showwarning = show
        yield
