"""The functional way of transformers' Flax classes: weights apart from the model, in every transformation of JAX."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import serialization  # noqa: E402
from flax.core import freeze  # noqa: E402
from flax.training.train_state import TrainState  # noqa: E402
from flax.traverse_util import flatten_dict, unflatten_dict  # noqa: E402

from opt_common.config import OPTConfig  # noqa: E402
from opt_common.weights import FLAX, table  # noqa: E402
from opt_flax import (  # noqa: E402
    FlaxAutoModelForCausalLM,
    FlaxOPTForCausalLM,
    FlaxOPTForSequenceClassification,
    FlaxOPTModel,  # noqa: E402
)

SMALL = dict(vocab_size=96, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, ffn_dim=64, dropout=0.0,
             max_position_embeddings=64, init_std=0.3)  # fmt: skip
FC1 = ("model", "decoder", "layers", "0", "fc1", "kernel")


def close(found, wanted, tolerance=2e-6) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def changed(params: dict, **values: Any) -> dict:
    """params with the kernel of the first fc1 replaced."""
    return unflatten_dict(flatten_dict(params) | {FC1: values["fc1"]})


@pytest.fixture
def ids(rng) -> np.ndarray:
    return rng.integers(3, 96, (2, 12))


@pytest.fixture
def model(tiny):
    return FlaxOPTForCausalLM.from_pretrained(tiny("350m")[0])


@pytest.fixture
def small():
    return FlaxOPTForCausalLM(OPTConfig(**SMALL))


# === params ===


@pytest.mark.parametrize("cls", [FlaxOPTForCausalLM, FlaxOPTModel])
def test_names_and_orientation(tiny, cls):
    """Those of the flax_model.msgpack that transformers wrote, whose layers are counted in strings."""
    model = cls.from_pretrained(tiny("350m")[0])
    wanted = {}
    for spec in table(model.config, cls.architecture):
        shape = spec.shape[::-1] if spec.kind == "linear" else spec.shape
        wanted[*spec.path.split("."), getattr(FLAX, spec.kind)] = shape
    assert {path: x.shape for path, x in flatten_dict(model.params).items()} == wanted
    assert model.required_params == wanted.keys()
    assert {path: x.shape for path, x in flatten_dict(model.params_shape_tree).items()} == wanted


def test_a_call_with_params_leaves_the_model_alone(tiny, model, ids):
    torch = pytest.importorskip("torch")
    theirs = copy.deepcopy(tiny("350m")[1])
    theirs.model.decoder.layers[0].fc1.weight.data *= 2
    wanted = theirs(torch.tensor(ids)).logits.detach().numpy()
    before = model(ids).logits
    params = changed(model.params, fc1=flatten_dict(model.params)[FC1] * 2)
    for given in (params, freeze(params), jax.tree.map(np.asarray, params)):
        close(model(ids, params=given).logits, wanted, 2e-5)
    np.testing.assert_array_equal(model(ids).logits, before)
    model.params = freeze(params)
    close(model(ids).logits, wanted, 2e-5)
    assert type(model.params) is dict


def test_an_entry_set_is_a_weight_set(model, ids):
    """`params` is one dictionary, and the model's, as long as its weights are those."""
    before, params = model(ids).logits, model.params
    layer = params["model"]["decoder"]["layers"]["0"]["fc1"]
    layer["kernel"] = layer["kernel"] * 2
    after = model(ids, params=params).logits
    assert np.abs(np.asarray(after - before)).max() > 1e-2
    np.testing.assert_array_equal(model(ids).logits, after)
    assert model.params is params
    np.testing.assert_array_equal(model.model.decoder.layers[0].fc1.kernel[...], layer["kernel"])

    model.model.decoder.layers[0].fc1.kernel[...] *= 0  # NNX's way: what was given out is old
    zeroed = model(ids).logits
    assert np.abs(np.asarray(zeroed - after)).max() > 1e-2
    assert model.params is not params and not np.asarray(flatten_dict(model.params)[FC1]).any()
    layer["bias"] = layer["bias"] + 1  # nobody's any more
    np.testing.assert_array_equal(model(ids).logits, zeroed)


