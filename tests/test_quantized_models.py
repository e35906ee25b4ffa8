"""Models with Linears of 8 and 4 bits, in every framework, beside transformers' of the same numbers in float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import opt_pt
from backends import COMPLETE, Backend
from checkpoints import contents
from conftest import CONFIGS, make_reference, save_reference
from opt_common import cli
from opt_common.checkpoints.checkpoint import Checkpoint
from opt_common.checkpoints.convert import convert
from opt_common.frameworks import registered
from opt_common.hub import DEMO
from opt_common.quantization import Packing, QuantizationConfig, dequantize, quantize
from opt_common.weights import table
from opt_pt.fast import cpu, digits

IDS = np.random.default_rng(0).integers(4, 96, (2, 9)).astype(np.int32)
MASK = np.ones_like(IDS)
MASK[1, :3] = 0
# folder: config, bits, group size
KINDS = {
    "8": ("pre-norm", 8, None),
    "4": ("350m", 4, 32),
    "8 in groups": ("no-bias", 8, 16),
    "4 a row": ("untied", 4, 64),
}
needs = pytest.mark.parametrize("framework", sorted(COMPLETE & registered().keys()))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, transformers.OPTForCausalLM]]:
    """few(kind) -> a folder of few bits, and transformers' float64 model of the same numbers."""
    made: dict[str, tuple[Path, transformers.OPTForCausalLM]] = {}

    def make(kind: str) -> tuple[Path, transformers.OPTForCausalLM]:
        if kind not in made:
            root, (name, bits, size) = tmp_path_factory.mktemp("few"), KINDS[kind]
            save_reference(make_reference(**CONFIGS[name]), root / "floats")
            convert(root / "floats", root / "few", quantization=QuantizationConfig.rounding(bits, size))
            convert(root / "few", root / "again", dtype="float64")
            made[kind] = root / "few", transformers.OPTForCausalLM.from_pretrained(root / "again", dtype="float64")
        return made[kind]

    return make


@needs
@pytest.mark.parametrize("kind", KINDS)
def test_logits(framework, kind, few, load):
    folder, reference = few(kind)
    with torch.no_grad():
        wanted = reference(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits.numpy()
    found = load(framework, folder)(input_ids=IDS, attention_mask=MASK).logits
    np.testing.assert_allclose(found[MASK > 0], wanted[MASK > 0], rtol=0, atol=2e-5)


@needs
def test_generates(framework, few, load):
    folder, reference = few("8")
    wanted = reference.generate(torch.tensor(IDS), attention_mask=torch.tensor(MASK), max_new_tokens=8, do_sample=False)
    found = load(framework, folder).generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False)
    np.testing.assert_array_equal(found, wanted.numpy())


@needs
@pytest.mark.parametrize("kind", ["8", "4"])
def test_saved_as_it_was(framework, kind, few, load, tmp_path):
    folder, _ = few(kind)
    load(framework, folder).model.save_pretrained(tmp_path)
    same = Path("model.safetensors")
    assert (tmp_path / same).read_bytes() == (folder / same).read_bytes()
    configs = [json.loads((root / "config.json").read_text())["quantization_config"] for root in (tmp_path, folder)]
    assert configs[0] == configs[1]


@needs
@pytest.mark.parametrize(("bits", "dtype"), [(8, "float32"), (4, "float16")])
def test_rounded_while_loading(framework, bits, dtype, tmp_path):
    """load_in_8bit and load_in_4bit give what a converted folder holds."""
    model = make_reference(hidden_size=128, ffn_dim=256)
    source = save_reference(model, tmp_path / "floats")
    convert(source, tmp_path / "few", dtype=dtype, quantization=QuantizationConfig.rounding(bits))
    cls = registered()[framework].model_class()
    cls.from_pretrained(source, dtype=dtype, **{f"load_in_{bits}bit": True}).save_pretrained(tmp_path / "ours")
    name = "model.safetensors"
    assert contents(tmp_path / "ours")[name] == contents(tmp_path / "few")[name]
    with pytest.raises(ValueError, match="load_in_4bit: found .*few in .* bits.* already, wanted weights that are not"):
        cls.from_pretrained(tmp_path / "few", load_in_4bit=True)
    with pytest.raises(ValueError, match="load_in_8bit, load_in_4bit: found both, wanted one"):
        cls.from_pretrained(source, load_in_8bit=True, load_in_4bit=True)


