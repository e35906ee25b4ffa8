"""From a path or a Hub name to an opened checkpoint and its config."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import OPTConfig
from ..files import read_json
from ..hub import COMPANIONS, DEMO, fetch, local
from .checkpoint import Checkpoint, of_one_save
from .fit import match, stored_architecture
from .layouts import LAYOUTS, layout_named
from .quantized import from_gptq


@dataclass(frozen=True)
class Opened:
    """A checkpoint and its config, checked against each other: the stored name of each tensor of the table, whether the
    head is tied, and whose table it is."""

    checkpoint: Checkpoint
    config: OPTConfig
    names: dict[str, str]
    tied: bool
    architecture: str


def open_checkpoint(
    path_or_name: str | Path,
    layout: str | None = None,
    prefer: bool = False,
    companions: bool = False,
    architecture: str | None = None,
    config: OPTConfig | None = None,
    changes: Mapping[str, Any] | None = None,
    resized_heads: bool = False,
    added: Callable[[OPTConfig], Collection[str]] = lambda config: (),
    **hub: Any,
) -> Opened:
    """Find, open and check a checkpoint. This reads no tensor and allocates nothing of its size.

    `path_or_name`: a folder, a weight file with its config.json beside it, "opt-demo", or a Hub name.
    `layout`: one of `LAYOUTS`, or None for the one that is there. If there are several, `prefer` takes the first in the
    order of LAYOUTS; otherwise they are an error. From a Hub repository only the preferred layout is fetched.
    `companions`: whether to fetch the tokenizer and the generation config too.
    `architecture`: whose table the checkpoint is matched against, `resized_heads`, and the names that `added` gives for
    a config: see `match`. `config`: to use in place of the checkpoint's. `changes`: config overrides.
    Raises FileNotFoundError and ValueError as `fetch`, `Checkpoint`, `OPTConfig.from_dict` and `match` do.
    """
    checkpoint, stored = find_checkpoint(path_or_name, layout, prefer, companions, **hub)
    given = config is not None
    config = config or stored
    config = config.changed(**changes) if changes else config
    fewer = (given or "num_hidden_layers" in (changes or ())) and config.num_hidden_layers < stored.num_hidden_layers
    names, tied = match(checkpoint, config, architecture, fewer, resized_heads, added(config))
    return Opened(checkpoint, config, names, tied, architecture or stored_architecture(checkpoint))


def find_checkpoint(
    path_or_name: str | Path, layout: str | None = None, prefer: bool = False, companions: bool = False, **hub: Any
) -> tuple[Checkpoint, OPTConfig]:
    """As `open_checkpoint`, without checking the two against each other."""
    path = local(path_or_name)
    if path.is_dir():
        path /= hub.get("subfolder", "")
    if not path.exists():
        path = fetch_checkpoint(str(path_or_name), layout, companions, **hub)
        prefer = True  # the cache may hold other layouts, fetched earlier

    def read() -> tuple[Checkpoint, OPTConfig]:
        checkpoint = Checkpoint(path, layout, prefer)
        own = LAYOUTS[checkpoint.layout].config(checkpoint.main, checkpoint)
        if own is not None:
            return checkpoint, own
        file = checkpoint.folder / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{checkpoint.folder}: no config.json; wanted one beside the weights of an OPT")
        config = OPTConfig.from_dict(values := read_json(file), source=str(file))
        quantization = values.get("quantization_config") or {}
        if quantization.get("quant_method") == "gptq":
            checkpoint.rearrange(lambda entries: from_gptq(entries, quantization))
        return checkpoint, config

    return of_one_save(path if path.is_dir() else path.parent, read)


def fetch_checkpoint(name: str, layout: str | None = None, companions: bool = False, **hub: Any) -> Path:
    """A local folder with the config and weights of "opt-demo" or a Hub repository, and `companions` if asked for.

    Fetches the preferred layout of the repository, or `layout`, and no other. Raises as `fetch`.
    """
    layouts = [layout_named(layout)] if layout else list(LAYOUTS.values())
    indexes = [index for each in layouts for index in each.main[1:]]
    assets = [asset for each in layouts for asset in each.assets]
    folder = fetch(name, ["config.json", *indexes, *((*COMPANIONS, *assets) if companions else ())], **hub)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; wanted a folder or repository of an OPT")
    if name == DEMO:
        return folder
    for (main, *index), beside in {each.main: each.beside for each in layouts}.items():
        there = [file for file in index if (folder / file).is_file()]
        shards = sorted(set(_shards(folder / there[0]))) if there else [main]
        folder = fetch(name, ["config.json", *there, *shards, *beside], **hub)
        if all((folder / shard).is_file() for shard in shards):
            break
    return folder


def _shards(index: Path) -> list[str]:
    """The files that an index names, unchecked: opening it reports what is wrong with it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        return []
    files = [name for names in weight_map.values() for name in (names if isinstance(names, list) else [names])]
    return files if all(isinstance(name, str) for name in files) else []
