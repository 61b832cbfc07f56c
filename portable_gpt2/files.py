"""Files and directories: what is read is a regular file, and what is written is complete or absent."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .checks import shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular(file: Path) -> Path:
    """Return a path if it leads to a regular file, whatever symbolic links it goes through.

    To open a named pipe would wait for a writer, perhaps for ever, and a device such as ``/dev/zero`` has no end.

    Raises
    ------
    OSError
        If there is no such file (FileNotFoundError), it is something other than a regular file, or it cannot be
        reached: its symbolic links form a loop, its name is too long, a directory above it may not be read. The message
        is a sentence that names it.

    Examples
    --------
    >>> import pathlib
    >>> from portable_gpt2 import files
    >>> files.regular(pathlib.Path("/"))
    Traceback (most recent call last):
    ...
    OSError: /: is a directory; expected a regular file
    """
    try:
        kind = stat.S_IFMT(file.stat().st_mode)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except OSError as error:
        loop = error.errno == errno.ELOOP
        raise OSError(f"{file}: {'a loop of symbolic links' if loop else error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise OSError(f"{shown(str(file))}: {error}") from None
    if kind != stat.S_IFREG:
        raise OSError(f"{file}: is {_KINDS.get(kind, 'something else')}; expected a regular file")
    return file


def holds_file(file: Path) -> bool:
    """Return whether there is a file of this name; if there is something else, refuse it as `regular` does."""
    try:
        regular(file)
    except FileNotFoundError:
        if file.is_symlink():
            raise FileNotFoundError(f"{file}: a symbolic link to {os.readlink(file)}, where there is no file") from None
        return False
    return True


class Locked(OSError):
    """Another process, or another thread of this one, holds a lock. `pid` is its process id, if it is known."""

    def __init__(self, file: Path, pid: int | None) -> None:
        super().__init__(f"{file}: locked by {f'process {pid}' if pid else 'another process'}")
        self.pid = pid


@contextlib.contextmanager
def lock(file: Path) -> Iterator[bool]:
    """Hold the lock of a file while the block runs. The file is made for the lock, and removed when the block ends.

    The system frees the lock when its process ends, however it ends: a file that ``kill -9`` left does not block. The
    block gets True, or False where there are no locks (Windows, some network file systems); it then runs without one.

    Parameters
    ----------
    file : Path
        A name that is used for nothing else; its directory must exist.

    Raises
    ------
    Locked
        If somebody else holds the lock. Its `pid` is the id of that process.

    Examples
    --------
    >>> import os, pathlib, tempfile
    >>> from portable_gpt2 import files
    >>> file = pathlib.Path(tempfile.mkdtemp(), "lock")
    >>> with files.lock(file):
    ...     try:
    ...         with files.lock(file):
    ...             pass
    ...     except files.Locked as error:
    ...         print(error.pid == os.getpid())
    True
    >>> file.exists()
    False
    """
    if fcntl is None:
        yield False
        return
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            held = _flock(descriptor, file)
            if _is_open(descriptor, file):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder removed the file between our two calls; this lock would exclude nobody
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"%d\n" % os.getpid())
        yield held
    finally:
        file.unlink(missing_ok=True)  # while the lock is held: whoever opened the file before sees that it is gone
        os.close(descriptor)


def _flock(descriptor: int, file: Path) -> bool:
    """Lock an open file, or return False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 32, 0).strip()
        raise Locked(file, int(text) if text.isdigit() else None) from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            return False
        raise
    return True


def _is_open(descriptor: int, file: Path) -> bool:
    """Return whether a name still leads to the file that was opened under it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False


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
