"""A save is one step for every reader, whatever goes wrong; readers change nothing and read one save."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from checkpoints import contents, random_checkpoint, tiny_config
from opt_common.checkpoints import commit
from opt_common.checkpoints.checkpoint import Checkpoint
from opt_common.checkpoints.convert import convert
from opt_common.checkpoints.examine import diff, examine
from opt_common.checkpoints.layouts import WRITABLE
from opt_common.checkpoints.open import open_checkpoint
from opt_common.checkpoints.pretrained import open_pretrained
from opt_common.checkpoints.save import save_checkpoint
from opt_common.checkpoints.tensors import Source
from opt_common.files import write_atomically

STRESS = Path(__file__).parent / "stress_saves.py"
ONE = "model.safetensors"


def save(folder: Path, value: int = 1, **options) -> None:
    array = np.full((2, 3), value, np.float32)
    save_checkpoint(folder, [Source("t", (2, 3), "float32", lambda: array)], {"config.json": f"{value}"}, **options)


def value(folder: Path) -> int:
    """The one value of all that a plain reader finds."""
    found = {int((folder / "config.json").read_text()), *map(int, Checkpoint(folder)["t"].read().reshape(-1))}
    (one,) = found
    return one


def around(folder: Path) -> list[str]:
    """What is in a folder and beside it."""
    return sorted(path.name for place in (folder, folder.parent) for path in place.iterdir())


@pytest.fixture(params=["exchanged", "moved"])
def way(request, monkeypatch) -> str:
    if request.param == "moved":
        monkeypatch.setattr(commit, "_can_be_exchanged", lambda folder: not folder.exists())
    return request.param


# Killed, and raced. `python tests/stress_saves.py` does as many as wanted.


def stress(what: str, folder: Path, layouts: str, times: int) -> None:
    command = [sys.executable, str(STRESS), what, str(folder), layouts, str(times)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="the system calls of Linux are counted")
@pytest.mark.parametrize("times", [5, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layouts", [",".join(WRITABLE), "safetensors/moved,orbax/moved,keras-hub/moved"])
def test_killed_before_any_system_call(layouts, times, tmp_path):
    """Saves and conversions, new and over an old one, once each while they commit; more often when slow."""
    stress("kill", tmp_path, layouts, times)


@pytest.mark.parametrize("layout", ["safetensors", "torch", "keras-hub", "orbax", "safetensors/moved", "orbax/moved"])
def test_two_writers_and_four_readers(layout, tmp_path):
    stress("race", tmp_path, layout, 60)


# Readers.


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", WRITABLE)
def test_a_reader_goes_on_in_the_save_that_it_opened(layout, tmp_path, way):
    given = [random_checkpoint(tmp_path / f"given{i}", tiny_config(layers=1), i) for i in range(2)]
    if layout == "keras-hub":  # has no rows 0 and 1
        for i in range(2):
            convert(given[i], tmp_path / f"hub{i}", layout)
            given[i] = tmp_path / f"hub{i}"
    new = tmp_path / "new"
    convert(given[0], new, layout)
    old, opened = {n: e.read() for n, e in Checkpoint(given[0]).items()}, Checkpoint(new)
    convert(given[1], new, layout)
    if layout == "orbax":  # a file a tensor: too many to keep open
        with pytest.raises(OSError, match="_METADATA: another save took its place while it was read; open it again"):
            [entry.read() for entry in opened.values()]
    else:
        for entry in opened.values():
            assert any(np.array_equal(entry.read(), a) and np.array_equal(entry.map(), a) for a in old.values())
    assert list(diff(new, given[1])) == []


def test_a_reader_reads_everything_of_one_save(tmp_path, monkeypatch):
    """Another save between the weights and what is read after them: it reads again."""
    folder = tmp_path / "new"
    for i in range(2):
        random_checkpoint(tmp_path / f"{i}", tiny_config(layers=1, max_position_embeddings=10 + i), i)
        (tmp_path / f"{i}" / "generation_config.json").write_text(json.dumps({"max_length": i + 5}))
    shutil.copytree(tmp_path / "0", folder)
    texts = {name: (tmp_path / "1" / name).read_bytes() for name in ("config.json", "generation_config.json")}
    stored = Checkpoint(tmp_path / "1")
    sources = [Source(name, entry.shape, entry.dtype, entry.read) for name, entry in stored.items()]
    for name in ("config.json", "generation_config.json"):
        saves, is_file = [], Path.is_file

        def saved_before(path, name=name, saves=saves, is_file=is_file):
            if path == folder / name and not saves:
                saves.append(name)
                save_checkpoint(folder, sources, texts)
            return is_file(path)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "is_file", saved_before)
            opened = open_pretrained(folder, "OPTForCausalLM", "auto")
        assert saves and opened.config.max_position_embeddings == 11 and opened.generation.max_length == 6
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "0", folder)


def test_readers_change_nothing(tmp_path):
    """Not what a killed save left, nor a downloaded folder that pretends that one did."""
    folder = random_checkpoint(tmp_path / "new", tiny_config(layers=1))
    for left in (folder / ".saving", folder / ".saved", tmp_path / ".new.saving"):
        left.mkdir()
        (left / ONE).write_bytes(b"half")
        (left / ".saving.json").write_text(json.dumps([ONE, "config.json"]))
    before = contents(tmp_path)
    open_checkpoint(folder), examine(folder), list(diff(folder, folder))
    convert(folder, tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    assert contents(tmp_path) == before


def test_a_reader_looks_into_no_save_that_is_under_way(tmp_path):
    """Orbax's layout takes what folders there are."""
    convert(random_checkpoint(tmp_path / "given", tiny_config(layers=1)), tmp_path / "new", "orbax")
    files = Checkpoint(tmp_path / "new").files
    for name in (".saving", ".saved"):
        (tmp_path / "new" / name).mkdir()
        (tmp_path / "new" / name / "config.json").touch()
    assert Checkpoint(tmp_path / "new").files == files


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_save_stopped_while_it_moves(tmp_path, monkeypatch):
    """Readers say what to do; the next save does it, and so do they who follow what it says."""
    monkeypatch.setattr(commit, "_can_be_exchanged", lambda folder: not folder.exists())
    for how in ("save", "move"):
        folder = tmp_path / how
        save(folder, 1)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            save(folder, 2)
        said = "no weights: a save was stopped while it moved its files in; move the rest out of"
        with pytest.raises(FileNotFoundError, match=f"{folder}: {said} {folder}/.saved"):
            Checkpoint(folder)
        if how == "move":
            for path in (folder / ".saved").glob("[!.]*"):
                path.rename(folder / path.name)
            assert value(folder) == 2
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # a save that fails finishes it too
            patch.setattr(commit, "_sync", lambda folder: 1 / 0)
            save(folder, 3)
        assert value(folder) == 2
        save(folder, 3)
        assert value(folder) == 3 and around(folder) == ["config.json", ONE, *sorted(os.listdir(tmp_path))]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_list_of_files_does_not_reach_out_of_the_folder(tmp_path):
    """A downloaded folder may pretend that a save into it was cut short."""
    (tmp_path / "precious").write_text("mine")
    names = (["../precious"], [str(tmp_path / "precious")], [".."], [1], {"a": 1}, ["a/../../precious"])
    for i, listed in enumerate(names):
        saved = tmp_path / f"bad{i}" / ".saved"
        saved.mkdir(parents=True)
        (saved / ".saving.json").write_text(json.dumps(listed))
        with pytest.raises(ValueError, match="saving.json: wanted a list of file names inside the folder"):
            save(saved.parent)
        assert (tmp_path / "precious").read_text() == "mine"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".saving.json").write_text('["keep"]')
    (tmp_path / "elsewhere" / "keep").touch()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / ".saved").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "link")
    assert value(tmp_path / "link") == 1 and (tmp_path / "elsewhere" / "keep").exists()


