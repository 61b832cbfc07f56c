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
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .checks import shown

try:
    import fcntl
except ImportError:  # Windows lacks this module
    fcntl = None  # type: ignore[assignment]

DRAFTS = ".portable_gpt2-"
"""The beginning of the names of drafts and of their locks."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular(file: Path) -> Path:
    """Return a path if it leads to a regular file, directly or through symbolic links.

    Other kinds are refused because opening a named pipe waits for a writer, perhaps for ever, and because reading a
    device such as ``/dev/zero`` never ends.

    Raises
    ------
    OSError
        If there is no such file (FileNotFoundError), if the path leads to something other than a regular file, or if it
        cannot be followed: its symbolic links form a loop, its name is too long, or a directory may not be read. The
        message names the path.

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
    """Return whether there is a file of this name; raise the error of `regular` if there is something else."""
    try:
        regular(file)
    except FileNotFoundError:
        if file.is_symlink():
            raise FileNotFoundError(f"{file}: a symbolic link to {os.readlink(file)}, where there is no file") from None
        return False
    return True


def check_writable(file: Path) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises
    ------
    OSError
        If there is no such directory (FileNotFoundError), the directory cannot be written to, or the file is a
        directory.
    """
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such directory")
    if file.is_dir():
        raise IsADirectoryError(f"{file}: is a directory; expected the name of a file")
    try:
        tempfile.TemporaryDirectory(prefix=".try-", dir=file.parent).cleanup()
    except OSError as error:
        raise OSError(f"{file.parent}: cannot be written to: {error.strerror}") from error


def already_exists(file: Path) -> FileExistsError:
    """Return the error for a file that exists and must not be replaced."""
    return FileExistsError(
        f"{file}: exists already; give a new name, or replace this file by force (--force, or force=True in Python)"
    )


def check_new(file: Path, force: bool) -> None:
    """Refuse a file that could not be written, and one that exists unless force is true.

    Raises
    ------
    OSError
        As for `check_writable`; FileExistsError if the file exists.
    """
    check_writable(file)
    if holds_file(file) and not force:
        raise already_exists(file)


def write_text(file: Path, text: str, force: bool) -> None:
    """Write a text in UTF-8 to a file, which appears complete or not at all. See `check_new` for force."""
    check_new(file, force)
    with replacing(file) as draft:
        draft.write_text(text, "utf-8")
        check_new(file, force)  # again, because another process may have written it meanwhile


class Locked(OSError):
    """Another process, or another thread of this one, holds the lock. `pid` is the holder's process id, if known."""

    def __init__(self, file: Path, pid: int | None) -> None:
        super().__init__(f"{file}: locked by {f'process {pid}' if pid else 'another process'}")
        self.pid = pid


