"""Conversion from one layout to another, tensor by tensor."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from ..config import DTYPES, OPTConfig
from ..files import read_bytes
from ..hub import COMPANIONS, local
from ..progress import byte_bar
from ..quantization import QuantizationConfig
from ..weights import table
from .checkpoint import of_one_save
from .layouts import HEADED, LAYOUTS, PACKED, WRITABLE, layout_named
from .open import open_checkpoint
from .quantized import as_table
from .save import save_checkpoint
from .shards import MAX_SHARD_SIZE, parse_size
from .tensors import Entry, Source, numpy_dtype

# `weight_packed` and `weight_scale` of Linears by their paths
Numbers = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a conversion reads and writes, before any tensor is read."""

    name: str
    files: list[Path]
    config: OPTConfig
    sources: list[Source]
    texts: dict[str, str | bytes]
    memory: int


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "safetensors",
    dtype: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    layout: str | None = None,
    quantization: QuantizationConfig | None = None,
    calibrate: Callable[[str], Numbers] | None = None,
) -> list[Path]:
    """Write the checkpoint `source` in the layout `to` into the folder `target`, with its config (unknown keys too),
    generation config and tokenizer. Returns the weight files.

    `source`: as `open_checkpoint` takes it; `layout` says which to read if it holds several. `dtype` casts every
    tensor once, and turns quantized Linears into floats; by default each keeps its own, and its bits. `quantization`
    rounds Linears to few bits: to the nearest, or to the numbers that `calibrate` gives, for a dtype of the scales; it
    is called when everything else is known to fit. One tensor is in memory at a time.
    Raises ValueError or OSError, leaving `target` as it was, if a tensor does not fit, overflows in `dtype`, or has no
    place in `to`; if a file cannot be read; if the disk is full.
    """
    job = _prepare(source, target, to, dtype, layout, quantization)
    if calibrate is not None:
        numbers = calibrate(job.config.dtype or "float32")
        job = _prepare(source, target, to, dtype, layout, quantization, numbers)
    with byte_bar(f"Converting {job.name}", sum(s.nbytes for s in job.sources)) as advance:
        return save_checkpoint(target, job.sources, job.texts, max_shard_size, advance, to, job.config)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion would do. `files`: names and sizes; if not `exact`, the layout cannot size its weight files
    without writing them, and only tensor data counts. `memory` is the peak above the interpreter's own: twice the
    largest tensor. `seconds` is the time at the rates `read` and `write`, in bytes per second, just measured with
    `SAMPLE` bytes of the source and beside the target; None if nothing can be written there. `free` is the free space
    on the target's disk."""

    files: list[tuple[str, int]]
    exact: bool
    memory: int
    seconds: float | None
    read: float
    write: float | None
    free: int

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


SAMPLE = 64_000_000


def plan(
    source: str | Path,
    target: str | Path,
    to: str = "safetensors",
    dtype: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    layout: str | None = None,
    quantization: QuantizationConfig | None = None,
) -> Plan:
    """What `convert` with the same arguments would write, from the headers alone. Raises as it does."""
    job, limit = _prepare(source, target, to, dtype, layout, quantization), parse_size(max_shard_size)
    written = layout_named(to)
    if written.plan:
        files = written.plan(job.sources, job.config, limit)
    else:
        files = [(written.main[0], sum(s.nbytes for s in job.sources))]
    files += [(name, len(text.encode() if isinstance(text, str) else text)) for name, text in job.texts.items()]

    there = Path(target).absolute()
    while not there.is_dir():
        there = there.parent
    read, write = _read_rate(job.files), _write_rate(there)
    out, into = sum(size for _, size in files), sum(file.stat().st_size for file in job.files)
    seconds = None if write is None else into / read + out / write
    return Plan(files, written.plan is not None, job.memory, seconds, read, write, shutil.disk_usage(there).free)


