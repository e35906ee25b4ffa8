"""What is JAX's and Flax NNX's own."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
import jax.numpy as jnp  # noqa: E402

from opt_common.config import OPTConfig  # noqa: E402
from opt_flax import FlaxOPTForCausalLM, FlaxOPTModel, attention, products  # noqa: E402
from opt_flax.generation.loop import run as generation_run  # noqa: E402

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


def test_constants_under_jit(tiny, ids):
    """What is known while tracing is checked there too."""
    folder, _ = tiny()
    model = FlaxOPTForCausalLM.from_pretrained(folder)
    positions = jnp.array([[*range(5), *range(7)], [*range(12)]])
    wanted = model(ids, position_ids=positions).logits
    found = jax.jit(lambda model: model(ids, position_ids=positions).logits)(model)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)
    positions += 53
    with pytest.raises(ValueError, match="position_ids: found position 64, wanted -1 to 63"):
        jax.jit(lambda model: model(ids, position_ids=positions).logits)(model)


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
            found = FLAX.oriented(spec, np.asarray(leaf[getattr(FLAX, spec.kind)][...]))
            wanted = TORCH.parameter(theirs, spec).grad.numpy()
            np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-12)


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
    before = generation_run._cache_size()
    for n, prompt, settings in ((3, ids, {}), (9, ids[:, :5], {}), (5, ids, {"eos_token_id": [7, 8]})):
        model.generate(prompt, max_new_tokens=n, **settings)
    assert generation_run._cache_size() == before + 1
    for seed in range(3):
        model.generate(ids, max_new_tokens=4, do_sample=True, seed=seed, temperature=2.0 + seed)
    assert generation_run._cache_size() == before + 2


def test_attention_implementations(tiny, ids):
    folder, _ = tiny("350m")
    model = FlaxOPTForCausalLM.from_pretrained(folder, attn_implementation="eager")
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    eager = model(ids, mask).logits
    model.set_attn_implementation("sdpa")
    np.testing.assert_array_equal(model(ids, mask).logits, eager)  # on a CPU one formula serves both
    wanted = "attn_implementation: found 'fast', wanted one of eager, sdpa, cudnn"
    new = partial(FlaxOPTModel, model.config, rngs=nnx.Rngs(0))
    for choose in (model.set_attn_implementation, lambda name: new(attn_implementation=name)):
        with pytest.raises(ValueError, match=wanted):
            choose("fast")
    assert model.model.decoder.config._attn_implementation == "sdpa", "a refused choice changes nothing"


GPU = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="H100", memory_stats=lambda: None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"device": jax.devices("cpu")[0]}, "the model is on cpu; move it to an NVIDIA GPU"),
        ({"device": SimpleNamespace(platform="gpu", compute_capability="gfx942")}, "the model is on gpu; move it to"),
        ({"device": SimpleNamespace(**vars(GPU) | {"compute_capability": "7.5"})}, "capability below 8.0; use a newer"),
        ({"dtype": jnp.float32}, "it computes in float32; load it with dtype='float16' or 'bfloat16'"),
        ({"dtype": np.dtype("bfloat16")}, None),
        ({"D": 80}, None),
        ({"D": 60}, "heads are 60 wide, not a multiple of 8 up to 128"),
        ({"D": 160}, "heads are 160 wide"),
        ({"T": 7, "S": 7}, None),
        ({"T": 7, "S": 8, "masked": True}, "a mask of 7 x 8 is not even"),
        ({"T": 8, "S": 7, "masked": True}, "a mask of 8 x 7 is not even"),
        ({"T": 8, "S": 16, "masked": True}, None),
        ({"T": 1, "S": 7, "masked": True}, None),
        ({"drops": True}, "it drops no attention weights"),
    ],
)
def test_the_rule(changes, why):
    """cuDNN where it can run: "sdpa" takes it, or the formula; "cudnn" takes it, or says why not."""
    call = {"device": GPU, "dtype": jnp.float16, "T": 8, "S": 8, "D": 64, "masked": False, "drops": False} | changes
    choose = partial(attention.choose_way, **call)
    assert choose("eager", weights=False) is choose("cudnn", weights=True) is attention.eager
    if why is None:
        assert choose("cudnn", weights=False) is attention.cudnn
        assert choose("sdpa", weights=False) is (attention.cudnn if call["T"] > 1 else attention.eager)
    else:
        assert choose("sdpa", weights=False) is attention.eager
        with pytest.raises(ValueError, match=f"attn_implementation: 'cudnn' cannot run: .*{why}.*, or take 'sdpa'"):
            choose("cudnn", weights=False)


def test_cudnn_where_it_cannot_run(tiny, ids):
    folder, _ = tiny()
    model = FlaxOPTForCausalLM.from_pretrained(folder, attn_implementation="cudnn", dtype="float16")
    with pytest.raises(ValueError, match="'cudnn' cannot run: the model is on cpu; move it to an NVIDIA GPU"):
        model(ids)
    with pytest.raises(ValueError, match="cannot run"):
        model.generate(ids, max_new_tokens=2)


@pytest.fixture
def without_gpu(monkeypatch):
    """The calls of cuDNN, answered by jax's own formula for the same arguments, which a CPU can run."""
    calls, real = [], jax.nn.dot_product_attention

    def answer(q, k, v, *, implementation, **how):
        assert implementation == "cudnn"
        calls.append(sorted(how.keys() - {"scale"}))
        return real(q, k, v, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    for module in ("attention", "products"):
        monkeypatch.setattr(f"opt_flax.{module}.default_device", lambda: GPU)
    return calls


LENGTHS = ["is_causal", "key_value_seq_lengths", "query_seq_lengths"]
PADDED = {
    "left": [[1] * 12, [0] * 4 + [1] * 8, [0] * 11 + [1]],
    "right": [[1] * 12, [1] * 8 + [0] * 4, [1] + [0] * 11],
    "holes": [[1] * 12, [0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1], [0] * 12],
}


@pytest.mark.parametrize("padding", [None, *PADDED])
@pytest.mark.parametrize("jit", [False, True])
def test_padding_keeps_the_fast_path(tiny, rng, without_gpu, padding, jit):
    """Rows are re-aligned and come back, in every output and in the cache."""
    folder, _ = tiny("350m")
    fast, slow = (
        FlaxOPTForCausalLM.from_pretrained(folder, dtype="bfloat16", attn_implementation=name)
        for name in ("sdpa", "eager")
    )
    ids = rng.integers(3, 96, (3, 16))
    mask = None if padding is None else np.array([row + [1] * 4 for row in PADDED[padding]])

    def run(model, ids, mask):
        first = None if mask is None else mask[:, :12]
        cache = model.init_cache(3, 16)
        out = model(ids[:, :12], first, past_key_values=cache, output_hidden_states=True)
        rest = model(ids[:, 12:], mask, past_key_values=out.past_key_values)
        v = [x.reshape(4, 3, 16, -1).transpose(1, 2, 0, 3) for x in rest.past_key_values.v]
        return (out.logits, *out.hidden_states, rest.logits, *v)

    run = jax.jit(run) if jit else run
    wanted = run(slow, ids, mask)
    assert without_gpu == []
    found = run(fast, ids, mask)
    assert without_gpu == [["is_causal"] if padding is None else LENGTHS] * 3 + [["mask"]] * 3
    keep = np.ones((3, 16), bool) if mask is None else mask == 1
    for a, b in zip(found, wanted, strict=True):
        at = keep[:, :12] if a.shape[1] == 12 else keep[:, 12:] if a.shape[1] == 4 else keep
        a, b = (np.asarray(x, np.float32)[at] for x in (a, b))
        assert np.abs(a - b).max() < 0.05 * np.abs(b).max()
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in found)


