"""opt_tf as scripts written for transformers' TensorFlow classes use it; judged by transformers' PyTorch class."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

from opt_tf import (
    KVCache,
    OPTConfig,
    TFAutoModelForCausalLM,
    TFOPTForCausalLM,
    TFOPTForQuestionAnswering,
    TFOPTForSequenceClassification,
    TFOPTModel,
)

SMALL = dict(vocab_size=96, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, ffn_dim=64,
             max_position_embeddings=64, init_std=0.3, dropout=0.0)  # fmt: skip
MASK = np.array([[0] * 4 + [1] * 8, [1] * 12, [1] * 9 + [0] * 3])
REAL = MASK == 1


@pytest.fixture
def ids(rng) -> np.ndarray:
    return rng.integers(3, 96, MASK.shape).astype(np.int32)


@pytest.fixture
def model() -> TFOPTForCausalLM:
    keras.utils.set_random_seed(0)
    return TFOPTForCausalLM(OPTConfig(**SMALL))


def close(found, wanted, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=0, atol=atol)


class Encoding(dict):
    """A mapping, as tokenizers return."""


# === Arguments ===


def test_ways_to_give_the_arguments(tiny, ids):
    folder, reference = tiny()
    model = TFOPTForCausalLM.from_pretrained(folder, from_pt=True)
    with torch.no_grad():
        wanted = reference(torch.tensor(ids.astype(int)), attention_mask=torch.tensor(MASK)).logits.numpy()[REAL]
    ways = {
        "keywords": lambda: model(input_ids=ids, attention_mask=MASK),
        "dictionary": lambda: model(Encoding(input_ids=ids, attention_mask=MASK)),
        "list": lambda: model([ids, MASK]),
        "tensors": lambda: model(tf.constant(ids), tf.constant(MASK)),
        "transformers' order": lambda: model(ids, None, MASK),
        "predict": lambda: model.predict({"input_ids": ids, "attention_mask": MASK}, batch_size=2, verbose=0),
    }
    for way, call in ways.items():
        np.testing.assert_allclose(np.asarray(call().logits)[REAL], wanted, rtol=0, atol=1e-3, err_msg=way)
    assert "past_key_values" not in ways["predict"]()
    wanted = model(ids, MASK, output_hidden_states=True).hidden_states[-1]
    for inner in (model.model, model.model.decoder):  # the parts take theirs in the same ways
        for given in (Encoding(input_ids=ids, attention_mask=MASK), [ids, MASK]):
            np.testing.assert_array_equal(inner(given).last_hidden_state, wanted)


@pytest.mark.parametrize("dtype", ["bool", "int8", "int64", "float32"])
def test_masks_of_any_dtype(dtype, model, ids):
    wanted = model(ids, MASK).logits
    np.testing.assert_array_equal(model(ids, MASK.astype(dtype)).logits, wanted)
    classifier = TFOPTForSequenceClassification(OPTConfig(**SMALL, pad_token_id=None))
    np.testing.assert_array_equal(classifier(ids, MASK.astype(dtype)).logits, classifier(ids, MASK).logits)


def test_ids_of_any_type(model, ids):
    wanted = model(ids).logits
    for given in (ids.tolist(), ids.astype("int64"), ids.astype("uint8"), tf.Variable(ids)):
        np.testing.assert_array_equal(model(given).logits, wanted)
    with pytest.raises(ValueError, match="input_ids: found float32, wanted integers"):
        model(ids.astype("float32"))
    numbers = keras.Input((12,))  # float32, unless told
    outer = keras.Model(numbers, model(numbers).logits)
    np.testing.assert_array_equal(outer(ids.astype("float32")), wanted)
    with pytest.raises(ValueError, match="input_ids: found fractions"):
        keras.layers.Lambda(lambda x: model(x).logits)(ids + 0.5)


def test_unknown_arguments_are_refused(model, ids):
    with pytest.raises(TypeError, match="found unknown arguments bogus"):
        model(ids, bogus=True)


def test_head_mask(tiny, ids):
    """As if a head's part of out_proj were 0."""
    folder, _ = tiny()
    model, cut = (TFOPTForCausalLM.from_pretrained(folder) for _ in range(2))
    D, heads = model.config.head_dim, np.ones((3, 4), np.float32)
    heads[1, 2] = 0
    kernel = cut.model.decoder.layers[1].self_attn.out_proj.kernel
    values = kernel.numpy()
    values[2 * D : 3 * D] = 0
    kernel.assign(values)
    wanted = cut(ids).logits
    assert np.abs(model(ids).logits - wanted).max() > 0.1
    close(model(ids, head_mask=heads).logits, wanted, 1e-4)


