"""What is Keras' and TensorFlow's own."""

from __future__ import annotations

import gc
import math
import re
import weakref

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
opt_tf = pytest.importorskip("opt_tf")
import keras  # noqa: E402  after opt_tf has chosen its backend

from opt_common.config import OPTConfig  # noqa: E402
from opt_common.generation import prompt as checked  # noqa: E402
from opt_common.weights import KERAS, table  # noqa: E402
from opt_tf import TFOPTForCausalLM, TFOPTModel  # noqa: E402
from opt_tf.attention import choose  # noqa: E402
from opt_tf.cache import CacheWriter  # noqa: E402
from opt_tf.generation.generate import _generate  # noqa: E402
from opt_tf.generation.programs import weights  # noqa: E402
from opt_tf.generation.prompts import call  # noqa: E402

SMALL = dict(vocab_size=96, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, ffn_dim=64,
             max_position_embeddings=64)  # fmt: skip


@pytest.fixture
def ids(rng) -> np.ndarray:
    return rng.integers(3, 96, (2, 12))


@pytest.mark.parametrize("config", ["350m", "untied", "no-bias"])
def test_keras_files(config, tiny, tmp_path, ids):
    folder, _ = tiny(config)
    model = TFOPTForCausalLM.from_pretrained(folder)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.config == model.config
    np.testing.assert_array_equal(again(ids).logits, model(ids).logits)


def test_functional_use(tiny, ids):
    folder, _ = tiny("350m")
    model = TFOPTModel.from_pretrained(folder)
    inputs = keras.Input((None,), dtype="int32")
    mask = keras.Input((None,), dtype="int32")
    hidden = model(inputs, attention_mask=mask).last_hidden_state
    functional = keras.Model([inputs, mask], keras.layers.Dense(3)(hidden[:, -1]))
    given = np.ones_like(ids)
    given[0, :4] = 0
    assert functional([ids, given]).shape == (2, 3)
    probe = keras.Model([inputs, mask], hidden)
    np.testing.assert_allclose(probe([ids, given]), model(ids, given).last_hidden_state, rtol=0, atol=1e-5)


def test_compile_and_fit(ids):
    keras.utils.set_random_seed(0)
    model = TFOPTForCausalLM(OPTConfig(**SMALL))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    x, y = np.repeat(ids, 8, axis=0), np.roll(np.repeat(ids, 8, axis=0), -1, axis=1)
    history = model.fit(x, y, epochs=15, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] - 0.3
    assert set(history) == {"loss", "accuracy"}


def test_precision_policies(ids):
    for policy, variables, compute in (("mixed_bfloat16", "float32", "bfloat16"), ("float16", "float16", "float16")):
        model = TFOPTForCausalLM(OPTConfig(**SMALL), dtype=policy)
        assert {v.dtype for v in model.trainable_variables} == {variables}
        assert model(ids).logits.dtype == compute
        assert model(ids, labels=ids).loss.dtype == tf.float32


def test_graph_and_xla_give_what_eager_gives(tiny, ids):
    folder, _ = tiny("350m")
    model = TFOPTForCausalLM.from_pretrained(folder)
    mask = np.ones_like(ids)
    mask[1, 8:] = 0
    wanted = model(ids, mask).logits.numpy()[mask == 1]
    for jit in (False, True):
        run = tf.function(lambda i, m: model(i, m).logits, jit_compile=jit)
        np.testing.assert_allclose(run(tf.constant(ids), tf.constant(mask)).numpy()[mask == 1], wanted, atol=5e-5)


@pytest.mark.parametrize("length", [12, 64])
def test_gradients(tiny, rng, length, monkeypatch):
    """As PyTorch's here, which are held against transformers'."""
    torch = pytest.importorskip("torch")
    from opt_common.weights import TORCH
    from opt_pt import OPTForCausalLM

    folder, _ = tiny("350m")
    monkeypatch.setattr("opt_tf.attention.FEWEST", 16)
    ids = rng.integers(3, 96, (2, length))
    ids[0, :3] = 1
    mask = (ids != 1).astype(int)
    labels = np.where((mask * np.roll(mask, 1, 1)) == 0, -100, ids)
    ours = TFOPTForCausalLM.from_pretrained(folder, dtype="float64")
    theirs = OPTForCausalLM.from_pretrained(folder, dtype="float64")
    theirs(*(torch.tensor(x) for x in (ids, mask)), labels=torch.tensor(labels)).loss.backward()
    with tf.GradientTape() as tape:
        loss = ours(ids, mask, labels=labels).loss
    specs = list(table(ours.config))
    grads = tape.gradient(loss, [KERAS.parameter(ours, spec).value for spec in specs])
    for spec, grad in zip(specs, grads, strict=True):
        wanted = TORCH.parameter(theirs, spec).grad.numpy()
        found = tf.convert_to_tensor(grad).numpy()
        np.testing.assert_allclose(found.T if spec.kind == "linear" else found, wanted, rtol=1e-8, atol=1e-12)