@needs
def test_half_precision(framework, few):
    folder, reference = few("4")
    with torch.no_grad():
        wanted = reference(torch.tensor(IDS)).logits.numpy()
        half = transformers.OPTForCausalLM.from_pretrained(folder.with_name("again"), dtype="bfloat16")
        limit = 2 * np.abs(half(torch.tensor(IDS)).logits.double().numpy() - wanted).max()
    found = Backend(framework, folder, dtype="bfloat16")(input_ids=IDS).logits
    assert np.abs(found - wanted).max() < limit


@needs
def test_new_weights(framework, few):
    """A model made from the config alone has numbers of about the config's deviation."""
    folder, _ = few("4")
    config = registered()[framework].module().OPTConfig.from_pretrained(folder)
    cls, fw = registered()[framework].model_class(), registered()[framework]
    layer = cls(config).model.decoder.layers[1].fc2
    weight = fw.numpy(layer.dequantize())
    assert weight.shape == (config.hidden_size, config.ffn_dim)
    np.testing.assert_allclose(weight.std(), config.init_std, rtol=0.1)


@needs
def test_damaged(framework, few, tmp_path):
    """A scale that is not finite is named; no model is returned."""
    folder, _ = few("4")
    convert(folder, tmp_path / "few")
    name, file = "model.decoder.layers.2.fc2.weight_scale", tmp_path / "few" / "model.safetensors"
    scale = Checkpoint(tmp_path / "few")[name].read()
    data = bytearray(file.read_bytes())
    at = data.index(scale.tobytes())
    data[at : at + 4] = np.float32(np.inf).tobytes()
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file}: {name}: found 1 scales that are NaN or infinite"):
        registered()[framework].model_class().from_pretrained(tmp_path / "few")


