"""From a folder that has been written to the folder it is to replace: the only code that changes a user's folder.

A save is staged beside its target. What is not its own (a README, other programs' folders) is hard-linked into it, and
the two folders are exchanged in one step, so that every program sees the old checkpoint or the new one. Only a writer
that holds the lock changes anything; it first removes, or finishes, what a killed one left. Readers never write.

Some folders cannot be exchanged: the file system or Windows has no such call, the folder is a mount point or the
current directory, its parent is not writable, or a file in it cannot be linked. Then the save moves its files into the
folder one by one. The file that the old weights are opened by is removed first, that of the new ones comes last:
programs see the old checkpoint, no weights, or the new one. If it is killed meanwhile, the next save moves the rest.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Collection, Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .layouts import LAYOUTS

# Beside the target: `.NAME.saving`, the save until it is exchanged, then the old folder until it is removed.
# Inside: `.saving`, a save that is to be moved in, called `.saved` once it is complete.
STAGED, SAVED = ".saving", ".saved"
_LIST = f"{STAGED}.json"  # the names that a save wrote: in `.saved`, and in a folder that is about to be exchanged
_OURS = (STAGED, SAVED, _LIST, f"{STAGED}.lock")
_MAINS = frozenset(name for layout in LAYOUTS.values() for name in layout.main)
# The names of the Hub's own layouts, which a save may clear away; a `model.pt` may be anything of the user's.
_CLEARED = re.compile("|".join(
    pattern for layout in LAYOUTS.values() if layout.shards for pattern in (layout.shards, *map(re.escape, layout.main))
))  # fmt: skip
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder, whose files take the place of those in `folder` when the block ends without an error.

    Files of the same name are replaced, the Hub's weight files that the new checkpoint lacks are removed, and all else
    stays. Warns of what an interrupted save left, and removes it. Raises NotADirectoryError if `folder` is a file,
    BlockingIOError if another process is saving into it, and OSError, with `folder` as it was, if it cannot be written.
    """
    folder = folder.resolve()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there}: is a file, wanted a folder to save into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    inside, beside = folder / STAGED, folder.with_name(f".{folder.name}{STAGED}")
    with ExitStack() as locks:
        places: list[Path] = []  # that are locked

        def lock(place: Path) -> None:
            if place not in places:
                locks.enter_context(_locked(place, folder))
                places.append(place)

        try:
            lock(beside)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
            if not folder.is_dir():  # else its parent is read-only
                raise OSError(error.errno, f"no folder can be made there: {error.strerror}", str(folder)) from error
        if folder.is_dir():
            lock(inside)
        _clear(folder, places, warn=True)
        staged = beside if beside in places and _can_be_exchanged(folder) else inside
        try:
            staged.mkdir()
            yield staged
            _sync(staged)
            if staged == beside and not folder.exists():
                os.rename(staged, folder)
            else:
                lock(inside)  # another program may have made the folder meanwhile
                if staged == inside or not _exchanged(staged, folder):
                    _move_in(staged, folder)
        finally:
            _clear(folder, places)
        _sync_names(folder.parent)


@contextmanager
def _locked(staged: Path, folder: Path) -> Iterator[None]:
    """Lets one process at a time save into `folder`. The kernel drops the lock when the process ends."""
    path = staged.with_name(f"{staged.name}.lock")
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(lock)
        except OSError as error:
            if isinstance(error, (BlockingIOError, PermissionError)):  # the latter on Windows
                os.close(lock)
                raise BlockingIOError(f"{folder}: another process is saving into it") from error
            if error.errno not in _NO_LOCKS:
                os.close(lock)
                raise
            warnings.warn(f"{folder}: its file system has no locks: save from one process at a time", stacklevel=8)
        if _is_at(path, lock):
            break
        os.close(lock)  # whoever held it removed it when done: it locks nobody out
    try:
        yield
    finally:
        try:
            if _is_at(path, lock):
                path.unlink()
        except PermissionError:  # Windows removes no open file
            pass
        finally:
            os.close(lock)


def _lock(file: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _can_be_exchanged(folder: Path) -> bool:
    """Whether it is worth trying. Who stands in the folder would stay in the old one, which is removed."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        here = folder.parent
    return _LIBC is not None and folder not in (here, *here.parents) and not os.path.ismount(folder)


def _exchanged(staged: Path, folder: Path) -> bool:
    """Exchange the two, or return False and leave both as they were."""
    new = os.listdir(staged)
    (folder / _LIST).write_text(json.dumps(new))
    try:
        _take_over(folder, staged, _replaced_names(folder, new))
        for name in new:
            if (folder / name).is_file():
                with suppress(PermissionError):
                    _make_like(folder / name, staged / name)
                os.utime(staged / name)
        _make_like(folder, staged)
        os.utime(staged)
        _exchange(staged, folder)
    except OSError:
        for name in set(os.listdir(staged)) - set(new):
            _remove(staged / name)
        return False
    return True


def _exchange(first: Path, second: Path) -> None:
    """Give each of two files or folders the other's name, in one step. Raises OSError where there is no such call."""
    assert _LIBC is not None
    paths = os.fsencode(first), os.fsencode(second)
    try:
        if sys.platform == "darwin":
            failed = _LIBC.renamex_np(*paths, 2)  # RENAME_SWAP
        else:
            failed = _LIBC.renameat2(-100, paths[0], -100, paths[1], 2)  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError as error:  # an old C library
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(first), None, str(second))


