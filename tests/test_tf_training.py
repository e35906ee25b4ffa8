"""opt_tf among Keras's own means of training: fit and its fellows, policies, files, and what is served."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_tf import OPTConfig, TFOPTForCausalLM, TFOPTForSequenceClassification

SMALL = dict(vocab_size=96, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, ffn_dim=64,
             max_position_embeddings=64)  # fmt: skip


@pytest.fixture
def ids(rng) -> np.ndarray:
    return rng.integers(3, 96, (8, 12))


def test_fit_evaluate_predict(ids, tmp_path):
    """With labels in a dictionary: the model's own loss; callbacks as Keras has them."""
    keras.utils.set_random_seed(0)
    model = TFOPTForCausalLM(OPTConfig(**SMALL, dropout=0.0))
    model.compile(keras.optimizers.AdamW(1e-3))
    given = {"input_ids": ids, "labels": ids}
    callbacks = [
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="loss", save_best_only=True),
        keras.callbacks.EarlyStopping(monitor="loss", patience=2),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
    ]
    history = model.fit(given, batch_size=4, epochs=4, verbose=0, callbacks=callbacks).history["loss"]
    assert history == sorted(history, reverse=True)
    assert (tmp_path / "log.csv").read_text().count("\n") == 5
    wanted = float(model(**given).loss)
    assert model.evaluate(given, batch_size=8, verbose=0) == pytest.approx(wanted, rel=1e-5)
    assert float(keras.saving.load_model(tmp_path / "best.keras")(**given).loss) == pytest.approx(wanted, rel=1e-5)
    found = model.predict(ids, batch_size=3, verbose=0).logits
    np.testing.assert_allclose(found, model(ids).logits, rtol=0, atol=1e-4)


