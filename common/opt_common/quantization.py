"""Linears of 8 and 4 bits, in compressed-tensors' format `pack-quantized`: what config.json says of them, and numbers.

A Linear with a weight [out, in] is stored as

weight_packed   int32 [out, in·bits/32]   whole numbers of `bits` bits plus 2^(bits-1), the first in the lowest bits
weight_scale    float [out, groups]       what the numbers of a group are multiplied by: of a row, or of part of one
weight_shape    int64 [2]                 out, in
bias            float [out]               as ever

Numbers are symmetric: there is no zero point besides the 2^(bits-1).

On a CPU, x times a weight of 8 bits with a scale a row is computed in whole numbers: x, over the largest number of its
row, becomes a whole number of 32 bits, which is four digits of 8. The product of a digit and the weight is a sum of
whole numbers, exact in int32, and the CPU reads a byte a weight. What is lost of x is less than float32's own rounding.
With many rows, bound by arithmetic, XLA makes floats of the weight instead.
A row with a number that is not finite becomes NaN.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np


def _amx() -> bool:
    """Whether the CPU multiplies matrices of bytes (AMX), as Linux says."""
    file = Path("/proc/cpuinfo")
    return file.exists() and "amx_int8" in file.read_text().split()


BITS = (4, 8)
# Of digits
MOST = 0x7F000000  # four of -128 to 127 reach 0x7F7F7F7F; the rest is for rounding
ONES = 0x80808080 - 2**32  # added, it makes each digit 0 to 255; then the highest bits flip back
PLACES = (2.0**0, 2.0**8, 2.0**16, 2.0**24)  # what a digit counts, the lowest first
LEAST = 2.0**-95  # of a row's largest number; with less, float32 loses no less: its own least is 2^-126
WIDEST = 2**16  # columns: the sum of more could overflow
MANY = math.inf if _amx() else 64  # rows of x, from which on XLA is quicker with floats made of the weight
# Of a model quantized here: the Linears of the decoder's layers.
_TARGETS = ("Linear",)
_IGNORE = ("lm_head", "score", "qa_outputs", "re:.*project_in$", "re:.*project_out$")


@dataclass(frozen=True)
class Packing:
    """How many bits a number has, and how many columns share a scale; None: those of a row."""

    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        return f"{self.bits} bits, " + (f"groups of {self.group_size}" if self.group_size else "one scale a row")

    def columns(self, width: int) -> int:
        """How many int32 hold a row of `width` numbers."""
        return width * self.bits // 32

    def groups(self, width: int) -> int:
        """How many scales a row of `width` numbers has."""
        return width // (self.group_size or width)

    def check(self, path: str, width: int) -> None:
        """Raise ValueError, naming the Linear, if rows of `width` numbers cannot be stored."""
        for what, size in (("the group size", self.group_size or 1), ("what an int32 holds", 32 // self.bits)):
            if width % size:
                raise ValueError(f"{path}: found {width} input features, wanted a multiple of {size}, {what}")


@dataclass(frozen=True)
class QuantizationConfig:
    """Which Linears are stored in few bits, and how: config.json's `quantization_config`.

    groups: targets and their packing; the first that fits a Linear counts. A target is "Linear" for all, the name of a
    module, or a regular expression after "re:". ignore: targets that stay as they are. Heads always do.
    """

    groups: tuple[tuple[tuple[str, ...], Packing], ...]
    ignore: tuple[str, ...] = _IGNORE

    @classmethod
    def rounding(cls, bits: int, group_size: int | None = None) -> Self:
        """Of the Linears of the decoder's layers, with the usual scales: one a row in 8 bits, one of 128 columns in 4.
        ValueError for other bits, or a group size that is not a multiple of 8."""
        if bits not in BITS:
            raise ValueError(f"bits: found {bits!r}, wanted 8 or 4")
        size = _group_size("group_size", 128 if group_size is None and bits == 4 else group_size)
        return cls(((_TARGETS, Packing(bits, size)),))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self | None:
        """From the contents of `quantization_config`: that of compressed-tensors, or of GPTQ, whose tensors are read as
        such ones. None for a GPTQ that can only be read as floats: with zero points, or with columns of a group apart
        from each other. Raises ValueError, naming the key, for what is not implemented."""
        read = _Reader("quantization_config", values)
        method = read.one_of("quant_method", "compressed-tensors", "gptq")
        if method == "gptq":
            packing = gptq_packing(values)
            return packing and cls(((_TARGETS, packing),))
        read.one_of("format", "pack-quantized")
        read.one_of("quantization_status", "compressed", None)
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
            read.absent(key)
        ignore = read.names("ignore")
        groups = read.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise read.error("config_groups", "an object of groups")
        return cls(tuple(_group(f"{read.path}.config_groups.{name}", group) for name, group in groups.items()), ignore)

    def to_dict(self) -> dict[str, Any]:
        """The contents of `quantization_config`, as compressed-tensors has them."""
        groups = {
            f"group_{i}": {
                "targets": list(targets),
                "weights": {
                    "num_bits": packing.bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group" if packing.group_size else "channel",
                    "group_size": packing.group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for i, (targets, packing) in enumerate(self.groups)
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
        }

    def of(self, path: str) -> Packing | None:
        """How the Linear `path` ("model.decoder.layers.0.fc1") is stored; None if it is not quantized."""
        names = (path, path.removeprefix("model."))
        if any(_fits(target, names) for target in self.ignore):
            return None
        found = (packing for targets, packing in self.groups if any(_fits(target, names) for target in targets))
        return next(found, None)

    def __str__(self) -> str:
        return "; ".join(dict.fromkeys(str(packing) for _, packing in self.groups))


def gptq_packing(values: Mapping[str, Any]) -> Packing | None:
    """How the Linears of a GPTQ checkpoint can be stored, from its `quantization_config`; None: as floats only."""
    read = _Reader("quantization_config", values)
    bits = read.one_of("bits", *BITS)
    size = read.get("group_size")
    size = None if size == -1 else _group_size(f"{read.path}.group_size", size)
    symmetric, apart = (read.one_of(key, True, False, None) for key in ("sym", "desc_act"))
    read.one_of("checkpoint_format", "gptq", "gptq_v2", None)
    read.one_of("lm_head", False, None)
    for key in ("dynamic", "modules_in_block_to_quantize"):
        read.absent(key)
    return Packing(bits, size) if symmetric is not False and not (apart and size) else None


class _Reader:
    """A part of `quantization_config`, and where it is, for errors."""

    def __init__(self, path: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{path}: found {reprlib.repr(values)}, wanted an object")
        self.path, self.values = path, values

    def error(self, key: str, wanted: str) -> ValueError:
        found = f"found {reprlib.repr(self.values.get(key))}, wanted {wanted}"
        return ValueError(f"{self.path}: {key}: {found}; OPT Zoo does not support this and will not ignore it")

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def one_of(self, key: str, *wanted: Any) -> Any:
        """The value, one of `wanted`: None stands for none, and is not named in the error."""
        value = self.values.get(key)
        if not any(type(value) is type(one) and value == one for one in wanted):
            raise self.error(key, " or ".join(repr(one) for one in wanted if one is not None))
        return value

    def absent(self, key: str) -> None:
        """Refuse a value; {} and [] are none."""
        if self.values.get(key) not in (None, {}, []):
            raise self.error(key, "none")

    def names(self, key: str) -> tuple[str, ...]:
        names = self.values.get(key) or []
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise self.error(key, "a list of names")
        for name in names:
            _check_pattern(f"{self.path}: {key}", name)
        return tuple(names)


def _group(path: str, values: Any) -> tuple[tuple[str, ...], Packing]:
    """One of `config_groups`."""
    read = _Reader(path, values)
    read.one_of("format", "pack-quantized", None)
    for key in ("input_activations", "output_activations"):
        read.absent(key)
    targets = read.names("targets")
    weights = _Reader(f"{path}.weights", read.get("weights"))
    bits = weights.one_of("num_bits", *BITS)
    weights.one_of("type", "int", None)
    weights.one_of("symmetric", True, None)
    weights.one_of("dynamic", False, None)
    weights.one_of("actorder", "weight", "static", False, None)  # which leave groups as they are
    weights.absent("block_structure")
    size = weights.get("group_size")
    if weights.one_of("strategy", "channel", "group", *([None] if size else [])) == "channel" or size == -1:
        if size not in (None, -1):
            raise weights.error("group_size", "null for strategy 'channel'")
        return targets, Packing(bits)
    return targets, Packing(bits, _group_size(f"{path}.weights: group_size", size, wanted=True))


def _group_size(name: str, size: Any, wanted: bool = False) -> int | None:
    if size is None and not wanted:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0 or size % 8:
        raise ValueError(f"{name}: found {reprlib.repr(size)}, wanted a multiple of 8")
    return size


_MOST = 2_000_000  # ways that a pattern may try to fit a name


def _check_pattern(name: str, target: str) -> None:
    """Refuse a regular expression that is none, or could take very long: it comes from a file."""
    if not target.startswith("re:"):
        return
    pattern = target[3:]
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: found {reprlib.repr(target)}, wanted a regular expression: {error}") from error
    ways = math.prod(part.count("|") + 1 for part in re.split(r"[()]", pattern))
    ways *= 64 ** len(re.findall(r"[*+{]|[^(]\?", pattern))
    if len(pattern) > 1000 or ways > _MOST or re.search(r"\)[*+?{]", pattern):
        raise ValueError(f"{name}: found {reprlib.repr(target)}, wanted a simpler pattern, which cannot take long")


def _fits(target: str, names: tuple[str, ...]) -> bool:
    if target.startswith("re:"):
        return any(re.match(target[3:], name) for name in names)
    return target in ("Linear", *names)


def quantize(name: str, weight: np.ndarray, packing: Packing, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight [out, in] to the nearest: `weight_packed`, and `weight_scale` in `dtype`. The scale is the group's
    largest number over 2^(bits-1) - ½. Raises ValueError, with `name`, if a number is not finite."""
    (out, width), half = weight.shape, 2 ** (packing.bits - 1)
    packing.check(name, width)
    packed = np.empty((out, packing.columns(width)), np.int32)
    scale = np.empty((out, packing.groups(width)), dtype)
    wide = np.promote_types(weight.dtype, np.float32)
    least = ml_dtypes.finfo(dtype).smallest_subnormal.astype(wide)  # in place of 0
    rows = max(1, _BLOCK // width)

    def block(i: int) -> None:
        w = weight[i : i + rows].astype(wide).reshape(-1, scale.shape[1], width // scale.shape[1])
        largest = np.maximum(w.max(-1), -w.min(-1))
        if not np.isfinite(largest).all():
            raise ValueError(f"{name}: found numbers that are NaN or infinite, wanted finite ones to quantize")
        scale[i : i + rows] = s = np.maximum(largest / wide.type(half - 0.5), least).astype(dtype)
        w /= s.astype(wide)[:, :, None]
        packed[i : i + rows] = pack(round_(w, packing.bits).reshape(len(w), width), packing.bits)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(block, range(0, out, rows)))
    return packed, scale


_BLOCK = 2**18  # numbers: stay in the processor's cache


def round_(w: np.ndarray, bits: int) -> np.ndarray:
    """Numbers over their scales, rounded in place to whole numbers of `bits` bits, plus 2^(bits-1): uint8."""
    half = 2 ** (bits - 1)
    np.rint(w, out=w)
    np.clip(w, -half, half - 1, out=w)
    w += half
    return w.astype(np.uint8)


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [out, in], each below 2^bits, as int32 [out, in·bits/32]."""
    if bits == 4:
        pairs = numbers.view("<u2")
        numbers = (pairs | pairs >> 4).astype(np.uint8)
    return numbers.view("<i4").astype(np.int32, copy=False)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """int32 [out, in·bits/32] as uint8 [out, in]."""
    numbers = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    return np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(len(packed), -1) if bits == 4 else numbers


def dequantize(packed: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The weight [out, in], in float32, or float64 of such scales."""
    out = np.empty((len(packed), packed.shape[1] * 32 // bits), np.promote_types(scale.dtype, np.float32))
    rows = max(1, _BLOCK // out.shape[1])
    for i in range(0, len(out), rows):
        wide = unpack(packed[i : i + rows], bits).astype(out.dtype) - 2 ** (bits - 1)
        wide = wide.reshape(len(wide), scale.shape[1], -1) * scale[i : i + rows].astype(out.dtype)[:, :, None]
        out[i : i + rows] = wide.reshape(len(wide), -1)
    return out