def test_what_params_must_hold(model, ids):
    name, flat = ".".join(FC1), flatten_dict(model.params)
    for wrong, message in (
        ({path: x for path, x in flat.items() if path != FC1}, f"params: found none {name}"),
        (flat | {("model", "lm_head", "kernel"): 0}, r"params: found an unknown model\.lm_head\.kernel"),
        (flat | {FC1: flat[FC1].T}, rf"params: found {name} of shape \[128, 64\], wanted \[64, 128\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, params=unflatten_dict(wrong))
        with pytest.raises(ValueError, match=message):
            model.params = unflatten_dict(wrong)
    model.params["model"]["decoder"]["layers"]["0"].pop("fc1")
    with pytest.raises(ValueError, match=r"params: found none model\.decoder\.layers\.0\.fc1\.bias"):
        model(ids)


def test_dtypes(model, ids):
    """That of the computation is the model's, that of the weights is theirs."""
    before, params = model(ids).logits, model.params
    half = model.to_bf16(params)
    assert {x.dtype.name for x in jax.tree.leaves(half)} == {"bfloat16"}
    mask = unflatten_dict({path: path[-1] != "scale" for path in flatten_dict(params)})
    some = flatten_dict(model.to_fp16(params, mask))
    assert {path[-1] == "scale": x.dtype.name for path, x in some.items()} == {True: "float32", False: "float16"}
    out = model(ids, params=half).logits
    close(out, model(ids, params=model.to_fp32(half)).logits)
    assert out.dtype == jnp.float32 and np.abs(np.asarray(out - before)).max() > 1e-3 * np.abs(before).max()
    model.params = half
    close(model(ids).logits, out)
    assert model.dtype == jnp.float32 and model.init_cache(1, 4).k[0].dtype == jnp.float32


# === Constructing and loading ===


def test_constructing(small, ids):
    config = OPTConfig(**SMALL)
    for same in (
        FlaxOPTForCausalLM(config, (1, 8), 0, jnp.float32),
        FlaxOPTForCausalLM(config, rngs=nnx.Rngs(0)),
        FlaxAutoModelForCausalLM.from_config(config, seed=0),
    ):
        jax.tree.map(np.testing.assert_array_equal, same.params, small.params)
    other = FlaxOPTForCausalLM(config, seed=1)
    assert not np.array_equal(other(ids).logits, small(ids).logits)
    half = FlaxOPTForCausalLM(config, dtype=jnp.bfloat16)
    assert half(ids).logits.dtype == jnp.bfloat16 and half.dtype == jnp.bfloat16
    assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"float32"}
    drawn = FlaxOPTForCausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {x.dtype.name for x in jax.tree.leaves(drawn.params)} == {"bfloat16"}
    with pytest.raises(ValueError, match="input_shape: found 'bfloat16', wanted whole numbers"):
        FlaxOPTForCausalLM(config, "bfloat16")


def test_without_weights(tiny, small, ids):
    config = OPTConfig(**SMALL)
    for build in (partial(FlaxOPTForCausalLM, _do_init=False), FlaxOPTForSequenceClassification):
        model = build(config) if build is not FlaxOPTForSequenceClassification else build(config, _do_init=False)
        for use in (model, lambda ids, model=model: model.params, model.save_pretrained):
            with pytest.raises(ValueError, match="params: found none, and a model that was made with _do_init=False"):
                use(ids if use is model else "nowhere")
        params = model.init_weights(model.key, model.input_shape)
        assert flatten_dict(params).keys() == model.required_params
        traced = jax.jit(lambda key, model=model: model.init_weights(key))(model.key)
        jax.tree.map(partial(close, tolerance=1e-5), traced, params)
    np.testing.assert_array_equal(
        FlaxOPTForCausalLM(config, _do_init=False)(ids, params=small.params).logits, small(ids).logits
    )
    some = {path: x for path, x in flatten_dict(small.params).items() if "fc2" not in path}
    filled = flatten_dict(small.init_weights(jax.random.key(5), params=unflatten_dict(some)))
    assert filled.keys() == small.required_params and all(filled[path] is x for path, x in some.items())

    folder, _ = tiny("350m")
    model, params = FlaxOPTForCausalLM.from_pretrained(folder, _do_init=False)
    wanted = FlaxOPTForCausalLM.from_pretrained(folder)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(model)))
    np.testing.assert_array_equal(model(ids, params=params).logits, wanted(ids).logits)


def test_loading(tiny, ids):
    folder, _ = tiny("350m")
    wanted = FlaxOPTForCausalLM.from_pretrained(folder)(ids).logits
    config = OPTConfig.from_pretrained(folder, output_hidden_states=True)
    out = FlaxOPTForCausalLM.from_pretrained(
        folder, jnp.float32, from_pt=True, seed=0, input_shape=(1, 8), config=config
    )
    np.testing.assert_array_equal(out(ids).logits, wanted)
    assert len(out(ids).hidden_states) == 4 and out.name_or_path == str(folder)
    mixed = FlaxOPTForCausalLM.from_pretrained(folder, "bfloat16", param_dtype="float32")
    assert mixed(ids).logits.dtype == jnp.bfloat16
    assert {x.dtype.name for x in jax.tree.leaves(mixed.params)} == {"float32"}