def test_fit_a_classifier(ids):
    """By a loss and metrics of Keras's, on the logits."""
    keras.utils.set_random_seed(0)
    model = TFOPTForSequenceClassification(OPTConfig(**SMALL, num_labels=3, dropout=0.0, pad_token_id=1))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss, metrics=["accuracy"])
    kinds = np.arange(8) % 3
    model.fit(ids, kinds, epochs=30, verbose=0)
    found, right = model.evaluate(ids, kinds, verbose=0)
    assert right == 1.0
    assert float(model(ids, labels=kinds).loss) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, ids):
    """Weights and the loss in float32, the rest in half; float16's loss is scaled."""
    keras.utils.set_random_seed(0)
    model = TFOPTForCausalLM(OPTConfig(**SMALL), dtype=policy)
    model.compile(keras.optimizers.AdamW(3e-3), auto_scale_loss=True)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    losses = model.fit({"input_ids": ids, "labels": ids}, epochs=12, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3
    assert {v.dtype for v in model.trainable_variables} == {"float32"}


def test_saved_in_the_middle_of_training(ids, tmp_path):
    """Optimizer and dice are saved too: a loaded model goes on to the same weights."""
    weights = {}
    for broken in (False, True):
        keras.utils.set_random_seed(0)
        model = TFOPTForCausalLM(OPTConfig(**SMALL, dropout=0.2, attention_dropout=0.2, layerdrop=0.3))
        model.compile(keras.optimizers.AdamW(1e-3))
        for epoch in range(4):
            if broken and epoch == 2:
                model.save(tmp_path / "model.keras")
                model = keras.saving.load_model(tmp_path / "model.keras")
            model.fit({"input_ids": ids, "labels": ids}, batch_size=4, shuffle=False, verbose=0)
        weights[broken] = model.get_weights()
    for a, b in zip(weights[False], weights[True], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_saved_model_with_a_signature(ids, tmp_path):
    """Served by TensorFlow alone, without opt_tf or Keras."""
    model = TFOPTForCausalLM(OPTConfig(**SMALL))
    model.export(tmp_path / "served", verbose=False)
    model.export(tmp_path / "plain", verbose=False, input_signature=[tf.TensorSpec((None, 12), "int32", "input_ids")])
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    np.save(tmp_path / "ids.npy", ids.astype(np.int32))
    np.save(tmp_path / "mask.npy", mask.astype(np.int32))
    program = """
        import sys
        import numpy as np
        import tensorflow as tf
        folder = sys.argv[1]
        ids, mask = (tf.constant(np.load(f"{folder}/{name}.npy")) for name in ("ids", "mask"))
        served = tf.saved_model.load(f"{folder}/served")
        found = served.signatures["serving_default"](input_ids=ids, attention_mask=mask)
        np.save(f"{folder}/logits.npy", found["logits"])
        plain = tf.saved_model.load(f"{folder}/plain")
        np.save(f"{folder}/plain.npy", plain.serve(ids)["logits"])
        assert "opt_tf" not in sys.modules
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    np.testing.assert_allclose(np.load(tmp_path / "plain.npy"), model(ids).logits, rtol=0, atol=1e-5)
    found, wanted = np.load(tmp_path / "logits.npy"), model(ids, mask).logits.numpy()
    np.testing.assert_allclose(found[mask == 1], wanted[mask == 1], rtol=0, atol=1e-5)


def test_tracing_does_not_freeze_the_dice(ids):
    for options in ({"dropout": 0.0, "layerdrop": 0.5}, {"dropout": 0.5}):
        model = TFOPTForCausalLM(OPTConfig(**SMALL | {"num_hidden_layers": 4} | options))
        for compiled in (False, True):
            run = tf.function(lambda model=model: model(ids, labels=ids, training=True).loss, jit_compile=compiled)
            assert len({float(run()) for _ in range(8)}) > 2
    assert not hasattr(TFOPTForCausalLM(OPTConfig(**SMALL)).model.decoder.skip, "seed_generator")  # off is free


@pytest.mark.parametrize("options", [{"dropout": 0.3, "attention_dropout": 0.3}, {"dropout": 0.3, "layerdrop": 0.5}])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_draws_the_same_masks_again(options, compiled, ids, tmp_path):
    TFOPTForCausalLM(OPTConfig(**SMALL, **options)).save_pretrained(tmp_path)

    def gradients(checkpointing: bool) -> list[list[np.ndarray]]:
        """Of two calls, whose masks differ."""
        keras.utils.set_random_seed(0)
        model = TFOPTForCausalLM.from_pretrained(tmp_path)
        if checkpointing:
            model.gradient_checkpointing_enable()

        @tf.function(jit_compile=compiled)
        def run():
            with tf.GradientTape() as tape:
                loss = model(ids, labels=ids, training=True).loss
            return tape.gradient(loss, model.trainable_variables)

        return [[g.numpy() for g in run()] for _ in range(2)]

    wanted, others = gradients(False)
    largest = max(np.linalg.norm(g) for g in wanted)

    def apart(found: list[np.ndarray]) -> float:
        return max(np.linalg.norm(a - b) for a, b in zip(found, wanted, strict=True)) / largest

    assert apart(gradients(True)[0]) < 1e-5 < 1e-2 < apart(others)


def test_mirrored_training_of_a_checkpoint(tmp_path):
    """Loaded, trained by AdamW and saved under the scope of two devices: what one device makes of it."""
    program = """
        import sys
        import numpy as np
        import tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        import keras
        from opt_tf import TFOPTForCausalLM

        ids, weights = np.random.default_rng(0).integers(3, 96, (4, 6)), []
        data = tf.data.Dataset.from_tensor_slices({"input_ids": ids, "labels": ids}).batch(4)
        for devices in (1, 2):
            with tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(devices)]).scope():
                model = TFOPTForCausalLM.from_pretrained(sys.argv[1])
                # a large epsilon: or steps along gradients that are rounding alone would be as large as any
                model.compile(keras.optimizers.AdamW(1e-2, epsilon=1e-3))
            losses = model.fit(data, epochs=2, verbose=0).history["loss"]
            model.save_pretrained(f"{sys.argv[1]}/{devices}")
            weights.append([losses, *TFOPTForCausalLM.from_pretrained(f"{sys.argv[1]}/{devices}").get_weights()])
        assert losses[1] < losses[0] - 0.2
        for one, two in zip(*weights, strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=2e-6)
    """
    config = SMALL | {"num_hidden_layers": 1, "init_std": 0.3, "dropout": 0.0}
    TFOPTForCausalLM(OPTConfig(**config)).save_pretrained(tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.parametrize("name", ["tp_plan", "sharding"])
def test_tensor_parallelism_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}: found one, wanted none: Keras on TensorFlow has no tensor paral"):
        TFOPTForCausalLM.from_pretrained(tmp_path, **dict[str, Any]({name: "auto"}))