# What is not the save's own.


def test_what_others_have_in_the_folder_stays(tmp_path, way):
    folder = tmp_path / "new"
    save(folder)
    (folder / "runs" / "a").mkdir(parents=True)
    log = open(folder / "runs" / "a" / "log", "w")  # noqa: SIM115
    (folder / "runs").chmod(0o750), (folder / "latest").symlink_to("runs/a"), (folder / "lost").symlink_to("nowhere")
    (folder / "config.json").chmod(0o640), folder.chmod(0o2770)
    if os.geteuid() == 0:
        os.chown(folder, 1234, 2345), os.chown(folder / "runs", 1234, 2345)
    kept = {path: path.lstat() for path in (folder, folder / "runs", folder / "runs" / "a" / "log", folder / "lost")}
    save(folder, 2)
    log.write("still open")
    log.close()
    assert (folder / "latest" / "log").read_text() == "still open"
    for path, was in kept.items():
        now = path.lstat()
        assert (now.st_mode, now.st_uid, now.st_gid) == (was.st_mode, was.st_uid, was.st_gid), path
    assert way == "moved" or stat.S_IMODE((folder / "config.json").stat().st_mode) == 0o640
    assert value(folder) == 2
    assert around(folder) == sorted(["config.json", "latest", "lost", ONE, "runs", "new"])


