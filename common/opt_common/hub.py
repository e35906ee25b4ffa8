"""Local folders, "opt-demo" and the Hugging Face Hub: from a name to a folder with the wanted files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DEMO = "opt-demo"

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "chat_template.jinja",
    "added_tokens.json",  # written by transformers before 4.34 for tokens that a fine-tuning added
)
# The files beside config and weights that a conversion copies.
COMPANIONS = ("generation_config.json", *TOKENIZER_FILES)
# The keyword arguments of `fetch`.
FETCH_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def local(path_or_name: str | Path) -> Path:
    """The path that a name would be here, "~" and "~user" replaced. FileNotFoundError if there is no such user."""
    try:
        return Path(path_or_name).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{path_or_name}: no such folder: its ~ is no user's home") from error


def fetch(
    path_or_name: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
) -> Path:
    """A local folder with those of `files` that exist. Only a Hub name uses the network.

    `path_or_name`: a folder; "opt-demo", the checkpoint inside this package; or a Hub name such as
    "facebook/opt-125m". The other arguments are huggingface_hub's.
    Raises FileNotFoundError if there is no such folder or repository, OSError if the Hub cannot be reached.
    """
    path = local(path_or_name)
    if path.is_dir():
        return path / subfolder
    if str(path_or_name) == DEMO:
        return Path(__file__).parent / DEMO
    name = str(path_or_name)
    if path.exists():
        raise NotADirectoryError(f"{path}: is a file, wanted the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"{name}: no such folder")

    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                allow_patterns=[f"{subfolder}/{file}" if subfolder else file for file in files],
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
            ),
            subfolder,
        )
    except errors.GatedRepoError as error:
        raise FileNotFoundError(f"{name}: this repository requires an accepted licence and a token") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(f"{name}: neither a folder here nor a repository on the Hub{at}") from error
    except Exception as error:  # the network's errors are many, and change with huggingface_hub's HTTP library
        raise OSError(
            f"{name}: not a folder here, not in the local cache, and the Hub cannot be reached ({type(error).__name__})"
        ) from error
