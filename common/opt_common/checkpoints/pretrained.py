"""`from_pretrained` and `save_pretrained`, except for what each framework does with an array."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DTYPES, OPTConfig
from ..generation import GenerationConfig
from ..hub import FETCH_OPTIONS, local
from ..progress import byte_bar
from ..quantization import QuantizationConfig
from ..weights import Spec, head, table
from .checkpoint import of_one_save
from .fit import layer_number
from .layouts import PACKED
from .open import Opened, open_checkpoint
from .quantized import as_table
from .save import save_checkpoint
from .shards import MAX_SHARD_SIZE
from .tensors import Entry, Index, Source, ahead, contiguous

# the config overrides that `from_pretrained` takes
_FIELDS = {field.name for field in dataclasses.fields(OPTConfig)}
CHANGEABLE = _FIELDS - {"unknown", "dtype", "quantization_config", "_attn_implementation"} | {"id2label", "label2id"}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint: its config, the dtype to load in, its tensors in the order of the table, read one at a
    time as they are asked for, those of the head that it does not hold, for the framework to draw, the stored names
    that are not used, and how to read those that the caller's `added` names."""

    config: OPTConfig
    dtype: str
    tensors: Iterator[tuple[Spec, np.ndarray]]
    new: list[Spec]
    unused: list[str]
    generation: GenerationConfig
    added: dict[str, Callable[[], np.ndarray]]


# transformers' options that say which weights to read ...
_LAYOUT_OF = {
    ("use_safetensors", True): "safetensors",
    ("use_safetensors", False): "torch",
    ("from_tf", True): "tf-h5",
    ("from_flax", True): "flax-msgpack",
}
# ... and those that cannot change what is loaded: whatever is given here, weights are streamed, and no code is run
_NO_EFFECT = {"low_cpu_mem_usage", "trust_remote_code", "offload_state_dict", "offload_buffers", "weights_only"}
_NO_EFFECT |= {"proxies", "resume_download", "from_pt", "_fast_init", "code_revision", "adapter_kwargs"}
# What is not there to be used, and so may only be off.
_ONLY_OFF = ("quantization_config", "variant", "use_flash_attention_2", "gguf_file", "tp_plan")
_ONLY_OFF += ("torchscript",)


