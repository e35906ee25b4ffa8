"""Where the weights of a model go: one device, or several through accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def single_device(device_map: Any) -> Any:
    """The device of a map that names only one; None for the others."""
    if isinstance(device_map, dict) and device_map.keys() == {""}:
        device_map = device_map[""]
    if isinstance(device_map, dict) or device_map in STRATEGIES:
        return None
    return device_map


def check_device_map(device_map: Any, max_memory: Any, offload_folder: Any) -> None:
    """Raise ValueError or ImportError for a map that cannot be followed here."""
    if isinstance(device_map, str) and device_map not in STRATEGIES:
        try:
            torch.device(device_map)
        except RuntimeError as error:
            wanted = f"a device, {', '.join(STRATEGIES)}, or a dictionary from modules to devices"
            raise ValueError(f"device_map: found {device_map!r}, wanted {wanted}") from error
    if device_map is not None and single_device(device_map) is None:
        try:
            import accelerate  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"device_map: {device_map!r} needs the accelerate package: pip install accelerate"
            ) from error


def device_of(model: nn.Module, device_map: Any, max_memory: dict[Any, Any] | None, device: Any) -> DeviceMap:
    """The device of each module of a model that is on the meta device still."""
    if device_map is None or single_device(device_map) is not None:
        return DeviceMap({"": device or "cpu"})
    if isinstance(device_map, str):
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        how = {"no_split_module_classes": model._no_split_modules}
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, low_zero=low, **how)  # type: ignore[arg-type]
        device_map = infer_auto_device_map(model, max_memory, **how)  # type: ignore[arg-type]
    return DeviceMap(dict(device_map))


class DeviceMap:
    """From a module's path to its device, by the longest prefix that the map has."""

    def __init__(self, devices: dict[str, Any]) -> None:
        self.devices = devices

    def __call__(self, path: str) -> Any:
        """The device that the weights of the module are loaded to: the CPU for those that accelerate then offloads."""
        parts = path.split(".")
        for n in range(len(parts), -1, -1):
            device = self.devices.get(".".join(parts[:n]))
            if device is not None:
                return "cpu" if device == "disk" else device
        raise ValueError(f"device_map: found no device for {path}, wanted one for every module")


def dispatch(model: Any, devices: DeviceMap, offload_folder: str | Path | None) -> Any:
    """The model, whose weights are loaded, ready to run on its devices."""
    if len({str(device) for device in devices.devices.values()}) == 1 and "disk" not in devices.devices.values():
        return model
    from accelerate import dispatch_model

    if "disk" in devices.devices.values() and offload_folder is None:
        raise ValueError("offload_folder: found None, wanted a folder: the device map puts modules on disk")
    return dispatch_model(model, devices.devices, offload_dir=None if offload_folder is None else str(offload_folder))
