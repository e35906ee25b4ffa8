"""Many prompts from a file and their texts into a file: batched by length, and resumed after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_atomically
from .frameworks import Framework

Row = dict[str, Any]


def read_prompts(lines: Iterable[str], source: str) -> list[Row]:
    """One row a line: a JSON string, or an object with "prompt", whose other keys are kept. Blank lines are skipped.
    ValueError names the source and the line."""
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}, line {number}: not readable as JSON: {error}") from error
        row = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{source}, line {number}: found {line.strip()[:80]}, wanted a string or {{"prompt": …}}')
        check_text(row, f"{source}, line {number}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{source}: found no prompts, wanted one JSON string or object a line")
    return rows


def check_text(row: Row, where: str) -> None:
    """Raise ValueError for a row that no file can hold as UTF-8: an argument of other bytes, or half a character."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: found {row['prompt']!r:.80}, wanted UTF-8 text") from error


def by_length(lengths: Sequence[int], rows: Iterable[int], size: int) -> list[list[int]]:
    """The rows in batches of at most `size` of about one length; the longest first, so that memory that does not
    suffice shows at once."""
    order = sorted(rows, key=lambda i: -lengths[i])
    return [order[at : at + size] for at in range(0, len(order), size)]


class Journal:
    """What of a job is done, in TARGET.partial: a line that says which job it is, then one for each row that is done.
    A job that was killed goes on where it was; the file itself appears when all rows are done, in their order.

    job: what the texts depend on. ValueError if the journal there is of another job.
    """

    def __init__(self, target: Path, job: Row) -> None:
        self.target, self.path = target, target.with_name(f"{target.name}.partial")
        self.done: dict[int, Row] = {}
        head = json.dumps(job, ensure_ascii=False)
        if self.path.exists():
            whole = self.path.read_bytes().rpartition(b"\n")[0]  # a kill may leave half of a line
            first, *lines = whole.decode().split("\n")
            if first and first != head:
                raise ValueError(
                    f"{self.path}: found the journal of another job, {first[:200]}; remove it to start anew"
                )
            self.done = {int(i): row for i, row in map(json.loads, lines)}
            os.truncate(self.path, len(whole) + 1 if first else 0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a", encoding="utf-8", newline="\n")
        if self.file.tell() == 0:
            self._write(head)

    def keep(self, rows: dict[int, Row]) -> None:
        """Note rows that are done."""
        self.done.update(rows)
        self._write("\n".join(json.dumps([i, row], ensure_ascii=False) for i, row in rows.items()))

    def finish(self) -> None:
        """Write the file and remove the journal."""
        self.file.close()
        lines = (json.dumps(self.done[i], ensure_ascii=False) for i in sorted(self.done))
        write_atomically(self.target, "\n".join(lines) + "\n")
        self.path.unlink()

    def _write(self, text: str) -> None:
        self.file.write(text + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def texts(
    framework: Framework, model: Any, tokenizer: Any, options: Mapping[str, Any], rows: Sequence[Row]
) -> list[Row]:
    """The rows with what a model writes behind their prompts: "text", all of it, "continuation", the new part, and
    "tokens"; lists of them with `num_return_sequences`."""
    inputs = framework.inputs(tokenizer, [row["prompt"] for row in rows])
    width = inputs["input_ids"].shape[1]
    tokens = framework.numpy(model.generate(**inputs, **options))
    several = len(tokens) // len(rows)
    found = []
    for i, row in enumerate(rows):
        own = tokens[i * several : (i + 1) * several]
        said = {
            "text": tokenizer.batch_decode(own, skip_special_tokens=True),
            "continuation": tokenizer.batch_decode(own[:, width:], skip_special_tokens=True),
            "tokens": own.tolist(),
        }
        found.append(row | (said if several > 1 else {name: value[0] for name, value in said.items()}))
    return found


def continue_all(
    rows: Sequence[Row],
    lengths: Sequence[int],
    write: Callable[[list[Row]], list[Row]],
    batch_size: int,
    journal: Journal | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """Give all rows that the journal does not hold to `write`, in batches; returns what it made of each, in order.
    lengths: tokens of each row's prompt. progress: told how many more rows are done."""
    done = {} if journal is None else dict(journal.done)
    progress(len(done))
    for batch in by_length(lengths, (i for i in range(len(rows)) if i not in done), batch_size):
        found = dict(zip(batch, write([rows[i] for i in batch]), strict=True))
        done |= found
        if journal is not None:
            journal.keep(found)
        progress(len(batch))
    if journal is not None:
        journal.finish()
    return [done[i] for i in range(len(rows))]