def _replaced_names(folder: Path, new: Collection[str]) -> set[str]:
    """What in `folder` a save of the files `new` replaces or removes."""
    # one file and an index of several are not read together, and the wrong one may be preferred
    mains = {name for layout in LAYOUTS.values() if {*layout.main} & {*new} for name in layout.main}
    return {
        path.name
        for path in folder.iterdir()
        if path.name in {*new, *_OURS, *mains} or (_CLEARED.fullmatch(path.name) and not path.is_dir())
    }


def _take_over(old: Path, new: Path, but: Container[str] = ()) -> None:
    """Link into `new` what it lacks of `old`, folders and all that is in them, `but` some names.

    Programs may write into `old` meanwhile, or have written into `new`: the latter have the last word."""
    with os.scandir(old) as entries:
        for entry in entries:
            if entry.name in but:
                continue
            into = new / entry.name
            with suppress(FileNotFoundError, FileExistsError, IsADirectoryError):
                if entry.is_dir(follow_symlinks=False):
                    if os.path.ismount(entry) or not os.access(entry, os.W_OK | os.X_OK):
                        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), entry.path)
                    into.mkdir(exist_ok=True)
                    _take_over(Path(entry), into)
                    _make_like(Path(entry), into)
                elif not os.path.lexists(into):
                    os.link(entry, into, follow_symlinks=False)
                elif not os.path.samestat(entry.stat(follow_symlinks=False), into.lstat()):
                    os.replace(entry, into)


def _make_like(old: Path, new: Path) -> None:
    """Give `new` the owner, rights and times of `old`."""
    was, now = old.stat(), new.stat()
    if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
        os.chown(new, was.st_uid, was.st_gid)
    shutil.copystat(old, new)


def _move_in(staged: Path, folder: Path) -> None:
    """Commit a save that cannot be exchanged. `_clear` does the moving, now or when the folder is next saved into."""
    inside = folder / STAGED
    if staged != inside:
        shutil.move(staged, inside)  # a copy, if the folder is on another file system
        _sync(inside)
    (inside / _LIST).write_text(json.dumps(os.listdir(inside)))
    os.rename(inside, folder / SAVED)


def _clear(folder: Path, places: list[Path], warn: bool = False) -> None:
    """Finish or remove what a save has left in `places`: this one, or one that was killed, which a warning says."""

    def say(left: Path, done: str) -> None:
        if warn:
            warnings.warn(f"{left}: {done}, an interrupted save left it", stacklevel=6)

    saved = folder / SAVED
    if saved.is_dir() and not saved.is_symlink():
        say(saved, "moved into its folder")
        _finish_moving(saved, folder)
    for left in places:
        if left.parent != folder and (left / _LIST).is_file():  # the old folder: others may have written into it
            _take_over(left, folder, _replaced_names(left, _listed(left / _LIST)))
            (left / _LIST).unlink()
        if left.exists():
            say(left, "removed")
            shutil.rmtree(left)
    (folder / _LIST).unlink(missing_ok=True)


def _finish_moving(saved: Path, folder: Path) -> None:
    """Move a complete save into its folder, or what is left of it to move."""
    listing = saved / _LIST
    if listing.is_file():  # it goes last
        new = _listed(listing) - {*_OURS}
        left = sorted(name for name in new if os.path.lexists(saved / name))
        moved = new.difference(left)
        for name in (_replaced_names(folder, new) & _MAINS) - moved:
            _remove(folder / name)
        for mains in (False, True):
            for name in left:
                if (name in _MAINS) is mains:
                    if (folder / name).is_dir():
                        _remove(folder / name)
                    os.replace(saved / name, folder / name)
            for name in _replaced_names(folder, new) - new - {*_OURS}:
                _remove(folder / name)
        listing.unlink()
    saved.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _listed(listing: Path) -> set[str]:
    """The names in a list of files, which may come with a downloaded folder and must not lead out of it."""
    try:
        names = json.loads(listing.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{listing}: not readable as JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(n, str) and n and Path(n).name == n != ".." for n in names):
        raise ValueError(f"{listing}: wanted a list of file names inside the folder")
    return set(names)


def _sync(folder: Path) -> None:
    """Have the disk hold the files below `folder` and, where file systems can say so, their names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
    _sync_names(folder)


def _sync_names(folder: Path) -> None:
    with suppress(OSError):  # not all file systems can
        names = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(names)
        finally:
            os.close(names)
