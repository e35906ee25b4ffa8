"""opt_flax over eight devices, which a CPU stands for: the answers of one device, and only the part of each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from opt_common.weights import table
from opt_flax import FlaxOPTForCausalLM, OPTConfig, shardings

CONFIG = dict(vocab_size=96, hidden_size=64, num_attention_heads=8, num_hidden_layers=1, ffn_dim=128,
              max_position_embeddings=64, init_std=0.2)  # fmt: skip


def mesh(**axes: int) -> Any:
    """No devices, which is enough to ask where a weight would lie."""
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def parts(place, name: str) -> tuple:
    return tuple(place(name).spec)


@pytest.mark.parametrize("tensor", ["model", "tensor", "tp", "mp"])
def test_axes_by_their_names(tensor):
    place = shardings(mesh(data=1, fsdp=1, **{tensor: 1}))
    assert place.batch.spec == PartitionSpec(("data", "fsdp"))
    layer = "model.decoder.layers.11."
    for name, wanted in {
        "model.decoder.embed_tokens.weight": ((tensor, "fsdp"), None),
        "model.decoder.embed_positions.weight": (None, None),
        "lm_head.kernel": (None, (tensor, "fsdp")),
        layer + "self_attn.q_proj.weight": (tensor, "fsdp"),
        layer + "self_attn.q_proj.kernel": ("fsdp", tensor),
        layer + "self_attn.q_proj.bias": (tensor,),
        layer + "self_attn.out_proj.weight_packed": ("fsdp", tensor),
        layer + "fc2.kernel": (tensor, "fsdp"),
        layer + "fc2.bias": ("fsdp",),
        layer + "final_layer_norm.scale": ("fsdp",),
        "opt_state.0.mu." + layer + "fc1.base_module.kernel.value": ("fsdp", tensor),
        "score.weight": (None, None),
        "opt_state.0.count.value": (),
        layer + "fc1.lora.lora_a": (),
    }.items():
        assert tuple(x[0] if isinstance(x, tuple) and len(x) == 1 else x for x in parts(place, name)) == wanted, name


def test_axes_named_by_hand():
    place = shardings(mesh(x=1, y=1), tensor="y")
    assert parts(place, "model.decoder.layers.0.fc1.weight") == ("y", None) and place.fsdp is None
    assert place.batch.spec == PartitionSpec(("x",))


def test_every_weight_of_the_table_is_known():
    place = shardings(mesh(fsdp=1, model=1))
    for architecture in ("OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"):
        for spec in table(OPTConfig(tie_word_embeddings=False, word_embed_proj_dim=512), architecture):
            assert len(parts(place, spec.name)) == len(spec.shape), spec.name


def test_what_does_not_divide_is_whole():
    place = shardings(mesh(fsdp=3, model=2))
    assert place("model.decoder.embed_tokens.embedding", (6, 4)).spec == PartitionSpec(("model", "fsdp"), None)
    assert place("model.decoder.embed_tokens.embedding", (8, 4)).spec == PartitionSpec(("model",), None)
    assert place("model.decoder.embed_tokens.embedding", (5, 4)).spec == PartitionSpec(None, None)
    assert place("model.decoder.layers.0.fc1.kernel", (3,)).spec == PartitionSpec(), "a factored moment"


@pytest.mark.parametrize(
    "name, how, message",
    [
        ("x", {}, "mesh: found axis 'x', wanted one of model, tensor, tp, mp, fsdp, data, batch, dp, replica"),
        ("x", {"tensor": "y"}, "tensor: found 'y', wanted one of the mesh's axes x"),
        ("model", {"fsdp": "data"}, "fsdp: found 'data', wanted one of the mesh's axes model"),
    ],
)
def test_meshes_that_are_refused(name, how, message):
    with pytest.raises(ValueError, match=message):
        shardings(mesh(**{name: 2}), **how)


def test_explicit_axes_are_refused():
    with pytest.raises(
        ValueError, match=r"mesh: found axes that are not Auto, wanted jax.make_mesh\(shape, names, axis"
    ):
        shardings(jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_attention_heads": 4}, "sharding: found num_attention_heads 4, wanted a multiple of 8 devices"),
        ({"ffn_dim": 100}, "sharding: found ffn_dim 100, wanted a multiple of 8 devices"),
    ],
)
def test_heads_that_do_not_divide(tmp_path, change, message):
    model = FlaxOPTForCausalLM(OPTConfig(**CONFIG | change), rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path)
    place = shardings(mesh(model=8))
    with pytest.raises(ValueError, match=message):
        FlaxOPTForCausalLM.from_pretrained(tmp_path, sharding=place)
    with pytest.raises(ValueError, match=message):
        place.of(model)


def test_a_plan_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^tp_plan: found one, wanted sharding=opt_flax.shardings\(mesh\)"):
        FlaxOPTForCausalLM.from_pretrained(tmp_path, tp_plan="auto")


def test_trees():
    model = FlaxOPTForCausalLM(OPTConfig(**CONFIG), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    place = shardings(mesh(fsdp=2, model=4))
    for tree in (model, nnx.state(model), model.params, nnx.state((model, optimizer, nnx.Rngs(dropout=1)))):
        found = place.of(tree)
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        specs = [s.spec for s in jax.tree.leaves(found)]
        assert specs.count(PartitionSpec("fsdp", "model")) == (12 if len(specs) > 40 else 4)


def on_devices(n: int, program: str, *arguments: Any) -> subprocess.Popen[str]:
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={n}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def on_eight_devices(program: str, folder: Path) -> None:
    process = on_devices(8, BEGIN + program, folder)
    output = process.communicate()[0]
    assert process.returncode == 0, output[-3000:]


BEGIN = """
import re, sys
import jax, numpy as np, optax
from flax import nnx
from jax.sharding import Mesh
from opt_flax import FlaxOPTForCausalLM, shardings

