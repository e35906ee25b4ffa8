"""One model over several GPUs, a process each: tensor parallelism.

A layer's first products are split by outputs, its second by inputs: a process has some of the heads and some of the
feed-forward, and only the sums behind `out_proj` and `fc2` meet (Shoeybi et al. 2019, arXiv:1909.08053). Embeddings,
norms and the head are whole everywhere, so that every process has all logits and chooses the same tokens.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from opt_common.config import OPTConfig
from opt_common.weights import Spec, table

from .quantized import QuantizedLinear

BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "fc1")
BY_INPUTS = ("out_proj", "fc2")


class ByOutputs:
    """A Linear that has some of the outputs. The gradients of its input meet."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_Split.apply(input) if torch.is_grad_enabled() else input)  # type: ignore[misc]


class ByInputs:
    """A Linear that has some of the inputs. Its outputs are summed over the processes, and the bias added once."""

    weight: Any
    bias: Any

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight.to(input.dtype))
        y = _Met.apply(y) if torch.is_grad_enabled() else summed(y)
        return y if self.bias is None else y + self.bias  # type: ignore[return-value]


class LinearByOutputs(ByOutputs, nn.Linear):
    __doc__ = ByOutputs.__doc__


class LinearByInputs(ByInputs, nn.Linear):
    __doc__ = ByInputs.__doc__


class QuantizedByOutputs(ByOutputs, QuantizedLinear):
    __doc__ = ByOutputs.__doc__


class QuantizedByInputs(ByInputs, QuantizedLinear):
    __doc__ = ByInputs.__doc__


def summed(x: Tensor) -> Tensor:
    """x, summed over the processes in place."""
    _met(dist.all_reduce, x)
    return x


class Sum:
    """The sum over the processes of a tensor of one shape, often: by one kernel that reads the other GPUs' memory where
    they can, by `all_reduce` elsewhere. It can be captured in a CUDA graph. `mine`, in float32, is where a process puts
    its part: PyTorch's kernel does not add float16."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        n, self.group = math.prod(shape), None
        if device.type == "cuda" and dist.get_world_size() > 1:
            room, self.group = _shared(n, device)
        else:
            room = torch.empty(n, device=device)
        self.mine = room[:n].view(shape)
        self.total = torch.empty_like(self.mine)

    def into(self, out: Tensor) -> None:
        """out: of the same shape, in any dtype."""
        if self.group is None:
            dist.all_reduce(self.mine)
            out.copy_(self.mine)
        else:
            torch.ops.symm_mem.one_shot_all_reduce_out(self.mine, "sum", self.group, self.total)
            out.copy_(self.total)


_buffers: dict[tuple[int, torch.device], tuple[Tensor, str | None]] = {}


def _shared(n: int, device: torch.device) -> tuple[Tensor, str | None]:
    """Room for n numbers that the other processes can read, and the name of their group; None if they cannot."""
    n = 1 << max(10, (n - 1).bit_length())
    if (n, device) not in _buffers:
        import torch.distributed._symmetric_memory as symmetric

        group = dist.group.WORLD
        assert group is not None
        try:
            room: Tensor = symmetric.empty(n, dtype=torch.float32, device=device)
            symmetric.rendezvous(room, group.group_name)
            _buffers[n, device] = room, group.group_name
        except RuntimeError:  # GPUs of several hosts, or without a link
            _buffers[n, device] = torch.empty(n, device=device), None
    return _buffers[n, device]


class _Split(torch.autograd.Function):
    """As it is; the gradients of all processes are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return summed(grad.contiguous().clone())


class _Met(torch.autograd.Function):
    """The sum over the processes; each has all of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return summed(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def processes(device: Any = None) -> tuple[int, int]:
    """This process's number, and how many there are; under torchrun, join the others first: over NCCL, a GPU each, or
    over gloo where there is none, or for a `device` that is the CPU.

    Raises RuntimeError outside of torchrun, if nobody has called `torch.distributed.init_process_group`; ValueError for
    more processes than GPUs.
    """
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise RuntimeError("tp_plan: found one process, wanted several: torchrun --nproc-per-node 2 script.py")
        # Its functions' defaults are the group that there is when it is imported, say by FSDP2: that group could never
        # be left, and a thread of gloo that outlives the interpreter aborts the process now and then.
        import torch.distributed.nn

        if torch.cuda.is_available() and torch.device(device or "cuda").type == "cuda":
            take_gpu()
            dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
        else:
            dist.init_process_group("gloo")
        atexit.register(leave)  # its threads must not outlive the interpreter
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Undo `processes`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def take_gpu() -> None:
    """Make a GPU of its own the current one of each of this host's processes. ValueError if they are too many."""
    local, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local > there:
        raise ValueError(f"torchrun: found {local} processes on this host, wanted at most its {there} GPUs")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def same(where: str, seen: Mapping[str, Any]) -> None:
    """Raise ValueError, in every process, that names the first of the things seen that are not the same in all."""
    of_all: list[Any] = [None] * dist.get_world_size()
    _met(dist.all_gather_object, of_all, dict(seen))
    first = of_all[0]
    for rank, its in enumerate(of_all):
        for name in first | its:
            if its.get(name) != first.get(name):
                found = f"{name} {its.get(name)!r:.100} in process {rank}"
                raise ValueError(f"{where}: found {found}, wanted {first.get(name)!r:.100}, as in process 0")


def _met(collective: Callable[..., Any], *arguments: Any) -> None:
    """Call a collective. Raises ConnectionError if another process has ended."""
    try:
        collective(*arguments)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in _CLOSED):
            rank, world = dist.get_rank(), dist.get_world_size()
            raise ConnectionError(f"process {rank} of {world}: another process has ended; see its message") from error
        raise


