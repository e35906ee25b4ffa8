"""Our own systems, a module `ours/KEY.py` for each framework:

CPU, GPU     the systems to compare, as `peers.System`
SYSTEMS      what makes the calls of each, by name: opt_KEY, or opt_KEY_VARIANT
TRAIN_CPU, TRAIN_GPU    what to train, as `train.Arm`
train        train.Job to the measurements
load_limit   the memory that loading may take above the weights, from the bytes of the weights and of the largest
STYLE        the colour and the marker of its lines
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from opt_common.frameworks import registered


def modules() -> dict[str, ModuleType]:
    """By key; a registered framework without one is not measured."""
    names = {key: f"benchmarks.ours.{key}" for key in registered()}
    return {key: importlib.import_module(name) for key, name in names.items() if importlib.util.find_spec(name)}
