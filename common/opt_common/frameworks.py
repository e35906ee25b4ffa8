"""The registry of frameworks: each registers itself by an entry point, and none is imported to be listed.

[project.entry-points."opt_zoo.frameworks"]
pt = "opt_pt.framework:PyTorch"    # KEY = "PACKAGE.framework:CLASS"; the extra KEY installs what it needs
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, EntryPoint, entry_points, version
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from packaging.requirements import Requirement

from .quantization import QuantizationConfig
from .weights import Naming

GROUP = "opt_zoo.frameworks"
LAUNCHED = "opt-zoo"  # torchrun's name of the job, in processes that the command itself has started


class Framework:
    """What the shared code knows about a framework. `PACKAGE/framework.py` subclasses it, and imports the framework
    inside methods only.

    title: its name in print. prefix: how the names of its classes begin, such as TF in TFOPTModel.
    tensors: what the tokenizer calls its tensors (`return_tensors`). ids: the dtype of token ids in them.
    naming: what it calls the parameters of a module.
    """

    title: ClassVar[str]
    prefix: ClassVar[str]
    tensors: ClassVar[str]
    ids: ClassVar[str]
    naming: ClassVar[Naming]

    def __init__(self, key: str, package: str, distribution: Distribution) -> None:
        self.key, self.package, self.distribution = key, package, distribution
        requirements = [Requirement(line) for line in distribution.requires or ()]
        # Those that the extra adds. A distribution without such an extra needs nothing more than itself.
        self.needs = tuple(
            one.name
            for one in requirements
            if one.marker and one.marker.evaluate({"extra": key}) and not one.marker.evaluate({"extra": ""})
        )

    @property
    def missing(self) -> str | None:
        """None, or what is not installed and the command that installs it."""
        absent = [name for name in self.needs if importlib.util.find_spec(name.replace("-", "_")) is None]
        install = f"pip install '{self.distribution.name}[{self.key}]'"
        return f"{' and '.join(absent)} not installed: {install}" if absent else None

    @property
    def version(self) -> str:
        return version(self.needs[0]) if self.needs else self.distribution.version

    def module(self) -> ModuleType:
        """The package, which imports the framework."""
        return importlib.import_module(self.package)

    def model_class(self, architecture: str = "OPTForCausalLM") -> Any:
        """Its class for one of `weights.HEADS`."""
        return getattr(self.module(), self.prefix + architecture)

    def tensor(self, array: np.ndarray) -> Any:
        """A numpy array as a tensor of the framework."""
        raise NotImplementedError

    def numpy(self, tensor: Any) -> np.ndarray:
        """A tensor of the framework as a numpy array."""
        raise NotImplementedError

    def on(self, device: str | None) -> AbstractContextManager[Any]:
        """A context in which models are loaded and tensors made on a device, by the framework's name for it. Default:
        a GPU if there is one. Raises ValueError if there is no such device."""
        if device is not None:
            raise ValueError(f"device: found {device!r}, wanted none: {self.title} has only one")
        return nullcontext()

    def calibrate(
        self, source: str | Path, layout: str | None, rows: np.ndarray, quantization: QuantizationConfig, dtype: str
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """`weight_packed` and `weight_scale`, in `dtype`, of a checkpoint's Linears by their paths, rounded so that
        what the model makes of `rows`, token ids [n, T], changes least: with these numbers and one layer in memory at
        a time. ValueError where the framework does not offer it."""
        raise ValueError(f"--calibrate: {self.title} does not offer it")

    def launch(self, command: list[str], processes: int, device: str | None) -> None:
        """Run `python COMMAND` as so many processes that split a model, each on a device of its own. ValueError where
        the framework or the machine does not offer it; OSError if one of them fails."""
        raise ValueError(f"--devices: found {processes}, wanted 1: {self.title} does not offer it")

    def meet(self, seen: dict[str, Any], split: bool, device: str | None) -> dict[str, Any]:
        """In one of several processes of a command: wait for the others. Returns what `from_pretrained` takes for a
        model that they `split`. ValueError where they see different things, or the framework does not offer it."""
        raise ValueError(f"torchrun: found several processes, wanted one: {self.title} does not offer them")

    def of_first(self, value: Any) -> Any:
        """In processes that split a model: the first one's value."""
        return value

    def inputs(self, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
        """`input_ids` and `attention_mask` of some texts, as tensors of the framework."""
        arrays = tokenizer(texts, padding=True, return_tensors="np")
        return {name: self.tensor(array.astype(self.ids)) for name, array in arrays.items()}


def transformers_title() -> str | None:
    """transformers and its version, where it and PyTorch are installed: what the frameworks are compared with."""
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        return f"transformers {version('transformers')}"
    return None


@functools.cache
def registered() -> Mapping[str, Framework]:
    """Every framework by its key, installed or not."""
    return {entry.name: _describe(entry) for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name)}


def _describe(entry: EntryPoint) -> Framework:
    """The description that an entry point names.

    `entry.load()` would run the package's __init__, which imports the framework, so this runs the one file.
    """
    package = entry.module.rpartition(".")[0]
    found = importlib.util.find_spec(package) if package else None
    spec = PathFinder.find_spec(entry.module, found.submodule_search_locations) if found else None
    if spec is None or spec.loader is None or entry.dist is None:
        raise ImportError(f"{GROUP}: found {entry.name} = {entry.value!r}, wanted PACKAGE.framework:CLASS")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, entry.attr)(entry.name, package, entry.dist)
