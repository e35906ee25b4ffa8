"""opt_flax among JAX's own means of training: donated state, Orbax, export, many devices."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from opt_flax import FlaxOPTForCausalLM, OPTConfig

SMALL = dict(vocab_size=96, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, ffn_dim=64,
             max_position_embeddings=64)  # fmt: skip


@pytest.fixture
def ids(rng) -> np.ndarray:
    return rng.integers(3, 96, (8, 12))


def training(config: OPTConfig, ids: np.ndarray) -> tuple[Any, Any]:
    """A step that is given the state's memory, and the state to begin with."""
    model = FlaxOPTForCausalLM(config, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer, nnx.Rngs(dropout=1)))

    def step(state: Any) -> tuple[Any, jax.Array]:
        model, optimizer, rngs = nnx.merge(graph, state)
        loss, gradients = nnx.value_and_grad(lambda m, r: m(ids, labels=ids, rngs=r).loss)(model, rngs)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer, rngs)), loss

    return jax.jit(step, donate_argnums=0), state


def test_donated_state(ids):
    step, state = training(OPTConfig(**SMALL), ids)
    losses = []
    for _ in range(10):
        before = jax.tree.leaves(state)
        state, loss = step(state)
        losses.append(float(loss))
        assert all(leaf.is_deleted() for leaf in before if leaf.ndim), "its memory is the new state's"
    assert losses[-1] < losses[0] - 0.2
    assert step._cache_size() == 1


