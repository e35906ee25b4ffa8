"""Many prompts from a file: batches, and a job that is killed and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opt_common.continuations import Journal, by_length, continue_all, read_prompts, share

ROWS = [{"prompt": "x" * n, "name": n} for n in (3, 9, 1, 5, 7)]
LENGTHS = [len(row["prompt"]) for row in ROWS]


def write(rows):
    return [row | {"text": row["prompt"] + "!"} for row in rows]


def test_prompts_are_strings_or_objects():
    assert read_prompts(['"a"\n', "\n", '{"prompt": "b", "id": 7}\n'], "f") == [
        {"prompt": "a"},
        {"prompt": "b", "id": 7},
    ]
    for lines, message in (
        (['"a"', "{"], "f, line 2: not readable as JSON"),
        (["[1]"], r"f, line 1: found \[1\], wanted a string"),
        (['{"text": "a"}'], "f, line 1: found .*wanted a string"),
        (["\n"], "f: found no prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(lines, "f")


def test_batches_go_by_length():
    assert by_length(LENGTHS, range(5), 2) == [[1, 4], [3, 0], [2]]


@pytest.mark.parametrize("killed", [0, 1, 2])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_job_goes_on(killed, torn, tmp_path):
    target, seen = tmp_path / "new" / "out.jsonl", []

    def dies(rows):
        if len(seen) == killed:
            raise KeyboardInterrupt
        seen.append([row["name"] for row in rows])
        return write(rows)

    with pytest.raises(KeyboardInterrupt):
        continue_all(ROWS, LENGTHS, dies, 2, Journal(target, {"model": "m"}))
    assert not target.exists()
    if torn:
        with open(f"{target}.partial", "a") as file:
            file.write('[0, {"prompt": "xx')
    with pytest.raises(ValueError, match="out.jsonl.partial: found the journal of another job, .*remove it"):
        Journal(target, {"model": "n"})

    steps, before = [], [name for batch in seen for name in batch]
    found = continue_all(ROWS, LENGTHS, lambda rows: seen.append([r["name"] for r in rows]) or write(rows), 2,
                         Journal(target, {"model": "m"}), steps.append)  # fmt: skip
    assert found == write(ROWS)
    assert [json.loads(line) for line in target.read_text().splitlines()] == write(ROWS)
    assert sorted(name for batch in seen for name in batch) == [1, 3, 5, 7, 9], "no row was written twice"
    assert steps[0] == len(before) and sum(steps) == 5
    assert [path.name for path in Path(target.parent).iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_several_processes_share_a_job(processes, tmp_path):
    """Each writes its share; a killed one's is gone on with, by fewer processes too; the last to finish writes all."""
    target, job, batches = tmp_path / "out.jsonl", {"model": "m"}, []

    def note(rows):
        batches.append([row["name"] for row in rows])
        return write(rows)

    def dies(rows):
        raise KeyboardInterrupt

    journals = [Journal(target, job, rank) for rank in range(processes)]
    for rank, journal in enumerate(journals):
        if rank == 1:
            with pytest.raises(KeyboardInterrupt):
                continue_all(ROWS, LENGTHS, dies, 2, journal, mine=share(LENGTHS, 2, rank, processes))
            with open(journal.path, "a") as file:
                file.write('[0, {"prompt": "xx')
        else:
            continue_all(ROWS, LENGTHS, note, 2, journal, mine=share(LENGTHS, 2, rank, processes))
    assert not target.exists()
    with pytest.raises(ValueError, match=r"out.jsonl.partial\S*: found the journal of another job"):
        Journal(target, {"model": "n"}, 1)
    journals = [Journal(target, job, rank) for rank in range(processes - 1)]
    for rank, journal in enumerate(journals):
        continue_all(ROWS, LENGTHS, note, 2, journal, mine=share(LENGTHS, 2, rank, processes - 1))
    assert [json.loads(line) for line in target.read_text().splitlines()] == write(ROWS)
    assert sorted(name for batch in batches for name in batch) == [1, 3, 5, 7, 9], "no row was written twice"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_shares_are_batches_of_one_process():
    batches = by_length(LENGTHS, range(5), 2)
    shares = [share(LENGTHS, 2, rank, 2) for rank in range(2)]
    assert shares == [[1, 2, 4], [0, 3]]
    assert [by_length(LENGTHS, mine, 2) for mine in shares] == [batches[::2], batches[1::2]]
