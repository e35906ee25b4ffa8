"""opt_tf, as the benchmarks run it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from benchmarks.peers import Calls, Job, System, each, loading, tf_calls

if TYPE_CHECKING:
    from benchmarks.train import Arm
    from benchmarks.train import Job as Training

NEEDS = {"tensorflow": "", "keras": ""}
CPU = tuple(System("opt_tf", "opt_tf, TensorFlow {}", dtype, NEEDS) for dtype in ("float32", "int8", "int4"))
GPU = (System("opt_tf", "opt_tf, TensorFlow {}", "float16", NEEDS, never=True),)
TRAIN_CPU: list[Arm] = [("opt_tf", "", False, False), ("opt_tf", "", True, False), ("opt_tf", "", False, True)]
TRAIN_GPU: list[Arm] = []
STYLE = "#d55e00", "s"


def calls(job: Job) -> Calls:
    import keras
    import tensorflow as tf

    from opt_tf import TFOPTForCausalLM

    model = TFOPTForCausalLM.from_pretrained(job.folder, **loading(job.dtype))
    forward = tf.function(lambda ids: model(ids).logits, jit_compile=True)

    @cache  # a program for each shape, whatever is in the cache
    def program(B: int, slots: int) -> Any:
        @tf.function(jit_compile=True, autograph=False)
        def loop(weights: list[Any], past: Any) -> Any:
            def advance(i: Any, token: Any, cache: Any) -> tuple[Any, Any, Any]:
                out = model(token, past_key_values=cache)
                token = tf.argmax(out.logits[:, -1], axis=-1, output_type=tf.int32)
                return i + 1, token[:, None], out.past_key_values

            with keras.StatelessScope(state_mapping=zip(model.weights, weights, strict=True)):
                taken = tf.cast(tf.range(slots) < past, tf.int32)
                cache = model.init_cache(B, slots)._replace(length=past, segments=tf.tile(taken[None], (B, 1)))
                start = (tf.constant(0), tf.fill((B, 1), 5), cache)
                return tf.while_loop(lambda i, *_: i < job.new, advance, start)[1]

        return loop

    def step(B: int, length: int, slots: int) -> Callable[[], float]:
        weights, past = [tf.convert_to_tensor(w.value) for w in model.weights], tf.constant(length - job.new)
        return each(job.new, lambda: program(B, slots)(weights, past).numpy())

    def generate(ids: Any, beams: int = 1) -> Any:
        return model.generate(ids, max_new_tokens=job.new, eos_token_id=[], num_beams=beams)

    return tf_calls(forward, generate, step)._replace(search=generate)


def train(job: Training) -> dict[str, Any]:
    import keras
    import tensorflow as tf

    from benchmarks.train import RATE, timed
    from opt_tf import OPTConfig, TFOPTForCausalLM

    keras.utils.set_random_seed(0)
    model = TFOPTForCausalLM(OPTConfig.from_dict(job.config), dtype=job.dtype)
    if job.checkpointing:
        model.gradient_checkpointing_enable()
    ids, optimizer = tf.constant(job.ids()), keras.optimizers.AdamW(RATE)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=job.compiled)
    def run() -> Any:
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=True).loss
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    return timed(job, run)


def load_limit(weights: int, largest: int) -> float:
    return 0.2 * weights + 200e6


SYSTEMS = {"opt_tf": calls}