def test_saved_in_the_middle_of_training(ids, tmp_path):
    """The optimizer and the random state are in the state: restored it goes on to the same weights."""
    config = OPTConfig(**SMALL, dropout=0.2, attention_dropout=0.2, layerdrop=0.3)
    step, state = training(config, ids)
    for i in range(4):
        if i == 2:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "saved", state)
        state, _ = step(state)
    step, fresh = training(config, ids)
    with ocp.StandardCheckpointer() as checkpointer:
        again = checkpointer.restore(tmp_path / "saved", fresh)
    for _ in range(2):
        again, _ = step(again)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(again), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_jax_export(ids, tmp_path):
    """Run by JAX alone, without opt_flax or Flax, for any number of rows."""
    model = FlaxOPTForCausalLM(OPTConfig(**SMALL), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    weights, tree = jax.tree.flatten(state)

    @jax.jit
    def run(weights: list[jax.Array], ids: jax.Array, mask: jax.Array) -> jax.Array:
        return nnx.merge(graph, jax.tree.unflatten(tree, weights))(ids, mask).logits

    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, 12"), jnp.int32)
    exported = jax.export.export(run)([jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights], shape, shape)
    (tmp_path / "model.bin").write_bytes(exported.serialize())
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    np.savez(tmp_path / "given.npz", *weights, ids=ids.astype(np.int32), mask=mask.astype(np.int32))
    program = """
        import sys
        import jax, numpy as np
        folder = sys.argv[1]
        given = np.load(f"{folder}/given.npz")
        weights = [given[f"arr_{i}"] for i in range(len(given.files) - 2)]
        run = jax.export.deserialize(open(f"{folder}/model.bin", "rb").read())
        np.save(f"{folder}/logits.npy", run.call(weights, given["ids"], given["mask"]))
        assert not {"opt_flax", "flax"} & set(sys.modules)
    """
    program = "import jax.export\n" + textwrap.dedent(program)
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    wanted = np.asarray(model(ids, mask).logits)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy")[mask == 1], wanted[mask == 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"dropout": 0.0, "layerdrop": 0.5}, {"dropout": 0.5}])
def test_compiling_does_not_freeze_random_draws(options, ids):
    model = FlaxOPTForCausalLM(OPTConfig(**SMALL | {"num_hidden_layers": 4} | options), rngs=nnx.Rngs(0))
    run = nnx.jit(lambda model, rngs: model(ids, labels=ids, rngs=rngs).loss)
    rngs = nnx.Rngs(dropout=1)
    losses = [float(run(model, rngs)) for _ in range(8)]
    assert len(set(losses)) > 2
    rngs = nnx.Rngs(dropout=1)
    assert [float(run(model, rngs)) for _ in range(8)] == losses


def test_layerdrop_off_is_free(ids):
    texts = [
        jax.jit(lambda model, key: model(ids, labels=ids, rngs=nnx.Rngs(dropout=key)).loss)
        .lower(FlaxOPTForCausalLM(OPTConfig(**SMALL, dropout=0.0, layerdrop=p), rngs=nnx.Rngs(0)), jax.random.key(0))
        .as_text()
        for p in (0.0, 0.1)
    ]
    assert ["threefry" in text or "rng_bit" in text for text in texts] == [False, True]


@pytest.mark.parametrize("options", [{"dropout": 0.3, "attention_dropout": 0.3}, {"dropout": 0.3, "layerdrop": 0.5}])
def test_checkpointing_draws_the_same_masks_again(options, ids):
    model = FlaxOPTForCausalLM(OPTConfig(**SMALL, **options), rngs=nnx.Rngs(0))

    def gradients(seed: int) -> list[np.ndarray]:
        found = nnx.grad(lambda m, r: m(ids, labels=ids, rngs=r).loss)(model, nnx.Rngs(dropout=seed))
        return [np.asarray(g) for g in jax.tree.leaves(found)]

    wanted, other = gradients(1), gradients(2)
    model.gradient_checkpointing_enable()
    found = gradients(1)
    largest = max(np.linalg.norm(g) for g in wanted)

    def apart(arrays: list[np.ndarray]) -> float:
        return max(np.linalg.norm(a - b) for a, b in zip(arrays, wanted, strict=True)) / largest

    assert apart(found) < 1e-5 < 1e-2 < apart(other)


SHARDED = """
import sys
import jax, numpy as np, optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from opt_flax import FlaxOPTForCausalLM

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

def sharding(name):
    if "norm" in name or name.endswith("bias"):
        return NamedSharding(mesh, P())
    rows = any(part in name for part in ("q_proj", "k_proj", "v_proj", "fc1", "embed_tokens"))
    return NamedSharding(mesh, P("model") if rows else P(None, "model"))

ids = np.random.default_rng(0).integers(3, 96, (8, 12))
mask = np.ones_like(ids)
mask[:3, :4] = 0

@nnx.jit
def step(model, optimizer, ids, mask):
    labels = jax.numpy.where(mask == 1, ids, -100)
    loss, gradients = nnx.value_and_grad(lambda m: m(ids, mask, labels=labels).loss)(model)
    optimizer.update(model, gradients)
    return loss

found = {}
for place in (None, sharding):
    model = FlaxOPTForCausalLM.from_pretrained(sys.argv[1], **({"sharding": place} if place else {}))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    given = ids, mask
    if place:
        given = jax.device_put(given, NamedSharding(mesh, P("data")))
    losses = [float(step(model, optimizer, *given)) for _ in range(3)]
    if place:
        kernel = model.model.decoder.layers[0].fc1.kernel[...]
        assert {s.data.shape for s in kernel.addressable_shards} == {(64, 32)}, "stays where it was"
    found[bool(place)] = losses, [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
assert np.allclose(found[True][0], found[False][0], rtol=1e-5), found
assert found[True][0][-1] < found[True][0][0]
for a, b in zip(found[True][1], found[False][1], strict=True):
    assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(b).max())
"""


@pytest.mark.slow  # by specs of its own; test_flax_sharding has those of `shardings`
def test_sharded_training(tmp_path):
    """Four rows of two devices: the batch cut one way, the weights the other; the loss and weights of one device."""
    FlaxOPTForCausalLM(OPTConfig(**SMALL), rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", SHARDED, str(tmp_path)], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
