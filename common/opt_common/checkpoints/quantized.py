"""The tensors of quantized Linears: a checkpoint's own, checked; rounded from its floats; or floats again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..config import DTYPES
from ..quantization import dequantize, gptq_packing, quantize, unpack
from ..weights import Spec
from .tensors import Entry, numpy_dtype, rearranged, transposed


def as_table(
    entries: Mapping[str, Entry],
    specs: Iterable[Spec],
    dtype: str | None = None,
    numbers: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> Iterator[tuple[Spec, Entry]]:
    """Each tensor of a table that `entries` hold, or hold in another form: Linears of few bits are rounded from floats,
    to scales in `dtype`, by default the weight's, or turned into floats. `numbers`: `weight_packed` and `weight_scale`
    of Linears by their paths, in place of those of rounding to nearest. Nothing is read yet; reading raises ValueError
    for a scale that is not finite, and for a weight that is not if it is to be rounded."""
    kept: dict[str, np.ndarray] = {}  # scales, between the reading of a Linear's numbers and theirs
    for spec in specs:
        weight, packed = entries.get(f"{spec.path}.weight"), entries.get(f"{spec.path}.weight_packed")
        if spec.name in entries:
            yield spec, _checked(spec, entries[spec.name])
        elif spec.packing is not None and weight is not None:
            yield spec, _rounded(spec, weight, dtype or weight.dtype, kept, (numbers or {}).get(spec.path))
        elif spec.kind == "linear" and packed is not None:
            yield spec, _floats(spec, packed, entries[f"{spec.path}.weight_scale"])


def _checked(spec: Spec, entry: Entry) -> Entry:
    """The stored tensor, whose numbers are checked when it is read."""
    if spec.kind not in ("scale", "shape"):
        return entry
    return rearranged(entry, tuple(entry.shape), lambda array: _check(spec, entry, array))


def _check(spec: Spec, entry: Entry, array: np.ndarray) -> np.ndarray:
    if spec.kind == "shape" and tuple(array) != spec.matrix:
        raise ValueError(f"{entry.file}: {spec.name}: found {array.tolist()}, wanted {list(spec.matrix)}")
    if spec.kind == "scale" and (lost := int(array.size - np.isfinite(array).sum())):
        raise ValueError(f"{entry.file}: {spec.name}: found {lost} scales that are NaN or infinite, wanted finite ones")
    return array


def _rounded(
    spec: Spec,
    weight: Entry,
    dtype: str,
    kept: dict[str, np.ndarray],
    numbers: tuple[np.ndarray, np.ndarray] | None,
) -> Entry:
    """A part of a Linear, rounded from its weight when it is read, if its numbers are not there."""
    assert spec.packing is not None
    packing = spec.packing

    def read() -> np.ndarray:
        if spec.kind == "shape":
            return np.array(spec.matrix, np.int64)
        if spec.kind == "scale" and spec.path in kept:
            return kept.pop(spec.path).astype(numpy_dtype(dtype), copy=False)
        packed, scale = numbers or quantize(f"{spec.path}.weight", weight.map(), packing, numpy_dtype(dtype))
        if spec.kind == "packed":
            kept[spec.path] = scale
        return packed if spec.kind == "packed" else scale.astype(numpy_dtype(dtype), copy=False)

    return Entry(spec.shape, spec.dtype(dtype), weight.file, read, read)


def _floats(spec: Spec, packed: Entry, scale: Entry) -> Entry:
    """The weight of a quantized Linear, in float32, or float64 of such scales."""

    def read() -> np.ndarray:
        scales = _check(Spec(spec.path, "scale", tuple(scale.shape), spec.axes), scale, scale.map())
        return dequantize(packed.map(), scales, packed.shape[1] * 32 // spec.shape[1])

    dtype = "float64" if scale.dtype == "float64" else "float32"
    return Entry(spec.shape, dtype, packed.file, read, read)


def from_gptq(entries: Mapping[str, Entry], values: Mapping[str, Any]) -> dict[str, Entry]:
    """The tensors of a GPTQ checkpoint under the names of `pack-quantized`, where its numbers are symmetric and the
    columns of a group stand side by side; otherwise as weights in float32. `values`: its `quantization_config`.

    qweight  int32 [in·bits/32, out]      the first number in the lowest bits
    scales   float [groups, out]
    qzeros   int32 [groups, out·bits/32]  what stands for 0 and, in files of the format "gptq", is 1 too low
    g_idx    int32 [in]                   the group of each column; in order if there is none

    Raises ValueError, naming the tensor, for one that is missing or of another shape or dtype; and when reading, if a
    checkpoint that says it is symmetric is not.
    """
    packing, bits, size = gptq_packing(values), values["bits"], values.get("group_size")
    one = values.get("checkpoint_format") != "gptq_v2"
    found = {name: entry for name, entry in entries.items() if not name.endswith(_GPTQ)}
    for name in [name for name in entries if name.endswith(".qweight")]:
        linear = _Gptq(name.removesuffix(".qweight"), entries, bits, None if size == -1 else size, int(one))
        found |= linear.packed() if packing else linear.weight()
    return found


_GPTQ = (".qweight", ".qzeros", ".scales", ".g_idx")


class _Gptq:
    """One Linear of a GPTQ checkpoint."""

    def __init__(self, path: str, entries: Mapping[str, Entry], bits: int, size: int | None, one: int) -> None:
        self.path, self.bits, self.one = path, bits, one
        self.qweight = entries[f"{path}.qweight"]
        columns, self.out = self.qweight.shape if len(self.qweight.shape) == 2 else (0, 0)
        self.width = columns * 32 // bits
        self.size = size or max(self.width, 1)
        groups = math.ceil(self.width / self.size)
        self.check("qweight", entries, (columns, self.out), ("int32",))
        self.scales = self.check("scales", entries, (groups, self.out), DTYPES)
        self.qzeros = self.check("qzeros", entries, (groups, self.out * bits // 32), ("int32",))
        self.g_idx = None
        if f"{path}.g_idx" in entries:
            self.g_idx = self.check("g_idx", entries, (self.width,), ("int32", "int64"))

    def check(self, part: str, entries: Mapping[str, Entry], shape: tuple[int, ...], dtypes: Iterable[str]) -> Entry:
        name = f"{self.path}.{part}"
        if name not in entries:
            raise ValueError(f"{self.qweight.file}: {name}: missing, wanted {list(shape)}")
        entry = entries[name]
        if tuple(entry.shape) != shape or entry.dtype not in dtypes or not self.out * self.width:
            wanted = f"{' or '.join(dtypes)} {list(shape)}"
            raise ValueError(f"{entry.file}: {name}: found {entry.dtype} {list(entry.shape)}, wanted {wanted}")
        return entry

    def packed(self) -> dict[str, Entry]:
        """As `pack-quantized`, which orders the numbers of a row alike."""
        qweight = transposed(self.qweight)

        def checked(get: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
            return lambda: self.ordered() or self.symmetric() or get()

        packed = Entry(qweight.shape, "int32", qweight.file, checked(qweight.read), checked(qweight.map))
        numbers = lambda: np.array([self.out, self.width], np.int64)  # noqa: E731
        shape = Entry((2,), "int64", qweight.file, numbers, numbers)
        parts = {"packed": packed, "scale": transposed(self.scales), "shape": shape}
        return {f"{self.path}.weight_{part}": entry for part, entry in parts.items()}

    def ordered(self) -> None:
        """Raise ValueError if the columns of a group do not stand side by side."""
        if self.g_idx is not None and not np.array_equal(self.g_idx.map(), self.in_order()):
            raise self.error("g_idx", "columns out of order", "them in order, as desc_act false says")

    def symmetric(self) -> None:
        """Raise ValueError if 0 is not in the middle everywhere."""
        middle = 2 ** (self.bits - 1)
        if not (self.zeros() == middle).all():
            raise self.error("qzeros", "zero points", f"{middle - self.one} everywhere, as sym true says")

    def error(self, part: str, found: str, wanted: str) -> ValueError:
        return ValueError(f"{self.qweight.file}: {self.path}.{part}: found {found}, wanted {wanted}")

    def in_order(self) -> np.ndarray:
        return np.arange(self.width) // self.size

    def zeros(self) -> np.ndarray:
        """What stands for 0: int32 [groups, out]."""
        return (unpack(self.qzeros.read(), self.bits).astype(np.int32) + self.one) % 2**self.bits

    def weight(self) -> dict[str, Entry]:
        """As floats [out, in]."""

        def read() -> np.ndarray:
            group = self.in_order() if self.g_idx is None else self.g_idx.read()
            scales = self.scales.read()
            if group.min() < 0 or group.max() >= len(scales):
                raise self.error("g_idx", f"groups {group.min()} to {group.max()}", f"0 to {len(scales) - 1}")
            _check(Spec(self.path, "scale", scales.shape, ()), self.scales, scales)
            numbers = unpack(np.ascontiguousarray(self.qweight.map().T), self.bits)  # [out, in]
            weight = numbers.astype(np.float32)
            weight -= self.zeros().astype(np.float32).T[:, group]
            weight *= scales.astype(np.float32).T[:, group]
            return weight

        return {f"{self.path}.weight": Entry((self.out, self.width), "float32", self.qweight.file, read, read)}