@pytest.mark.parametrize("msgpack", [False, True])
def test_saving_params(model, ids, tmp_path, msgpack):
    params = changed(model.params, fc1=flatten_dict(model.params)[FC1] * 2)
    before, wanted = model(ids).logits, model(ids, params=params).logits
    model.save_pretrained(tmp_path, params=params, safe_serialization=not msgpack)
    assert (tmp_path / ("flax_model.msgpack" if msgpack else "model.safetensors")).exists()
    np.testing.assert_array_equal(FlaxOPTForCausalLM.from_pretrained(tmp_path)(ids).logits, wanted)
    np.testing.assert_array_equal(model(ids).logits, before)
    if msgpack:
        stored = serialization.msgpack_restore((tmp_path / "flax_model.msgpack").read_bytes())
        jax.tree.map(np.testing.assert_array_equal, stored, jax.tree.map(np.asarray, params))
    model.save_pretrained(tmp_path / "half", params=model.to_bf16(params))
    assert OPTConfig.from_pretrained(tmp_path / "half").dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"push_to_hub: found True; save, then huggingface_hub\.upload_folder"):
        model.save_pretrained(tmp_path, push_to_hub=True)


# === Calls ===


def loss_of(model, params, ids, **how):
    logits = model(ids, params=params, **how)[0]
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def test_transformations(small, ids):
    """jit, grad, vmap, scan and checkpoint: one loss, one gradient; NNX's."""
    params = small.params
    nnx_loss, nnx_grads = nnx.value_and_grad(lambda m: m(ids, labels=ids).loss)(small)
    wanted = dict(nnx.to_flat_state(nnx_grads))
    wanted = {tuple(map(str, path)): np.asarray(x[...]) for path, x in wanted.items()}
    largest = max(np.abs(x).max() for x in wanted.values())

    def check(loss, grads, factor=1.0):
        close(loss, nnx_loss)
        for path, x in flatten_dict(grads).items():
            np.testing.assert_allclose(np.asarray(x) * factor, wanted[path], rtol=0, atol=1e-5 * largest)

    loss = partial(loss_of, small)
    check(*jax.jit(jax.value_and_grad(loss))(params, ids))
    check(*jax.jit(jax.value_and_grad(jax.checkpoint(loss)))(params, ids))
    each = jax.vmap(jax.value_and_grad(lambda p, row: loss(p, row[None])), (None, 0))
    rows = jax.jit(each)(params, jnp.asarray(ids))
    check(*jax.tree.map(lambda x: x.mean(0), rows))

    def step(total, row):
        value, grads = jax.value_and_grad(loss)(params, row[None])
        return jax.tree.map(jnp.add, total, grads), value

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, losses = jax.jit(lambda rows: jax.lax.scan(step, zeros, rows))(jnp.asarray(ids))
    check(losses.mean(), total, 0.5)
    small.gradient_checkpointing_enable()
    check(*jax.jit(jax.value_and_grad(partial(loss_of, small)))(params, ids))


