"""Result files that appear whole or not at all.

What is written goes to a hidden neighbour first and takes its name in one rename, so that an error, Ctrl-C or a full
disk leaves the old file as it was and nothing half-written beside it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from entropy_fast.errors import InputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, renamed to `path` when the block ends and removed when it raises.

    Missing parent folders are made. Raises InputError when `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{target} is a folder; give the name of a file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=f".partial{target.suffix}", dir=target.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_text(path: str | Path) -> Iterator[IO[str]]:
    """An open UTF-8 text file that becomes `path` when the block ends; see `atomic_path`."""
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as stream:
        yield stream


def atomic_directory(path: str | Path, fill: Callable[[Path], None], *, ours: Callable[[Path], bool]) -> None:
    """Let `fill` write a folder's content, then put the folder in the place of `path` whole.

    Args:
        path: the folder to make.
        fill: is called with an empty temporary folder beside it.
        ours: whether an existing folder may be replaced; asked so that a mistyped path costs nobody their files.

    Raises:
        InputError: `path` exists and is not `ours`.
    """
    target = Path(path)
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not ours(target):
        raise InputError(f"{target} exists and is something else; move it away or choose another output folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent))
    try:
        fill(partial)
        partial.chmod(0o777 & ~_umask())
        if target.exists():
            old = partial.with_name(partial.name + ".old")
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.rename(target)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(partial)


def _umask() -> int:
    # the mode that an ordinary open() would have given, which mkstemp does not
    mask = os.umask(0)
    os.umask(mask)
    return mask
