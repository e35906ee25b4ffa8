"""Saves that race and saves that are killed, as many as wanted; `test_saves.py` runs some of each.

    python tests/stress_saves.py race FOLDER LAYOUT ROUNDS    two writers, four readers
    python tests/stress_saves.py kill FOLDER LAYOUT KILLS     kill -9 before random system calls (Linux)

LAYOUT: some, with commas between them; each may end in "/moved", for a folder that cannot be exchanged. Both end with
an error if a reader ever finds anything but one whole save, or if the next save leaves anything behind.
"""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing.synchronize
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from checkpoints import contents, random_checkpoint, tiny_config
from opt_common.checkpoints import commit
from opt_common.checkpoints.convert import convert
from opt_common.checkpoints.open import open_checkpoint
from opt_common.checkpoints.save import save_checkpoint
from opt_common.checkpoints.tensors import Source
from opt_common.weights import table

MAINS = commit._MAINS


def save(folder: Path, layout: str, value: int, shards: int | str = "5GB") -> None:
    """A checkpoint all of whose numbers, and a key of whose config, are `value`."""
    config = tiny_config(layers=1, dtype="float32")
    config = dataclasses.replace(config, unknown={**config.unknown, "value": value})
    arrays = {s.name: np.full(s.shape, value, np.float32) for s in table(config)}
    sources = [Source(name, array.shape, "float32", lambda a=array: a) for name, array in arrays.items()]
    save_checkpoint(folder, sources, {"config.json": config.to_json()}, shards, layout=layout, config=config)


def write(folder: Path, layout: str, seed: int, done: multiprocessing.synchronize.Event) -> None:
    random.seed(seed)
    while not done.is_set():
        try:
            save(folder, layout, random.randrange(1, 4000), random.choice((600, 4000, "5GB")))
        except BlockingIOError:
            time.sleep(0.001)


def read(folder: Path, layout: str, seed: int, rounds: int, found: multiprocessing.Queue) -> None:
    random.seed(seed)
    count: Counter[str] = Counter()
    for _ in range(rounds):
        try:
            opened = open_checkpoint(folder)
            time.sleep(random.choice((0, 0, 0.01)))
            values = {float(opened.config.unknown["value"])}
            for name, entry in opened.checkpoint.items():
                array = random.choice((entry.read, entry.map))()
                # keras-hub has no rows 0 and 1
                values |= {*np.unique(array[2:] if name.endswith("embed_positions.weight") else array).tolist()}
            count["whole" if len(values) == 1 else f"a mixture of {values}"] += 1
        except (OSError, ValueError) as error:
            replaced = "another save took its place" in str(error)  # of very many files, which are not kept open
            count["replaced" if replaced and layout == "orbax" else repr(error)] += 1
    found.put(count)


def race(folder: Path, layout: str, rounds: int) -> None:
    save(folder, layout, 1)
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("mine")
    done, found = multiprocessing.Event(), multiprocessing.Queue()
    writers = [multiprocessing.Process(target=write, args=(folder, layout, i, done)) for i in range(2)]
    readers = [multiprocessing.Process(target=read, args=(folder, layout, i, rounds // 4, found)) for i in range(4)]
    for process in writers + readers:
        process.start()
    count = sum((found.get() for _ in readers), Counter())
    done.set()
    for process in writers + readers:
        process.join()
    print(layout, dict(count))
    assert set(count) <= {"whole", "replaced"} and count["whole"]
    assert (folder / "runs" / "log").read_text() == "mine"
    assert not hidden(folder)


def hidden(folder: Path) -> list[str]:
    """What saves have left in and beside a folder."""
    return [path.name for place in (folder, folder.parent) for path in place.glob(".*")]


def killed(call: Callable[[], object], at: int) -> int | None:
    """Run `call` in a process that is killed before it enters its system call number `at`; returns how many it made if
    it ended before."""
    libc, memory = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p
    trace, syscall, options = (lambda request, pid, data: libc.ptrace(request, pid, memory(), memory(data))), 24, 0x4200
    child = os.fork()
    if child == 0:
        trace(0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            call()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    trace(options, child, 1)  # stops for system calls are told from signals by bit 7
    calls, entering = 0, True
    while True:
        trace(syscall, child, 0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            return calls
        if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
            calls, entering = calls + entering, not entering
            if calls == at and not entering:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None


def kill(folder: Path, layout: str, kills: int, moved: bool) -> None:
    """Conversions and saves into a new folder and over an old one, which has a file of its own."""
    made, new, rng = folder / "made", folder / "target" / "new", random.Random(0)
    for i, name in enumerate(("first", "second")):
        random_checkpoint(made / f"given-{name}", tiny_config(layers=1), i)
        if layout == "keras-hub":  # has no rows 0 and 1
            convert(made / f"given-{name}", made / f"hub-{name}", "keras-hub")
            shutil.rmtree(made / f"given-{name}")
            convert(made / f"hub-{name}", made / f"given-{name}")
        convert(made / f"given-{name}", made / name, layout)
        save(made / f"saved-{name}", layout, i + 1)
    ways: dict[str, tuple[str, Callable[[], object]]] = {
        "convert": ("", lambda: convert(made / "given-second", new, layout)),
        "save": ("saved-", lambda: save(new, layout, 2)),
    }
    count: Counter[str] = Counter()
    total = {}
    for turn in range(kills + 4):
        shutil.rmtree(new.parent, ignore_errors=True)
        new.parent.mkdir()
        old, way = turn % 2 == 1, "save" if turn % 4 < 2 else "convert"
        prefix, again = ways[way]
        whole = {name: contents(made / (prefix + name)) for name in ("first", "second")}
        if old:
            shutil.copytree(made / (prefix + "first"), new)
            (new / "README.md").write_text("mine")
        if turn < 4:
            total[way, old] = killed(again, 0)
            assert total[way, old]
            continue
        first = 1 if turn % 8 < 4 else total[way, old] * 2 // 3  # half of them while the save is committed
        ended = killed(again, rng.randrange(first, total[way, old] + 1))
        there = {name: data for name, data in contents(new).items() if not name.startswith(".sav")}
        assert not old or there.pop("README.md") == b"mine"
        state = next((name for name, files in whole.items() if files == there), "absent" if not there else "mixed")
        if moved and old and state == "mixed" and not MAINS & there.keys():
            state = "without weights"
        assert state in (("first", "second", "without weights") if old else ("absent", "second")), sorted(there)
        assert ended is None or state == "second"
        if state == "first" and rng.random() < 0.2:
            open_checkpoint(new)
        count[f"{way}, {'over' if old else 'new'}: {state}"] += 1
        again()
        there = contents(new)
        assert not old or there.pop("README.md") == b"mine"
        assert there == whole["second"] and not hidden(new), hidden(new)
    print(layout, total, dict(count))


if __name__ == "__main__":
    what, place, layouts, times = sys.argv[1:]
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method("fork")
    can_be_exchanged = commit._can_be_exchanged
    for layout in layouts.split(","):
        layout, _, moved = layout.partition("/")
        folder = Path(place) / (layout + moved)
        folder.mkdir(parents=True)
        commit._can_be_exchanged = (lambda folder: not folder.exists()) if moved else can_be_exchanged
        if what == "race":
            race(folder / "raced", layout, int(times))
        else:
            kill(folder, layout, int(times), bool(moved))
