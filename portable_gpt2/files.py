"""Files and directories that are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def appearing(directory: Path, force: bool) -> Iterator[Path]:
    """Give a temporary sibling directory that takes its name when the block ends well, and vanishes otherwise."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        for file in (*draft.rglob("*"), draft):  # on the disk before its name is: after a power cut too it is whole
            synchronise(file)
        if force and directory.exists():
            _exchange(draft, directory)
        else:
            draft.replace(directory)
        synchronise(directory.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a temporary sibling file that takes the place of a file when the block ends well, and vanishes otherwise."""
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    os.close(descriptor)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(0o666 & ~_umask())
        synchronise(draft)
        draft.replace(file)
        synchronise(file.parent)
    finally:
        draft.unlink(missing_ok=True)


def synchronise(file: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if file.is_dir() and os.name != "posix":  # elsewhere a directory cannot be opened
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(draft: Path, directory: Path) -> None:
    """Swap the names of two directories; where the system can, there is one of either name at every moment."""
    if _swap(draft, directory):
        return
    aside = draft.with_name(f"{draft.name}-old")
    directory.rename(aside)
    try:
        draft.rename(directory)
    except BaseException:
        aside.rename(directory)
        raise
    aside.rename(draft)  # to be removed by this name


def _swap(first: Path, second: Path) -> bool:
    """Swap two names at once; return False where the system cannot. Linux can, and Python has no name for it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # of the kernel, of the file system
        return False
    raise OSError(code, os.strerror(code), str(second))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