_CLOSED = ("Connection closed", "Connection reset", "Broken pipe", "Timed out")  # gloo's words


def split(model: Any, rank: int, world: int) -> None:
    """Make a model, without its values, that of one of `world` processes. Raises ValueError if it cannot be split."""
    _check(model.config, world)
    for layer in model.get_decoder().layers:
        layer.self_attn.num_heads //= world
        for parent in (layer.self_attn, layer):
            for name in (*BY_OUTPUTS, *BY_INPUTS):
                if (old := parent._modules.get(name)) is not None:
                    setattr(parent, name, _part(old, name in BY_OUTPUTS, world))
    model.tp_size, model.tp_rank = world, rank


def _check(config: OPTConfig, world: int) -> None:
    """Raise ValueError if a config's heads, features or groups cannot be split evenly over `world` processes."""
    for name in ("num_attention_heads", "ffn_dim"):
        if getattr(config, name) % world:
            raise ValueError(f"tp_plan: found {name} {getattr(config, name)}, wanted a multiple of {world} processes")
    for spec in table(config, "OPTModel"):
        for n, axis in zip(spec.shape, spec.axes, strict=True):
            if spec.packing is not None and axis in ("heads", "ffn") and n > 1 and n % world:
                raise ValueError(f"tp_plan: {spec.name}: found {n} columns, wanted a multiple of {world} processes")


def _part(old: Any, by_outputs: bool, world: int) -> nn.Module:
    into, out = old.in_features, old.out_features
    into, out = (into, out // world) if by_outputs else (into // world, out)
    if isinstance(old, QuantizedLinear):
        cls = QuantizedByOutputs if by_outputs else QuantizedByInputs
        with torch.device(old.weight_packed.device):
            return cls(into, out, old.packing, old.bias is not None).to(old.weight_scale.dtype)
    cls = LinearByOutputs if by_outputs else LinearByInputs
    return cls(into, out, old.bias is not None, old.weight.device, old.weight.dtype)


def shape(spec: Spec, world: int) -> tuple[int, ...]:
    """The shape of what one of `world` processes has of a tensor of the checkpoint."""
    if spec.kind == "shape":
        return spec.shape
    return tuple(
        n // world if axis in ("heads", "ffn") and n > 1 else n for n, axis in zip(spec.shape, spec.axes, strict=True)
    )


def index(spec: Spec, rank: int, world: int) -> tuple[slice, ...] | None:
    """The rows and columns that a process has of a tensor of the checkpoint; None for all."""
    mine = shape(spec, world)
    if mine == spec.shape:
        return None
    firsts = [rank * n if n < of else 0 for n, of in zip(mine, spec.shape, strict=True)]
    return tuple(slice(first, first + n) for first, n in zip(firsts, mine, strict=True))


def shape_of_part(spec: Spec, world: int) -> Tensor:
    """What a process has of the `weight_shape` of a quantized Linear."""
    (out, into), name = spec.matrix, spec.path.rpartition(".")[2]
    return torch.tensor([out // world if name in BY_OUTPUTS else out, into // world if name in BY_INPUTS else into])


def spread(tensors: Iterable[Any]) -> bool:
    """Whether some of the tensors lie in parts in several processes, as FSDP2's do."""
    parts = sys.modules.get("torch.distributed.tensor")  # who has not imported it has none; that takes half a second
    return parts is not None and any(isinstance(x, parts.DTensor) for x in tensors)


def gather(
    tensors: Mapping[str, Tensor], specs: Iterable[Spec], write: Callable[[Callable[[str], Tensor]], None] | None
) -> None:
    """Call `write`, in the first process, with a function from a name to the whole tensor, whose parts are gathered as
    it is asked for: no process ever holds more than one. Every process of the default group must call this.

    tensors: this process's parts. specs: the shapes of the whole ones. write: None to gather nothing. If it fails, all
    processes do.
    """
    shapes = {spec.name: spec.shape for spec in specs}

    def whole(name: str) -> Tensor:
        mine = tensors[name].detach()
        if spread([mine]):
            return mine.full_tensor()  # type: ignore[attr-defined]
        shape = shapes.get(name, mine.shape)
        axis = next((i for i, (n, of) in enumerate(zip(mine.shape, shape, strict=True)) if n < of), None)
        if axis is None:
            return mine
        parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        _met(dist.all_gather, parts, mine.contiguous())
        return torch.cat(parts, dim=axis)

    if dist.get_rank() == 0:
        end: Any = None
        try:
            if write is not None:
                write(lambda name: whole(of_first(name)))
        except BaseException as error:
            end = RuntimeError(f"save_pretrained: the first process failed: {error}")
            raise
        finally:
            of_first(end)
        return
    while isinstance(name := of_first(None), str):
        whole(name)
    if name is not None:
        raise name


def of_first(value: Any) -> Any:
    """What the first process gives."""
    given = [value]
    _met(dist.broadcast_object_list, given)
    return given[0]


def as_first(flags: Tensor) -> Tensor:
    """The first process's booleans, of a shape that all know."""
    numbers = flags.int()
    _met(dist.broadcast, numbers, 0)
    return numbers.bool()


def agreed(seed: int | None) -> int:
    """The seed, or one that the first process draws: all must choose the same tokens."""
    return of_first(int(torch.randint(2**62, ())) if seed is None else seed)


def fully_sharded(model: nn.Module) -> bool:
    """Whether each pass of a model gathers its weights from all processes (FSDP2)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has no such model
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def anyone(here: bool, device: torch.device) -> bool:
    """Whether it is so in any process."""
    given = torch.tensor(int(here), device=device)
    _met(dist.all_reduce, given, dist.ReduceOp.MAX)
    return bool(given)
