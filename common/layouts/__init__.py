"""The layouts that a checkpoint can have, by the names that `opt-zoo convert --to` takes; a module each, the preferred
first.

A module has

    MAIN     the names of the files that a folder of this layout is opened by, the preferred first
    SHARD    a pattern of the names of its other weight files
    read     from such a file to the weight files, and the tensors by their Hub names, matrices [out, in]; headers only
    write    from tensors by their Hub names to weight files in an empty folder; returns their names; not all have it

and may have

    holds    whether such a file is of this layout, where several share a name
    config   from such a file to the OPTConfig that it holds itself, where there is no Hub config.json; None if none
    plan     from what `write` takes to the files that it would write and their bytes, reading no tensor

A tensor that a layout stores otherwise (transposed, cut, joined) is put right when it is read. `read` raises ValueError
that names the file for one that is damaged, or that would take more memory than its size warrants.
"""

from __future__ import annotations

from types import ModuleType

from . import safetensors, safetensors_flax, safetensors_tf, torch_bin

LAYOUTS: dict[str, ModuleType] = {
    "safetensors": safetensors,
    "torch": torch_bin,
    "safetensors-tf": safetensors_tf,
    "safetensors-flax": safetensors_flax,
}
WRITABLE = tuple(name for name, module in LAYOUTS.items() if hasattr(module, "write"))


def layout_module(name: str) -> ModuleType:
    """The module of a layout by name. ValueError that lists them for a name that is none."""
    if name not in LAYOUTS:
        raise ValueError(f"layout: found {name!r}, wanted one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