def test_what_others_write_during_the_exchange_stays(tmp_path, monkeypatch):
    folder, exchange = tmp_path / "new", commit._exchange
    save(folder)
    for name in ("replaced", "appended", "runs/replaced"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("old")

    def late(first, second):
        for name in ("replaced", "runs/replaced"):
            (folder / "temporary").write_text("late")
            os.replace(folder / "temporary", folder / name)
        with open(folder / "appended", "a") as file:
            file.write(", late")
        (folder / "added").write_text("late")
        (folder / "runs" / "added").mkdir()
        exchange(first, second)
        if killed:
            raise KeyboardInterrupt

    monkeypatch.setattr(commit, "_exchange", late)
    for killed in (False, True):
        shutil.rmtree(folder / "runs" / "added", ignore_errors=True)
        if killed:
            with pytest.raises(KeyboardInterrupt):
                save(folder, 3)
        else:
            save(folder, 2)
        assert value(folder) == 2 + killed
        found = {name: (folder / name).read_text() for name in ("replaced", "added", "runs/replaced")}
        assert set(found.values()) == {"late"} and (folder / "appended").read_text().startswith("old, late")
        assert (folder / "runs" / "added").is_dir()
        assert around(folder) == ["added", "appended", "config.json", ONE, "new", "replaced", "runs"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_index_and_one_file_do_not_stay_together(tmp_path, way):
    """Of one layout, also where a reader would prefer the older of the two."""
    for layout in ("keras-hub", "flax-msgpack"):
        folder = tmp_path / layout
        given = [random_checkpoint(tmp_path / f"{layout}{i}", tiny_config(layers=1), i) for i in range(2)]
        for i, shards in ((0, "5GB"), (1, 300), (0, "5GB")):
            convert(given[i], folder, layout, max_shard_size=shards)
            # keras-hub has no rows 0 and 1
            assert all(row.name.endswith("embed_positions.weight") for row in diff(folder, given[i]))


def test_a_lock_that_its_holder_removed(tmp_path, monkeypatch):
    """Whoever had opened it before locks nobody out with it, and so takes the one that is there now."""
    lock, path, others = commit._lock, tmp_path / ".new.saving.lock", []

    def meanwhile(file):
        if not others:
            path.unlink()
            others.append(os.open(path, os.O_RDWR | os.O_CREAT))
            lock(others[0])
        lock(file)

    monkeypatch.setattr(commit, "_lock", meanwhile)
    with pytest.raises(BlockingIOError, match="new: another process is saving into it"):
        save(tmp_path / "new")
    assert os.listdir(tmp_path) == [path.name]  # which is the other's
    os.close(others[0])
    save(tmp_path / "new")
    assert os.listdir(tmp_path) == ["new"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(commit, "_lock", fail)
        code = errno.ENOLCK
        with pytest.warns(UserWarning, match="new: its file system has no locks: save from one process at a time"):
            save(tmp_path / "new", 1)
        assert around(tmp_path / "new") == ["config.json", ONE, "new"]
        code = errno.EIO
        with pytest.raises(OSError, match="new: not saved: Input/output error"):
            save(tmp_path / "new", 2)
    assert value(tmp_path / "new") == 1
    save(tmp_path / "new", 3)
    assert around(tmp_path / "new") == ["config.json", ONE, "new"]


# Targets.


def test_a_target_that_is_a_link_or_the_current_folder(tmp_path, way, monkeypatch):
    (tmp_path / "link").symlink_to("real")
    for turn in range(2):  # the folder is made, then saved over
        save(tmp_path / "link", turn)
        assert (tmp_path / "link").is_symlink() and value(tmp_path / "real") == turn
    monkeypatch.chdir(tmp_path / "real")
    here = os.stat(".").st_ino
    for target in (Path("."), tmp_path / "link"):
        save(target, 7)
        assert os.stat(tmp_path / "real").st_ino == here == os.stat(".").st_ino
    (tmp_path / "real" / "below").mkdir()
    monkeypatch.chdir("below")
    save(tmp_path / "real", 8)
    assert os.getcwd() == str(tmp_path / "real" / "below") and value(Path("..")) == 8
    assert around(tmp_path / "real") == ["below", "config.json", "link", ONE, "real"]


def test_a_target_that_is_the_source(tmp_path):
    folder = random_checkpoint(tmp_path / "new", tiny_config(layers=1))
    (tmp_path / "link").symlink_to(folder)
    before = contents(folder)
    for source, target in ((folder, folder), (folder / ONE, tmp_path / "link"), (tmp_path / "link", folder)):
        with pytest.raises(ValueError, match="is also the source; wanted another folder"):
            convert(source, target, "torch")
    assert contents(folder) == before
    convert(folder, folder / "below", "torch")  # but one may lie in the other
    assert list(diff(folder / "below", folder)) == []
    convert(folder / "below", folder, "tf-h5")
    assert list(diff(folder, folder / "below")) == [] and (folder / "vocab.json").is_file()


def test_a_target_that_cannot_be(tmp_path):
    """The error names the target, or what is in its way, and no file of ours."""
    (tmp_path / "file").write_text("mine")
    for target in ("file", "file/new", "file/a/new"):
        with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file: is a file, wanted a folder to save into"):
            save(tmp_path / target)
    if sys.platform == "linux":
        with pytest.raises(OSError, match="no folder can be made there: .*: '/proc/new'"):
            save(Path("/proc/new"))
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_written_while_its_folder_is_exchanged(tmp_path, monkeypatch):
    """It is in the new folder, whole, though the old one was taken away under it."""
    replace = os.replace

    def exchanged(old, new):
        monkeypatch.setattr(os, "replace", replace)
        (tmp_path / "new").rename(tmp_path / "old")
        (tmp_path / "new").mkdir()
        replace(old, new)

    (tmp_path / "new").mkdir()
    monkeypatch.setattr(os, "replace", exchanged)
    write_atomically(tmp_path / "new" / "config.json", "mine")
    assert (tmp_path / "new" / "config.json").read_text() == "mine" and os.listdir(tmp_path / "new") == ["config.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):  # and what can never be written is an error
        write_atomically(tmp_path / "file" / "config.json", "mine")


def test_folders_that_cannot_be_exchanged(tmp_path, monkeypatch):
    """The file system has no exchange or no links, or the folder is a mount point: the same folder in the end."""
    no = OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def fail(*_, **__):
        raise no

    for i, (owner, name, does) in enumerate([
        (commit, "_exchange", fail), (commit, "_LIBC", None), (os.path, "ismount", lambda path: True),
        (os, "link", fail), (os, "chown", fail), (shutil, "copystat", fail),
    ]):  # fmt: skip
        folder = tmp_path / f"{i}"
        save(folder)
        (folder / "README.md").write_text("mine")
        if name == "chown" and os.geteuid() == 0:
            os.chown(folder, 1234, 2345)
        inode = folder.stat().st_ino
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, does)
            save(folder, 2)
        assert value(folder) == 2 and (folder / "README.md").read_text() == "mine"
        assert sorted(os.listdir(folder)) == ["README.md", "config.json", ONE]
        assert folder.stat().st_ino == inode or name == "chown" and os.geteuid(), name
    assert sorted(os.listdir(tmp_path)) == [f"{n}" for n in range(i + 1)]


@pytest.mark.skipif(os.name != "posix", reason="rights are of POSIX")
def test_folders_without_the_right_to_write(tmp_path):
    """A read-only folder is as it was; one in a read-only parent is saved into."""
    program = """
        import os, sys
        sys.path[:0] = sys.argv[2:]
        import numpy as np
        from opt_common.checkpoints.save import save_checkpoint
        from opt_common.checkpoints.tensors import Source
        array = np.full(3, 2, np.float32)
        if os.geteuid() == 0:
            os.setgid(65534), os.setuid(65534)  # whom rights bind
        save_checkpoint(sys.argv[1], [Source("t", (3,), "float32", lambda: array)], {"config.json": "2"})
    """
    readonly, parent = tmp_path / "readonly", tmp_path / "parent"
    for folder in (readonly, parent / "new"):
        save(folder)
        for path in (folder, *folder.iterdir()):
            path.chmod(0o777 if path.is_dir() else 0o666)
    tops = [p for p in tmp_path.parents if p.stat().st_uid == os.geteuid() and p != Path(p.anchor)]
    modes = {p: p.stat().st_mode for p in tops}
    try:
        for p in tops:
            p.chmod(modes[p] | 0o055)  # whoever it is comes this far
        tmp_path.chmod(0o777), readonly.chmod(0o555), parent.chmod(0o555)
        for folder, said in ((readonly, "PermissionError"), (parent / "new", "")):
            command = [sys.executable, "-c", textwrap.dedent(program), str(folder), *sys.path]
            ran = subprocess.run(command, capture_output=True, text=True)
            assert said in ran.stderr and (ran.returncode == 0) == (said == ""), ran.stderr
    finally:
        for p in tops:
            p.chmod(modes[p])
        readonly.chmod(0o755), parent.chmod(0o755)
    assert value(readonly) == 1 and value(parent / "new") == 2
    for folder in (readonly, parent / "new"):
        assert sorted(os.listdir(folder)) == ["config.json", ONE]
    assert sorted(os.listdir(tmp_path)) == ["parent", "readonly"] and os.listdir(parent) == ["new"]


# Errors.


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full disk", "input/output error"])
def test_an_error_in_any_step(code, tmp_path, way, monkeypatch):
    """Each call in turn fails once: old or new, whole, and the next save leaves nothing behind."""
    calls = [
        (os, "open"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "link"), (os, "mkdir"), (os, "rmdir"),
        (os, "unlink"), (os, "utime"), (shutil, "copystat"), (commit, "_exchange"), (Path, "write_text"),
        (Path, "write_bytes"),
    ]  # fmt: skip
    ends = {True: 0, False: 0}
    for fail_at in range(1, 200):
        folder, count = tmp_path / f"{fail_at}" / "new", 0
        save(folder)
        (folder / "README.md").write_text("mine")

        def counted(function, fail_at=fail_at):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == fail_at:
                    raise OSError(code, os.strerror(code))
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for module, name in calls:
                patch.setattr(module, name, counted(getattr(module, name)))
            try:
                save(folder, 2)
                saved = True
            except OSError as error:
                assert os.strerror(code) in str(error)
                saved = False
        if not (folder / ".saved").exists():  # nor was the moving cut short by an error that would not go away
            assert value(folder) == 2 if saved else value(folder) in (1, 2)
        assert (folder / "README.md").read_text() == "mine"
        ends[saved] += 1
        save(folder, 3)
        assert value(folder) == 3 and around(folder) == sorted(["README.md", "config.json", ONE, "new"])
        if count < fail_at:
            break
    assert ends[False] > 5 and saved


def test_an_error_while_reading_the_source(tmp_path, monkeypatch):
    given = random_checkpoint(tmp_path / "given", tiny_config(layers=1))
    before = contents(convert(given, tmp_path / "new")[0].parent)

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(given / ONE))

    for target in ("new", "other"):
        with monkeypatch.context() as patch:
            patch.setattr("opt_common.checkpoints.tensors.mmap.mmap", fail)
            with pytest.raises(OSError, match=f"{given / ONE}"):
                convert(given, tmp_path / target, "torch")
    assert contents(tmp_path / "new") == before
    assert sorted(os.listdir(tmp_path)) == ["given", "new"]