load, folder = FlaxOPTForCausalLM.from_pretrained, sys.argv[1]
devices = np.array(jax.devices())
tensor, fully = shardings(Mesh(devices, ("model",))), shardings(Mesh(devices, ("fsdp",)))
both = shardings(Mesh(devices.reshape(2, 2, 2), ("data", "fsdp", "model")))
ids = np.random.default_rng(0).integers(3, 96, (8, 12))
mask = np.ones_like(ids)
mask[:3, :4] = 0

def close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max() <= 2e-5 * max(1, np.abs(b).max()), np.abs(a - b).max()

def lies(tree, place):
    for array, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(place.of(tree)), strict=True):
        assert array.sharding.is_equivalent_to(wanted, array.ndim), (array.shape, array.sharding, wanted)

def collectives(compiled):
    text = compiled.as_text()
    return set(re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)\\(", text)), text
"""


GENERATE = """
one, sampled = load(folder), {"do_sample": True, "seed": 3, "top_p": 0.9}
for place, ways in ((tensor, ({"num_beams": 3}, {})), (both, (sampled,))):
    model = load(folder, sharding=place)
    where = jax.device_put((ids, mask), place.batch)
    for how in ways:
        wanted = one.generate(ids, mask, max_new_tokens=8, eos_token_id=[], **how)
        np.testing.assert_array_equal(model.generate(*where, max_new_tokens=8, eos_token_id=[], **how), wanted)

# a step of tensor parallel decoding: sums of activations alone; no device has a whole matrix, or another's heads
step = jax.jit(lambda m, token, cache: m(token, past_key_values=cache))
start = jax.jit(lambda m: m(ids[:6], mask[:6], past_key_values=m.init_cache(6, 32)))  # 4 x 6: no size of a weight
for bits in ({}, {"load_in_8bit": True}):
    model = load(folder, sharding=tensor, **bits)
    lies(nnx.state(model), tensor)
    out = start(model)
    close(out.logits, start(load(folder, **bits)).logits)
    cache = out.past_key_values
    assert {s.data.shape for s in cache.k[0].addressable_shards} == {(6, 32, 8)}, cache.k[0].sharding
    kinds, text = collectives(step.lower(model, ids[:6, :1], cache).compile())
    assert kinds == {"all-reduce"}, kinds
    assert not re.search(r"f32\\[(64,128|128,64|64,64|96,64)\\]|s32\\[(64,16|128,16|64,32)\\]", text)
"""


def test_generate_over_eight_devices(tmp_path):
    FlaxOPTForCausalLM(OPTConfig(**CONFIG), rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    on_eight_devices(GENERATE, tmp_path)


TRAIN = """
@nnx.jit
def step(model, optimizer, ids, mask):
    labels = jax.numpy.where(mask == 1, ids, -100)
    loss, gradients = nnx.value_and_grad(lambda m: m(ids, mask, labels=labels).loss)(model)
    optimizer.update(model, gradients)
    return loss

def trained(place):
    model = load(folder, **({"sharding": place} if place else {}))
    if place is both:
        model.gradient_checkpointing_enable()
    # a large eps: Adam would make steps as large as any of what is no gradient but rounding, as that of k_proj's bias
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, eps=1e-3), wrt=nnx.Param)
    given = jax.device_put((ids, mask), place.batch) if place else (ids, mask)
    losses = [step(model, optimizer, *given) for _ in range(2)]
    if place:
        lies((nnx.state(model), nnx.state(optimizer)), place)
    return losses, nnx.state(model)

