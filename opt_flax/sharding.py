"""One model over several devices: which part of each weight lies on which, by the axes that the weight table names.

Tensor parallel: a layer's first products are split by outputs, its second by inputs, and the embedding by tokens, so
that activations meet once in attention and once in the feed-forward (Shoeybi et al. 2019, arXiv:1909.08053). Fully
sharded: what is left of a matrix is split too, and gathered where it is used (Rajbhandari et al. 2020,
arXiv:1910.02054).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from opt_common.config import OPTConfig
from opt_common.weights import FLAX, HEADS, TORCH, Axis, table

# The names of a mesh's axes that say what they are for
TENSOR = ("model", "tensor", "tp", "mp")
FSDP = ("fsdp",)
DATA = ("data", "batch", "dp", "replica")


def shardings(mesh: Mesh | AbstractMesh, *, tensor: str | None = None, fsdp: str | None = None) -> Shardings:
    """Where the weights lie on the devices of `mesh`, for `from_pretrained(..., sharding=shardings(mesh))` and, by
    `of`, for params, states and optimizers.

    tensor: the axis of the mesh over which heads, feed-forward and vocabulary are split. Default: the one called
        "model", "tensor", "tp" or "mp".
    fsdp: the axis over which what is left of every matrix is split, and the norms. Default: the one called "fsdp".
    Over its other axes ("data", "batch", "dp", "replica") each device has a copy.
    Raises ValueError for an axis that has none of these names, unless one is named here, and for axes of a type other
    than Auto.
    """
    sizes = {str(name): n for name, n in mesh.shape.items()}
    if not all(kind is AxisType.Auto for kind in mesh.axis_types):
        how = f"axis_types=(jax.sharding.AxisType.Auto,) * {len(sizes)}"
        raise ValueError(f"mesh: found axes that are not Auto, wanted jax.make_mesh(shape, names, {how})")
    for argument, name in (("tensor", tensor), ("fsdp", fsdp)):
        if name is not None and name not in sizes:
            raise ValueError(f"{argument}: found {name!r}, wanted one of the mesh's axes {', '.join(sizes)}")
    named = tensor or fsdp
    tensor = tensor or next((name for name in sizes if name in TENSOR), None)
    fsdp = fsdp or next((name for name in sizes if name in FSDP), None)
    unknown = [name for name, n in sizes.items() if n > 1 and name not in (tensor, fsdp, *DATA)]
    if unknown and not named:
        known = ", ".join((*TENSOR, *FSDP, *DATA))
        raise ValueError(f"mesh: found axis {unknown[0]!r}, wanted one of {known}; or name it by tensor= or fsdp=")
    return Shardings(mesh, tensor, fsdp)


@dataclass(frozen=True)
class Shardings:
    """What `shardings` returns: a function from a weight's name to where it lies."""

    mesh: Mesh | AbstractMesh
    tensor: str | None
    fsdp: str | None

    def __call__(self, name: str, shape: tuple[int, ...] | None = None) -> NamedSharding:
        """Of a weight, by its name in the checkpoint ("model.decoder.layers.0.fc1.weight") or in the model
        ("model.decoder.layers.0.fc1.kernel"), or of what has the name and the shape of one, as an optimizer's moments.
        Anything else is whole on every device, and so is an axis of `shape` that does not divide evenly."""
        axes, n = _axes_of(name), self.mesh.shape
        if shape is not None and len(shape) != len(axes):
            axes = ()
        split = {"heads": [self.tensor], "ffn": [self.tensor], "vocab": [self.tensor, self.fsdp], "hidden": [self.fsdp]}
        spec = []
        for i, axis in enumerate(axes):
            over = tuple(name for name in split.get(axis or "", ()) if name is not None)
            while over and shape is not None and shape[i] % math.prod(n[name] for name in over):
                over = over[:-1]
            spec.append(over or None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def of(self, tree: Any) -> Any:
        """Of every array in a model, its state, its params or an optimizer's state: a tree like it of NamedShardings,
        as `jax.device_put`, `jax.jit` and Orbax take them. Raises ValueError as `check` does, of a model."""
        if isinstance(config := getattr(tree, "config", None), OPTConfig):
            self.check(config)

        def one(path: Any, x: Any) -> NamedSharding:
            return self(jax.tree_util.keystr(path, simple=True, separator="."), x.shape)

        return jax.tree_util.tree_map_with_path(one, tree)

    @property
    def batch(self) -> NamedSharding:
        """Of a batch: its rows are split over every axis that no weight's heads are split over."""
        rows = tuple(name for name in self.mesh.axis_names if name != self.tensor)
        return NamedSharding(self.mesh, PartitionSpec(rows))

    def check(self, config: OPTConfig) -> None:
        """Raise ValueError if a config's heads, features or groups cannot be split evenly."""
        n = self.mesh.shape[self.tensor] if self.tensor else 1
        for name in ("num_attention_heads", "ffn_dim"):
            if getattr(config, name) % n:
                raise ValueError(f"sharding: found {name} {getattr(config, name)}, wanted a multiple of {n} devices")
        for spec in table(config):
            for size, axis in zip(spec.shape, spec.axes, strict=True):
                if spec.packing is not None and axis in ("heads", "ffn") and size > 1 and size % n:
                    raise ValueError(f"sharding: {spec.name}: found {size} columns, wanted a multiple of {n} devices")


def _axes_of(name: str) -> tuple[Axis | None, ...]:
    """The axes of a weight, by the end of its name; none if it is not one."""
    parts, known = name.removesuffix(".value").split("."), _known()
    for module in reversed(parts[:-1]):  # an adapter holds the module it wraps, under a name of its own
        if module in {name for name, _ in known}:
            return known.get((module, parts[-1]), ())
    return ()


@cache
def _known() -> dict[tuple[str, str], tuple[Axis | None, ...]]:
    """The axes of every weight, by the names of its module and of itself, in the checkpoint and here."""
    known = {}
    config = OPTConfig(num_hidden_layers=1, word_embed_proj_dim=1, tie_word_embeddings=False)
    for spec in (spec for architecture in HEADS for spec in table(config, architecture)):
        module, axes = spec.path.rpartition(".")[2], spec.axes
        if spec.kind == "embedding":  # by rows alone: what is looked up would lie by its width, and not by the batch
            axes = (axes[0], None)
        known[module, getattr(TORCH, spec.kind)] = axes
        known[module, getattr(FLAX, spec.kind)] = axes[::-1] if FLAX.transposes(spec) else axes
        known |= {(module, name): axes for name in (FLAX.packed, FLAX.scale) if spec.kind == "linear"}
    return known