def test_blocks_of_tokens(ids, rng):
    """Each block of a long call sees the slots up to its last token: what one block of all would give."""
    config = OPTConfig(**(SMALL | {"max_position_embeddings": 512}))
    sizes = [tuple(mask.shape[2:]) for mask in choose(None, 0, 300).masks]
    assert sizes == [(75, 75), (75, 150), (75, 225), (75, 300)]
    assert [m.shape[2] for m in choose(None, 0, 100).masks] == [64, 36]
    model = TFOPTForCausalLM(config, initializer=keras.initializers.RandomNormal(stddev=0.3, seed=0), dtype="float64")
    ids, mask = rng.integers(3, 96, (2, 300)), np.ones((2, 300), int)
    mask[0, :90] = mask[1, 280:] = 0
    found = model(ids, mask, output_attentions=True, past_key_values=model.init_cache(2, 310))
    apart, cache = [], model.init_cache(2, 310)
    for first in range(0, 300, 60):  # each a block of its own
        out = model(ids[:, first : first + 60], mask[:, : first + 60], past_key_values=cache, output_attentions=True)
        cache = out.past_key_values
        apart.append(out)
    for name in ("logits", "attentions"):
        pick = (lambda o: o.logits) if name == "logits" else (lambda o: tf.transpose(o.attentions[1], (0, 2, 1, 3)))
        wanted = np.concatenate([pick(out).numpy() for out in apart], axis=1)
        assert pick(found).shape == wanted.shape
        np.testing.assert_allclose(pick(found).numpy()[mask == 1], wanted[mask == 1], rtol=0, atol=1e-12)
    assert found.attentions[1].shape == (2, 4, 300, 310)
    uncached = model(ids, mask, output_attentions=True)
    np.testing.assert_allclose(uncached.attentions[1], found.attentions[1][..., :300], rtol=0, atol=1e-12)


@pytest.fixture
def drawn() -> TFOPTModel:
    """A model whose weights are large enough to tell mistakes by."""
    initializer = keras.initializers.RandomNormal(stddev=0.3, seed=keras.random.SeedGenerator(0))
    return TFOPTModel(OPTConfig(**(SMALL | {"num_hidden_layers": 3})), initializer, dtype="float64")


def same(found, wanted) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)


CAUSAL = np.tril(np.ones((12, 12), bool))[None, None]
PADDED = np.array([[0] * 4 + [1] * 8, [1] * 12])
MASKS = {
    "none": (None, None),
    "bool": (PADDED, CAUSAL & (PADDED == 1)[:, None, None]),
    "additive": (PADDED, np.where(CAUSAL & (PADDED == 1)[:, None, None], 0, np.finfo("float64").min)),
    "infinite": (None, np.where(CAUSAL, 0, -np.inf)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", MASKS)
def test_a_layer_called_by_hand(case, compiled, drawn, ids):
    """Layers and attentions take what transformers' take, and return what the decoder gets from them."""
    padding, mask = MASKS[case]
    wanted = drawn(ids, padding, output_hidden_states=True, output_attentions=True)
    real = np.ones((2, 12), bool) if padding is None else padding == 1
    given = None if mask is None else tf.constant(mask)
    for i, layer in enumerate(drawn.decoder.layers[: 1 if compiled else 2]):
        before, after = wanted.hidden_states[i], wanted.hidden_states[i + 1].numpy()

        def run(x, layer=layer):
            return layer(x, attention_mask=given, use_cache=False)[0]

        found = (tf.function(run, jit_compile=True) if compiled else run)(before)
        same(found.numpy()[real], after[real])
        normed = layer.self_attn_layer_norm(before)
        out, none = layer.self_attn(hidden_states=normed, attention_mask=given)
        assert none is None
        middle = before + out
        ffn = layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(middle))))
        same((middle + ffn).numpy()[real], after[real])
        out, weights = layer.self_attn(hidden_states=normed, attention_mask=given, output_attentions=True)
        rows = np.where(real[:, None, :, None], 1, 0)
        same(weights * rows, wanted.attentions[i] * rows)
        found_again, weights_again, _ = layer(before, given, output_attentions=True)
        same(found_again, found)
        same(weights_again, weights)