@contextlib.contextmanager
def lock(file: Path) -> Iterator[bool]:
    """Hold a lock while the block runs. The lock is a file, which is created for the block and removed at its end.

    The operating system frees the lock when the process ends, even if it is killed. So a file that was left by a killed
    process locks nothing. The context manager returns True. On systems without locks (Windows, some network file
    systems) it returns False, and the block runs without a lock.

    Parameters
    ----------
    file : Path
        The name of the lock, which must not be used for anything else. Its directory must exist.

    Raises
    ------
    Locked
        If another process or thread holds the lock. `pid` of the error is the id of that process.

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
        # The previous holder removed the file after it was opened here. A lock on it would exclude nobody: try again.
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"%d\n" % os.getpid())
        yield held
    finally:
        # The file is removed before the lock is freed, so that a process that waits for the lock sees that it is gone.
        # If the directory was replaced meanwhile, the name belongs to another process's lock, which must stay.
        if _is_open(descriptor, file):
            file.unlink()
        os.close(descriptor)


def _flock(descriptor: int, file: Path) -> bool:
    """Lock an open file and return True, or return False if the file system has no locks."""
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
    """Write a directory that appears complete or not at all.

    The context manager returns a draft, an empty directory that the block fills. If the block succeeds, the draft gets
    the name of the target; if it raises an error, the draft is removed. The target is checked before the block runs,
    only one process at a time can write it, and other users cannot read the draft. The new directory gets the mode,
    owner and access control list of the directory that it replaces, and each new file gets those of the old file of the
    same name.

    Parameters
    ----------
    directory : Path
        The target. Missing directories above it are made. If it is a symbolic link, the directory that the link leads
        to is replaced.
    force : bool
        Whether to replace a directory that is not empty, with all that it contains.

    Raises
    ------
    OSError
        If the target may not be replaced (FileExistsError), if it cannot be made there, or if another process is
        writing it. The message names the target.
    """
    directory = _real(directory)
    _check_directory(directory, force)
    with _drafting(directory) as draft:
        # Checked again, because another process may have written the target before this one had the lock.
        _check_directory(directory, force)
        draft.mkdir()
        _inherit(draft, directory)
        mode = stat.S_IMODE(draft.stat().st_mode)
        _chmod(draft, mode & ~0o077 | 0o700)
        yield draft
        _chmod(draft, mode)
        for file in draft.iterdir():
            _inherit(file, directory / file.name)
        for file in (*draft.rglob("*"), draft):  # before the rename, so that a power cut does no harm
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
    """Write a file that appears complete or not at all.

    The context manager returns a draft, an empty file that the block writes to but must not replace. If the block
    succeeds, the draft replaces the target; if it raises an error, the draft is removed. The new file gets the mode,
    owner and access control list of the file that it replaces.

    Raises
    ------
    OSError
        As for `appearing`, and if something other than a regular file has this name.
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
    """Return a path without symbolic links. A loop of links is returned unchanged; using it fails."""
    try:
        return Path(os.path.realpath(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: the current directory no longer exists; give an absolute path") from None


@contextlib.contextmanager
def _drafting(target: Path) -> Iterator[Path]:
    """Yield the path of a target's draft, which does not exist yet. It is removed when the block ends.

    The names of the draft and of the lock are derived from the target's name. So the next process that writes the same
    target finds and removes the files that a killed process left.
    """
    key = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    draft, aside, lock_file = (target.with_name(f"{DRAFTS}{key}.{end}") for end in ("draft", "old", "lock"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_parents(target))
        try:
            held = stack.enter_context(lock(lock_file))
        except Locked as error:
            who = f"process {error.pid}" if error.pid else "another process"
            raise FileExistsError(f"{target}: {who} is writing it; wait for it to end, or give another name") from None
        except OSError as error:
            raise type(error)(f"{target}: cannot be written in {target.parent}: {error.strerror}") from None
        if held:
            if aside.exists() and not target.exists():  # a process was killed between the two renamings of `_exchange`
                aside.rename(target)
            _remove(aside)
            _remove(draft)
        elif os.path.lexists(draft):
            raise FileExistsError(
                f"{target}: another process is writing it, or was killed and left {draft}; wait, or remove that file"
            )
        try:
            yield draft
        finally:
            with contextlib.suppress(OSError):  # the next writer tries again and reports the error
                _remove(draft)


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the missing directories above a target. If the block fails, remove these directories again."""
    made = []
    try:
        for parent in reversed(target.parents):
            if not parent.is_dir():
                try:
                    parent.mkdir()
                except FileExistsError:
                    if not parent.is_dir():  # not an error if another process has just made this directory
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
        with contextlib.suppress(OSError):  # fails if another process has put something there
            for parent in reversed(made):
                parent.rmdir()
        raise


def _check_directory(directory: Path, force: bool) -> None:
    """Raise an error if a new directory cannot replace the target, or must not."""
    try:
        is_directory = stat.S_ISDIR(directory.lstat().st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise type(error)(f"{directory}: {error.strerror}") from None
    if directory.is_symlink():
        raise FileExistsError(f"{directory}: a loop of symbolic links; give another directory")
    if not is_directory:
        raise FileExistsError(f"{directory}: exists already and is not a directory; give a new one")
    if _is_mount_point(directory):
        raise FileExistsError(f"{directory}: is a mount point, which cannot be replaced; give a directory inside it")
    try:
        here = Path(os.path.realpath(os.curdir))
    except FileNotFoundError:  # the current directory was removed
        here = Path(os.devnull)
    if directory in (here, *here.parents):
        which = "is" if directory == here else "holds"
        raise FileExistsError(f"{directory}: {which} the current directory, and is not replaced; give another one")
    if not force and any(directory.iterdir()):
        raise FileExistsError(f"{directory}: exists already; give a new directory, or replace this one by force")


def _is_mount_point(directory: Path) -> bool:
    """Return whether something is mounted at a directory, even if it is a part of the same file system."""
    if os.path.ismount(directory):
        return True
    with contextlib.suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
        escaped = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % found[0][0], os.fsencode(directory))
        return any(line.split(b" ")[4] == escaped for line in mounts)
    return False


def _inherit(new: Path, old: Path) -> None:
    """Give a new file or directory the owner, mode and access control list of the old one, where that is permitted."""
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
    """Change a mode. Nothing happens on a file system that has no modes or cannot store this mode."""
    with contextlib.suppress(OSError):
        path.chmod(mode)


def _remove(path: Path) -> None:
    """Remove a file, or a directory with all that it contains, even if the modes forbid it."""
    if not path.is_symlink() and path.is_dir():
        for root, _, _ in os.walk(path):
            with contextlib.suppress(OSError):
                os.chmod(root, 0o700)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def synchronise(file: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if file.is_dir() and os.name != "posix":  # other systems cannot open a directory
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(draft: Path, directory: Path) -> None:
    """Swap the names of two directories, atomically if the system supports this."""
    if _swap(draft, directory):
        return
    aside = draft.with_suffix(".old")
    directory.rename(aside)
    try:
        draft.rename(directory)
    except BaseException:
        aside.rename(directory)
        raise
    aside.rename(draft)  # the caller removes the old directory under the name of the draft


def _swap(first: Path, second: Path) -> bool:
    """Swap two names atomically and return True, or return False if the system does not support this.

    Linux supports it by the function renameat2 of the C library, which Python does not offer.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # the values of C's AT_FDCWD and RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # the kernel or the file system does not support it
        return False
    raise OSError(code, os.strerror(code), str(second))
