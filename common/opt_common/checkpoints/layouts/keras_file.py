"""`model.save("model.keras")` of opt_tf: a zip file of config.json and an HDF5 file. Needs no Keras, no TensorFlow.

Reading creates or imports nothing that the file names: it compares the class in the config with those it knows, and
reads those two records in place.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...config import OPTConfig
from ...files import naming, parse_json
from ...weights import HEADS, KERAS, Spec
from ..containers.hdf5 import add_variable, create_hdf5, read_hdf5
from ..containers.zips import Records
from ..tensors import Entry, Source
from .layout import Layout, Progress
from .names import Names

_FILE = "model.keras"
_WEIGHTS, _CONFIG = "model.weights.h5", "config.json"
_CONFIG_BYTES = 1 << 20
_CLASSES = {f"opt_zoo>TF{architecture}": architecture for architecture in HEADS}
_FIRST = "layers/opt_decoder_layer/"
_SEED = "/vars/seed"  # of dropout
_ALIGNED = 64  # keeps the alignment of numbers in the HDF5 file, which is eight bytes


@cache
def _names(architecture: str) -> Names:
    """Keras's names of a model's variables. It names the layers of a list after their class, numbered from the second
    on, and numbers the variables of a layer."""
    head = HEADS[architecture]
    root = "" if head is None else "layers/tfopt_model/"

    def name(spec: Spec) -> str | None:
        variable = f"vars/{int(spec.kind in ('bias', 'norm_bias'))}"
        if spec.path in HEADS.values():
            return f"layers/linear/{variable}" if spec.path == head else None
        path = spec.path.removeprefix("model.").replace(".", "/")
        return f"{root}{path.replace('layers/0/', _FIRST)}/{variable}"

    def normalize(stored: str) -> str:
        return root + stored if stored.startswith("decoder/") else stored

    return Names("opt_tf", KERAS, name, _FIRST, "layers/opt_decoder_layer_{}/", normalize)


def _read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    start, size = _locate(main, _WEIGHTS)
    names = _names(_architecture(main, _own_config(main)))
    # a compiled model's optimizer is no part of the model
    stored = {
        name: entry
        for name, entry in read_hdf5(main, start, size).items()
        if not name.startswith("optimizer/") and not name.endswith(_SEED)
    }
    return [main], names.to_hub(main, stored)


def _config(main: Path, entries: Mapping[str, Entry]) -> OPTConfig:
    """The config in the file's own config.json; one beside the file is not this model's."""
    values = _own_config(main)
    _architecture(main, values)
    theirs = values.get("config")
    given = theirs.get("config") if isinstance(theirs, dict) else None
    unknown = given.get("unknown", {}) if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(unknown, dict):
        raise ValueError(f"{main}: {_CONFIG}: wanted the fields of an OPTConfig as config.config")
    fields = {key: value for key, value in given.items() if key != "unknown"}
    return OPTConfig.from_dict(unknown | fields, source=f"{main}: {_CONFIG}")


def _own_config(main: Path) -> dict[str, Any]:
    start, size = _locate(main, _CONFIG)
    if size > _CONFIG_BYTES:
        raise ValueError(f"{main}: {_CONFIG}: found {size} bytes, wanted at most {_CONFIG_BYTES}")
    with naming(main), open(main, "rb") as file:
        file.seek(start)
        return parse_json(file.read(size), f"{main}: {_CONFIG}")


def _architecture(main: Path, values: dict[str, Any]) -> str:
    kind = values.get("registered_name")
    if not isinstance(kind, str) or kind not in _CLASSES:
        found = f"a model of class {kind!r:.80}"
        raise ValueError(f"{main}: {_CONFIG}: found {found}, wanted one of {', '.join(_CLASSES)}")
    return _CLASSES[kind]


def _locate(main: Path, name: str) -> tuple[int, int]:
    """Where a record begins in the file, and its size."""
    try:
        with naming(main), open(main, "rb") as file:
            records = Records(file)
            if name.encode() not in records.names:
                raise ValueError(f"no record {name}")
            return records.locate(name.encode())
    except (ValueError, struct.error) as error:
        raise ValueError(f"{main}: not readable as a Keras file: {error}") from error


def _write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Progress
) -> list[str]:
    """One file, whatever `limit`."""
    if config is None:
        raise ValueError("keras: wanted a config to write a model")
    head = zipfile.ZipInfo(_WEIGHTS)
    head.CRC = head.header_offset = 0
    # a field that pads the header; zip's own 64-bit numbers follow it
    padding = -(30 + len(_WEIGHTS) + 4 + 20) % _ALIGNED
    head.extra = struct.pack("<2sH", b"OZ", padding) + bytes(padding)
    path, begin = folder / _FILE, len(head.FileHeader(zip64=True))
    modules = {t.name.split(".")[0] for t in tensors}
    heads = [architecture for architecture, head in HEADS.items() if head in modules]
    architecture = heads[0] if heads else "OPTForCausalLM" if "model" in modules else "OPTModel"
    with create_hdf5(path, begin) as file:
        for t in tensors:
            add_variable(file, _names(architecture).to_stored(t))
            advance(t.nbytes)
    # HDF5 seeks in its file, so checksum and directory come once that is complete
    with open(path, "r+b") as file:
        file.seek(begin)
        while piece := file.read(1 << 22):
            head.CRC = zlib.crc32(piece, head.CRC)
            head.file_size += len(piece)
        head.compress_size = head.file_size
        file.seek(0)
        file.write(head.FileHeader(zip64=True))
        file.seek(0, 2)
        with zipfile.ZipFile(file, "w") as archive:
            archive.infolist().append(head)
            archive.writestr(zipfile.ZipInfo("metadata.json"), json.dumps({"keras_version": _VERSION}))
            serialized = _serialized(f"TF{architecture}", config, tensors[0].dtype)
            archive.writestr(zipfile.ZipInfo(_CONFIG), json.dumps(serialized))
    return [_FILE]


_VERSION = "3.12.0"  # the oldest Keras that opt_tf takes; the files of later ones are the same


def _serialized(kind: str, config: OPTConfig, dtype: str) -> dict[str, Any]:
    """The model, as Keras serializes it."""
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": dtype}, "registered_name": None}
    name = {  # as Keras makes a name of a class's
        "TFOPTModel": "tfopt_model",
        "TFOPTForCausalLM": "tfopt_for_causal_lm",
        "TFOPTForSequenceClassification": "tfopt_for_sequence_classification",
        "TFOPTForQuestionAnswering": "tfopt_for_question_answering",
    }[kind]
    fields = dataclasses.asdict(config)
    del fields["_attn_implementation"]  # of the model that runs, not of the file
    values = {"name": name, "trainable": True, "dtype": policy, "config": fields}
    module = "opt_tf.model" if kind in ("TFOPTModel", "TFOPTForCausalLM") else "opt_tf.heads"
    own = {"module": module, "class_name": kind, "config": values, "registered_name": f"opt_zoo>{kind}"}
    return own | {"build_config": {"shapes_dict": {}}, "compile_config": {}}


KERAS_FILE = Layout(main=(_FILE,), read=_read, write=_write, config=_config, headed=True)
