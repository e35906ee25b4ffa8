"""Linears of 8 and 4 bits: the format, its readers and their errors, conversion, and the models of all frameworks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from checkpoints import arrays, contents, gptq_folder, random_checkpoint, rewrite, tiny_config
from opt_common import cli
from opt_common.checkpoints.convert import convert, plan
from opt_common.checkpoints.examine import examine
from opt_common.checkpoints.open import open_checkpoint
from opt_common.config import OPTConfig
from opt_common.hub import DEMO, fetch
from opt_common.quantization import Packing, QuantizationConfig, dequantize, pack, quantize, unpack
from opt_common.weights import byte_count, parameter_count, table

# bits and group size, as for `QuantizationConfig.rounding`
KINDS = [(8, None), (4, None), (8, 32), (4, 32)]


def small(size: str = "125m", **changes: Any) -> OPTConfig:
    """A config whose widths groups of 32 and of 128 divide."""
    widths = {"hidden_size": 128, "ffn_dim": 256, "word_embed_proj_dim": 64 if size == "350m" else 128}
    return tiny_config(size, layers=2, **(widths | changes))


# === Numbers ===


@pytest.mark.parametrize("bits", [4, 8])
def test_packing(bits):
    numbers = np.random.default_rng(0).integers(0, 2**bits, (3, 64)).astype(np.uint8)
    packed = pack(numbers, bits)
    each = 32 // bits
    wanted = [[sum(int(n) << bits * i for i, n in enumerate(row[at : at + each])) for at in range(0, 64, each)]
              for row in numbers]  # fmt: skip
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(packed.view(np.uint32), np.array(wanted, np.uint32))
    np.testing.assert_array_equal(unpack(packed, bits), numbers)


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_rounding(bits, group, dtype):
    w = np.random.default_rng(1).standard_normal((6, 64)).astype(dtype)
    w[2] = 0
    packed, scale = quantize("w", w, Packing(bits, group), np.dtype(dtype))
    assert packed.shape == (6, 2 * bits) and scale.shape == (6, 64 // (group or 64)) and scale.dtype == dtype
    steps = np.repeat(scale.astype(np.float64), group or 64, axis=1)
    found, half = dequantize(packed, scale, bits), 2 ** (bits - 1)
    assert found.dtype == (np.float64 if dtype == np.float64 else np.float32)
    whole = np.rint(found / steps)
    np.testing.assert_allclose(found, whole * steps, rtol=1e-6)
    assert whole.max() == half - 1
    nearest = np.clip(w.astype(np.float64) / steps, -half, half - 1)
    assert np.abs(whole - nearest).max() < 0.5 + 1e-5  # the largest number is a tie
    largest = np.abs(w.astype(np.float64)).reshape(6, -1, group or 64).max(-1)
    np.testing.assert_allclose(scale.astype(np.float64), largest / (2 ** (bits - 1) - 0.5), rtol=2**-8, atol=1e-7)
    assert not found[2].any()


def test_rounding_refuses():
    for wrong in (np.nan, np.inf, -np.inf):
        w = np.ones((2, 64), np.float16)
        w[1, 5] = wrong
        with pytest.raises(ValueError, match="fc1: found numbers that are NaN or infinite, wanted finite"):
            quantize("fc1", w, Packing(8), w.dtype)
    with pytest.raises(ValueError, match="fc1: found 60 input features, wanted a multiple of 32, the group size"):
        quantize("fc1", np.ones((2, 60), np.float16), Packing(4, 32), np.dtype(np.float16))
    with pytest.raises(ValueError, match="fc1: found 6 input features, wanted a multiple of 4, what an int32 holds"):
        quantize("fc1", np.ones((2, 6), np.float16), Packing(8), np.dtype(np.float16))


# === config.json ===


def written(bits: int = 4, **weights: Any) -> dict[str, Any]:
    values = QuantizationConfig.rounding(bits).to_dict()
    values["config_groups"]["group_0"]["weights"] |= weights
    return values


def test_config(tmp_path):
    config = OPTConfig(quantization_config=written())
    assert config.quantization_config == QuantizationConfig.rounding(4, 128)
    config.save_pretrained(tmp_path)
    read = OPTConfig.from_pretrained(tmp_path)
    assert read.quantization_config == config.quantization_config and hash(read) == hash(config)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == written()
    kinds = {spec.kind for spec in table(config) if "project" in spec.path or "lm_head" in spec.path}
    assert not kinds & {"packed", "scale", "shape"}
    for size in ("125m", "350m", "1.3b"):
        floats, eight = OPTConfig.from_size(size), OPTConfig.from_size(size, quantization_config=written(8))
        assert parameter_count(eight) == parameter_count(floats)
        matrices = sum(s.size for s in table(floats) if s.kind == "linear" and ".layers." in s.path)
        assert 0 < byte_count(eight) - (byte_count(floats) - matrices) < 0.01 * matrices


def test_config_of_others():
    """What llm-compressor writes: more keys, groups of their own, names and patterns."""
    eight = written(8)["config_groups"]["group_0"]["weights"]
    more = {"observer": "minmax", "observer_kwargs": {}, "actorder": "static", "block_structure": None}
    values = written(4, **more) | {"version": "0.20.0", "global_compression_ratio": None, "sparsity_config": {}}
    values["transform_config"], values["ignore"] = {}, ["lm_head", r"re:.*layers\.1\.fc[12]", "decoder.layers.0.fc2"]
    values["config_groups"] = {
        "attention": {"targets": [r"re:.*self_attn\.(q|k|v)_proj$"], "weights": eight},
        "others": {**values["config_groups"]["group_0"], "format": "pack-quantized"},
    }
    config = OPTConfig(quantization_config=values).quantization_config
    assert config is not None
    layer, of = "model.decoder.layers", config.of
    assert of(f"{layer}.0.self_attn.q_proj") == Packing(8) and of(f"{layer}.1.self_attn.out_proj") == Packing(4, 128)
    assert of(f"{layer}.1.fc1") is None and of(f"{layer}.0.fc2") is None and of(f"{layer}.0.fc1") == Packing(4, 128)
    assert of("model.decoder.project_in") == Packing(4, 128)
    assert QuantizationConfig.from_dict(config.to_dict()) == config


def grouped(**changes: Any) -> dict[str, Any]:
    values = written()
    values["config_groups"]["group_0"] |= changes
    return values


REFUSED = {
    "method": ({"quant_method": "bitsandbytes"}, "quant_method: found 'bitsandbytes', wanted 'compressed-tensors' or"),
    "no object": ("int4", "quantization_config: found 'int4', wanted an object"),
    "fp8": (written() | {"format": "float-quantized"}, "format: found 'float-quantized', wanted 'pack-quantized'"),
    "not packed yet": (written() | {"quantization_status": "frozen"}, "quantization_status: found 'frozen'"),
    "cache": (written() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: found {'num_bits': 8}, wanted none"),
    "sparsity": (written() | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config: found"),
    "transforms": (written() | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config: found"),
    "no groups": (written() | {"config_groups": {}}, "config_groups: found {}, wanted an object of groups"),
    "activations": (grouped(input_activations={"num_bits": 8}), "group_0: input_activations: found"),
    "outputs": (grouped(output_activations={"num_bits": 8}), "group_0: output_activations: found"),
    "float": (written(type="float"), "group_0.weights: type: found 'float', wanted 'int'"),
    "bits": (written(num_bits=3), "group_0.weights: num_bits: found 3, wanted 4 or 8"),
    "boolean bits": (written(num_bits=True), "num_bits: found True"),
    "zero points": (written(symmetric=False), "weights: symmetric: found False, wanted True"),
    "dynamic": (written(dynamic=True), "weights: dynamic: found True"),
    "columns apart": (written(actorder="group"), "weights: actorder: found 'group'"),
    "a tensor": (written(strategy="tensor", group_size=None), "strategy: found 'tensor', wanted 'channel' or 'group'"),
    "group size": (written(group_size=100), "weights: group_size: found 100, wanted a multiple of 8"),
    "no group size": (written(group_size=None), "weights: group_size: found None, wanted a multiple of 8"),
    "two strategies": (written(strategy="channel"), "group_size: found 128, wanted null for strategy 'channel'"),
    "no weights": (grouped(weights=None), "group_0.weights: found None, wanted an object"),
    "no list": (grouped(targets="Linear"), "targets: found 'Linear', wanted a list of names"),
    "no pattern": (grouped(targets=["re:("]), "targets: found 're:', wanted a regular|wanted a regular expression"),
    "slow pattern": (grouped(targets=["re:(.*.*)*x"]), "wanted a simpler pattern"),
    "slow choice": (written() | {"ignore": ["re:" + "(.|.)" * 40 + "x"]}, "ignore: .*wanted a simpler pattern"),
    "gptq bits": ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits: found 3, wanted 4 or 8"),
    "gptq size": ({"quant_method": "gptq", "bits": 4, "group_size": 100}, "group_size: found 100, wanted a multiple"),
    "gptq head": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "lm_head": True}, "lm_head: found True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_refuses(tmp_path, case):
    values, message = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": values}))
    with pytest.raises(ValueError, match=message) as error:
        OPTConfig.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: quantization_config")


def test_widths_that_groups_do_not_divide(tmp_path):
    folder = random_checkpoint(tmp_path / "floats", tiny_config(layers=2))
    wanted = r"model\.decoder\.layers\.0\.self_attn\.k_proj: found 8 input features, wanted a multiple of 128"
    with pytest.raises(ValueError, match=wanted):
        convert(folder, tmp_path / "four", quantization=QuantizationConfig.rounding(4))
    assert not (tmp_path / "four").exists()
    rewrite(folder, lambda tensors: None, quantization_config=written())
    with pytest.raises(ValueError, match=wanted):
        open_checkpoint(folder)


# === Files ===


@pytest.mark.parametrize("size", ["125m", "350m"])
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_there_and_back(tmp_path, size, bits, group):
    source = random_checkpoint(tmp_path / "floats", small(size))
    chosen = QuantizationConfig.rounding(bits, group)
    foreseen = plan(source, tmp_path / "few", quantization=chosen)
    files = convert(source, tmp_path / "few", quantization=chosen)
    assert dict(foreseen.files) == {f.name: f.stat().st_size for f in (tmp_path / "few").iterdir()}
    assert files[0].stat().st_size < 0.8 * (source / "model.safetensors").stat().st_size
    config = OPTConfig.from_pretrained(tmp_path / "few")
    assert config.quantization_config == QuantizationConfig.rounding(bits, group)

    convert(tmp_path / "few", tmp_path / "back", dtype="float32")
    assert OPTConfig.from_pretrained(tmp_path / "back").quantization_config is None
    floats, few, back = arrays(source), arrays(tmp_path / "few"), arrays(tmp_path / "back")
    assert back.keys() == floats.keys()
    for name, array in floats.items():
        path = name.removesuffix(".weight")
        packing = config.quantization_config.of(path) if array.ndim == 2 and name.endswith("weight") else None
        if packing is None or "embed" in name:
            np.testing.assert_array_equal(few[name], array)
            np.testing.assert_array_equal(back[name], array.astype(np.float32))
            continue
        packed, scale = quantize(name, array, packing, array.dtype)
        np.testing.assert_array_equal(few[f"{path}.weight_packed"], packed)
        np.testing.assert_array_equal(few[f"{path}.weight_scale"], scale)
        assert few[f"{path}.weight_shape"].tolist() == list(array.shape)
        np.testing.assert_array_equal(back[name], dequantize(packed, scale, bits))

    # in another layout that has room for them, in shards, and back: the same bytes
    convert(tmp_path / "few", tmp_path / "bin", "torch", max_shard_size=100_000)
    convert(tmp_path / "bin", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "few")


def test_scales_are_those_of_the_dtype_written(tmp_path):
    source = random_checkpoint(tmp_path / "floats", small(dtype="float32"))
    convert(source, tmp_path / "few", dtype="bfloat16", quantization=QuantizationConfig.rounding(8))
    floats, few, path = arrays(source), arrays(tmp_path / "few"), "model.decoder.layers.1.fc2"
    packed, scale = quantize(path, floats[f"{path}.weight"], Packing(8), np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(few[f"{path}.weight_packed"], packed)
    np.testing.assert_array_equal(few[f"{path}.weight_scale"], scale)


def test_inspect(tmp_path):
    source = random_checkpoint(tmp_path / "floats", small("350m"))
    convert(source, tmp_path / "few", quantization=QuantizationConfig.rounding(4))
    facts = examine(tmp_path / "few", sha256=True, check=True)
    assert facts["quantization"] == "4 bits, groups of 128" and facts["dtype"] == "float16" and not facts["misfits"]
    assert facts["parameters"] == examine(source)["parameters"] == parameter_count(small("350m"))
    assert examine(source)["quantization"] is None and not facts["not_finite"]


@pytest.mark.parametrize("bits", [8, 4])
def test_errors_of_rounding(tmp_path, bits, capsys):
    """Of each weight, over its norm; the command names the largest."""
    source, few, again = DEMO, tmp_path / "few", tmp_path / "again"
    convert(source, few, quantization=QuantizationConfig.rounding(bits))
    convert(few, again, dtype="float32")
    floats, rounded = arrays(fetch(DEMO, [])), arrays(again)
    found = examine(few, source=source)["errors"]
    assert len(found) == 6 * OPTConfig.from_pretrained(DEMO).num_hidden_layers
    for name, error in found.items():
        w = floats[name].astype(np.float64)
        assert error == pytest.approx(np.linalg.norm(rounded[name] - w) / np.linalg.norm(w), rel=1e-6)
    cli.inspect(str(few), source=str(source))
    worst = max(found, key=lambda name: found[name])
    assert f"{found[worst]:.2%}, {worst}" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="opt-demo: found floats, wanted weights of few bits, rounded from the source"):
        examine(source, source=few)
    with pytest.raises(ValueError, match=f"few: found {bits} bits.*, wanted the floats they were rounded from"):
        examine(few, source=few)
    random_checkpoint(tmp_path / "other", small())
    with pytest.raises(ValueError, match=r"k_proj.weight: found \[128, 128\], wanted \[256, 256\]"):
        examine(few, source=tmp_path / "other")


def test_convert_refuses(tmp_path):
    source = random_checkpoint(tmp_path / "floats", small())
    convert(source, tmp_path / "few", quantization=QuantizationConfig.rounding(4))
    with pytest.raises(ValueError, match="found weights in 4 bits, groups of 128 already, wanted floats"):
        convert(tmp_path / "few", tmp_path / "no", quantization=QuantizationConfig.rounding(8))
    with pytest.raises(ValueError, match="flax-msgpack cannot hold quantized weights; wanted one of safetensors"):
        convert(tmp_path / "few", tmp_path / "no", "flax-msgpack")
    convert(tmp_path / "few", tmp_path / "flax", "flax-msgpack", dtype="float16")
    for bits, size, message in ((3, None, "bits: found 3, wanted 8 or 4"), (4, 100, "group_size: found 100, wanted a")):
        with pytest.raises(ValueError, match=message):
            QuantizationConfig.rounding(bits, size)
    rewrite(source, lambda tensors: tensors["model.decoder.layers.1.fc1.weight"].__setitem__((3, 3), np.nan))
    with pytest.raises(ValueError, match=r"layers\.1\.fc1\.weight: found numbers that are NaN or infinite"):
        convert(source, tmp_path / "no", quantization=QuantizationConfig.rounding(8))
    assert not (tmp_path / "no").exists()


FC1 = "model.decoder.layers.1.fc1"
DAMAGES: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "no scale": (lambda t: t.pop(f"{FC1}.weight_scale"), r"fc1\.weight_scale: missing, wanted \[256, 1\]"),
    "no numbers": (lambda t: t.pop(f"{FC1}.weight_packed"), r"fc1\.weight_packed: missing, wanted \[256, 16\]"),
    "no shape": (lambda t: t.pop(f"{FC1}.weight_shape"), r"fc1\.weight_shape: missing, wanted \[2\]"),
    "short scale": (
        lambda t: t.__setitem__(f"{FC1}.weight_scale", t[f"{FC1}.weight_scale"][:-1]),
        r"fc1\.weight_scale: found shape \[255, 1\], wanted \[256, 1\]",
    ),
    "other dtype": (
        lambda t: t.__setitem__(f"{FC1}.weight_packed", t[f"{FC1}.weight_packed"].astype(np.int64)),
        r"fc1\.weight_packed: found dtype int64, wanted one of int32",
    ),
    "zero points": (
        lambda t: t.__setitem__(f"{FC1}.weight_zero_point", np.zeros((32, 1), np.int32)),
        r"fc1\.weight_zero_point: unexpected, no such tensor",
    ),
    "scale not finite": (
        lambda t: t[f"{FC1}.weight_scale"].__setitem__((7, 0), np.inf),
        r"fc1\.weight_scale: found 1 scales that are NaN or infinite, wanted finite ones",
    ),
    "another shape": (
        lambda t: t[f"{FC1}.weight_shape"].__setitem__(0, 128),
        r"fc1\.weight_shape: found \[128, 128\], wanted \[256, 128\]",
    ),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("four")
    convert(random_checkpoint(root / "floats", small()), root / "few", quantization=QuantizationConfig.rounding(4))
    return root / "few"


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged(tmp_path, four, case):
    change, message = DAMAGES[case]
    convert(four, tmp_path / "few")
    rewrite(tmp_path / "few", change)
    for options in ({}, {"dtype": "float32"}):
        with pytest.raises(ValueError, match=message) as error:
            convert(tmp_path / "few", tmp_path / "no", **options)
        assert str(tmp_path) in str(error.value)
        if case == "another shape":
            break  # floats have their own
    assert not (tmp_path / "no").exists()


# === GPTQ's files ===


GPTQ: dict[str, tuple[dict[str, Any], QuantizationConfig | None]] = {
    "4 bits": ({"bits": 4, "size": 32}, QuantizationConfig.rounding(4, 32)),
    "8 bits": ({"bits": 8, "size": -1}, QuantizationConfig.rounding(8)),
    "second form": ({"bits": 4, "size": 128, "form": "gptq_v2"}, QuantizationConfig.rounding(4)),
    "one group out of order": ({"bits": 8, "size": -1, "shuffled": True}, QuantizationConfig.rounding(8)),
    "zero points": ({"bits": 4, "size": 32, "symmetric": False}, None),
    "columns apart": ({"bits": 4, "size": 32, "shuffled": True}, None),
    "both": ({"bits": 8, "size": 64, "symmetric": False, "shuffled": True, "form": "gptq"}, None),
}


@pytest.mark.parametrize("case", GPTQ)
def test_gptq(tmp_path, case):
    """Symmetric files are read as ours; others as floats. Either way with the numbers that they mean."""
    made, wanted = GPTQ[case]
    floats = gptq_folder(tmp_path / "gptq", small(), **made)
    opened = open_checkpoint(tmp_path / "gptq")
    assert opened.config.quantization_config == wanted
    convert(tmp_path / "gptq", tmp_path / "ours")
    assert ("model.decoder.layers.0.fc1.weight_packed" in arrays(tmp_path / "ours")) == (wanted is not None)
    convert(tmp_path / "gptq", tmp_path / "floats", dtype="float64")
    found = arrays(tmp_path / "floats")
    for name, array in floats.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-7, err_msg=name)


def test_gptq_refuses(tmp_path):
    gptq_folder(tmp_path, small(), 4, 32)
    path, config = FC1, json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    whole = arrays(tmp_path)
    for name, change, message in [
        ("scales", lambda x: None, r"fc1\.scales: missing, wanted \[4, 256\]"),
        ("scales", lambda x: x[:3], r"fc1\.scales: found float16 \[3, 256\], wanted float16 or .* \[4, 256\]"),
        ("qzeros", lambda x: x[:, :-1], r"fc1\.qzeros: found int32 \[4, 31\], wanted int32 \[4, 32\]"),
        ("g_idx", lambda x: x[1:], r"fc1\.g_idx: found int32 \[127\], wanted int32 or int64 \[128\]"),
        ("qweight", lambda x: x[:-4], r"fc1\.scales: found float16 \[4, 256\], wanted .* \[3, 256\]"),
        ("qzeros", lambda x: x - 1, r"fc1\.qzeros: found zero points, wanted 7 everywhere, as sym true says"),
        ("g_idx", lambda x: x[::-1], r"fc1\.g_idx: found columns out of order, wanted them in order"),
        ("scales", lambda x: x * np.float16(np.nan), r"fc1\.weight_scale: found 1024 scales that are NaN"),
    ]:

        def damage(
            tensors: dict[str, np.ndarray], name: str = f"{path}.{name}", change: Callable[..., Any] = change
        ) -> None:
            tensors.update(whole)
            tensors.pop(name)
            if (array := change(whole[name])) is not None:
                tensors[name] = np.ascontiguousarray(array)

        rewrite(tmp_path, damage, quantization_config=config)
        with pytest.raises(ValueError, match=message):
            convert(tmp_path, tmp_path / "no")
    damage_group = {**config, "desc_act": True}
    rewrite(tmp_path, lambda t: (t.update(whole), t[f"{path}.g_idx"].fill(9)), quantization_config=damage_group)
    with pytest.raises(ValueError, match=r"fc1\.g_idx: found groups 9 to 9, wanted 0 to 3"):
        convert(tmp_path, tmp_path / "no")
    assert not (tmp_path / "no").exists()