# === Outputs ===


def test_the_config_says_what_is_returned(tiny, ids):
    folder, _ = tiny()
    model = TFOPTModel.from_pretrained(folder, output_hidden_states=True, output_attentions=True, use_cache=False)
    out = model(ids)
    assert list(out) == ["last_hidden_state", "hidden_states", "attentions"]
    assert (len(out.hidden_states), len(out.attentions)) == (4, 3)
    assert list(model(ids, output_attentions=False, use_cache=True)) == [
        "last_hidden_state", "past_key_values", "hidden_states",
    ]  # fmt: skip
    model.config.return_dict = False
    hidden, states, attentions = model(ids)
    np.testing.assert_array_equal(hidden, out.last_hidden_state)
    assert model(ids, return_dict=True).attentions is not None


def test_a_cache_unless_in_training(model, ids):
    assert list(model(ids)) == ["logits", "past_key_values"]
    assert list(model(ids, training=True)) == ["logits"]
    assert list(model(ids, training=True, use_cache=True)) == ["logits", "past_key_values"]
    loss, logits = model(ids, labels=ids)[:2]
    assert loss.shape == () and logits.shape == (*ids.shape, 96)
    found = model(ids, labels=ids, return_dict=False)
    assert type(found) is tuple and len(found) == 3


# === Caches ===


def steps(call, ids, mask, cache=None) -> np.ndarray:
    """The last logits, of four tokens and then one at a time."""
    out, cache = call(ids[:, :4], mask[:, :4], cache)
    for i in range(4, ids.shape[1]):
        out, cache = call(ids[:, i : i + 1], mask[:, : i + 1], cache)
    return np.asarray(out[:, -1])


@pytest.mark.parametrize("masked", [False, True])
def test_a_loop_by_hand(model, ids, masked):
    mask = MASK[[0, 1, 1]] if masked else np.ones_like(MASK)
    wanted = np.asarray(model(ids, mask).logits[:, -1])

    def call(ids, mask, cache):
        out = model(ids, past_key_values=cache, **({"attention_mask": mask} if masked else {}))
        return out.logits, out.past_key_values

    close(steps(call, ids, mask), wanted)
    close(steps(call, ids, mask, model.init_cache(3, 12)), wanted)

    @tf.function(reduce_retracing=True)
    def compiled(ids, mask, cache):
        return call(ids, mask, cache)

    def run(ids, mask, cache):
        return compiled(tf.constant(ids), tf.constant(mask), cache)

    cache = model(ids[:, :4], mask[:, :4]).past_key_values
    for i in range(4, 12):
        out, cache = run(ids[:, i : i + 1], mask[:, : i + 1], cache)
    close(out[:, -1], wanted)
    assert compiled.experimental_get_tracing_count() <= 3
    assert len(cache) == 2 and cache.get_seq_length() == 12


def test_a_cache_reads_as_transformers(tiny, ids):
    folder, reference = tiny()
    model = TFOPTForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs = reference(torch.tensor(ids.astype(int))).past_key_values
    grown = model(ids).past_key_values
    fixed = model(ids, past_key_values=model.init_cache(3, 20)).past_key_values
    for cache in (grown, fixed):
        assert len(cache) == len(theirs.layers) == 3
        for (k, v), layer in zip(cache, theirs.layers, strict=True):
            close(k, layer.keys.numpy(), 1e-4)
            close(v, layer.values.numpy(), 1e-4)
    assert cache[0][0].shape == (3, 4, 12, 16)


def test_caches_of_other_rows(model, ids):
    """Repeated or chosen row by row, as tuples of tensors or as they are."""
    wanted = np.asarray(model(ids, MASK[[0, 1, 1]]).logits[:, -1])
    mask = MASK[[0, 1, 1]]
    past = model(ids[:, :11], mask[:, :11]).past_key_values
    pick = [1, 0, 0, 2]
    for chosen in (
        tf.nest.map_structure(lambda x: tf.gather(x, pick), past),
        tuple((tf.gather(k, pick), tf.gather(v, pick)) for k, v in past),
        [[tf.gather(x, pick).numpy() for x in layer] for layer in past],
    ):
        close(model(ids[pick, 11:], past_key_values=chosen, attention_mask=mask[pick]).logits[:, -1], wanted[pick])
        close(model(ids[pick, 11:], chosen, mask[pick]).logits[:, -1], wanted[pick])
    with pytest.raises(ValueError, match="past_key_values: found 1 layers, wanted 2"):
        model(ids[:, 11:], past_key_values=tuple(past)[:1])
    assert not KVCache()


