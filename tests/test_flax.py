"""What is JAX's and Flax NNX's own."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
import jax.numpy as jnp  # noqa: E402

from opt_common.config import OPTConfig  # noqa: E402
from opt_flax import FlaxOPTForCausalLM, FlaxOPTModel  # noqa: E402
from opt_flax.generate import _generate  # noqa: E402

SMALL = dict(vocab_size=96, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, ffn_dim=64,
             max_position_embeddings=64)  # fmt: skip


@pytest.fixture
def ids(rng) -> np.ndarray:
    return rng.integers(3, 96, (2, 12))


def test_nothing_abstract_and_parameters_only(tiny):
    folder, _ = tiny("350m")
    model = FlaxOPTForCausalLM.from_pretrained(folder, dtype="bfloat16")
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.bfloat16 for leaf in leaves)
    assert len(leaves) == len(jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_jit_split_and_merge(tiny, ids):
    folder, _ = tiny("350m")
    model = FlaxOPTForCausalLM.from_pretrained(folder)
    mask = np.ones_like(ids)
    mask[1, 8:] = 0
    wanted = np.asarray(model(ids, mask).logits)[mask == 1]
    traces = 0

    @jax.jit
    def run(model, ids, mask):
        nonlocal traces
        traces += 1
        return model(ids, mask).logits

    graph, state = nnx.split(model)
    for each in (model, nnx.merge(graph, state), model):
        found = np.asarray(run(each, ids, mask))[mask == 1]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)
    assert traces == 1
    cached = nnx.jit(lambda model, ids: model(ids, use_cache=True).past_key_values)(model, ids)
    assert int(cached.length) == 12


def test_gradients(tiny, ids):
    """As PyTorch's here, which are held against transformers'."""
    torch = pytest.importorskip("torch")
    from opt_common.weights import FLAX, TORCH, table
    from opt_pt import OPTForCausalLM

    folder, _ = tiny("350m")
    ids[0, :3] = 1
    mask = (ids != 1).astype(int)
    labels = np.where((mask * np.roll(mask, 1, 1)) == 0, -100, ids)
    theirs = OPTForCausalLM.from_pretrained(folder, dtype="float64")
    theirs(*(torch.tensor(x) for x in (ids, mask)), labels=torch.tensor(labels)).loss.backward()
    with jax.enable_x64(True):
        ours = FlaxOPTForCausalLM.from_pretrained(folder, dtype="float64")
        grads = nnx.jit(nnx.grad(lambda model: model(ids, mask, labels=labels).loss))(ours)
        for spec in table(ours.config):
            leaf = grads
            for part in spec.path.split("."):
                leaf = leaf[int(part)] if part.isdigit() else leaf[part]
            found = np.asarray(leaf[getattr(FLAX, spec.kind)][...])
            wanted = TORCH.parameter(theirs, spec).grad.numpy()
            np.testing.assert_allclose(found.T if spec.kind == "linear" else found, wanted, rtol=1e-8, atol=1e-12)


def test_new_weights_and_dropout(ids):
    config = OPTConfig(**(SMALL | {"vocab_size": 5000, "max_position_embeddings": 2048}), dropout=0.5)
    model = FlaxOPTForCausalLM(config, rngs=nnx.Rngs(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
        name = jax.tree_util.keystr(path)
        if "kernel" in name or "embedding" in name:
            assert abs(float(leaf.std()) / 0.02 - 1) < 0.1, name
        else:
            assert (leaf == ("scale" in name)).all(), name
    assert (model.model.decoder.embed_tokens.embedding[...][1] == 0).all()
    still = model(ids, output_hidden_states=True)
    moving = model(ids, output_hidden_states=True, rngs=nnx.Rngs(dropout=1))
    np.testing.assert_array_equal(still.hidden_states[0], moving.hidden_states[0])  # none on the embeddings
    assert not np.array_equal(still.hidden_states[1], moving.hidden_states[1])
    again = model(ids, output_hidden_states=True, rngs=nnx.Rngs(dropout=1))
    np.testing.assert_array_equal(again.logits, moving.logits)


def test_the_bare_model_jits_with_a_cache(tiny, ids):
    folder, _ = tiny()
    model = FlaxOPTModel.from_pretrained(folder)
    step = jax.jit(lambda model, ids, cache: model(ids, past_key_values=cache))
    cache = model.init_cache(2, 12)
    for i in range(0, 12, 4):
        out = step(model, ids[:, i : i + 4], cache)
        cache = out.past_key_values
    wanted = model(ids).last_hidden_state[:, 8:]
    np.testing.assert_allclose(out.last_hidden_state, wanted, rtol=0, atol=1e-4)
    assert step._cache_size() == 1


def test_generate_compiles_once_for_many_calls(tiny, ids):
    folder, _ = tiny("pre-norm-narrow")
    model = FlaxOPTForCausalLM.from_pretrained(folder)
    before = _generate._cache_size()
    for n, prompt, settings in ((3, ids, {}), (9, ids[:, :5], {}), (5, ids, {"min_new_tokens": 2, "eos_token_id": 7})):
        model.generate(prompt, max_new_tokens=n, **settings)
    assert _generate._cache_size() == before + 1
    for seed in range(3):
        model.generate(ids, max_new_tokens=4, do_sample=True, seed=seed, temperature=1.0 + seed)
    assert _generate._cache_size() == before + 2
