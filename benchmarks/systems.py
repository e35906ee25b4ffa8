"""What the PyTorch benchmarks on a GPU share: ours and transformers over one set of random weights, in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.report import reason, say
from opt_common.config import OPTConfig
from opt_pt import OPTForCausalLM

THEIRS = ("eager", "sdpa", "flash_attention_2")


@dataclass(frozen=True)
class Setup:
    """The real shapes in float16 on the GPU; or, with `smoke`, tiny models on the CPU, which only prove the code."""

    smoke: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.smoke else torch.float16

    def config(self, size: str) -> OPTConfig:
        if not self.smoke:
            return OPTConfig.from_size(size)
        small = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256}
        return OPTConfig.from_size(size, **small, **({"word_embed_proj_dim": 32} if size == "350m" else {}))

    def length(self, tokens: int) -> int:
        return max(2, tokens // 32) if self.smoke else tokens

    def repeats(self, times: int) -> int:
        return 1 if self.smoke else times

    def tokens(self, size: str, B: int, S: int) -> Tensor:
        """[B, S] random words, the special ids not among them."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (B, self.length(S))
        return torch.randint(4, self.config(size).vocab_size, shape, generator=generator, device=self.device)

    def synchronize(self) -> None:
        if not self.smoke:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what PyTorch holds but no tensor uses."""
        gc.collect()
        if not self.smoke:
            torch.cuda.empty_cache()


def build_ours(setup: Setup, size: str) -> OPTForCausalLM:
    """Random weights, N(0, 0.02²), drawn where they are to lie."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(setup.dtype)
    try:
        with torch.device(setup.device):
            return OPTForCausalLM(setup.config(size)).eval()
    finally:
        torch.set_default_dtype(before)


def build_theirs(setup: Setup, ours: OPTForCausalLM) -> Any:
    """transformers' model over the same weights, not a copy of them. No token ends its `generate`."""
    import transformers

    transformers.logging.set_verbosity_error()
    values = ours.config.to_dict() | {"eos_token_id": None, "dtype": setup.dtype}
    with torch.device("meta"):
        theirs = transformers.OPTForCausalLM(transformers.OPTConfig(**values))
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.tie_weights()
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=ours.config.pad_token_id)
    assert theirs.lm_head.weight.data_ptr() == ours.lm_head.weight.data_ptr(), "the weights were copied"
    return theirs.eval()


def build(setup: Setup, size: str) -> tuple[OPTForCausalLM, Any]:
    """Ours and theirs. Raises if they answer differently: the time of a wrong answer is worth nothing."""
    say(f"opt-{size}: random weights, and transformers' model over them")
    ours = build_ours(setup, size)
    theirs = build_theirs(setup, ours)
    ids = setup.tokens(size, 2, 64)
    want, got = (forward(model, ids).float() for model in (theirs, ours))
    error = ((got - want).norm() / want.norm()).item()
    if not error < 2e-2:
        raise RuntimeError(f"opt-{size}: the logits of the two systems differ by {error:.1e} of their norm")
    return ours, theirs


def forward(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """All logits, no cache."""
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def captured(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """`forward` as a CUDA graph, made at the first call."""
    replay: list[Callable[[Tensor], Tensor]] = []

    def run() -> Tensor:
        if not replay:
            with torch.no_grad():
                replay.append(torch.cuda.make_graphed_callables(lambda x: model(x, use_cache=False).logits, (ids,)))
        return replay[0](ids)

    return run


def event_ms(setup: Setup, run: Callable[[], Any]) -> float:
    """One call by CUDA events, from an idle device until its work is done: what its caller would wait for."""
    if setup.smoke:
        return wall_ms(setup, run)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def wall_ms(setup: Setup, run: Callable[[], Any]) -> float:
    """One call by the host's clock, from an idle device until its work is done."""
    setup.synchronize()
    start = time.perf_counter()
    run()
    setup.synchronize()
    return 1000 * (time.perf_counter() - start)


@dataclass(frozen=True)
class Arm:
    """One thing to time: a model, the attention it is to use, and the call."""

    model: Any
    attention: str
    run: Callable[[], Any]


def forward_arms(ours: Any, theirs: Any, attention: list[str], ids: Tensor) -> dict[str, Arm]:
    """The forward pass of transformers with each attention, and of ours with those given."""
    systems = [("transformers", theirs, name) for name in THEIRS] + [("ours", ours, name) for name in attention]
    return {f"{who} {name}": Arm(model, name, lambda m=model: forward(m, ids)) for who, model, name in systems}


def in_turns(
    setup: Setup, arms: dict[str, Arm], budget_ms: float = 400, least: int = 5, most: int = 20
) -> tuple[dict[str, float], dict[str, str]]:
    """The median milliseconds of each arm, and why an arm did not run.

    After a call that is not counted, each arm gets the repeats that fit its budget, `least` to `most`, or 3 if one
    takes over 200 ms. They go round in turns, so that clocks and heat are the same for all.
    """
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    not_run: dict[str, str] = {}
    setup.free()  # what the last arms left would otherwise be in the way of the largest; not again until all is timed
    for name, arm in arms.items():
        try:
            arm.model.set_attn_implementation(arm.attention)
            arm.run()
            once = event_ms(setup, arm.run)
        except Exception as error:  # one arm that cannot run must not cost the others
            not_run[name] = reason(error)
            continue
        repeats[name] = setup.repeats(3 if once > 200 else max(least, min(most, int(budget_ms / once))))
        times[name] = [once]
    for i in range(1, max(repeats.values(), default=0)):
        for name in times:
            if i < repeats[name]:
                arms[name].model.set_attn_implementation(arms[name].attention)
                times[name].append(event_ms(setup, arms[name].run))
    return {name: statistics.median(values) for name, values in times.items()}, not_run


def machine(setup: Setup) -> dict[str, Any]:
    """`report.machine`, with the GPU's name and the dtype."""
    name = "CPU" if setup.smoke else torch.cuda.get_device_name()
    return report.machine(setup.smoke, name) | {"dtype": str(setup.dtype).removeprefix("torch.")}