# === In other models, and in training ===


def test_in_functional_models(model, ids, tmp_path):
    inputs = keras.Input((12,), dtype="int32", name="input_ids")
    mask = keras.Input((12,), dtype="int32", name="attention_mask")
    wanted = np.asarray(model(ids, MASK).logits)
    calls = {
        "dictionary": lambda: model({"input_ids": inputs, "attention_mask": mask}),
        "list": lambda: model([inputs, mask]),
        "keyword": lambda: model(inputs, attention_mask=mask),
    }
    for way, call in calls.items():
        out = call()
        assert list(out) == ["logits"], way  # a cache would be one of its outputs
        outer = keras.Model({"input_ids": inputs, "attention_mask": mask}, out.logits)
        given = {"input_ids": ids, "attention_mask": MASK}
        close(np.asarray(outer(given))[REAL], wanted[REAL])
        close(outer.predict(given, verbose=0)[REAL], wanted[REAL])
    outer.save(tmp_path / "outer.keras")
    close(np.asarray(keras.saving.load_model(tmp_path / "outer.keras")(given))[REAL], wanted[REAL])
    numbers = keras.Input((12,))  # float32, unless told
    close(keras.Model(numbers, model(numbers).logits)(ids), model(ids).logits)


def test_in_subclassed_models(ids):
    class Outer(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.opt, self.head = TFOPTModel(OPTConfig(**SMALL)), keras.layers.Dense(2)

        def call(self, x, training=None):
            return self.head(self.opt(x, training=training).last_hidden_state[:, -1])

    built = Outer()
    built.build((None, 12))  # with float32 in place of ids
    assert built(ids).shape == (3, 2)
    outer, given = Outer(), {"input_ids": ids, "attention_mask": MASK}
    outer.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    outer.fit(given, np.array([0, 1, 0]), verbose=0)
    close(outer.predict(given, verbose=0), outer(given))


@pytest.mark.parametrize("kind", ["apart", "dictionary", "classes", "answers"])
def test_fit_by_the_models_own_loss(kind, ids):
    """compile without a loss: labels in the dictionary of inputs, or apart from it."""
    cls = {"classes": TFOPTForSequenceClassification, "answers": TFOPTForQuestionAnswering}.get(kind, TFOPTForCausalLM)
    model = cls(OPTConfig(**SMALL))
    model.compile(keras.optimizers.SGD(0.01))
    inputs = {"input_ids": ids, "attention_mask": MASK}
    labels = {"classes": {"labels": np.array([0, 1, 0])}, "answers": {"start_positions": np.array([4, 1, 2]),
              "end_positions": np.array([7, 2, 2])}}.get(kind, {"labels": np.where(REAL, ids, -100)})  # fmt: skip
    wanted = float(model(**inputs, **labels).loss)
    apart = tuple(labels.values()) if kind == "answers" else labels["labels"]
    data = (inputs | labels,) if kind == "dictionary" else (inputs, apart)
    assert model.evaluate(*data, verbose=0) == pytest.approx(wanted, rel=1e-5)
    assert model.fit(*data, verbose=0).history["loss"] == [pytest.approx(wanted, rel=1e-5)]
    assert float(model(**inputs, **labels).loss) < wanted
    if kind == "apart":
        with pytest.raises(ValueError, match="sample_weight: found one"):
            model.fit(*data, sample_weight=np.ones(3), verbose=0)


def test_where_targets_may_be(model, ids):
    """By a loss of Keras's, in every place; as in transformers they are not shifted then."""
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(MASK)}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    wanted = pytest.approx(float(loss(ids, model(**inputs).logits)), rel=1e-5)
    accuracy = np.mean(np.argmax(model(**inputs).logits, axis=-1) == ids)
    for given in (loss, [loss, None, None]):
        model.compile("sgd", given, metrics=[keras.metrics.SparseCategoricalAccuracy()])
        for data in ((inputs, ids), (inputs | {"labels": ids},), (inputs, {"labels": ids}), (inputs, {"logits": ids})):
            assert model.evaluate(*data, verbose=0) == [wanted, pytest.approx(accuracy)]
    with pytest.raises(ValueError, match="y: found label, wanted labels"):
        model.evaluate(inputs, {"label": ids}, verbose=0)
    model.compile("sgd", "passthrough", metrics=[keras.metrics.SparseCategoricalAccuracy()])
    own = pytest.approx(float(model(**inputs, labels=ids).loss), rel=1e-5)
    assert model.evaluate(inputs | {"labels": ids}, verbose=0) == [own, pytest.approx(accuracy)]


