"""Many prompts from a file and their texts into a file: batched by length, and resumed after a kill."""

from __future__ import annotations

import json
import os
import re
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


def share(lengths: Sequence[int], size: int, rank: int, processes: int) -> list[int]:
    """The rows of one of several processes, in order: every so many-th batch of all. They depend on nothing that
    changes while the others work."""
    return sorted(row for batch in by_length(lengths, range(len(lengths)), size)[rank::processes] for row in batch)


class Journal:
    """What of a job is done, in TARGET.partial: a line that says which job it is, then one for each row that is done.
    A job that was killed goes on where it was; the file itself appears when all rows are done, in their order.

    Of several processes each has a journal, TARGET.partial-1 and so on behind the first's. All read those of all, and
    the last to finish writes the file. All have to have read before one begins.

    job: what the texts depend on. rank: which process this is. ValueError if a journal there is of another job.
    """

    def __init__(self, target: Path, job: Row, rank: int = 0) -> None:
        self.target, self.head = target, json.dumps(job, ensure_ascii=False)
        self.path = target.with_name(f"{target.name}.partial" + (f"-{rank}" if rank else ""))
        self.done, self.file = self._read(), None

    def begin(self) -> None:
        """Make the journal, or mend the end of the one that is there. Before the first `keep`."""
        if self.path.exists():
            os.truncate(self.path, len(self._whole(self.path)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a", encoding="utf-8", newline="\n")
        if self.file.tell() == 0:
            self._write(self.head)

    def keep(self, rows: dict[int, Row]) -> None:
        """Note rows that are done."""
        self.done.update(rows)
        self._write("\n".join(json.dumps([i, row], ensure_ascii=False) for i, row in rows.items()))

    def finish(self, rows: int) -> None:
        """Write the file and remove the journals, if all of so many rows are done."""
        if self.file is not None:
            self.file.close()
        done = self._read()
        if len(done) == rows:  # of several processes, two may see it: they write the same
            lines = (json.dumps(done[i], ensure_ascii=False) for i in range(rows))
            write_atomically(self.target, "\n".join(lines) + "\n")
            for path in self._paths():
                path.unlink(missing_ok=True)

    def _read(self) -> dict[int, Row]:
        """The rows in the journals of all processes."""
        done = {}
        for path in self._paths():
            try:
                first, *lines = self._whole(path).decode().split("\n")[:-1] or [self.head]
            except FileNotFoundError:  # another process has just finished
                continue
            if first != self.head:
                raise ValueError(f"{path}: found the journal of another job, {first[:200]}; remove it to start anew")
            done |= {int(i): row for i, row in map(json.loads, lines)}
        return done

    def _paths(self) -> list[Path]:
        name = re.compile(re.escape(self.target.name) + r"\.partial(-\d+)?")
        folder = self.target.parent
        return [path for path in sorted(folder.iterdir()) if name.fullmatch(path.name)] if folder.is_dir() else []

    @staticmethod
    def _whole(path: Path) -> bytes:
        """Its whole lines: a kill may leave half of one."""
        text = path.read_bytes()
        return text[: text.rfind(b"\n") + 1]

    def _write(self, text: str) -> None:
        assert self.file is not None
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
    mine: Iterable[int] | None = None,
) -> list[Row]:
    """Give all rows that the journal does not hold to `write`, in batches; returns what it made of each, in order.
    lengths: tokens of each row's prompt. progress: told how many more rows are done. mine: the rows to look at; all by
    default."""
    done, mine = {} if journal is None else dict(journal.done), range(len(rows)) if mine is None else sorted(mine)
    progress(sum(i in done for i in mine))
    batches = by_length(lengths, (i for i in mine if i not in done), batch_size)
    if journal is not None and batches:
        journal.begin()
    for batch in batches:
        found = dict(zip(batch, write([rows[i] for i in batch]), strict=True))
        done |= found
        if journal is not None:
            journal.keep(found)
        progress(len(batch))
    if journal is not None:
        journal.finish(len(rows))
    return [done[i] for i in mine]
