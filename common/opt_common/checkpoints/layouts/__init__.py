"""The layouts that a checkpoint can have, by the names that `opt-zoo convert --to` takes, the preferred first."""

from __future__ import annotations

from .flax_msgpack import FLAX_MSGPACK
from .keras_file import KERAS_FILE
from .keras_hub import KERAS_HUB
from .layout import Layout
from .metaseq import METASEQ
from .orbax import ORBAX
from .safetensors import SAFETENSORS, SAFETENSORS_FLAX, SAFETENSORS_TF
from .tf_h5 import TF_H5
from .torch import STATE_DICT, TORCH

LAYOUTS: dict[str, Layout] = {
    "safetensors": SAFETENSORS,
    "torch": TORCH,
    "safetensors-tf": SAFETENSORS_TF,
    "safetensors-flax": SAFETENSORS_FLAX,
    "tf-h5": TF_H5,
    "flax-msgpack": FLAX_MSGPACK,
    "metaseq": METASEQ,
    "state-dict": STATE_DICT,
    "keras-hub": KERAS_HUB,
    "keras": KERAS_FILE,
    "orbax": ORBAX,
}
WRITABLE = tuple(name for name, layout in LAYOUTS.items() if layout.write)
HEADED = tuple(name for name, layout in LAYOUTS.items() if layout.headed)
PACKED = ("safetensors", "torch", "state-dict")  # which can hold quantized Linears: those of the Hub's own names


def layout_named(name: str) -> Layout:
    """The layout of a name. ValueError that lists them for a name that is none."""
    if name not in LAYOUTS:
        raise ValueError(f"layout: found {name!r}, wanted one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
