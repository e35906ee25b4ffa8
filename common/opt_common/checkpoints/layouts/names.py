"""What frameworks and their layouts call OPT's tensors, by the rows of the one table in `weights.py`.

model.decoder.layers.0.fc1.weight    the Hub
model/decoder/layers.0/fc1/kernel:0  transformers' TensorFlow, after a scope such as `tfopt_for_causal_lm/`, which
                                     some files keep
model.decoder.layers.0.fc1.kernel    transformers' Flax
model/decoder/layers/0/fc1/kernel    the same in msgpack
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ...config import OPTConfig
from ...files import naming
from ...weights import FLAX, HEADS, KERAS, Naming, Spec, table
from ..containers.unpickle import load
from ..tensors import Entry, Source, renamed, transposed

# Every kind of row once; layers differ by their number only.
_SMALL = OPTConfig(num_hidden_layers=1, word_embed_proj_dim=1, tie_word_embeddings=False)
_ROWS = {spec.name: spec for architecture in ("OPTForCausalLM", *HEADS) for spec in table(_SMALL, architecture)}
_NUMBER = r"(0|[1-9]\d{0,3})"
_LAYER = re.compile(rf"layers\.{_NUMBER}\.", re.ASCII)


def row_of(name: str) -> Spec | None:
    """The row, as of layer 0, of the tensor that the Hub calls `name`: right in its kind and axes, not in its shape."""
    return _ROWS.get(_LAYER.sub("layers.0.", name, count=1))


class Names:
    """The Hub's names of tensors and a layout's, both ways.

    `name` gives the layout's for a row of layer 0, or None if the layout has no such tensor. `first` is the part of it
    that tells layer 0, `nth` that of another layer, with {} for its number. `naming` says which tensors are stored
    transposed. `normalize` turns the spellings that a file may have into the one that `name` gives. `owner` is for
    errors.
    """

    def __init__(
        self,
        owner: str,
        naming: Naming,
        name: Callable[[Spec], str | None],
        first: str,
        nth: str,
        normalize: Callable[[str], str] = lambda stored: stored,
    ) -> None:
        self._owner, self._naming, self._first, self._nth, self._normalize = owner, naming, first, nth, normalize
        before, after = map(re.escape, nth.split("{}"))
        self._layer = re.compile(before + _NUMBER + after, re.ASCII)
        self._stored = {spec.name: stored for spec in _ROWS.values() if (stored := name(spec)) is not None}
        self._rows: dict[str, Spec] = {}
        for hub, stored in self._stored.items():  # the bare model's rows come last, and may be called as others are
            self._rows.setdefault(stored, _ROWS[hub])

    def stored(self, name: str) -> tuple[str, Spec]:
        """The layout's name of the tensor that the Hub calls `name`, and its row, as of layer 0. ValueError if the
        layout has no such tensor."""
        spec, number = row_of(name), _LAYER.search(name)
        if spec is None or spec.name not in self._stored:
            raise ValueError(f"{name}: {self._owner} has no such tensor")
        stored = self._stored[spec.name]
        if number is not None and number[1] != "0":
            stored = stored.replace(self._first, self._nth.format(number[1]), 1)
        return stored, spec

    def hub(self, stored: str) -> tuple[str, Spec] | None:
        """The Hub's name of the layout's `stored`, and its row, as of layer 0; or None."""
        stored = self._normalize(stored)
        number = self._layer.search(stored)
        spec = self._rows.get(self._layer.sub(self._first, stored, count=1))
        if spec is None:
            return None
        return spec.name.replace("layers.0.", f"layers.{number[1]}.") if number else spec.name, spec

    def to_stored(self, tensor: Source) -> Source:
        """A tensor as the layout calls and stores it."""
        name, spec = self.stored(tensor.name)
        return renamed(tensor, name, self._naming.transposes(spec))

    def to_hub(self, path: Path, stored: Mapping[str, Entry]) -> dict[str, Entry]:
        """The tensors of the file `path` by the Hub's names, matrices [out, in]. One of an unknown name keeps it,
        and one of a strange shape its shape, for the check against the config to report."""
        entries: dict[str, Entry] = {}
        for theirs, entry in stored.items():
            name, spec = self.hub(theirs) or (theirs, None)
            if name in entries:
                raise ValueError(f"{path}: holds {name} twice, once as {theirs}")
            turn = spec is not None and self._naming.transposes(spec) and len(entry.shape) == 2
            entries[name] = transposed(entry) if turn else entry
        return entries


def _tf(spec: Spec) -> str | None:
    if spec.path in HEADS.values():  # transformers' TFOPTForCausalLM has no head of its own
        return None
    # the bare TFOPTModel says "model/" too; embed_tokens is a layer of transformers' own, whose table is a "weight"
    name = KERAS.name(spec) if not spec.path.endswith("embed_tokens") else spec.name
    return f"model/{name.removeprefix('model.').replace('.', '/').replace('layers/', 'layers.')}:0"


def _normalize_tf(stored: str) -> str:
    # files of 2022 call the table of positions a weight
    return re.sub(r"^[^/]+/(?=model/)", "", stored).replace(
        "/embed_positions/weight:0", "/embed_positions/embeddings:0"
    )


def _normalize_tf_h5(stored: str) -> str:
    # a single file puts Keras's group before the scope
    return _normalize_tf(re.sub(r"^model/(?=[^/]+/model/)", "", stored))


def _flax(spec: Spec) -> str | None:
    return None if spec.path in ("score", "qa_outputs") else FLAX.name(spec)


def _flax_path(spec: Spec) -> str | None:
    name = _flax(spec)
    return name and name.replace(".", "/")


TF_SCOPE = "tfopt_for_causal_lm/"  # before the names in an index; it counts the models that a program had made
TF_NAMES = Names("transformers' TensorFlow OPT", KERAS, _tf, "layers.0/", "layers.{}/", _normalize_tf)
TF_H5_NAMES = Names("transformers' TensorFlow OPT", KERAS, _tf, "layers.0/", "layers.{}/", _normalize_tf_h5)
FLAX_NAMES = Names("transformers' Flax OPT", FLAX, _flax, "layers.0.", "layers.{}.")
FLAX_PATH_NAMES = Names("transformers' Flax OPT", FLAX, _flax_path, "layers/0/", "layers/{}/")


def holds_metaseq(path: Path) -> bool:
    """Whether a file that PyTorch saved is one of metaseq's: its "model" holds names of a decoder, or of parameters
    that FSDP has joined."""
    with naming(path), open(path, "rb") as file:
        if file.read(4)[:2] not in (b"PK", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"):
            return False
    tree = load(path)
    model = tree.get("model") if isinstance(tree, dict) else None
    return isinstance(model, dict) and any(
        isinstance(name, str) and (name.startswith("decoder.") or "flat_param_" in name) for name in model
    )