def test_packed_rows_are_a_mask(tiny, ids, without_gpu):
    folder, _ = tiny()
    positions = np.array([[*range(5), *range(7)], range(12)])
    fast, slow = (
        FlaxOPTForCausalLM.from_pretrained(folder, dtype="bfloat16", attn_implementation=name)
        for name in ("cudnn", "eager")
    )
    found, wanted = (np.asarray(m(ids, position_ids=positions).logits, np.float32) for m in (fast, slow))
    assert without_gpu == [["mask"]] * 3
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_generate_prefills_on_the_fast_path(tiny, ids, without_gpu):
    """Each prompt alone, with padding on either side, and together: the same tokens."""
    folder, _ = tiny("350m")
    model = FlaxOPTForCausalLM.from_pretrained(folder, dtype="bfloat16")
    mask = np.ones_like(ids)
    mask[0, :5] = mask[1, 9:] = 0
    text = np.asarray(model.generate(ids, mask, max_new_tokens=8, eos_token_id=[]))[:, 12:]
    assert without_gpu == [LENGTHS] * 3  # the loop has one query a row
    for row, prompt in zip(text, (ids[:1, 5:], ids[1:, :9]), strict=True):
        np.testing.assert_array_equal(
            np.asarray(model.generate(prompt, max_new_tokens=8, eos_token_id=[]))[0, -8:], row
        )


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from opt_flax import FlaxOPTForCausalLM

mesh = Mesh(jax.devices(), ("model",))

def sharding(name):
    if "norm" in name or name.endswith("bias"):
        return NamedSharding(mesh, PartitionSpec())
    rows = any(part in name for part in ("q_proj", "k_proj", "v_proj", "fc1", "embed_tokens"))
    return NamedSharding(mesh, PartitionSpec("model") if rows else PartitionSpec(None, "model"))

ids = np.random.default_rng(0).integers(3, 96, (2, 12))
wanted = FlaxOPTForCausalLM.from_pretrained(sys.argv[1])
found = FlaxOPTForCausalLM.from_pretrained(sys.argv[1], sharding=sharding)
layer = found.model.decoder.layers[0]
for kernel, part in ((layer.fc1.kernel, (64, 8)), (layer.fc2.kernel, (8, 64))):
    shards = kernel[...].addressable_shards
    assert len({s.device for s in shards}) == 8 and {s.data.shape for s in shards} == {part}, shards
