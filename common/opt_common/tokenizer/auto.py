"""AutoTokenizer, for scripts that import it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import read_json
from ..hub import fetch
from .gpt2 import GPT2Tokenizer

_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


class AutoTokenizer:
    """Loads a GPT2Tokenizer, or refuses the tokenizer of another model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> GPT2Tokenizer:
        """`GPT2Tokenizer.from_pretrained` with the same arguments, if the checkpoint is an OPT's.

        Raises ValueError, naming file and key, if tokenizer_config.json wants another class than GPT-2's, or if
        config.json is another model's and tokenizer_config.json does not say on its own which tokenizer this is.
        """
        hub = {
            name: options[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in options
        }
        subfolder = options.get("subfolder") or ""
        names = ("tokenizer_config.json", "config.json")
        folder = fetch(pretrained_model_name_or_path, [str(Path(subfolder, name)) for name in names], **hub) / subfolder
        tokenizer, model = (read_json(folder / name) if (folder / name).is_file() else {} for name in names)
        wanted = tokenizer.get("tokenizer_class")
        if wanted is not None and wanted not in _CLASSES:
            found = f"tokenizer_class: found {wanted!r}, wanted one of {', '.join(_CLASSES)}"
            raise ValueError(f"{folder / names[0]}: {found}")
        complete = wanted in _CLASSES[:2] and "bos_token" in tokenizer  # such as BLIP-2's, whose text model is an OPT
        if not complete and model.get("model_type", "opt") != "opt":
            raise ValueError(f"{folder / names[1]}: model_type: found {model['model_type']!r}, wanted 'opt'")
        return GPT2Tokenizer.from_pretrained(pretrained_model_name_or_path, **options)