wanted = trained(None)
assert wanted[0][1] < wanted[0][0]
for place in (tensor, fully, both):
    close(trained(place), wanted)

# the functional way, as scripts of transformers' Flax classes have it
model, params = load(folder, _do_init=False, sharding=both)
lies(params, both)
move = optax.adamw(1e-2, eps=1e-3)

@jax.jit
def update(params, state, ids, mask):
    labels = jax.numpy.where(mask == 1, ids, -100)
    loss, gradients = jax.value_and_grad(lambda p: model(ids, mask, params=p, labels=labels).loss)(params)
    changes, state = move.update(gradients, state, params)
    return optax.apply_updates(params, changes), state, loss

state, where = move.init(params), jax.device_put((ids, mask), both.batch)
for _ in range(2):
    params, state, loss = update(params, state, *where)
lies((params, state), both)
close(params, nnx.to_pure_dict(wanted[1]))

# rows stay where they are: of data parallel training nothing is gathered, of fully sharded training the weights
forward = jax.jit(lambda m, ids: m(ids).logits)
for place, wanted in ((shardings(Mesh(devices, ("data",))), set()), (fully, {"all-gather"})):
    model, where = load(folder, sharding=place), jax.device_put(ids, place.batch)
    kinds, text = collectives(forward.lower(model, where).compile())
    assert kinds == wanted and "f32[8,12,64]" not in text, kinds
"""


def test_training_over_eight_devices(tmp_path):
    FlaxOPTForCausalLM(OPTConfig(**CONFIG), rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    on_eight_devices(TRAIN, tmp_path)


ORBAX = """
from pathlib import Path
import orbax.checkpoint as ocp

model = load(folder)
state = nnx.state(model)
spread = load(folder, sharding=both)
spread.save_pretrained(folder + "/whole")
files = [Path(folder, where, "model.safetensors").read_bytes() for where in ("", "whole")]
assert files[0] == files[1]
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder + "/orbax", nnx.state(spread))
    for place in (tensor, fully):
        abstract = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, place.of(state)
        )
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder + "/orbax", abstract)
        lies(restored, place)
        close(restored, state)
model.config.save_pretrained(folder + "/orbax")
again = nnx.state(load(folder + "/orbax", sharding=both))
lies(again, both)
close(again, state)
"""


def test_orbax_over_eight_devices(tmp_path):
    """Restored straight into other shards; `save_pretrained` writes the checkpoint of one device."""
    FlaxOPTForCausalLM(OPTConfig(**CONFIG), rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    on_eight_devices(ORBAX, tmp_path)


PROCESSES = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
from opt_flax import FlaxOPTForCausalLM, shardings

address, rank, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
model = FlaxOPTForCausalLM.from_pretrained(folder, sharding=shardings(Mesh(np.array(jax.devices()), ("model",))))
kernel = model.model.decoder.layers[0].fc1.kernel[...]
assert [s.data.shape for s in kernel.addressable_shards] == [(64, 32)] * 2, "half of it"
ids = np.arange(3, 27).reshape(2, 12)
found = model.generate(ids, max_new_tokens=8, eos_token_id=[], do_sample=True, seed=1)
np.testing.assert_array_equal(found, np.load(folder + "/wanted.npy"))
try:
    model.generate(ids, max_new_tokens=8, do_sample=True)
    raise AssertionError
except ValueError as error:
    assert str(error).startswith("seed: found None with a model over several processes"), error
model.save_pretrained(folder + "/whole")
"""


def test_two_processes(tmp_path):
    """Each has half of the weights, and reads them; both have the answer of one; one file is written by both."""
    model = FlaxOPTForCausalLM(OPTConfig(**CONFIG), rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path)
    ids = np.arange(3, 27).reshape(2, 12)
    wanted = model.generate(ids, max_new_tokens=8, eos_token_id=[], do_sample=True, seed=1)
    np.save(tmp_path / "wanted.npy", np.asarray(wanted))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [on_devices(2, PROCESSES, address, rank, tmp_path) for rank in (0, 1)]
    for process in processes:
        output = process.communicate(timeout=500)[0]
        assert process.returncode == 0, output[-3000:]
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