def test_a_train_state(small, ids):
    """Weights by path: some frozen, some decayed; the model's own are not touched until they are set."""
    part = unflatten_dict(
        {path: "frozen" if "embed_tokens" in path else "trained" for path in flatten_dict(small.params)}
    )
    tx = optax.multi_transform({"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()}, part)
    state = TrainState.create(apply_fn=small.__call__, params=small.params, tx=tx)

    @jax.jit
    def step(state, ids):
        apply = partial(state.apply_fn, train=True, dropout_rng=jax.random.PRNGKey(0))
        loss, grads = jax.value_and_grad(lambda params: loss_of(apply, params, ids))(state.params)
        return state.apply_gradients(grads=grads), loss

    before, losses = flatten_dict(small.params), []
    for _ in range(3):
        state, loss = step(state, ids)
        losses.append(float(loss))
    assert losses[0] > losses[1] > losses[2]
    for path, x in flatten_dict(state.params).items():
        if path[-2:] == ("k_proj", "bias"):  # has no effect on a softmax
            continue
        assert np.array_equal(x, before[path]) == ("embed_tokens" in path), path
    close(loss_of(small, None, ids), losses[0])
    small.params = state.params
    assert float(loss_of(small, None, ids)) < losses[2]


def test_dropout(ids):
    model = FlaxOPTForCausalLM(OPTConfig(**SMALL | {"dropout": 0.3}))
    key, still = jax.random.PRNGKey(1), model(ids).logits
    moving = model(ids, dropout_rng=key, train=True).logits
    assert not np.array_equal(moving, still)
    for same in ({"deterministic": False, "dropout_rng": key}, {"rngs": nnx.Rngs(dropout=1)}):
        np.testing.assert_array_equal(model(ids, **same).logits, moving)
    np.testing.assert_array_equal(model(ids, params=model.params, train=True, dropout_rng=key).logits, moving)
    assert not np.array_equal(model(ids, train=True, dropout_rng=jax.random.PRNGKey(2)).logits, moving)
    for off in (
        {"dropout_rng": key},
        {"dropout_rng": key, "train": False},
        {"rngs": nnx.Rngs(1), "deterministic": True},
    ):
        np.testing.assert_array_equal(model(ids, **off).logits, still)
    with pytest.raises(ValueError, match="dropout_rng: found None, wanted a key"):
        model(ids, train=True)
    with pytest.raises(ValueError, match="train, deterministic: found True and True, which contradict"):
        model(ids, train=True, deterministic=True)


def test_a_loop_by_hand(model, ids):
    """One mask as wide as the cache for all steps, in eager calls and in one program; padding on the left."""
    ids[0, :4] = 1
    mask = (ids != 1).astype("i4")
    whole, masks, wanted = ids, mask, []
    for _ in range(3):
        logits = np.asarray(model(whole, masks).logits[:, -1:])
        token = logits.argmax(-1)
        whole, masks = np.concatenate([whole, token], 1), np.pad(masks, ((0, 0), (0, 1)), constant_values=1)
        wanted.append(logits)

    def step(params, token, how):
        out = model(token, params=params, **how)
        return out.logits[:, -1:], model.update_inputs_for_generation(out, dict(how))

    for run in (step, jax.jit(step)):
        how, token, found = model.prepare_inputs_for_generation(jnp.asarray(ids), 16, mask), jnp.asarray(ids), []
        assert how["attention_mask"].shape == (2, 16)
        for _ in range(3):
            logits, how = run(model.params, token, how)
            token = logits.argmax(-1)
            found.append(logits)
        close(np.stack(found), np.stack(wanted), 1e-5)
    with pytest.raises(ValueError, match=r"attention_mask: found shape \[2, 17\], wanted \[2, 15\]"):
        model(token, attention_mask=np.ones((2, 17)), past_key_values=how["past_key_values"])


def test_as_a_linen_module(model, ids):
    module, variables = model.module, {"params": model.params, "cache": model.init_cache(2, 16)}
    mask, wanted = np.ones((2, 16)), model(ids)
    out, changes = module.apply(variables, ids[:, :8], mask, np.arange(8)[None], mutable=["cache"])
    rest, _ = module.apply(variables | changes, ids[:, 8:], mask, np.arange(8, 12)[None], mutable=["cache"])
    close(jnp.concatenate([out.logits, rest.logits], 1), wanted.logits, 1e-5)
    assert list(changes) == ["cache"] and list(out) == ["logits"]
    (logits,) = module.apply({"params": model.params}, ids, deterministic=True, return_dict=False)
    np.testing.assert_array_equal(logits, wanted.logits)
    new = module.init(jax.random.key(0), ids, init_cache=True)
    assert flatten_dict(new["params"]).keys() == model.required_params and new["cache"].slots == 12


def test_the_config_speaks(model, ids):
    """By default a call returns what the config says; a program compiled before it was changed is not used."""
    run = jax.jit(lambda model, ids: model(ids))
    assert list(run(model, ids)) == list(model(ids)) == ["logits"]
    assert model.config.use_cache and list(model(ids, use_cache=True)) == ["logits", "past_key_values"]  # but for this
    model.config.output_hidden_states = True
    for out in (model(ids), run(model, ids)):
        assert list(out) == ["logits", "hidden_states"]
    assert list(model(ids, output_hidden_states=False)) == ["logits"]
    model.config.return_dict = False
    logits, hidden_states = model(ids)
    assert logits.shape == (2, 12, 96) and len(hidden_states) == 4
    assert list(model(ids, return_dict=True, output_attentions=True)) == ["logits", "hidden_states", "attentions"]
    with pytest.raises(TypeError, match="found unknown arguments output_logits"):
        model(ids, output_logits=True)


def test_another_class_of_padding_is_seen(tiny, ids):
    """What is compiled for one pad_token_id does not answer for another."""
    model = FlaxOPTForSequenceClassification(OPTConfig(**SMALL), rngs=nnx.Rngs(0))
    run = jax.jit(lambda model, ids: model(ids).logits)
    ids[:, -1] = 7
    before = run(model, ids)
    model.config.pad_token_id = 7
    after = run(model, ids)
    assert not np.array_equal(after, before)
    close(after, model(ids).logits, 1e-5)


def test_resizing(tiny, ids):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for name in ("350m", "untied"):
        folder, _ = tiny(name)
        theirs = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = FlaxOPTForCausalLM.from_pretrained(folder)
        theirs.resize_token_embeddings(90, mean_resizing=False)
        assert model.resize_token_embeddings(90) is model.get_input_embeddings()
        ids = ids % 90
        close(model(ids).logits, theirs(torch.tensor(ids)).logits.detach().numpy(), 2e-5)
        before = model(ids).logits
        model.resize_token_embeddings(91, pad_to_multiple_of=16)
        assert model.config.vocab_size == model.model.decoder.vocab_size == 96
        table = model.get_input_embeddings().embedding[...]
        close(table[90:], np.tile(table[:90].mean(0), (6, 1)), 1e-5)
        close(model(ids).logits[..., :90], before, 1e-5)
        assert model(ids + 6).logits.shape == (2, 12, 96)


def test_a_beam_search_by_hand(model, ids):
    """Rows of the cache are picked as rows of every array of it: each beam goes on from its own past."""
    how = model.prepare_inputs_for_generation(jnp.asarray(ids), 16)
    out = model(ids, **how)
    picked = jnp.array([1, 1, 0])
    cache = jax.tree.map(lambda x: x[picked] if x.ndim else x, out.past_key_values)
    how = model.update_inputs_for_generation(out, how) | {"past_key_values": cache}
    how |= {name: how[name][picked] for name in ("attention_mask", "position_ids")}
    token, rows = np.array([[5], [6], [7]]), ids[np.asarray(picked)]
    wanted = model(np.concatenate([rows, token], 1)).logits[:, -1:]
    for run in (model, jax.jit(lambda token, **how: model(token, **how))):
        found = run(token, **how)
        close(found.logits, wanted, 1e-5)
    assert jax.eval_shape(lambda: found.past_key_values).k[0].shape == (3, 4, 16, 16)
    plain = model(ids, past_key_values=model.init_cache(2, 16)).past_key_values
    with pytest.raises(ValueError, match="past_key_values: found 2 rows of keys, wanted 2 times 4 heads"):
        model(token[:2], past_key_values=jax.tree.map(lambda x: x[:2] if x.ndim else x, plain))


@pytest.mark.parametrize("old", ["transformers", "opt_flax"])
def test_the_migration_page(tiny, tmp_path, monkeypatch, old):
    """The scripts of docs/coming-from-flaxopt.md: transformers' where its Flax classes are installed, the same with its
    import line changed, and the one in NNX. All end in the same weights."""
    page = (Path(__file__).parents[1] / "docs" / "coming-from-flaxopt.md").read_text(encoding="utf-8")
    functional, native, *_ = re.findall(r"```python[^\n]*\n(.*?)```", page, re.DOTALL)
    name, line = "facebook/opt-125m", "from transformers import FlaxOPTForCausalLM"
    assert functional.count(line) == 1 and functional.count(name) == native.count(name) == 1
    if old == "transformers" and not hasattr(pytest.importorskip("transformers"), "FlaxOPTForCausalLM"):
        pytest.skip("transformers 4 with Flax is not installed")
    folder = tiny("pre-norm")[0]
    for script, to in ((functional.replace(line, line.replace("transformers", old)), "functional"), (native, "native")):
        (tmp_path / to).mkdir()
        monkeypatch.chdir(tmp_path / to)
        variables: dict[str, Any] = {}
        exec(script.replace(name, str(folder)), variables)
    ids = variables["ids"]
    models = [FlaxOPTForCausalLM.from_pretrained(path) for path in (folder, "../functional/tuned", "../native/tuned")]
    before, found, wanted = (np.asarray(model(ids).logits) for model in models)
    close(found, wanted, 1e-3)
    assert np.abs(found - before).max() > 1e-2 * np.abs(before).max()