def test_targets_by_the_names_of_outputs(ids):
    model = TFOPTForQuestionAnswering(OPTConfig(**SMALL))
    model.compile("sgd")
    spans = {"end_logits": np.array([7, 2, 2]), "start_logits": np.array([4, 1, 2])}
    wanted = model(ids, start_positions=spans["start_logits"], end_positions=spans["end_logits"]).loss
    assert model.evaluate(ids, spans, verbose=0) == pytest.approx(float(wanted), rel=1e-5)


def test_weights_of_rows(model, ids):
    """Given [B], they count for every token of their row, also where B is T."""
    x, y, weights = ids[:, :3], ids[:, 1:4], np.array([1.0, 0.0, 3.0], np.float32)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = keras.losses.sparse_categorical_crossentropy(y, model(x).logits, from_logits=True)
    wanted = pytest.approx(float(np.mean(losses * weights[:, None])), rel=1e-5)
    assert model.evaluate(x, y, sample_weight=weights, verbose=0) == wanted
    assert model.evaluate(x, y, sample_weight=np.repeat(weights[:, None], 3, axis=1), verbose=0) == wanted
    assert model.fit(x, y, sample_weight=weights, verbose=0).history["loss"] == [wanted]


def test_replicas_share_the_loss(tmp_path):
    """Two replicas of half a batch each take the step that one takes of all; by the own loss and by a compiled one."""
    program = """
        import sys
        import numpy as np
        import tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        from opt_tf import OPTConfig, TFOPTForCausalLM
        import keras
        config = OPTConfig(vocab_size=96, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, ffn_dim=32,
                           max_position_embeddings=16, init_std=0.3, dropout=0.0)
        ids = np.random.default_rng(0).integers(3, 96, (4, 6)).astype("int32")
        for own in (True, False):
            weights = []
            for devices in (1, 2):
                keras.utils.set_random_seed(0)
                with tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(devices)]).scope():
                    model = TFOPTForCausalLM(config)
                    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                    model.compile(keras.optimizers.SGD(0.1), None if own else loss)
                data = tf.data.Dataset.from_tensor_slices(({"input_ids": ids}, ids)).batch(4)
                history = model.fit(data, epochs=2, verbose=0).history["loss"]
                weights.append([history, *model.get_weights()])
            for one, two in zip(*weights):
                np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_prepare_tf_dataset(model):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({
        "text": ["a", "b", "c"],
        "input_ids": [[2, 5], [2, 6, 7], [2, 8]],
        "attention_mask": [[1, 1], [1, 1, 1], [1, 1]],
    })  # fmt: skip

    class Tokenizer:
        def pad(self, rows, return_tensors):
            T = max(len(row["input_ids"]) for row in rows)
            fill = {"input_ids": 1, "attention_mask": 0}
            return {
                name: np.array([[*row[name]] + [fill[name]] * (T - len(row[name])) for row in rows]) for name in fill
            }

    (first, second) = model.prepare_tf_dataset(rows, batch_size=2, shuffle=False, tokenizer=Tokenizer())
    assert first["input_ids"].numpy().tolist() == [[2, 5, 1], [2, 6, 7]]
    assert second["attention_mask"].numpy().tolist() == [[1, 1]]

    def collate(rows, **more):
        batch = Tokenizer().pad(rows, "np")
        return batch | {"labels": np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)}

    labelled = model.prepare_tf_dataset(rows, batch_size=2, collate_fn=collate)
    ((inputs, labels),) = labelled  # shuffled, and the last row left out
    assert sorted(inputs) == ["attention_mask", "input_ids"] and labels.shape[0] == 2
    model.compile("sgd")
    assert np.isfinite(model.fit(labelled, verbose=0).history["loss"]).all()
    classes = datasets.Dataset.from_dict({"input_ids": [[2, 5], [2, 6]], "label": [1, 0]})
    classifier = TFOPTForSequenceClassification(OPTConfig(**SMALL))
    ((inputs, labels),) = classifier.prepare_tf_dataset(classes, shuffle=False)
    assert (inputs.shape, labels.numpy().tolist()) == ((2, 2), [1, 0])


# === Parts ===


def test_embeddings(model, ids):
    table = model.get_input_embeddings()
    assert table is model.model.decoder.embed_tokens is model.get_output_embeddings()
    assert (table.vocab_size, table.hidden_size, table.weight.shape) == (96, 64, (96, 64))
    bare = TFOPTModel(OPTConfig(**SMALL))
    assert bare.model.decoder is bare.decoder and not hasattr(bare, "lm_head")
    assert bare.get_output_embeddings() is None
    wanted = model(ids).logits
    model.set_input_embeddings(table.weight.numpy()[:, ::-1])
    assert np.abs(model(ids).logits - wanted).max() > 0.1
    model.set_input_embeddings(table.weight.numpy()[:, ::-1])
    np.testing.assert_array_equal(model(ids).logits, wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(tied, ids, tmp_path):
    model = TFOPTForCausalLM(OPTConfig(**SMALL, tie_word_embeddings=tied))
    wanted = np.asarray(model(ids).logits)
    rows = model.resize_token_embeddings(97, pad_to_multiple_of=4).weight.numpy()
    assert rows.shape == (100, 64) and model.config.vocab_size == 100
    close(rows[96:], np.tile(rows[:96].mean(axis=0), (4, 1)), 1e-6)
    found = model(np.where(ids == 3, 99, ids)).logits
    assert found.shape == (*ids.shape, 100)
    close(model(ids).logits[..., :96], wanted)
    model.compile("sgd")
    model.fit({"input_ids": ids, "labels": np.where(ids == 3, 99, ids)}, verbose=0)
    model.save_pretrained(tmp_path / "hub")
    model.save(tmp_path / "model.keras")
    for again in (
        TFOPTForCausalLM.from_pretrained(tmp_path / "hub"),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        np.testing.assert_array_equal(again(ids).logits, model(ids).logits)
    model.resize_token_embeddings(50)
    assert model(ids % 50).logits.shape[-1] == 50


def test_replaced_parts(model, ids):
    usual, count = np.asarray(model(ids).logits), len(model.weights)
    layer = model.model.decoder.layers[0]
    layer.activation_fn = keras.layers.Activation("tanh")
    by_layer = np.asarray(model(ids).logits)
    assert np.abs(by_layer - usual).max() > 0.1
    layer.activation_fn = tf.tanh
    np.testing.assert_array_equal(model(ids).logits, by_layer)
    kept = layer.fc1
    layer.fc1 = keras.layers.Dense(64, kernel_initializer="zeros")
    assert np.abs(model(ids).logits - by_layer).max() > 0.1
    assert len(model.weights) == count
    layer.fc1 = kept
    np.testing.assert_array_equal(model(ids).logits, by_layer)


def test_frozen_and_with_lora(model, ids, tmp_path):
    for variable in model.variables:
        variable.trainable = False
    for layer in model.model.decoder.layers:
        layer.self_attn.q_proj.enable_lora(4)
    before = [v.numpy() for v in model.variables]
    assert [v.path.rpartition("/")[2] for v in model.trainable_variables] == ["lora_kernel_a", "lora_kernel_b"] * 2
    usual = float(model(ids, labels=ids).loss)
    model.compile(keras.optimizers.SGD(0.1))
    model.fit({"input_ids": ids, "labels": ids}, epochs=3, verbose=0)
    assert float(model(ids, labels=ids).loss) < usual
    changed = {v.path for v, old in zip(model.variables, before, strict=True) if not np.array_equal(v, old)}
    assert len(changed) in (2, 4) and all("lora" in path for path in changed)
    model.save_pretrained(tmp_path)
    close(TFOPTForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    model.model.trainable = False
    assert model.trainable_variables == []


def test_quantized(model, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # which Keras does after every kernel
    wanted = np.asarray(model(ids).logits)
    model.quantize("int8")
    found = np.asarray(model(ids).logits)
    assert 0 < np.abs(found - wanted).max() / np.abs(wanted).max() < 0.1
    layer = model.model.decoder.layers[1]
    parts = (layer.fc1, layer.fc2, layer.self_attn.q_proj, layer.self_attn.out_proj)
    assert {part._kernel.dtype for part in parts} == {"int8"}
    with pytest.raises(ValueError, match="save_pretrained: found quantized weights"):
        model.save_pretrained(tmp_path)


# === Files ===


@pytest.fixture
def policy():
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


def test_dtype_policies(tiny, policy, ids):
    folder, _ = tiny()
    policy("mixed_bfloat16")
    model = TFOPTForCausalLM.from_pretrained(folder)
    assert (model.weights[0].dtype, model(ids).logits.dtype) == ("float32", tf.bfloat16)
    assert TFOPTForCausalLM.from_pretrained(folder, dtype="float16").weights[0].dtype == "float16"
    policy("float32")
    mixed = TFOPTForCausalLM.from_pretrained(folder, dtype="mixed_float16")
    assert (mixed.weights[0].dtype, mixed(ids).logits.dtype) == ("float32", tf.float16)


def test_loading_and_saving_as_transformers(tiny, model, ids, tmp_path):
    folder, _ = tiny()
    config = OPTConfig.from_pretrained(folder, output_attentions=True)
    found, info = TFOPTForCausalLM.from_pretrained(folder, config=config, from_pt=True, output_loading_info=True)
    assert found(ids).attentions is not None and info["missing_keys"] == [] and found.name_or_path == str(folder)
    with pytest.warns(UserWarning, match=r"newly initialized.*score"):
        classifier = TFOPTForSequenceClassification.from_pretrained(folder, num_labels=5)
    assert classifier(ids).logits.shape == (3, 5)
    made = TFAutoModelForCausalLM.from_config(OPTConfig(**SMALL))
    assert type(made) is TFOPTForCausalLM
    made.set_weights(model.get_weights())
    np.testing.assert_array_equal(made(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path / "h5", safe_serialization=False)
    assert (tmp_path / "h5" / "tf_model.h5").is_file()
    np.testing.assert_array_equal(TFOPTForCausalLM.from_pretrained(tmp_path / "h5")(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="push_to_hub: found True"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)


def test_tensorflow_checkpoints(model, ids, tmp_path):
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    other = TFOPTForCausalLM(OPTConfig(**SMALL))
    tf.train.Checkpoint(model=other).restore(path).assert_existing_objects_matched()
    np.testing.assert_array_equal(other(ids).logits, model(ids).logits)


def test_saved_models_and_tflite(model, ids, tmp_path):
    wanted = np.asarray(model(ids, MASK).logits)[REAL]
    model.save_pretrained(tmp_path, saved_model=True)
    folder = str(tmp_path / "saved_model" / "1")
    given = {"input_ids": ids, "attention_mask": MASK}
    assert model.input_signature.keys() == given.keys()
    close(np.asarray(model.serving(given)["logits"])[REAL], wanted)
    loaded = tf.saved_model.load(folder)
    for name, dtype in (("serving_default", "int32"), ("int64_serving", "int64")):
        given = {"input_ids": tf.constant(ids, dtype), "attention_mask": tf.constant(MASK, dtype)}
        found = loaded.signatures[name](**given)
        assert list(found) == ["logits"]
        close(np.asarray(found["logits"])[REAL], wanted)
    np.testing.assert_array_equal(TFOPTForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)

    @tf.function(input_signature=[tf.TensorSpec((None, None), tf.int32, name="ids")])
    def likeliest(ids):
        return {"next": tf.argmax(model(ids).logits[:, -1], axis=-1)}

    model.save_pretrained(tmp_path, saved_model=True, version=2, signatures={"next": likeliest})
    found = tf.saved_model.load(str(tmp_path / "saved_model" / "2")).signatures["next"](ids=tf.constant(ids))
    np.testing.assert_array_equal(found["next"], likeliest(tf.constant(ids))["next"])

    lite = tf.lite.Interpreter(model_content=tf.lite.TFLiteConverter.from_saved_model(folder).convert())
    given = {"input_ids": ids, "attention_mask": MASK.astype(np.int32)}
    close(lite.get_signature_runner("serving_default")(**given)["logits"][REAL], wanted, 1e-4)
    traced = likeliest.get_concrete_function()
    lite = tf.lite.Interpreter(model_content=tf.lite.TFLiteConverter.from_concrete_functions([traced], model).convert())
    np.testing.assert_array_equal(lite.get_signature_runner()(ids=ids)["next"], found["next"])
