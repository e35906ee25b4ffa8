"""OPTConfig: sizes, round trips, and errors that name the field."""

from __future__ import annotations

import dataclasses
import json

import pytest
import transformers

from opt_common.config import SIZES, OPTConfig
from opt_common.weights import HEADS, byte_count, parameter_count, table

# size: parameters with a tied head, float16 bytes, tensors; the bytes of 6.7b to 66b are the Hub indexes' total_size
PUBLISHED = {
    "125m": (125_239_296, 250_478_592, 196),
    "350m": (331_196_416, 662_392_832, 388),
    "1.3b": (1_315_758_080, 2_631_516_160, 388),
    "2.7b": (2_651_596_800, 5_303_193_600, 516),
    "6.7b": (6_658_473_984, 13_316_947_968, 516),
    "13b": (12_853_473_280, 25_706_946_560, 644),
    "30b": (29_974_540_288, 59_949_080_576, 772),
    "66b": (65_719_701_504, 131_439_403_008, 1028),
    "175b": (174_604_468_224, 349_208_936_448, 1540),
}


def test_every_size():
    assert list(SIZES) == list(PUBLISHED)
    for size, (parameters, nbytes, tensors) in PUBLISHED.items():
        config = OPTConfig.from_size(size)
        assert parameter_count(config) == parameters
        assert byte_count(config, "float16") == nbytes
        assert len(list(table(config))) == tensors
        assert config.head_dim == {"125m": 64, "350m": 64, "1.3b": 64, "2.7b": 80}.get(size, 128)
    assert OPTConfig.from_size("350m").projects_embeddings
    assert not OPTConfig.from_size("350m").has_final_layer_norm
    with pytest.raises(ValueError, match="size: found '7b', wanted one of 125m"):
        OPTConfig.from_size("7b")


# opt-13b's on the Hub, keys of no use to OPT and all
HUB = {
    "_name_or_path": "facebook/opt-13b", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
    "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
    "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 20480, "hidden_size": 5120,
    "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
    "num_attention_heads": 40, "num_hidden_layers": 40, "output_projection": True, "pad_token_id": 1,
    "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.21.0.dev0", "use_cache": True,
    "vocab_size": 50272, "word_embed_proj_dim": 5120,
}  # fmt: skip


@pytest.mark.parametrize("architecture", HEADS)
def test_axes_name_the_sizes_of_a_shape(architecture):
    config = OPTConfig(vocab_size=7, hidden_size=12, word_embed_proj_dim=5, ffn_dim=9, num_hidden_layers=2,
                       num_attention_heads=3, max_position_embeddings=11, num_labels=2,
                       tie_word_embeddings=False)  # fmt: skip
    sizes = {"vocab": 7, "embed": 5, "hidden": 12, "heads": 12, "ffn": 9, "labels": 2, None: 13}
    axes = {}
    for spec in table(config, architecture):
        assert spec.shape == tuple(sizes[axis] for axis in spec.axes), spec
        axes[spec.name.removeprefix("model.").replace("layers.1.", "layers.0.")] = spec.axes
    layer = "decoder.layers.0."
    for name in ("q_proj", "k_proj", "v_proj"):
        assert axes[f"{layer}self_attn.{name}.weight"] == ("heads", "hidden")
        assert axes[f"{layer}self_attn.{name}.bias"] == ("heads",)
    assert axes[f"{layer}self_attn.out_proj.weight"] == ("hidden", "heads")
    assert axes[f"{layer}self_attn.out_proj.bias"] == ("hidden",)


def test_round_trip_keeps_unknown_keys(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    config = OPTConfig.from_pretrained(tmp_path)
    assert config == dataclasses.replace(OPTConfig.from_size("13b"), dtype="float16", unknown=config.unknown)
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved.items() >= HUB.items()
    assert OPTConfig.from_pretrained(tmp_path / "again") == config


def test_half_a_surrogate_pair_is_kept(tmp_path):
    """JSON can name one, UTF-8 cannot."""
    (tmp_path / "config.json").write_text('{"note": "caf\\u00e9 \\ud83d", "pair": "\\ud83d\\ude00"}')
    config = OPTConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "saved")
    again = OPTConfig.from_pretrained(tmp_path / "saved")
    assert (again.note, again.pair) == ("caf\u00e9 \ud83d", "\U0001f600")
    assert again.unknown == config.unknown | {"architectures": ["OPTForCausalLM"]}