def gradient_pt(model: Any, embeds: np.ndarray) -> np.ndarray:
    x = torch.tensor(embeds, requires_grad=True)
    model(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
    assert x.grad is not None
    return x.grad.numpy()


def gradient_flax(model: Any, embeds: np.ndarray) -> np.ndarray:
    import jax

    return np.asarray(jax.jit(jax.grad(lambda x: (model(inputs_embeds=x).logits ** 2).mean()))(embeds))


def gradient_tf(model: Any, embeds: np.ndarray) -> np.ndarray:
    import tensorflow as tf

    x = tf.constant(embeds)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_mean(model(inputs_embeds=x, use_cache=False).logits ** 2)
    return tape.gradient(loss, x).numpy()


@needs
@pytest.mark.parametrize("kind", ["8", "4"])
def test_gradients_of_x(framework, kind, few, load):
    folder, reference = few(kind)
    width = reference.get_input_embeddings().weight.shape[1]
    embeds = np.random.default_rng(1).standard_normal((2, 5, width)).astype(np.float32)
    wanted = gradient_pt(reference, embeds.astype(np.float64))
    found = globals()[f"gradient_{framework}"](load(framework, folder).model, embeds)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


# === PyTorch's own ===


counts = pytest.mark.skipif(not digits.EXACT, reason="needs VNNI")


def counted_pt(x: np.ndarray, packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return digits.product(torch.tensor(x), digits.numbers(torch.tensor(packed)), torch.tensor(scale), None).numpy()


def counted_reordered(x: np.ndarray, packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return digits.product(torch.tensor(x), digits.reordered(torch.tensor(packed)), torch.tensor(scale), None).numpy()


def counted_flax(*numbers: np.ndarray) -> np.ndarray:
    jax = pytest.importorskip("jax")
    from opt_flax.quantized import _counted

    return np.asarray(jax.jit(_counted)(*numbers))


def counted_tf(*numbers: np.ndarray) -> np.ndarray:
    tf = pytest.importorskip("tensorflow")
    from opt_tf.quantized import _counted

    return tf.function(_counted, jit_compile=True)(*map(tf.constant, numbers)).numpy()


@pytest.mark.parametrize(
    "product", [pytest.param(p, marks=counts) for p in (counted_pt, counted_reordered)] + [counted_flax, counted_tf]
)
def test_whole_numbers(product):
    """On a CPU: as exact as float32, small or large, beside an outlier, or all equal."""
    rng = np.random.default_rng(0)
    weight, scale = quantize("w", rng.standard_normal((40, 96)), Packing(8), np.dtype("float32"))
    x = rng.standard_normal((9, 96)) * 10.0 ** np.array([0, -20, -28, 20, 3, 0, 0, 0, 0])[:, None]
    x[4, 0], x[5], x[6, ::2], x[7, 0], x[8, 1] = -1e9, 0, x[6].max(), np.nan, np.inf
    x = x.astype(np.float32)
    wanted = x[:7].astype(np.float64) @ dequantize(weight, scale.astype(np.float64), 8).T
    found = product(x, weight, scale)
    assert (np.abs(found[:7] - wanted) <= 2e-7 * np.abs(wanted).max(1, keepdims=True)).all()
    assert np.isnan(found[7:]).all()


@pytest.mark.parametrize("framework", sorted({"flax", "tf"} & registered().keys()))
def test_a_compiled_program_multiplies_whole_numbers(framework):
    """It makes them once, before its loop."""
    weight, scale = quantize("w", np.eye(32), Packing(8), np.dtype("float32"))
    x = np.ones((1, 32), np.float32)
    if framework == "flax":
        jax = pytest.importorskip("jax")
        from opt_flax.quantized import _product as product

        loop = jax.jit(lambda x, w, s: jax.lax.fori_loop(0, 3, lambda i, x: product(x, w, s, 8), x))
        text = loop.lower(x, weight, scale).compile().as_text()
    else:
        tf = pytest.importorskip("tensorflow")
        from opt_tf.quantized import _product as product

        def run(x: Any, w: Any, s: Any) -> Any:
            return tf.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, product(x, w, s, 8)), (0, x))[1]

        loop = tf.function(run, jit_compile=True)
        text = loop.experimental_get_compiler_ir(*map(tf.constant, (x, weight, scale)))(stage="optimized_hlo")
    (line,) = (line for line in text.splitlines() if " while(" in line)
    assert "s8[32,8,4]" in line
    assert "s32[32,8]" not in line


@counts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_packed(few, dtype, monkeypatch):
    """`pack` reorders what has 8 bits and a scale a row; forward passes and steps take it while it is the weights."""
    folder, reference = few("8")
    model = opt_pt.OPTForCausalLM.from_pretrained(folder, dtype=dtype)
    ids, layers = torch.tensor(IDS), model.config.num_hidden_layers
    wanted = reference(ids).logits
    taken, product = [], digits.product
    monkeypatch.setattr(digits, "product", lambda x, w, *rest: taken.append(w.is_mkldnn) or product(x, w, *rest))

    def answer() -> torch.Tensor:
        taken.clear()
        return model(ids).logits

    def far(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return bool((found - wanted).norm() > (2e-6 if dtype == "float32" else 2e-2) * wanted.norm())

    assert not far(answer(), wanted)
    assert taken == [False] * 6 * layers
    assert not cpu.can_step(model, ids[:, 0])
    model.pack()
    assert not far(answer(), wanted)
    assert taken == [True] * 4 * layers
    assert cpu.can_step(model, ids[:, 0])
    found = model.generate(ids, max_new_tokens=8, do_sample=False)
    if dtype == "float32":
        assert torch.equal(found, reference.generate(ids, max_new_tokens=8, do_sample=False))
    for layer, change in enumerate(("self_attn.v_proj", "fc2")):  # of which the first is packed with two others
        before = answer()
        model.model.decoder.layers[layer].get_submodule(change).weight_scale.mul_(3)
        assert far(answer(), before)
        assert not cpu.can_step(model, ids[:, 0])
    assert taken.count(False) == 4
    assert not far(copy.deepcopy(model)(ids).logits, answer())


@pytest.fixture
def ours(few) -> Any:
    return pytest.importorskip("opt_pt").OPTForCausalLM.from_pretrained(few("4")[0])


def test_state_dict(ours):
    names = {spec.name for spec in table(ours.config)} | {"lm_head.weight"}
    assert ours.state_dict().keys() == names
    layer = ours.model.decoder.layers[0].fc1
    assert layer.weight_packed.dtype == torch.int32 and not layer.weight_packed.requires_grad
    again = type(ours)(ours.config)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.eval()(torch.tensor(IDS)).logits, ours(torch.tensor(IDS)).logits)
    assert ours.half().model.decoder.layers[0].fc1.weight_scale.dtype == torch.float16


def test_backward_keeps_no_floats(ours):
    """Of a quantized Linear, autograd keeps the packed weight."""
    layer = ours.model.decoder.layers[0].fc1
    x, kept = torch.randn(3, layer.in_features, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert {t.dtype for t in kept if t.numel() > layer.weight_scale.numel()} == {torch.int32}
    weight, bias = layer.dequantize(), layer.bias
    torch.testing.assert_close(y, x @ weight.T + bias)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 3))
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    z.sum().backward()
    assert z.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_transforms(ours):
    layer = ours.model.decoder.layers[0].fc1
    x = torch.randn(4, 3, layer.in_features)
    wanted = layer(x)
    torch.testing.assert_close(torch.vmap(layer)(x), wanted)
    gradient = torch.func.vmap(torch.func.grad(lambda x: layer(x).sum()))(x)
    torch.testing.assert_close(gradient, layer.dequantize().sum(0).expand_as(x))
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(tangent, wanted - layer.bias)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.requires_grad_()), wanted)