a, b = (np.asarray(jax.jit(lambda m: m(ids).logits)(m)) for m in (found, wanted))
assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max()
a, b = (np.asarray(m.generate(ids, max_new_tokens=8, eos_token_id=[])) for m in (found, wanted))
np.testing.assert_array_equal(a, b)

# no device holds another's heads: of 2 rows and 8 heads each has 2 of 16 matrices of keys, in a cache of 71 slots too
step = jax.jit(lambda m, token, cache: m(token, past_key_values=cache).past_key_values)
for columns, compiled in (
    (12, jax.jit(lambda m: m(ids).logits).lower(found).compile()),
    (71, step.lower(found, ids[:, :1], jax.eval_shape(step, found, ids, found.init_cache(2, 71))).compile()),
    (71, jax.jit(lambda m: step(m, ids[:, :1], step(m, ids, m.init_cache(2, 71)))).lower(found).compile()),
):
    text = compiled.as_text()
    assert f"f32[2,{columns},8]" in text and f"f32[16,{columns},8]" not in text, columns
whole = FlaxOPTForCausalLM.from_pretrained(sys.argv[1], sharding=NamedSharding(mesh, PartitionSpec()))
assert whole.model.decoder.layers[0].fc1.kernel[...].sharding.is_fully_replicated
"""


@pytest.mark.slow  # by specs of its own; test_flax_sharding has those of `shardings`
def test_sharding(tmp_path):
    """Eight devices, each with its part of the weights, keys and values and no more; the same answers as one."""
    config = OPTConfig(**SMALL | {"num_attention_heads": 8, "init_std": 0.2})
    FlaxOPTForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", SHARDED, str(tmp_path)], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_a_gpu_writes_half_precision_products(monkeypatch):
    """One token's product is wide until the bias is added; that of many is written in half precision. On a CPU both are
    wide."""
    config = OPTConfig(**SMALL)
    linear = FlaxOPTModel(config, dtype="bfloat16", rngs=nnx.Rngs(0)).decoder.layers[0].fc1

    def rounded_first(tokens: int) -> bool:
        return "f32" not in str(jax.make_jaxpr(lambda x: linear(x))(jnp.ones((1, tokens, 64), jnp.bfloat16)))

    assert not rounded_first(1) and not rounded_first(4)
    monkeypatch.setattr("opt_flax.products.default_device", lambda: GPU)
    assert not rounded_first(1) and rounded_first(4)


def test_products_agree(rng):
    """Every form of a product, of a kernel and of the table, is the plain one, and so is its gradient."""
    k = jnp.asarray(rng.normal(size=(64, 24)), jnp.float32)

    def run(x, k, axis):
        return products.product(x, k, (((x.ndim - 1,), (axis,)), ((), ())))

    for shape in ((1, 1), (1, 2), (4, 1), (5, 1), (2, 8), (17, 1), (1, 129)):
        x = jnp.asarray(rng.normal(size=(*shape, 64)), jnp.float32)
        for kernel, axis in ((k, 0), (k.T, 1)):
            np.testing.assert_allclose(run(x, kernel, axis), x @ k, rtol=0, atol=2e-5)
            found = jax.grad(lambda x, kernel: (run(x, kernel, axis) ** 2).sum(), (0, 1))(x, kernel)  # noqa: B023
            wanted = jax.grad(lambda x, k: ((x @ k) ** 2).sum(), (0, 1))(x, k)
            np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(found[1] if axis == 0 else found[1].T, wanted[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("free", "wanted_axes"), [(10**9, {1}), (10**5, {0, 1})])
def test_one_row_on_a_gpu_reads_kernels_by_rows(tiny, ids, monkeypatch, free, wanted_axes):
    """Where memory allows it, the loop has kernels [out, in] of its own; the table is stored that way anyway."""
    folder, _ = tiny("350m")
    model = FlaxOPTForCausalLM.from_pretrained(folder)
    generate = partial(model.generate, ids[:1], max_new_tokens=8, eos_token_id=[])
    wanted, axes, one_on_gpu = generate(), [], products._one_on_gpu

    def seen(x, kernel, axis, wide):
        axes.append(axis)
        return one_on_gpu(x, kernel, axis, wide)

    gpu = SimpleNamespace(**vars(GPU) | {"memory_stats": lambda: {"bytes_limit": 10**9 + free, "bytes_in_use": 10**9}})
    monkeypatch.setattr(products, "default_device", lambda: gpu)
    monkeypatch.setattr(products, "_one_on_gpu", seen)
    generation_run.clear_cache()
    np.testing.assert_array_equal(generate(), wanted)
    generation_run.clear_cache()
    assert set(axes) == wanted_axes
    assert model.model.decoder.layers[0].fc1.kernel.shape == (64, 128)
