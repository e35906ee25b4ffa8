"""Many prompts from a file: batches, and a job that is killed and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opt_common.continuations import Journal, by_length, continue_all, read_prompts

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