def test_lora(ours):
    """peft puts its adapters around them and trains them; merging, which would be lost, is refused."""
    peft = pytest.importorskip("peft")
    ids = torch.tensor(IDS).long()
    before = {name: x.clone() for name, x in ours.state_dict().items()}
    wanted = ours(ids).logits
    model = peft.get_peft_model(ours, peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM"))
    torch.testing.assert_close(model(ids).logits, wanted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    for how in ({}, {"safe_merge": True}):
        with pytest.raises(ValueError, match="weight: found a copy of packed numbers, wanted floats to write"):
            model.merge_and_unload(**how)
    after = model.unload().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def column_by_column(weight: np.ndarray, products: np.ndarray, packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ without blocks: whole numbers, and scales."""
    w, half, size = weight.astype(np.float64), 2 ** (packing.bits - 1), packing.group_size or weight.shape[1]
    damped = products + np.diag(0.01 * products.diagonal().mean() + (products.diagonal() == 0))
    spread, numbers, scales = np.linalg.cholesky(np.linalg.inv(damped)).T, np.empty_like(w), []
    for i in range(w.shape[1]):
        if i % size == 0:
            scales.append(np.abs(w[:, i : i + size]).max(1) / (half - 0.5))
        numbers[:, i] = np.clip(np.rint(w[:, i] / scales[-1]), -half, half - 1)
        w[:, i:] -= np.outer((w[:, i] - numbers[:, i] * scales[-1]) / spread[i, i], spread[i, i:])
    return numbers, np.stack(scales, 1)


@pytest.mark.parametrize("packing", [Packing(4, 16), Packing(4), Packing(8, 192), Packing(4, 96)], ids=str)
def test_calibrated_rounding(packing):
    """Of independent inputs it is rounding to the nearest; of others, the products change less than by that."""
    rng, dtype = np.random.default_rng(2), torch.float32
    weight = rng.standard_normal((12, 192)).astype(np.float32)
    nearest = dequantize(*quantize("w", weight, packing, np.dtype(np.float32)), packing.bits)
    round_ = pytest.importorskip("opt_pt.calibration")._round

    def floats(products: np.ndarray) -> np.ndarray:
        numbers, scale = round_(torch.tensor(weight), torch.tensor(products, dtype=dtype), packing, dtype)
        assert numbers.min() >= -(2 ** (packing.bits - 1)) and numbers.max() < 2 ** (packing.bits - 1)
        return (numbers.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1).numpy()

    found, step = floats(3 * np.eye(192)), np.abs(weight).max() / (2 ** (packing.bits - 1) - 0.5)
    assert np.abs(found - nearest).max() < 1.1 * step and (np.abs(found - nearest) > 1e-5).sum() < 20  # ties
    x = rng.standard_normal((400, 24)) @ rng.standard_normal((24, 192)) + 0.3 * rng.standard_normal((400, 192))
    x[:, 7] = 0  # a column of which the text says nothing
    before, after = (np.square(x @ (w - weight).T).sum() for w in (nearest, floats(x.T @ x)))
    assert after < 0.5 * before
    numbers, scale = round_(torch.tensor(weight, dtype=torch.float64), torch.tensor(x.T @ x), packing, torch.float64)
    wanted = column_by_column(weight, x.T @ x, packing)
    rows = (numbers.numpy() == wanted[0]).all(1)  # a group's largest number is a tie, from which on a row may differ
    assert rows.mean() > 0.75
    np.testing.assert_allclose(scale[rows], wanted[1][rows], rtol=1e-6)


def test_calibrate(tmp_path):
    """What a conversion writes is what the calibrated model computes."""
    calibrate = pytest.importorskip("opt_pt.calibration").calibrate
    load = pytest.importorskip("opt_pt").OPTForCausalLM.from_pretrained
    source = save_reference(make_reference(hidden_size=64, ffn_dim=128), tmp_path / "floats")
    model = load(source)
    rows, chosen = (
        torch.randint(4, 96, (6, 40), generator=torch.Generator().manual_seed(0)),
        QuantizationConfig.rounding(4, 32),
    )
    before = model(rows).logits.detach()
    numbers = calibrate(model, rows, chosen, "float32")
    convert(source, tmp_path / "few", quantization=chosen, calibrate=lambda dtype: numbers)
    convert(source, tmp_path / "nearest", quantization=chosen)
    few, nearest = (load(tmp_path / name) for name in ("few", "nearest"))
    with torch.no_grad():
        torch.testing.assert_close(few(rows).logits, model(rows).logits, rtol=0, atol=2e-5)
        errors = [(m(rows).logits - before).square().mean() for m in (few, nearest)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("config", ["pre-norm", "350m"])
def test_calibration_streams(tmp_path, config):
    """A layer at a time, to the same numbers."""
    calibration = pytest.importorskip("opt_pt.calibration")
    source = save_reference(make_reference(**CONFIGS[config]), tmp_path / "floats")
    rows = torch.randint(4, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    chosen = QuantizationConfig.rounding(4, 32)
    wanted = calibration.calibrate(opt_pt.OPTForCausalLM.from_pretrained(source), rows, chosen)
    model, layers = calibration.streamed(opt_pt.OPTForCausalLM, source)

    def watched() -> Any:
        for i, layer in enumerate(layers):
            there = [not next(one.parameters()).is_meta for one in model.model.decoder.layers]
            assert there == [j == i for j in range(len(there))]
            yield layer

    found = calibration.calibrate(model, rows, chosen, layers=watched())
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(x, y) for name in wanted for x, y in zip(found[name], wanted[name], strict=True))
    assert all(p.is_meta for p in [*model.model.decoder.layers.parameters(), *model.lm_head.parameters()])


def test_the_command_calibrates(tmp_path, capsys):
    pytest.importorskip("opt_pt")
    text, few, nearest = tmp_path / "text", tmp_path / "few", tmp_path / "nearest"
    text.write_text("Once upon a")
    with pytest.raises(ValueError, match=f"--calibrate: found a text of 5 tokens in {text}, wanted 512 or more"):
        cli.convert(DEMO, few, bits=4, calibrate=text)
    for option in ({"calibrate": text}, {"group_size": 64}):
        with pytest.raises(ValueError, match="found .*, wanted none without --bits"):
            cli.convert(DEMO, few, **option)
    text.write_text("Once upon a time there was a king who had three daughters. " * 50)
    cli.convert(DEMO, few, bits=4, group_size=64, calibrate=text)
    cli.convert(DEMO, nearest, bits=4, group_size=64)
    found, other = Checkpoint(few), Checkpoint(nearest)
    assert found.keys() == other.keys()
    same = [name for name in found if found[name].read().tobytes() == other[name].read().tobytes()]
    assert not any("weight_packed" in name for name in same) and "model.decoder.layers.0.fc1.bias" in same
    cli.inspect(str(few))
    assert "4 bits, groups of 64" in capsys.readouterr().out


# === Flax's own ===


def test_flax_learns_around_them(few):
    opt_flax, nnx = pytest.importorskip("opt_flax"), pytest.importorskip("flax.nnx")
    jax = pytest.importorskip("jax")
    folder, _ = few("4")
    model = opt_flax.FlaxOPTForCausalLM.from_pretrained(folder)
    gradients = nnx.jit(nnx.grad(lambda m: m(IDS, labels=IDS).loss))(model)  # of what learns: no numbers of few bits
    assert (
        "bias" in gradients.model.decoder.layers[0].fc1 and "weight_scale" not in gradients.model.decoder.layers[0].fc1
    )
    logits = nnx.jit(lambda m: m(IDS).logits)(model)
    bare, params = opt_flax.FlaxOPTForCausalLM.from_pretrained(folder, _do_init=False)
    again = jax.jit(lambda params: bare(IDS, params=params).logits)(params)
    np.testing.assert_allclose(again, logits, rtol=0, atol=1e-6)


# === TensorFlow's own ===


def test_keras_file(few, tmp_path):
    keras, opt_tf = pytest.importorskip("keras"), pytest.importorskip("opt_tf")
    model = opt_tf.TFOPTForCausalLM.from_pretrained(few("4")[0])
    trainable = {w.path.rpartition("/")[2] for w in model.trainable_weights}
    assert not trainable & {"weight_packed", "weight_scale"} and "bias" in trainable
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)


# === compressed-tensors, where it is installed ===


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_ours(kind, few):
    pytest.importorskip("compressed_tensors")
    folder, reference = few(kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(torch.tensor(IDS)).logits.double(), reference(torch.tensor(IDS)).logits, rtol=0, atol=2e-5
        )


def test_what_compressed_tensors_writes(tmp_path):
    """A model compressed by its own code, of whatever it takes for a Linear: project_in and project_out too."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model = make_reference(**CONFIGS["350m"]).float()
    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}
    said = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    status = {"format": "pack-quantized", "quantization_status": "frozen"}
    quantization.apply_quantization_config(model, quantization.QuantizationConfig(**said, **status))
    for module in [m for m in model.modules() if hasattr(m, "weight_scale")]:
        groups = module.weight.detach().unflatten(1, (-1, 32))
        module.weight_scale.data.copy_(groups.abs().amax(-1) / 7.5)
    compressor = compressors.ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    found = Backend("pt", tmp_path)(input_ids=IDS).logits
    with torch.no_grad():
        np.testing.assert_allclose(found, theirs(torch.tensor(IDS)).logits.numpy(), rtol=0, atol=2e-5)