def test_settable_and_hashable():
    config = OPTConfig.from_dict({"prefix": "</s>", "eos_token_id": [2, 50118]})
    assert hash(config) == hash(OPTConfig.from_dict({"prefix": "</s>", "eos_token_id": [2, 50118]}))
    with pytest.raises(ValueError, match="OPTConfig.hidden_size: found 1, wanted a multiple"):
        config.hidden_size = 1
    assert config.hidden_size == 768
    config.use_cache, config.dropout = False, 0.5
    assert json.loads(config.to_json())["dropout"] == 0.5 and "_attn_implementation" not in config.to_dict()
    assert config != dataclasses.replace(config, _attn_implementation="eager")
    assert config.eos_token_ids == (2, 50118)
    assert json.loads(config.to_json())["eos_token_id"] == [2, 50118]


def test_calls_of_transformers_config(tmp_path):
    """Its other ways to a config, with the answers that it gives."""
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    for cls in (OPTConfig, transformers.OPTConfig):
        config, unused = cls.from_pretrained(tmp_path, return_unused_kwargs=True, dropout=0.0, num_labels=3, mine=1)
        assert (config.dropout, config.num_labels, unused) == (0.0, 3, {"mine": 1})
        config, unused = cls.from_dict(dict(HUB), return_unused_kwargs=True)
        assert (config.hidden_size, unused) == (5120, {})
        values, rest = cls.get_config_dict(tmp_path, mine=1)
        assert values == HUB and rest["mine"] == 1
        assert cls(pad_token_id=-1).pad_token_id == -1
    for cls in (OPTConfig, transformers.AutoConfig):
        assert cls.for_model("opt", hidden_size=24, num_attention_heads=2).hidden_size == 24
        with pytest.raises(ValueError, match="nothing"):
            cls.for_model("nothing")


def test_dtype_spellings():
    assert OPTConfig.from_dict({"torch_dtype": "float16"}).dtype == "float16"
    assert OPTConfig.from_dict({"dtype": "bfloat16", "torch_dtype": None}).dtype == "bfloat16"
    assert OPTConfig.from_dict({"torch_dtype": "torch.float32"}).dtype == "float32"


WRONG = [
    ("hidden_size", 770, "hidden_size: found 770, wanted a multiple of num_attention_heads"),
    ("hidden_size", -768, "hidden_size: found -768, wanted a whole number > 0"),
    ("num_hidden_layers", 0, "num_hidden_layers: found 0"),
    ("num_hidden_layers", "12", "num_hidden_layers: found '12'"),
    ("num_attention_heads", 1.5, "num_attention_heads: found 1.5"),
    ("num_attention_heads", None, "num_attention_heads: found None"),
    ("vocab_size", True, "vocab_size: found True"),
    ("word_embed_proj_dim", 0, "word_embed_proj_dim: found 0"),
    ("activation_function", "relu6", "activation_function: found 'relu6', wanted one of relu"),
    ("activation_function", ["relu"], "activation_function: found"),
    ("do_layer_norm_before", "yes", "do_layer_norm_before: found 'yes', wanted true or false"),
    ("_remove_final_layer_norm", 1, "_remove_final_layer_norm: found 1"),
    ("dropout", 1.0, "dropout: found 1.0, wanted a probability"),
    ("dropout", "0.1", "dropout: found '0.1', wanted a number"),
    ("init_std", -0.1, "init_std: found -0.1"),
    ("init_std", float("nan"), "init_std: found nan"),
    ("eos_token_id", 50272, "eos_token_id: found 50272"),
    ("eos_token_id", [2, -1], "eos_token_id: found"),
    ("pad_token_id", "1", "pad_token_id: found '1'"),
    ("torch_dtype", "int8", "dtype: found 'int8'"),
    ("torch_dtype", 16, "dtype: found 16"),
    ("model_type", "gpt2", "model_type: found 'gpt2', wanted 'opt'"),
    ("quantization_config", {"bits": 4}, "quantization_config: .* will not ignore it"),
    ("is_encoder_decoder", True, "is_encoder_decoder: found True"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=lambda x: str(x)[:24])
def test_errors_name_file_and_field(tmp_path, key, value, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value}))
    with pytest.raises(ValueError, match=message) as error:
        OPTConfig.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not readable as JSON"),
        (b"[1]", "found a JSON list, wanted an object"),
        (b'{"dropout": 0.1, "dropout": 0.2}', "key 'dropout' appears twice"),
        (b'{"prefix": "\xff"}', "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"prefix": ' + b"[" * 700 + b"]" * 700 + b"}", "nested too deeply"),
        (b'{"init_std": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b'{"init_std": 1e999}', "init_std: found inf"),
        (b'{"activation_function": "' + b"x" * 10**6 + b'"}', "activation_function: found 'xxx"),
        (b'{"prefix": [' + b"[]," * 100_000 + b"[]]}", "more lists and objects than 300016 bytes"),
    ],
    ids=["cut", "list", "twice", "not utf-8", "deep", "deep value", "long number", "infinite", "long", "many lists"],
)
def test_broken_json(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        OPTConfig.from_pretrained(tmp_path)
    assert "config.json" in str(error.value) and len(str(error.value)) < 500