def _prepare(
    source: str | Path,
    target: str | Path,
    to: str,
    dtype: str | None,
    layout: str | None,
    quantization: QuantizationConfig | None,
    numbers: Numbers | None = None,
) -> _Job:
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: found {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if to not in WRITABLE:
        raise ValueError(f"layout: found {to!r}, wanted one of {', '.join(WRITABLE)} to write")
    return of_one_save(local(source), lambda: _read_headers(source, target, to, dtype, layout, quantization, numbers))


def _read_headers(
    source: str | Path,
    target: str | Path,
    to: str,
    dtype: str | None,
    layout: str | None,
    quantization: QuantizationConfig | None,
    numbers: Numbers | None = None,
) -> _Job:
    opened = open_checkpoint(source, layout, companions=True)
    checkpoint, folder = opened.checkpoint, opened.checkpoint.folder
    read, written = LAYOUTS[checkpoint.layout], LAYOUTS[to]
    if Path(target).resolve() == folder.resolve():
        raise ValueError(f"{target}: is also the source; wanted another folder")
    if opened.architecture != "OPTForCausalLM" and to not in HEADED:
        raise ValueError(f"{checkpoint.path}: is an {opened.architecture}; wanted one of {', '.join(HEADED)} to write")
    held = {name: checkpoint[stored] for name, stored in opened.names.items()}
    packing = opened.config.quantization_config
    if packing and quantization:
        raise ValueError(f"{checkpoint.path}: found weights in {packing} already, wanted floats to quantize")
    packing = quantization or (packing if dtype is None else None)
    if packing and to not in PACKED:
        raise ValueError(f"{to} cannot hold quantized weights; wanted one of {', '.join(PACKED)}, or a dtype to unpack")
    config = dataclasses.replace(
        opened.config, tie_word_embeddings=opened.tied, dtype=dtype or checkpoint.dtype, quantization_config=packing
    )
    written.check(config)
    entries = [*as_table(held, table(config, opened.architecture), dtype, numbers)]
    casts = [dtype if dtype and entry.dtype in DTYPES else entry.dtype for _, entry in entries]
    sources = [
        Source(spec.name, spec.shape, cast, lambda n=spec.name, e=entry, d=cast: _cast(n, e, d))
        for (spec, entry), cast in zip(entries, casts, strict=True)
    ]
    texts: dict[str, str | bytes] = {"config.json": config.to_json()}
    texts |= {name: read_bytes(folder / name) for name in COMPANIONS if (folder / name).is_file()}
    if "tokenizer.json" in texts and not read.companions:
        written.check_files(folder)  # an error when it is written would name a temporary copy
    if read.companions:
        texts.pop("tokenizer.json", None)
        texts |= read.companions(checkpoint.main)
    if read is not written:
        for lost in {text for text in (read.lost, written.lost) if text}:
            warnings.warn(lost, stacklevel=6)
    memory = 2 * max(t.nbytes for t in [*sources, *(entry for _, entry in entries), *held.values()])
    return _Job(checkpoint.path.name, checkpoint.files, config, sources, texts, memory)


def _cast(name: str, entry: Entry, dtype: str) -> np.ndarray:
    array = entry.map()
    if dtype == entry.dtype:
        return array
    with np.errstate(over="ignore"):  # reported below, by name
        cast = array.astype(numpy_dtype(dtype))
    if ml_dtypes.finfo(cast.dtype).max < ml_dtypes.finfo(array.dtype).max:
        lost = int(np.isinf(cast).sum() - np.isinf(array).sum())
        if lost:
            wider = "bfloat16 or float32 can hold them" if dtype == "float16" else "float64 can hold them"
            raise ValueError(f"{name}: {lost} of {array.size} numbers overflow {dtype}; {wider}")
    return cast


def _read_rate(files: list[Path]) -> float:
    largest = max(files, key=lambda file: file.stat().st_size)
    start = time.perf_counter()
    with open(largest, "rb") as file:
        done = len(file.read(SAMPLE))
    return done / (time.perf_counter() - start)


def _write_rate(folder: Path) -> float | None:
    data = os.urandom(1_000_000)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(SAMPLE // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return None
    return SAMPLE / (time.perf_counter() - start)
