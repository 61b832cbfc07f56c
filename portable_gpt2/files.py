"""Files and directories: only regular files are read, and a file that is written is complete or absent."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from .checks import shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DRAFTS = ".portable_gpt2-"
"""How the names of drafts, and of the locks of their targets, begin."""

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
        # While the lock is held, so that another process that has opened the file sees that it is gone. Not another's
        # file: the directory may have been replaced by now.
        if _is_open(descriptor, file):
            file.unlink()
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
    """Give an empty draft of a directory, which takes its name when the block ends well, and vanishes otherwise.

    The target is checked before the block runs, and only one process at a time writes it. Nobody else can read the
    draft. A directory that exists keeps its mode, owner and access control list, and so do the files of its that are
    replaced by others of their names.

    Parameters
    ----------
    directory : Path
        The target; directories above it that are missing are made. If it is a symbolic link, the link remains.
    force : bool
        Whether a directory that is not empty may be replaced, with all that it holds.

    Raises
    ------
    OSError
        If the target may not be replaced (FileExistsError), cannot be made where it is said to be, or somebody else is
        writing it. The message is a sentence that names it.
    """
    directory = _real(directory)
    _check_directory(directory, force)
    with _drafting(directory) as draft:
        _check_directory(directory, force)  # again: somebody else may have written it before this had the lock
        draft.mkdir()
        _inherit(draft, directory)
        mode = stat.S_IMODE(draft.stat().st_mode)
        _chmod(draft, mode & ~0o077 | 0o700)
        yield draft
        _chmod(draft, mode)
        for file in draft.iterdir():
            _inherit(file, directory / file.name)
        for file in (*draft.rglob("*"), draft):  # on the disk before the name: after a power cut too it is whole
            if not file.is_symlink():
                synchronise(file)
        if force and directory.exists():
            _exchange(draft, directory)
        else:
            try:
                draft.replace(directory)
            except OSError as error:
                if not directory.exists():
                    raise
                raise FileExistsError(f"{directory}: was made by another process in the meantime") from error
        synchronise(directory.parent)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give an empty draft of a file, which takes its place when the block ends well, and vanishes otherwise.

    The block may write the draft, but not replace it. A file that exists keeps its mode, owner and access control list.

    Raises
    ------
    OSError
        As for `appearing`; also if there is something of this name that is not a regular file.
    """
    file = _real(file)
    with _drafting(file) as draft:
        exists = holds_file(file)
        draft.touch(exist_ok=False)
        mode = stat.S_IMODE(draft.stat().st_mode)
        _chmod(draft, 0o600)
        yield draft
        _chmod(draft, mode)
        if exists:
            _inherit(draft, file)
        synchronise(draft)
        draft.replace(file)
        synchronise(file.parent)


def _real(path: Path) -> Path:
    """Return a path without symbolic links; a loop of them stays, and is refused where it is used."""
    try:
        return Path(os.path.realpath(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: the current directory no longer exists; give an absolute path") from None


@contextlib.contextmanager
def _drafting(target: Path) -> Iterator[Path]:
    """Give the name of a target's draft, which does not exist yet and will not exist any more when the block ends.

    The names of the draft and of the target's lock follow from the target's: what a process that was killed left is
    found, and removed, by the next one that writes the same target.
    """
    key = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    draft, aside, lock_file = (target.with_name(f"{DRAFTS}{key}.{end}") for end in ("draft", "old", "lock"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_parents(target))
        try:
            held = stack.enter_context(lock(lock_file))
        except Locked as error:
            who = f"process {error.pid}" if error.pid else "another process"
            raise FileExistsError(f"{target}: {who} is writing it; wait until it ends, or give another name") from None
        except OSError as error:
            raise type(error)(f"{target}: cannot be written in {target.parent}: {error.strerror}") from None
        if held:
            if aside.exists() and not target.exists():  # killed between the two renamings of `_exchange`
                aside.rename(target)
            _remove(aside)
            _remove(draft)
        elif os.path.lexists(draft):
            raise FileExistsError(
                f"{target}: another process is writing it, or was killed and left {draft}; remove that, or wait"
            )
        try:
            yield draft
        finally:
            with contextlib.suppress(OSError):  # the next writer tries again, and says why it cannot
                _remove(draft)


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the directories above a target, and remove those that were made if the block fails."""
    made = []
    try:
        for parent in reversed(target.parents):
            if not parent.is_dir():
                try:
                    parent.mkdir()
                except FileExistsError:
                    if not parent.is_dir():  # otherwise, somebody else has just made it
                        raise
                else:
                    made.append(parent)
    except OSError as error:
        why = "is not a directory" if isinstance(error, FileExistsError) else f"cannot be made: {error.strerror}"
        for parent in reversed(made):
            parent.rmdir()
        raise type(error)(f"{target}: its parent {parent} {why}") from None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else has put something there
            for parent in reversed(made):
                parent.rmdir()
        raise


def _check_directory(directory: Path, force: bool) -> None:
    """Refuse a target that a new directory could not replace, or may not."""
    try:
        is_directory = stat.S_ISDIR(directory.lstat().st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise type(error)(f"{directory}: {error.strerror}") from None
    if directory.is_symlink():
        raise FileExistsError(f"{directory}: a loop of symbolic links; give another directory")
    if not is_directory:
        raise FileExistsError(f"{directory}: exists already; give a new directory, this is none")
    if _is_mount_point(directory):
        raise FileExistsError(f"{directory}: is a mount point, which cannot be replaced; give a directory inside it")
    try:
        here = Path(os.path.realpath(os.curdir))
    except FileNotFoundError:  # it was removed
        here = Path(os.devnull)
    if directory in (here, *here.parents):
        which = "is" if directory == here else "holds"
        raise FileExistsError(f"{directory}: {which} the current directory, and is not replaced; give another one")
    if not force and any(directory.iterdir()):
        raise FileExistsError(f"{directory}: exists already; give a new directory, or replace this one by force")


def _is_mount_point(directory: Path) -> bool:
    """Return whether something is mounted at a directory, a part of the same file system included."""
    if os.path.ismount(directory):
        return True
    with contextlib.suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
        escaped = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % found[0][0], os.fsencode(directory))
        return any(line.split(b" ")[4] == escaped for line in mounts)
    return False


def _inherit(new: Path, old: Path) -> None:
    """Give a file or a directory the owner, mode and access control list of one that it replaces, as permitted."""
    if new.is_symlink() or not os.path.lexists(old):
        return
    found = old.stat()
    if os.name == "posix":
        with contextlib.suppress(OSError):
            os.chown(new, found.st_uid, found.st_gid)
    _chmod(new, stat.S_IMODE(found.st_mode))
    if hasattr(os, "listxattr"):  # Linux
        for name in ("system.posix_acl_access", "system.posix_acl_default"):
            with contextlib.suppress(OSError):
                os.setxattr(new, name, os.getxattr(old, name))


def _chmod(path: Path, mode: int) -> None:
    """Change a mode where the file system has modes: some refuse those that they cannot store."""
    with contextlib.suppress(OSError):
        path.chmod(mode)


def _remove(path: Path) -> None:
    """Remove a file or a directory with all that it holds, whatever their modes are."""
    if not path.is_symlink() and path.is_dir():
        for root, _, _ in os.walk(path):
            with contextlib.suppress(OSError):
                os.chmod(root, 0o700)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    aside = draft.with_suffix(".old")
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
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # the kernel or the file system cannot
        return False
    raise OSError(code, os.strerror(code), str(second))
