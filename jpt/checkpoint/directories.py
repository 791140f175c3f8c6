"""Directories that appear when they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_absent(path: str | os.PathLike[str]) -> Path:
    """The path of a directory that is to be made.

    Raises:
        FileExistsError: there is something, other than an empty directory.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f'{target} exists already and is not empty; remove it or choose another directory')
    return target


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory to fill; it gets its name when the block ends, and goes away where the block fails.

    What a killed process left behind is removed by the next one that makes the same directory.

    Raises:
        FileExistsError: there is something at `path`, other than an empty directory.
    """
    target = check_absent(path).absolute()
    temporary = target.with_name(f'{target.name}.incomplete')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