def test_a_decoder_by_hand(drawn, ids):
    decoder, (padded, mask) = drawn.decoder, MASKS["additive"]
    x = decoder.embed_tokens(ids) + decoder.embed_positions(padded, 0)
    for layer in decoder.layers:
        x = layer(x, attention_mask=tf.constant(mask))[0]
    wanted = drawn(ids, attention_mask=padded).last_hidden_state
    same(decoder.final_layer_norm(x).numpy()[padded == 1], wanted.numpy()[padded == 1])


def test_a_mask_of_another_rank_is_refused(drawn):
    with pytest.raises(ValueError, match=r"attention_mask: found shape \[2, 12\], wanted \[batch or 1, 1"):
        drawn.decoder.layers[0](tf.zeros((2, 12, 64), tf.float64), attention_mask=tf.ones((2, 12)))


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_called_by_hand_writes_the_cache(masked, drawn, ids):
    past = drawn(ids[:, :7], past_key_values=drawn.init_cache(2, 20)).past_key_values
    wanted = drawn(ids[:, 7:], past_key_values=past, output_hidden_states=True)
    writer = CacheWriter(past)
    mask = tf.constant(CAUSAL[:, :, 7:]) if masked else None
    for i, layer in enumerate(drawn.decoder.layers):
        found, _, kept = layer(wanted.hidden_states[i], mask, past_key_values=writer)
        assert kept is writer
        if i + 1 < len(drawn.decoder.layers):
            same(found, wanted.hidden_states[i + 1])
    cache = writer.advance(5, wanted.past_key_values.segments)
    assert int(cache.length) == int(wanted.past_key_values.length) == 12
    for ours, theirs in zip(cache.k + cache.v, wanted.past_key_values.k + wanted.past_key_values.v, strict=True):
        same(ours, theirs)


def test_a_replaced_activation_counts(drawn, ids):
    usual = drawn(ids).last_hidden_state.numpy()
    drawn.decoder.layers[1].activation_fn = tf.zeros_like
    found = drawn(ids).last_hidden_state.numpy()
    assert np.abs(found - usual).max() > 0.1
    drawn.decoder.layers[1].activation_fn = tf.nn.relu
    same(drawn(ids).last_hidden_state, usual)
    for variable in drawn.decoder.layers[1].fc1.weights:
        variable.assign(tf.zeros_like(variable.value))
    same(drawn(ids).last_hidden_state, found)


def test_what_users_read(drawn):
    config, layer = drawn.config, drawn.decoder.layers[1]
    attention = layer.self_attn
    assert (attention.layer_idx, attention.is_causal, attention.config) == (1, True, config)
    assert (attention.embed_dim, attention.num_heads, attention.head_dim, attention.scaling) == (64, 4, 16, 0.25)
    assert (layer.embed_dim, layer.do_layer_norm_before) == (64, True)


def test_variables_are_called_as_in_the_checkpoint():
    model = TFOPTForCausalLM(OPTConfig(**SMALL, word_embed_proj_dim=32, tie_word_embeddings=False))
    for spec in table(model.config):
        variable = KERAS.parameter(model, spec)
        prefix = "" if spec.path.startswith("model.") else f"{model.name}/"
        assert variable.path == f"{prefix}{re.sub(r'(?<!layers)[.]', '/', spec.path)}/{variable.name}"


@pytest.mark.parametrize("compiled", [False, True])
def test_padding_takes_no_gradient(compiled, ids):
    """From its own look-up; not even where it is not masked."""
    model = TFOPTForCausalLM(OPTConfig(**SMALL, tie_word_embeddings=False))
    ids[:, 3:6] = 1

    def run(ids):
        with tf.GradientTape() as tape:
            loss = model(ids, tf.ones_like(ids), labels=ids).loss
        return tf.convert_to_tensor(tape.gradient(loss, model.model.decoder.embed_tokens.embeddings.value))

    found = (tf.function(run, jit_compile=True) if compiled else run)(tf.constant(ids)).numpy()
    assert not found[1].any()
    others = np.unique(ids[:, :-1])[1:]
    assert (np.abs(found[others]).max(axis=1) > 0).all()


def test_arguments_in_a_dictionary(drawn, ids):
    found = drawn({"input_ids": ids, "attention_mask": PADDED}, output_hidden_states=True)
    wanted = drawn(ids, attention_mask=PADDED, output_hidden_states=True)
    for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("config", ["350m", "untied", "no-bias"])
