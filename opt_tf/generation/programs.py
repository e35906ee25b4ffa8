"""The compiled programs of `generate`: models of one kind share them, and XLA compiles as many as fit in a process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_common.config import OPTConfig
from opt_common.generation import crowded

from ..layers import Dropout, LayerDrop

MOST = 256  # programs of XLA; each holds some 10 to 50 MB
_forms: set[Any] = set()  # of the programs that it has compiled


def compiled(function: Callable[..., Any]) -> tuple[Any, Any]:
    """The programs of a function of some models and tensors, of XLA and without it; they take `weights`, the models or
    their Kind, then the rest.

    TensorFlow keeps every program for good, and one that took the weights from the models would keep them as well, long
    after the models are gone."""

    def run(models: tuple[Any, ...], weights: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(_variables(models), weights, strict=True))):
            return function(*models, *args, **kwargs)

    programs: Any = tuple(tf.function(run, jit_compile=jit, autograph=False) for jit in (True, False))
    for program in programs:
        program._omit_frequent_tracing_warning = True  # there is one for each width of prompts, as is documented
    return programs


def weights(models: tuple[Any, ...]) -> list[Tensor]:
    return [tf.convert_to_tensor(variable.value) for variable in _variables(models)]


def called(programs: tuple[Any, Any], kind: Kind, tensors: list[Tensor], *args: Any, **kwargs: Any) -> Any:
    """What the program of XLA returns or, if it would be one too many, that without it."""
    form = (programs[0], kind, *map(_form, tf.nest.flatten((args, kwargs))))
    if form not in _forms and len(_forms) < MOST and not crowded():
        _forms.add(form)
    return programs[form not in _forms](kind, tensors, *args, **kwargs)


def _form(x: Any) -> Any:
    """What a program depends on of an argument."""
    return (x.shape, x.dtype) if tf.is_tensor(x) else x if isinstance(x, (int, float, str)) else id(x)


def _variables(models: tuple[Any, ...]) -> list[Any]:
    return [variable for model in models if model is not None for variable in model.weights]


# === What a program depends on of a model, besides its weights ===


class Kind(tf.types.experimental.TraceType):
    """Models that are built alike. It stands for them as an argument of a tf.function."""

    def __init__(self, models: tuple[Any, ...]) -> None:
        self.form = tuple(None if model is None else built(model) for model in models)
        self.models = tuple(None if model is None else weakref.ref(model) for model in models)  # a program keeps this

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Kind) and self.form == other.form

    def __hash__(self) -> int:
        return hash(self.form)

    def __tf_tracing_type__(self, context: Any) -> Kind:
        return self

    def is_subtype_of(self, other: Any) -> bool:
        return self == other

    def most_specific_common_supertype(self, others: Any) -> Kind | None:
        return self if all(self == other for other in others) else None

    def placeholder_value(self, placeholder_context: Any = None) -> tuple[Any, ...]:
        return tuple(None if model is None else model() for model in self.models)

    def cast(self, value: Any, cast_context: Any) -> Any:
        return value


class _Unknown(Exception):
    """Something of which it is not known what a program takes from it, as a user's layer may hold."""


# What takes no part in a call: what Keras itself keeps in a layer or model, but for the policy, and what the plan says.
_TRAINING = ("optimizer", "_compile_config", "_compiled_trainable_state", "stop_training")
_OUTSIDE = frozenset((*vars(keras.layers.Layer()), *vars(keras.Model()), *_TRAINING, "generation_config"))
_PLAIN = frozenset((type(None), bool, int, float, str, type, FunctionType))


def built(model: Any) -> Any:
    """The classes of a model's layers and what they hold, but for the values of its weights; or the model itself, if it
    holds anything else."""
    layers = list(model._flatten_layers())
    places = {id(x): i for things in (layers, model.weights) for i, x in enumerate(things)}
    try:
        return tuple(_layer(layer, places) for layer in layers)
    except _Unknown:
        return weakref.ref(model)


def _layer(layer: Any, places: dict[int, int]) -> Any:
    attributes, policy = vars(layer), layer.dtype_policy
    held = [*_code(type(layer)), policy.name, policy.compute_dtype, policy.variable_dtype]
    for name in sorted(attributes.keys() - _OUTSIDE):
        if name == "seed_generator" and type(layer) in (Dropout, LayerDrop):  # nothing is dropped in a text
            continue
        if not name.startswith("_self_"):
            held += [name, _value(attributes[name], places)]
    return tuple(held)


def _code(kind: type) -> tuple[Any, ...]:
    """A class and its functions, as a class can be patched too; Keras's own are taken to stay."""
    ours = (c for c in kind.__mro__ if c.__module__.partition(".")[0] not in ("keras", "tensorflow", "builtins"))
    return kind, *(x for c in ours for x in vars(c).values() if type(x) is FunctionType)


def _value(x: Any, places: dict[int, int]) -> Any:
    if type(x) in _PLAIN:
        return type(x), x
    if id(x) in places:  # a layer or a weight
        return type(x), places[id(x)]
    if isinstance(x, keras.initializers.Initializer):
        return None
    if isinstance(x, OPTConfig):
        return repr(x)
    if isinstance(x, (list, tuple)):
        return type(x), tuple(_value(each, places) for each in x)
    raise _Unknown
