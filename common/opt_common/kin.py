"""isinstance(model, transformers.PreTrainedModel), and the like.

Programs around a model ask this before they do what it needs: Trainer saves the config and a tied head of a
PreTrainedModel only, SmoothQuant looks for each OPTDecoderLayer, a pipeline for a ModelOutput, lm-evaluation-harness
for a PreTrainedTokenizerFast; what is none they refuse, or pass over without a word. So instances of the classes here
say yes, by their `__class__`, as proxies and mocks do: a class that comes after both, ours and transformers'. Their
type stays ours, and nothing of transformers' runs. Where transformers is not loaded nobody can ask, and `__class__` is
the type.
"""

from __future__ import annotations

import sys
from typing import Any

_MODULES = (
    "transformers.models.opt.modeling_opt",
    "transformers.modeling_utils",
    "transformers.models.opt.configuration_opt",
    "transformers.configuration_utils",
    "transformers.utils.generic",
    "transformers.cache_utils",
    "transformers.models.gpt2.tokenization_gpt2",
    "transformers.tokenization_utils_tokenizers",
    "transformers.tokenization_utils_base",
)
_NAMES = {  # the closest that is loaded with any model
    "OPTPreTrainedModel": ("PreTrainedModel",),
    "OPTConfig": ("OPTConfig", "PreTrainedConfig"),
    "KVCache": ("DynamicCache",),
    "GPT2Tokenizer": ("GPT2Tokenizer", "TokenizersBackend"),
}
_known: dict[tuple[type, type], type] = {}


class _Both(type):
    """The type of such classes: in them transformers' classes come last, behind object, and lend no attribute that
    ours have; called, they make an instance of ours."""

    def mro(cls) -> list[type]:
        return sorted(super().mro(), key=lambda base: base.__module__.partition(".")[0] == "transformers")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        ours = cls.__dict__.get("_ours")
        return super().__call__(*args, **kwargs) if ours is None else ours(*args, **kwargs)


class Kin:
    """A base of classes whose instances pass for those of transformers' class of the same name."""

    @property
    def __class__(self) -> type:
        ours = type(self)
        theirs = _theirs(ours)
        if theirs is None or issubclass(ours, theirs):
            return ours
        if (ours, theirs) not in _known:
            same = ("__module__", "__qualname__", "__doc__", "__annotations__")
            named = {name: getattr(ours, name, {}) for name in same}
            meta = _Both if type(theirs) is type else type("_Both", (_Both, type(theirs)), {})
            _known[ours, theirs] = meta(ours.__name__, (ours, theirs), {"_ours": ours} | named)
        return _known[ours, theirs]

    @__class__.setter
    def __class__(self, cls: type) -> None:
        object.__dict__["__class__"].__set__(self, cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        # pickle takes copyreg.__newobj__ only for an object whose __class__ is its type
        return (_new, *reduced[1:]) if reduced[0].__name__ == "__newobj__" else reduced


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _theirs(ours: type) -> type | None:
    """The class of transformers that `ours` is closest to, of those that are loaded."""
    modules = [sys.modules[name] for name in _MODULES if name in sys.modules]
    for base in ours.__mro__ if modules else ():
        if base.__module__.partition(".")[0] in ("opt_pt", "opt_common"):
            for name in _NAMES.get(base.__name__, (base.__name__,)):
                for module in modules:
                    if theirs := getattr(module, name, None):
                        return theirs
    return None