def test_a_compiled_step_gives_what_an_eager_one_gives(tiny, rng, config, rows):
    """A compiled product of few rows is another one, in parts."""
    folder, _ = tiny(config)
    model = TFOPTForCausalLM.from_pretrained(folder)
    ids = rng.integers(3, 96, (rows, 9))
    cache = model(ids[:, :8], past_key_values=model.init_cache(rows, 12)).past_key_values
    assert cache.k[0].shape == cache.v[0].shape == (rows * 4, 12, 16)
    wanted = model(ids[:, 8:], past_key_values=cache)
    step = tf.function(lambda i, cache: model(i, past_key_values=cache), jit_compile=True)
    found = step(tf.constant(ids[:, 8:]), cache)
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=5e-5)
    for ours, theirs in zip(found.past_key_values.k, wanted.past_key_values.k, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_does_not_copy_the_cache(tiny, rng, rows):
    """Nothing in the compiled loop has a cache's shape but the cache, written in place."""
    folder, _ = tiny()
    model = TFOPTForCausalLM.from_pretrained(folder)
    ids = tf.constant(rng.integers(3, 96, (rows, 32)), tf.int32)
    settings = checked(model.config, ids, None, {"max_new_tokens": 21}).settings
    made = call(model, ids, tf.ones_like(ids), settings, {})
    start = made.start._replace(text=made.start.text[:, : 32 + 21])
    text = _generate[0].experimental_get_compiler_ir(
        made.models, weights(made.models), start, None, made.numbers, plan=made.plan._replace(room=21)
    )(stage="optimized_hlo")
    (loop,) = re.findall(r"^%\S*while_body\S* \(.*?^}", text, re.DOTALL | re.MULTILINE)
    size = rows * 4 * (32 + 21) * 16
    made = [line for line in loop.splitlines() if (m := re.match(r".*?= f32\[([\d,]+)\]\S* (?!get-tuple)", line))
            and math.prod(map(int, m[1].split(","))) == size]  # fmt: skip
    assert len(made) == 2 * model.config.num_hidden_layers
    assert all("dynamic-update-slice" in line for line in made)


def test_new_weights_and_dropout(ids):
    config = OPTConfig(**(SMALL | {"vocab_size": 5000, "max_position_embeddings": 2048}), dropout=0.5)
    model = TFOPTForCausalLM(config)
    for variable in model.weights:
        values = variable.numpy()
        if variable.path.endswith(("kernel", "embeddings")):
            assert abs(values.std() / 0.02 - 1) < 0.1, variable.path
        else:
            assert (values == variable.path.endswith("gamma")).all(), variable.path
    layers = model.model.decoder.layers
    assert not np.array_equal(layers[0].fc1.kernel, layers[1].fc1.kernel)
    assert (model.model.decoder.embed_tokens.embeddings.numpy()[1] == 0).all()
    still = model(ids, output_hidden_states=True)
    moving = model(ids, output_hidden_states=True, training=True)
    np.testing.assert_array_equal(still.hidden_states[0], moving.hidden_states[0])  # none on the embeddings
    assert not np.array_equal(still.hidden_states[1], moving.hidden_states[1])
    np.testing.assert_array_equal(model(ids).logits, still.logits)


def test_generate_compiles_once_for_many_calls(tiny, ids):
    folder, _ = tiny("pre-norm-narrow")
    model = TFOPTForCausalLM.from_pretrained(folder)
    before = _generate[0].experimental_get_tracing_count()
    for n, prompt, settings in ((3, ids, {}), (9, ids[:, :5], {}), (5, ids, {"min_new_tokens": 2, "eos_token_id": 7})):
        model.generate(prompt, max_new_tokens=n, **settings)
    assert _generate[0].experimental_get_tracing_count() == before + 1
    model.generate(np.repeat(ids, 3, axis=1)[:, :33], max_new_tokens=3)
    model.generate(np.repeat(ids, 4, axis=1)[:, :40], max_new_tokens=3)
    assert _generate[0].experimental_get_tracing_count() == before + 2
    for seed in range(3):
        model.generate(ids, max_new_tokens=4, do_sample=True, seed=seed, temperature=1.0 + seed)
    assert _generate[0].experimental_get_tracing_count() == before + 3


def test_a_deleted_model_is_freed(tiny, ids):
    folder, _ = tiny()
    model = TFOPTForCausalLM.from_pretrained(folder)
    model.generate(ids, max_new_tokens=2)
    kernel = weakref.ref(model.model.decoder.layers[0].fc1.kernel)
    del model
    gc.collect()
    assert kernel() is None
