"""The layouts that a checkpoint can have, by the names that `opt-zoo convert --to` takes; a module each, the preferred
first.

A module has

    MAIN     the names of the files that a folder of this layout is opened by, the preferred first
    SHARD    a pattern of the names of its other weight files
    read     from such a file to the weight files, and the tensors by their Hub names, matrices [out, in]; headers only
    write    from tensors by their Hub names to weight files in an empty folder; returns their names; not all have it

and may have

    find     from a folder or file to the file to open it by, or None; for layouts without names of their own
    holds    whether such a file is of this layout, where several share a name
    config   from such a file and its tensors to the OPTConfig that it holds itself; None where config.json does
    companions  from such a file to the tokenizer's files by their Hub names, where the layout has its own: `ASSETS`
    BESIDE   patterns of the other files to fetch from the Hub, where neither MAIN nor an index names them
    LOST     a sentence that says what of a model has no place in this layout
    check    raises ValueError for the config of a model that has no place in this layout
    plan     from what `write` takes to the files that it would write and their bytes, reading no tensor

A tensor that a layout stores otherwise (transposed, cut, joined) is put right when it is read. `read` raises ValueError
that names the file for one that is damaged, or that would take more memory than its size warrants.
"""

from __future__ import annotations

from types import ModuleType

from . import (
    flax_msgpack,
    keras_file,
    keras_hub,
    metaseq,
    orbax,
    safetensors,
    safetensors_flax,
    safetensors_tf,
    state_dict,
    tf_h5,
    torch_bin,
)

LAYOUTS: dict[str, ModuleType] = {
    "safetensors": safetensors,
    "torch": torch_bin,
    "safetensors-tf": safetensors_tf,
    "safetensors-flax": safetensors_flax,
    "tf-h5": tf_h5,
    "flax-msgpack": flax_msgpack,
    "metaseq": metaseq,
    "state-dict": state_dict,
    "keras-hub": keras_hub,
    "keras": keras_file,
    "orbax": orbax,
}
WRITABLE = tuple(name for name, module in LAYOUTS.items() if hasattr(module, "write"))
# those that can hold a score or qa_outputs: nobody else's classes have them
HEADED = ("safetensors", "torch", "state-dict", "keras", "orbax")


def layout_module(name: str) -> ModuleType:
    """The module of a layout by name. ValueError that lists them for a name that is none."""
    if name not in LAYOUTS:
        raise ValueError(f"layout: found {name!r}, wanted one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
