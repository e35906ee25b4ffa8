"""The functional way of transformers' Flax classes, beside NNX's own: a model is called with its weights apart from it,
`model(ids, params=params)`, under every transformation of JAX.

`params` is a nested dictionary of arrays with transformers' names and orientation: layers are "0", "1" ..., kernels
[in, out].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from opt_common.outputs import ModelOutput

from .cache import KVCache
from .quantized import Packed

Params = dict[str, Any]
Path = tuple[str, ...]

# What `params` has given out, and the array that each entry then held: a script may put others in their places
_given: WeakKeyDictionary[nnx.Module, tuple[Params, dict[Path, Any]]] = WeakKeyDictionary()


def functional(call: Callable[..., Any]) -> Callable[..., Any]:
    """Give a model's call the arguments of transformers' Flax classes, in their order.

    params: the weights of this call, in place of the model's. The model is not changed.
    train: whether dropout is on, with dropout_rng, a key; off by default. deterministic says the opposite. `rngs`,
        NNX's, turn it on by themselves.
    """

    @wraps(call)
    def run(
        self: Any,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        params: Mapping[str, Any] | None = None,
        past_key_values: KVCache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        dropout_rng: ArrayLike | None = None,
        deterministic: bool | None = None,
        train: bool | None = None,
        rngs: nnx.Rngs | None = None,
        **kwargs: Any,
    ) -> Any:
        rngs = _rngs(self.config, train, deterministic, dropout_rng, rngs)
        return call(
            weighted(self, params),
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            rngs=rngs,
            **kwargs,
        )

    del run.__wrapped__  # the signature is this one's
    return run


def with_params(method: Callable[..., Any]) -> Callable[..., Any]:
    """Give a method of a model the argument params, the weights of this call."""

    @wraps(method)
    def run(self: Any, *args: Any, params: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        return method(weighted(self, params), *args, **kwargs)

    return run


def weighted(model: Any, params: Mapping[str, Any] | None) -> Any:
    """The model, or if params are given a copy with them."""
    if params is not None:
        return bind(model, params)
    adopt(model)
    check_weights(model)
    return model


def _rngs(
    config: Any, train: bool | None, deterministic: bool | None, key: ArrayLike | None, rngs: nnx.Rngs | None
) -> nnx.Rngs | None:
    if train is not None and deterministic is not None and train == deterministic:
        raise ValueError(f"train, deterministic: found {train} and {deterministic}, which contradict each other")
    if train is None and deterministic is not None:
        train = not deterministic
    if train is None or (train and rngs is not None):
        return rngs
    if not train or not (config.dropout or config.attention_dropout or config.layerdrop):
        return None
    if key is None:
        raise ValueError("dropout_rng: found None, wanted a key for the dropout of training")
    return nnx.Rngs(dropout=jnp.asarray(key))


class FunctionalModel(nnx.Module):
    """What transformers' Flax models offer for weights that are kept outside of the model."""

    framework = "flax"

    @property
    def params(self) -> Params:
        """The weights, a nested dictionary. Setting an entry of it sets the weight, as of the next call of the model or
        look at `params`, but not for NNX's functions before that; setting `params` sets them all, at once.
        Raises ValueError for a model made with _do_init=False, and for missing, unknown and misshapen weights."""
        check_weights(self)
        return give(self)

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        check_weights(self)
        write(self, params)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "params":  # NNX would take it for a part of the model
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def params_shape_tree(self) -> Params:
        """The shapes and dtypes of the weights, as `params`."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), read(self))

    @property
    def required_params(self) -> set[Path]:
        """The names of the weights, each a tuple."""
        return {*_flat(read(self))}

    @property
    def key(self: Any) -> Array:
        """The key of the constructor's `seed`."""
        return jax.random.PRNGKey(self.seed)

    def init_weights(
        self: Any, rng: Array, input_shape: tuple[int, ...] = (1, 1), params: Mapping[str, Any] | None = None
    ) -> Params:
        """New weights, drawn with the key `rng`; or `params`, with new ones for those that it lacks. The model keeps
        its own. input_shape has no effect."""
        table = self._decoder.embed_tokens
        new = type(self)(self.config, dtype=table.dtype, param_dtype=table.param_dtype, rngs=nnx.Rngs(rng))
        return _nested(_flat(read(new)) | _flat(params or {}))

    def to_bf16(self, params: Mapping[str, Any], mask: Any = None) -> Any:
        """`params` with its floating-point arrays in bfloat16: all, or those where `mask`, a tree of booleans, says
        so."""
        return cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Mapping[str, Any], mask: Any = None) -> Any:
        """As `to_bf16`, in float16."""
        return cast(params, jnp.float16, mask)

    def to_fp32(self, params: Mapping[str, Any], mask: Any = None) -> Any:
        """As `to_bf16`, in float32."""
        return cast(params, jnp.float32, mask)

    @property
    def module(self) -> Module:
        """The model as Linen has it: `model.module.apply({"params": params}, ids)`."""
        return Module(self)

    def prepare_inputs_for_generation(
        self: Any, input_ids: Array, max_length: int, attention_mask: ArrayLike | None = None
    ) -> dict[str, Any]:
        """The arguments of the first call of a loop that ends at max_length tokens: a cache, a mask as wide as it is,
        and the positions."""
        B, T = input_ids.shape
        mask = jnp.ones((B, max_length), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        if attention_mask is not None:
            positions = jnp.asarray(attention_mask).cumsum(axis=1) - 1
            mask = lax.dynamic_update_slice(mask, jnp.asarray(attention_mask, jnp.int32), (0, 0))
        cache = RowsFirst(*self.init_cache(B, max_length))
        return {"past_key_values": cache, "attention_mask": mask, "position_ids": positions}

    def update_inputs_for_generation(self, model_outputs: ModelOutput, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the next call, from the outputs and arguments of the last."""
        model_kwargs["past_key_values"] = model_outputs.past_key_values
        model_kwargs["position_ids"] = model_kwargs["position_ids"][:, -1:] + 1
        return model_kwargs


@dataclass(frozen=True)
class Module:
    """A model as Linen has it: its variables are arguments, {"params": ...} and, of a call with a cache, "cache"."""

    model: Any

    def init(
        self,
        rngs: Any,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        init_cache: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """New variables, drawn with a key or {"params": key}; with init_cache, a cache for ids of this shape too."""
        variables = {"params": self.model.init_weights(rngs["params"] if isinstance(rngs, Mapping) else rngs)}
        return variables | ({"cache": self.model.init_cache(*jnp.shape(input_ids))} if init_cache else {})

    def apply(
        self,
        variables: Mapping[str, Any],
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        return_dict: bool = True,
        rngs: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Call the model. `rngs` is a key or {"dropout": key}. With `mutable`, returns the output and the variables
        that changed, {"cache": ...} if there is one."""
        key = rngs.get("dropout") if isinstance(rngs, Mapping) else rngs
        params, cache = variables["params"], variables.get("cache")
        out = self.model(
            input_ids, attention_mask, position_ids, params, cache, dropout_rng=key, return_dict=True, **kwargs
        )
        cache = out.pop("past_key_values", None)
        result = out if return_dict else out.to_tuple()
        return (result, {} if cache is None else {"cache": cache}) if mutable else result


class RowsFirst(KVCache):
    """A KVCache whose keys and values a tree_map sees as [B, N, S, D], rows first like those of transformers' caches: a
    beam search by hand picks its rows from every array alike."""


def _flatten(cache: RowsFirst) -> tuple[list[Any], None]:
    def rows_first(x: Any) -> Any:  # anything can be a leaf: a sharding, an axis
        return x.reshape(-1, cache.rows, *x.shape[1:]).swapaxes(0, 1) if _is_array(x, 3) else x

    return [*(tuple(map(rows_first, x)) for x in (cache.k, cache.v)), cache.length, cache.segments], None


def _unflatten(_: None, children: Iterable[Any]) -> RowsFirst:
    def heads_first(x: Any) -> Any:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) if _is_array(x, 4) else x

    k, v, length, segments = children
    return RowsFirst(tuple(map(heads_first, k)), tuple(map(heads_first, v)), length, segments)


def _is_array(x: Any, ndim: int) -> bool:
    return isinstance(x, (jax.Array, np.ndarray)) and x.ndim == ndim


jax.tree_util.register_pytree_node(RowsFirst, _flatten, _unflatten)


# === Weights apart from a model ===


def read(model: nnx.Module) -> Params:
    """The model's weights as a nested dictionary."""
    return _nested({path: variable.get_value() for path, variable in _variables(model)})


def write(model: nnx.Module, params: Mapping[str, Any]) -> None:
    """Set the model's weights. Raises ValueError for missing, unknown and misshapen ones."""
    for _, variable, value in _matched(model, params):
        variable.set_value(jnp.asarray(value))
    _given.pop(model, None)


def bind(model: Any, params: Mapping[str, Any]) -> Any:
    """A copy of the model with these weights, which may be traced. Raises ValueError as `write` does."""
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    values = {path: value for path, _, value in _matched(model, params)}
    for path, variable in flat.items():
        if isinstance(variable, (nnx.Param, Packed)):
            flat[path] = variable.replace(jnp.asarray(values[_names(path)]))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def give(model: nnx.Module) -> Params:
    """The model's weights, in a dictionary whose entries may be set: it is kept, and `adopt` looks at it."""
    adopt(model)
    tree = read(model)
    if model not in _given or not _same(_flat(tree), _flat(_given[model][0])):
        _given[model] = tree, _flat(tree)
    return _given[model][0]


def adopt(model: nnx.Module) -> None:
    """Take over the arrays that a script has put into the dictionary that `give` gave it."""
    if model not in _given:
        return
    tree, known = _given[model]
    found = _flat(tree)
    if not _same(found, known):
        for path, variable, value in _matched(model, tree):
            if value is not known[path]:
                variable.set_value(jnp.asarray(value))
        _given[model] = tree, found


def check_weights(model: Any) -> None:
    """Raise ValueError for a model without weights of its own."""
    if isinstance(model._decoder.embed_tokens.embedding.get_value(), jax.ShapeDtypeStruct):
        raise ValueError("params: found none, and a model that was made with _do_init=False, wanted its weights")


def without_weights(model: Any) -> Any:
    """A copy of the model that has the shapes of its weights alone."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))


def cast(params: Mapping[str, Any], dtype: DTypeLike, mask: Any = None) -> Any:
    """params with the floating-point arrays in another dtype: all, or those where mask, a tree of booleans, says so."""

    def to(x: Any, wanted: bool = True) -> Any:
        return x.astype(dtype) if wanted and jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(to, params) if mask is None else jax.tree.map(to, params, mask)


def _variables(model: nnx.Module) -> Iterator[tuple[Path, nnx.Variable]]:
    for path, node in nnx.iter_graph(model):
        if isinstance(node, (nnx.Param, Packed)):
            yield _names(path), node


def _names(path: Iterable[Any]) -> Path:
    return tuple(map(str, path))


def _matched(model: nnx.Module, params: Mapping[str, Any]) -> list[tuple[Path, nnx.Variable, Any]]:
    variables, values = dict(_variables(model)), _flat(params)
    for name, paths in (("none", variables.keys() - values), ("an unknown", values.keys() - variables)):
        if paths:
            raise ValueError(f"params: found {name} {'.'.join(min(paths))}")
    for path, variable in variables.items():
        if jnp.shape(values[path]) != variable.shape:
            found = f"params: found {'.'.join(path)} of shape {list(jnp.shape(values[path]))}"
            raise ValueError(f"{found}, wanted {list(variable.shape)}")
    return [(path, variable, values[path]) for path, variable in variables.items()]


def _flat(params: Mapping[str, Any], path: Path = ()) -> dict[Path, Any]:
    flat: dict[Path, Any] = {}
    for key, value in params.items():
        flat |= _flat(value, (*path, str(key))) if isinstance(value, Mapping) else {(*path, str(key)): value}
    return flat


def _nested(flat: Mapping[Path, Any]) -> Params:
    tree: Params = {}
    for (*parents, name), value in flat.items():
        level = tree
        for key in parents:
            level = level.setdefault(key, {})
        level[name] = value
    return tree


def _same(a: dict[Path, Any], b: dict[Path, Any]) -> bool:
    return a.keys() == b.keys() and all(value is b[path] for path, value in a.items())