def open_pretrained(
    path_or_name: str | Path,
    architecture: str,
    dtype: str,
    copied: bool = False,
    layout: str | None = None,
    config: OPTConfig | str | Path | None = None,
    ignore_mismatched_sizes: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    added: Callable[[OPTConfig], Collection[str]] = lambda config: (),
    part: Callable[[Spec], Index | None] = lambda spec: None,
    **options: Any,
) -> Pretrained:
    """Find, open and check a checkpoint; no tensor is read yet.

    `architecture`: one of `weights.HEADS`. `dtype` is a name, or "auto" for the checkpoint's own. `copied`: the caller
    copies each array elsewhere and drops it, so it may be a map of the file. `layout`: which to read of several, as on
    the Hub; the preferred one by default (`open_checkpoint`). `config`: replaces the checkpoint's; an OPTConfig, or a
    folder or Hub name. `ignore_mismatched_sizes`: a head of another shape is newly initialized. `key_mapping`: as in
    `open_checkpoint`. `added`: the names of tensors that a model of this config has besides the table's. `part`: of
    a tensor, the rows and columns to read; None for all. `options`: config overrides (`num_labels`, `dropout` ...;
    fewer `num_hidden_layers` drop the last layers), what `opt_common.hub.fetch` takes, and transformers'
    use_safetensors, from_tf, from_flax, load_in_8bit and load_in_4bit, which round the layers' Linears as they are
    read, and others that cannot change what is loaded.
    Warns, in one line, of weights that are not used, and of those that the checkpoint does not hold. Raises before
    anything is allocated: TypeError for an unknown option, ValueError for one that is not offered.
    """
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"dtype: found {dtype!r}, wanted 'auto' or one of {', '.join(DTYPES)}")
    if options.pop("use_auth_token", None) is not None:
        raise ValueError("use_auth_token: give it as token")
    for name in [name for name in options if name in _ONLY_OFF]:
        if options.pop(name):
            raise ValueError(f"{name}: OPT Zoo does not support this and will not ignore it")
    for name in [name for name in options if name in _NO_EFFECT]:
        del options[name]
    for name in ("use_safetensors", "from_tf", "from_flax"):
        layout = _LAYOUT_OF.get((name, options.pop(name, None)), layout)
    rounded = [bits for bits in (8, 4) if options.pop(f"load_in_{bits}bit", None)]
    if len(rounded) > 1:
        raise ValueError("load_in_8bit, load_in_4bit: found both, wanted one of them")
    unknown = sorted(options.keys() - CHANGEABLE - {*FETCH_OPTIONS})
    if unknown:
        raise TypeError(f"from_pretrained: found argument {unknown[0]!r}, wanted one of the config's or the Hub's")
    changes = {key: options.pop(key) for key in [*options] if key in CHANGEABLE}
    if config is not None and not isinstance(config, OPTConfig):
        config = OPTConfig.from_pretrained(config)
    given = config

    def read() -> tuple[Opened, GenerationConfig]:
        fitting = (architecture, given, changes, ignore_mismatched_sizes, added, key_mapping)
        opened = open_checkpoint(path_or_name, layout, True, False, *fitting, **options)
        return opened, GenerationConfig.from_folder(opened.checkpoint.folder, opened.config)

    opened, generation = of_one_save(local(path_or_name) / options.get("subfolder", ""), read)
    checkpoint, config, names, tied = opened.checkpoint, opened.config, opened.names, opened.tied
    path, there = checkpoint.path, set(names.values())
    if architecture == "OPTForCausalLM" and config.tie_word_embeddings and not tied:
        warnings.warn(f"{path}: lm_head.weight differs from embed_tokens.weight, so they are not tied", stacklevel=3)
    dtype = checkpoint.dtype if dtype == "auto" else dtype
    config = dataclasses.replace(config, tie_word_embeddings=tied, dtype=dtype)
    if rounded:
        if config.quantization_config is not None:
            found = f"{path} in {config.quantization_config} already"
            raise ValueError(f"load_in_{rounded[0]}bit: found {found}, wanted weights that are not quantized")
        config = dataclasses.replace(config, quantization_config=QuantizationConfig.rounding(rounded[0]))
    bare = "model." if architecture == "OPTModel" else ""
    held = {name.removeprefix(bare): checkpoint[stored] for name, stored in names.items()}
    entries = [*as_table(held, table(config, architecture), dtype)]
    new = [spec for spec in head(config, architecture) if spec.name not in names]
    silent = {"lm_head.weight"} if tied else set()  # it is the embedding
    more = {name: checkpoint[name].read for name in added(config) if name in checkpoint}
    silent |= more.keys()
    unused = [name for name in checkpoint if name not in there | silent and not name.endswith("decoder.version")]
    layers = sorted({number for name in unused if (number := layer_number(name)) >= 0})
    dropped = [f"layers {layers[0]} to {layers[-1]}"] if layers else []
    dropped += [name for name in unused if layer_number(name) < 0]
    for what, named in (("newly initialized, so train before use", [s.name for s in new]), ("not used", dropped)):
        if named:
            warnings.warn(f"{path}: {what}: {', '.join(named)}", stacklevel=3)

    def read_of(spec: Spec, entry: Entry) -> tuple[int, Callable[[], np.ndarray]]:
        if (index := part(spec)) is not None:
            size = entry.nbytes * math.prod(cut.stop - cut.start for cut in index) // math.prod(entry.shape)
            return size, lambda: contiguous(entry.part(index, copied))
        return entry.nbytes, lambda: contiguous(entry.map() if copied else entry.read())

    def tensors() -> Iterator[tuple[Spec, np.ndarray]]:
        reads = (read_of(spec, entry) for spec, entry in entries)
        arrays = ahead(reads) if copied else (read() for _, read in reads)
        with byte_bar(f"Loading {path.name}", sum(entry.nbytes for _, entry in entries)) as advance:
            for spec, entry in entries:
                yield spec, next(arrays)  # not held here: the caller may drop it
                advance(entry.nbytes)

    return Pretrained(config, dtype, tensors(), new, unused, generation, more)


def save_pretrained(
    folder: str | Path,
    config: OPTConfig,
    architecture: str,
    dtype: str,
    get: Callable[[Spec], np.ndarray],
    max_shard_size: int | str = MAX_SHARD_SIZE,
    layout: str = "safetensors",
    generation: GenerationConfig | None = None,
    added: Sequence[Source] = (),
) -> None:
    """Write config.json, generation_config.json and weights that transformers loads; see `save_checkpoint`.

    `get` returns the array of a tensor in the checkpoint's orientation and in `dtype`, or its `Spec.dtype`; it is not
    asked for the shape of a quantized Linear. `added`: tensors besides those
    of the table.
    """
    unknown = {**config.unknown, "architectures": [architecture]}
    config = dataclasses.replace(config, dtype=dtype, unknown=unknown)
    if config.quantization_config is not None and layout not in PACKED:
        raise ValueError(f"layout: found {layout}, wanted one of {', '.join(PACKED)} for quantized weights")

    def part(spec: Spec) -> np.ndarray:
        return np.array(spec.matrix, np.int64) if spec.kind == "shape" else get(spec)

    sources = [Source(s.name, s.shape, s.dtype(dtype), lambda s=s: part(s)) for s in table(config, architecture)]
    sources += added
    generation = generation or GenerationConfig.from_model_config(config)
    texts = {"config.json": config.to_json(), "generation_config.json": generation.to_json_string()}
    with byte_bar(f"Saving {Path(folder).name}", sum(source.nbytes for source in sources)) as advance:
        save_checkpoint(folder, sources, texts, max_shard_size, advance, layout)
