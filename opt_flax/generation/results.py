"""What `generate` returns.

R texts   V vocabulary
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.tree_util import register_pytree_node
from jax.typing import ArrayLike

from .choosing import Plan
from .loop import Given, Reading


def texts(array: ArrayLike) -> Any:
    """The texts, an array, with an attribute `sequences`, the same, for scripts that expect transformers' output."""
    if isinstance(array, Tracer):
        return Traced(array)
    copy = jnp.array(array) if isinstance(array, jax.Array) else jax.device_put(array)
    array = jax.device_put(array)
    array.sequences = copy  # pyright: ignore[reportAttributeAccessIssue]; itself would keep it for ever
    return array


class Traced:
    """Texts within a compiled function: an array in most places, which a traced array with an attribute would be in
    all. What leaves the function is an array again."""

    def __init__(self, sequences: Array) -> None:
        self.sequences = sequences

    def __jax_array__(self) -> Array:
        return self.sequences

    def __getattr__(self, name: str) -> Any:
        if name == "sequences":
            raise AttributeError(name)
        return getattr(self.sequences, name)

    def __getitem__(self, key: Any) -> Array:
        return self.sequences[key]

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Array]:
        return iter(self.sequences)

    def __eq__(self, other: Any) -> Any:
        return operator.eq(self.sequences, other)

    def __ne__(self, other: Any) -> Any:
        return operator.ne(self.sequences, other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _unflatten(_: None, leaves: tuple[Any]) -> Any:
    known = isinstance(leaves[0], jax.Array) and not isinstance(leaves[0], Tracer)
    return texts(leaves[0]) if known else Traced(leaves[0])  # jax also puts other things into trees


register_pytree_node(Traced, lambda traced: ((traced.sequences,), None), _unflatten)


def of_passes(readings: list[Reading], given: Given, plan: Plan) -> dict[str, Any]:
    """The attention weights and hidden states of each pass, if there are any, without the columns that are there for
    a program's width."""
    found: dict[str, list[Any]] = {"attentions": [], "hidden_states": []}
    for step, reading in enumerate(readings):
        there = slice(given.front, given.mask.shape[1] + step)
        rows = slice(None) if plan.use_cache and step else there
        if reading.attentions is not None:
            found["attentions"].append(tuple(x[:, :, rows, there] for x in reading.attentions))
        if reading.hidden_states is not None:
            found["hidden_states"].append(tuple(x[:, rows] for x in reading.hidden_states))
    return {name: tuple(passes) for name, passes in found.items() if passes}


def compute_transition_scores(
    self: Any,
    sequences: ArrayLike,
    scores: tuple[ArrayLike, ...],
    beam_indices: ArrayLike | None = None,
    normalize_logits: bool = False,
) -> Array:
    """The score [R, new] of each new token, from a GenerateOutput with `output_scores`; of a beam, 0 behind its end.

    sequences, scores, beam_indices: the output's fields. normalize_logits: the log probabilities of the scores instead.
    """
    table = jnp.stack([jnp.asarray(x) for x in scores], axis=1)  # [rows, new, V]
    if normalize_logits:
        table = jax.nn.log_softmax(table)
    if beam_indices is None:
        rows = jnp.broadcast_to(jnp.arange(len(table))[:, None], table.shape[:2])
    else:
        rows = jnp.asarray(beam_indices)
    new = rows.shape[1]
    found = table[jnp.maximum(rows, 0), jnp.arange(new), jnp.asarray(sequences)[:, -new:]]
    return jnp.where(rows < 0, 0, found)
