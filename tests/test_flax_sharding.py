"""opt_flax over eight devices, which a CPU stands for: the answers of one device, and only the part of each."""

from __future__ import annotations

from typing import Any

import jax
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from opt_common.weights import table
from opt_flax import FlaxOPTForCausalLM, OPTConfig, shardings

CONFIG = dict(vocab_size=96, hidden_size=64, num_attention_heads=8, num_hidden_layers=2, ffn_dim=128,
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


def test_trees():
    model = FlaxOPTForCausalLM(OPTConfig(**CONFIG), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    place = shardings(mesh(fsdp=2, model=4))
    for tree in (model, nnx.state(model), model.params, nnx.state((model, optimizer, nnx.Rngs(dropout=1)))):
        found = place.of(tree)
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        specs = [s.spec for s in jax.tree.leaves(found)]
        assert specs.count(PartitionSpec("fsdp", "model")) == (24 if len(specs) > 60 else 8)
