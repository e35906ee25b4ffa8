"""The layouts that a checkpoint can have, by the names that `opt-zoo convert --to` takes; a module each.

A module has

    MAIN     the names of the files that a folder of this layout is opened by, the preferred first
    SHARD    a pattern of the names of its other weight files
    read     from such a file to the weight files, and the tensors by their Hub names, matrices [out, in]; headers only
    write    from tensors by their Hub names to weight files in an empty folder; returns their names; not all have it

A tensor that a layout stores otherwise (transposed, cut, joined) is put right when it is read. `read` raises ValueError
that names the file for one that is damaged, or that would take more memory than its size warrants.
"""

from __future__ import annotations

from types import ModuleType

from . import safetensors, torch_bin

LAYOUTS: dict[str, ModuleType] = {"safetensors": safetensors, "torch": torch_bin}
