"""opt_flax, as the benchmarks run it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from benchmarks.peers import Calls, Ids, Job, System, each, loading

if TYPE_CHECKING:
    from benchmarks.train import Arm
    from benchmarks.train import Job as Training

NEEDS = {"jax": "", "flax": ""}
CPU = tuple(System("opt_flax", "opt_flax, JAX {}", dtype, NEEDS) for dtype in ("float32", "int8", "int4"))
GPU = (System("opt_flax", "opt_flax, JAX {}", "float16", NEEDS),)
TRAIN_CPU: list[Arm] = [("opt_flax", "sdpa", True, checkpointing) for checkpointing in (False, True)]
TRAIN_GPU = TRAIN_CPU
STYLE = "#0072b2", "^"


def calls(job: Job) -> Calls:
    import jax
    import jax.numpy as jnp

    from opt_flax import FlaxOPTForCausalLM

    model = FlaxOPTForCausalLM.from_pretrained(job.folder, **loading(job.dtype))
    compiled = jax.jit(lambda model, ids: model(ids).logits)

    def generate(ids: Ids, beams: int = 1) -> Any:
        return model.generate(ids, max_new_tokens=job.new, eos_token_id=[], num_beams=beams).block_until_ready()

    @cache
    def program(B: int, slots: int) -> Any:
        @jax.jit
        def loop(model: Any, past: Any) -> Any:
            def advance(_: Any, state: Any) -> Any:
                out = model(state[0], past_key_values=state[1])
                return out.logits[:, -1].argmax(-1, keepdims=True).astype(jnp.int32), out.past_key_values

            taken = jnp.broadcast_to(jnp.arange(slots) < past, (B, slots)).astype(jnp.int32)
            cache = model.init_cache(B, slots)._replace(length=past, segments=taken)
            return jax.lax.fori_loop(0, job.new, advance, (jnp.full((B, 1), 5), cache))[0]

        return loop

    def step(B: int, length: int, slots: int) -> Callable[[], float]:
        past = jnp.int32(length - job.new)
        return each(job.new, lambda: program(B, slots)(model, past).block_until_ready())

    return Calls(lambda ids: compiled(model, ids).block_until_ready(), generate, step, generate)


def train(job: Training) -> dict[str, Any]:
    import jax
    import optax
    from flax import nnx

    from benchmarks.train import RATE, timed
    from opt_flax import FlaxOPTForCausalLM, OPTConfig

    model = FlaxOPTForCausalLM(
        OPTConfig.from_dict(job.config), dtype=job.dtype, attn_implementation=job.attention, rngs=nnx.Rngs(0)
    )
    if job.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = nnx.Optimizer(model, optax.adamw(RATE), wrt=nnx.Param)
    ids, rngs = jax.numpy.asarray(job.ids()), nnx.Rngs(dropout=1)
    graph, state = nnx.split((model, optimizer, rngs))
    # as a list: Flax's own trees of twelve hundred arrays are walked in Python at every call, which takes 5 ms
    leaves, tree = jax.tree.flatten(state)

    def run(leaves: Any) -> Any:
        model, optimizer, rngs = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        loss, grads = nnx.value_and_grad(lambda m, r: m(ids, labels=ids, rngs=r).loss)(model, rngs)
        optimizer.update(model, grads)
        return jax.tree.leaves(nnx.state((model, optimizer, rngs))), loss

    compiled, kept = jax.jit(run, donate_argnums=0), [leaves]

    def step() -> Any:
        kept[0], loss = compiled(kept[0])
        return loss

    found = timed(job, step)
    memory = jax.devices()[0].memory_stats()
    if memory:
        found["peak_GB"] = memory["peak_bytes_in_use"] / 1e9
    return found


def load_limit(weights: int, largest: int) -> float:
    return largest + 300e6


SYSTEMS = {"opt_flax": calls}
