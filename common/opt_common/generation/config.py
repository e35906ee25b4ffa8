"""The options of `generate` that stay with a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import OPTConfig
from ..files import read_json, write_atomically
from .options import NEUTRAL, SAID, Options

_KNOWN = {*Options.__annotations__, *NEUTRAL, *SAID}


class GenerationConfig:
    """The options of `generate` that stay with a model, by transformers' names: read from `generation_config.json`, set
    as attributes, and overridden by a call's keywords. What is not set reads as None."""

    def __init__(self, /, **values: Any) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        if name in _KNOWN:
            return None
        raise AttributeError(f"GenerationConfig has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(repr(self))  # by value: Flax keeps it as the static part of a model

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    @classmethod
    def from_model_config(cls, config: OPTConfig) -> GenerationConfig:
        """The token ids of a model's config."""
        eos = config.eos_token_id
        ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
        return cls(**ids, eos_token_id=list(eos) if isinstance(eos, tuple) else eos)

    @classmethod
    def from_folder(cls, folder: Path, config: OPTConfig) -> GenerationConfig:
        """From a checkpoint's `generation_config.json`, or from its config where there is none."""
        path = folder / "generation_config.json"
        return cls(**_options(path)) if path.is_file() else cls.from_model_config(config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **values: Any) -> GenerationConfig:
        """From a folder's `generation_config.json`, with `values` over it. Raises FileNotFoundError that names it."""
        return cls(**(_options(Path(folder) / "generation_config.json") | values))

    def to_dict(self) -> dict[str, Any]:
        """What is set."""
        return {name: value for name, value in sorted(self.__dict__.items()) if value is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        """transformers' name of `to_dict`."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True, ignore_metadata: bool = False) -> str:
        """The contents of a `generation_config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def update(self, **values: Any) -> dict[str, Any]:
        """Set options by name; returns those that do not exist."""
        known = {name for name in values if name in _KNOWN}
        self.__dict__.update({name: values[name] for name in known})
        return {name: value for name, value in values.items() if name not in known}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder/generation_config.json`, whole or not at all."""
        write_atomically(Path(folder) / "generation_config.json", self.to_json_string())


def _options(path: Path) -> dict[str, Any]:
    """The contents of a file. ValueError, naming it, for a name that would take the place of a method."""
    values = read_json(path)
    wrong = [name for name in values if hasattr(GenerationConfig, name)]
    if wrong:
        raise ValueError(f"{path}: found {wrong[0]!r}, wanted options of generate")
    return values
