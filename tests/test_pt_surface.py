"""What users ask of a PyTorch model besides running it, beside transformers where it has an answer."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import opt_pt
from opt_pt import KVCache, OPTConfig, OPTForCausalLM, OPTForSequenceClassification, OPTModel, OPTPreTrainedModel


@pytest.fixture
def ids(rng):
    return torch.from_numpy(rng.integers(3, 96, (2, 9)))


def pair(folder, **options):
    theirs = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return theirs, OPTForCausalLM.from_pretrained(folder, **options)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("config", ["pre-norm", "350m", "untied"])
def test_numbers_and_parts(tiny, config):
    theirs, ours = pair(tiny(config)[0])
    for exclude in (False, True):
        found = ours.num_parameters(exclude_embeddings=exclude)
        assert found == theirs.num_parameters(exclude_embeddings=exclude)
    ours.lm_head.weight.requires_grad_(False)
    theirs.lm_head.weight.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    assert (ours.device, ours.dtype) == (theirs.device, theirs.dtype)
    assert ours.get_input_embeddings() is ours.model.decoder.embed_tokens
    assert ours.get_output_embeddings() is ours.lm_head and ours.get_decoder() is ours.model.decoder
    assert ours.base_model is ours.model and ours.can_generate()
    assert ours._no_split_modules == ["OPTDecoderLayer"]


@pytest.mark.parametrize("config", ["pre-norm", "350m", "untied"])
@pytest.mark.parametrize(
    ("tokens", "multiple", "rows"), [(99, None, 99), (90, None, 90), (97, 16, 112), (None, 64, 128)]
)
def test_resizing_the_token_embedding(tiny, ids, config, tokens, multiple, rows):
    theirs, ours = pair(tiny(config)[0])
    ids = ids % 90
    for model in (theirs, ours):
        embedding = model.resize_token_embeddings(tokens, pad_to_multiple_of=multiple, mean_resizing=False)
        assert embedding.weight.shape[0] == embedding.num_embeddings == model.config.vocab_size == rows
        assert model.lm_head.weight.shape[0] == model.lm_head.out_features == rows
        assert (model.lm_head.weight is embedding.weight) == (config != "untied")
    with torch.no_grad():
        kept = min(rows, 96)
        close(ours(ids).logits[..., :kept], theirs(ids).logits[..., :kept])
        assert ours(ids).logits.shape[-1] == rows
        assert ours.generate(ids, max_new_tokens=2, eos_token_id=[]).shape == (2, 11)


def test_fewer_layers_than_the_file(tiny, ids):
    folder, _ = tiny()
    theirs = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=2)
    with pytest.warns(UserWarning, match="not used: layers 2 to 2"):
        ours = OPTForCausalLM.from_pretrained(folder, num_hidden_layers=2)
    with torch.no_grad():
        close(ours(ids).logits, theirs(ids).logits)
    with pytest.raises(ValueError, match="missing"):
        OPTForCausalLM.from_pretrained(folder, num_hidden_layers=4)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, "disk"])
def test_device_maps(tiny, ids, tmp_path, device_map):
    pytest.importorskip("accelerate")
    folder, _ = tiny()
    wanted = OPTForCausalLM.from_pretrained(folder)
    if device_map == "disk":
        device_map = {
            "model.decoder.layers.1": "disk",
            "model.decoder.layers.2": "cpu",
            "model.decoder.layers.0": "cpu",
        }
        device_map |= {
            f"model.decoder.{name}": "cpu" for name in ("embed_tokens", "embed_positions", "final_layer_norm")
        }
        with pytest.raises(ValueError, match="device_map: found no device for lm_head|offload_folder: found None"):
            OPTForCausalLM.from_pretrained(folder, device_map=device_map | {"lm_head": "cpu"})
        device_map |= {"lm_head": "cpu"}
    ours = OPTForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    with torch.no_grad():
        close(ours(ids).logits, wanted(ids).logits)
    assert torch.equal(ours.generate(ids, max_new_tokens=3), wanted.generate(ids, max_new_tokens=3))


def test_loading_options(tiny):
    folder, _ = tiny()
    load = OPTForCausalLM.from_pretrained
    config = OPTConfig.from_pretrained(pretrained_model_name_or_path=folder, attn_implementation="eager")
    assert load(pretrained_model_name_or_path=folder, config=config).config._attn_implementation == "eager"
    config._attn_implementation = "by eye"
    with pytest.raises(ValueError, match="attn_implementation: found 'by eye'"):
        OPTForCausalLM(config)
    load(folder, low_cpu_mem_usage=True, trust_remote_code=True, use_safetensors=True, variant=None, load_in_8bit=False)
    for option in ("variant", "gguf_file", "quantization_config"):
        with pytest.raises(ValueError, match=f"{option}: OPT Zoo does not support this"):
            load(folder, **{option: "x"})
    with pytest.raises(TypeError, match="found argument 'num_lables'"):
        load(folder, num_lables=3)
    with pytest.raises(ValueError, match="device_map: found 'everywhere'"):
        load(folder, device_map="everywhere")
    with pytest.raises(FileNotFoundError, match="pytorch_model"):
        load(folder, use_safetensors=False)
    with pytest.warns(UserWarning, match="newly initialized"):
        model, info = OPTForSequenceClassification.from_pretrained(folder, num_labels=4, output_loading_info=True)
    assert info["missing_keys"] == ["score.weight"] and model.score.out_features == 4


def test_modules_that_a_subclass_adds(tiny, ids, tmp_path):
    class Mine(OPTForCausalLM):
        def __init__(self, config, attn_implementation=None):
            super().__init__(config, attn_implementation)
            self.value = nn.Linear(config.hidden_size, 1)

    model = Mine.from_pretrained(tiny()[0])
    assert not any(p.is_meta for p in model.parameters())
    assert model.value.weight.std() > 0 and (model.value.bias == 0).all()
    assert model.generate(ids, max_new_tokens=2, eos_token_id=[]).shape == (2, 11)
    model.value.bias.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    again, info = Mine.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == []
    assert torch.equal(again.value.weight, model.value.weight) and again.value.bias == 0.5
    with pytest.raises(ValueError, match="value.bias: unexpected"):
        OPTForCausalLM.from_pretrained(tmp_path)
    model.value.register_buffer("steps", torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="steps: found torch.int64"):
        model.save_pretrained(tmp_path)


def test_weights_from_a_state_dict(tiny, ids):
    folder, _ = tiny()
    theirs, ours = pair(folder)
    model = OPTForCausalLM.from_pretrained(None, config=ours.config, state_dict=theirs.state_dict())
    assert not model.training
    with torch.no_grad():
        close(model(ids).logits, theirs(ids).logits)
    with pytest.raises(ValueError, match="state_dict: found one, wanted None"):
        OPTForCausalLM.from_pretrained(folder, state_dict=theirs.state_dict())
    with pytest.raises(ValueError, match="state_dict: found None"):
        OPTForCausalLM.from_pretrained(None, config=ours.config)


def test_names_of_other_peoples_checkpoints(tiny, ids, tmp_path):
    theirs, _ = pair(tiny()[0])
    theirs.config.save_pretrained(tmp_path)
    weights = {f"transformer.{name}": x.clone() for name, x in theirs.model.state_dict().items()}
    weights = {name.replace("fc1", "up"): x for name, x in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    mapping = {r"^transformer\.(.*)\.up\.": r"model.\1.fc1.", r"^transformer\.": "model."}
    for cls in (transformers.OPTForCausalLM, OPTForCausalLM):
        model = cls.from_pretrained(tmp_path, key_mapping=mapping)
        with torch.no_grad():
            close(model(ids).logits, theirs(ids).logits)


def test_saving_options(tiny, ids, tmp_path):
    _, ours = pair(tiny()[0])
    doubled = {name: p * 2 if name.endswith("fc1.bias") else p for name, p in ours.state_dict().items()}
    ours.save_pretrained(tmp_path / "bin", state_dict=doubled, safe_serialization=False)
    assert (tmp_path / "bin" / "pytorch_model.bin").is_file()
    theirs = transformers.OPTForCausalLM.from_pretrained(tmp_path / "bin", dtype=torch.float32)
    ours.load_state_dict(doubled)
    with torch.no_grad():
        close(ours(ids).logits, theirs(ids).logits)
    ours.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="push_to_hub"):
        ours.save_pretrained(tmp_path / "none", push_to_hub=True)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["grows", "fixed", "DynamicCache", "StaticCache"])
def test_caches(tiny, ids, kind, grad):
    """A hand-written loop over any cache gives what one call gives; with gradients through the past."""
    ours = OPTForCausalLM.from_pretrained(tiny()[0], dtype="float64")
    cache = {
        "grows": lambda: KVCache(),
        "fixed": lambda: ours.init_cache(2, 12),
        "DynamicCache": transformers.DynamicCache,
        "StaticCache": lambda: transformers.StaticCache(ours.config, max_cache_len=12),
    }[kind]()
    if grad and kind in ("fixed", "StaticCache"):
        pytest.skip("written in place")
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.set_grad_enabled(grad):
        wanted = ours(ids, mask).logits
        pieces = []
        for begin, end in ((0, 4), (4, 5), (5, 9)):
            out = ours(ids[:, begin:end], mask[:, :end], past_key_values=cache)
            cache = out.past_key_values
            pieces.append(out.logits)
        close(torch.cat(pieces, dim=1)[mask == 1], wanted[mask == 1])
        if grad:
            pieces[-1].sum().backward()
            found = ours.model.decoder.layers[0].self_attn.k_proj.weight.grad
            ours.zero_grad()
            ours(ids, mask).logits[:, 5:].sum().backward()
            close(found, ours.model.decoder.layers[0].self_attn.k_proj.weight.grad)


class Evicting(transformers.DynamicCache):
    """Keeps the first slot and the last three."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx)
        layer = self.layers[layer_idx]
        layer.keys, layer.values = (torch.cat([x[:, :, :1], x[:, :, 1:][:, :, -3:]], 2) for x in (keys, values))
        return keys, values


@pytest.mark.parametrize("kind", ["other layers", "scaled", "evicting"])
def test_caches_that_users_edit(tiny, ids, kind):
    """What is put in the place of a layer's keys and values counts, however many there are."""
    answers = []
    for model in pair(tiny()[0]):
        with torch.no_grad():
            if kind == "evicting":
                cache, positions = Evicting(), torch.arange(9)
                logits = [model(ids[:, i : i + 1], past_key_values=cache, position_ids=positions[i : i + 1]).logits
                          for i in range(9)]  # fmt: skip
                answers.append(torch.cat(logits, dim=1))
                continue
            cache = model(ids).past_key_values
            for layer in cache.layers:
                if kind == "scaled":
                    layer.values.mul_(0.5)
                else:
                    layer.keys = layer.keys[:, :, [0, 2, 5]]
                    layer.values = layer.values[:, :, [0, 2, 5]]
            assert cache.get_seq_length() == cache.layers[-1].get_seq_length() == (9 if kind == "scaled" else 3)
            for token in (7, 8):
                out = model(torch.full((2, 1), token), past_key_values=cache, position_ids=torch.tensor([[token]]))
            answers.append(out.logits)
    close(answers[1], answers[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("config", ["pre-norm", "350m"])
def test_layers_called_one_by_one(tiny, config, implementation, rng):
    """With the arguments of transformers' layers; without a mask its eager attention sees all, its sdpa what is
    earlier."""
    theirs, ours = pair(tiny(config)[0], attn_implementation=implementation)
    x = torch.from_numpy(rng.normal(size=(2, 5, theirs.config.hidden_size)).astype("float32"))

    def answers(model):
        layer, cache = model.model.decoder.layers[0], transformers.DynamicCache(config=model.config)
        yield layer(x)
        yield layer(x, output_attentions=True)
        yield layer(x, use_cache=False, position_ids=torch.arange(5)[None])
        yield layer.self_attn(hidden_states=x, past_key_values=cache)[0]
        yield layer.self_attn(x[:, :1], cache)[0]
        name = "cache" if hasattr(model, "init_cache") else "past_key_values"  # ours takes both names
        yield layer(x[:, :1], **{name: cache})

    with torch.no_grad():
        for found, wanted in zip(answers(ours), answers(theirs), strict=True):
            close(found, wanted)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_four_dimensions(tiny, ids, implementation):
    """What each token sees, written out: here the first four see each other, and the last does not see the second."""
    theirs, ours = pair(tiny()[0], attn_implementation=implementation)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    seen[:4, :4] = True
    seen[8, 1] = False
    mask = torch.zeros(1, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.arange(9)[None]
    with torch.no_grad():
        whole = theirs(ids, attention_mask=mask, position_ids=positions).logits
        for given in (mask, seen[None, None]):
            close(ours(ids, attention_mask=given, position_ids=positions).logits, whole)
            begin = ours(ids[:, :4], attention_mask=given[..., :4, :4], position_ids=positions[:, :4])
            cut = {"past_key_values": begin.past_key_values, "position_ids": positions[:, 4:]}
            close(ours(ids[:, 4:], attention_mask=given[..., 4:, :], **cut).logits, whole[:, 4:])
    with pytest.raises(ValueError, match="position_ids: found None"):
        ours(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask: found shape \[1, 1, 9, 8\]"):
        ours(ids, attention_mask=mask[..., :8], position_ids=positions)


def test_reentrant_gradient_checkpointing(tiny, ids):
    theirs, ours = pair(tiny()[0], dropout=0.0)
    for model in (theirs.train(), ours.train()):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
    assert ours.is_activation_checkpointing
    close(ours.model.decoder.layers[0].fc1.weight.grad, theirs.model.decoder.layers[0].fc1.weight.grad)


def test_gradients_of_each_row(tiny, ids):
    """torch.func.vmap, under which no value can be looked at."""
    _, ours = pair(tiny()[0], attn_implementation="eager")
    bias = "model.decoder.layers.0.fc1.bias"

    def loss(value, row, mask):
        call = {"attention_mask": mask[None], "labels": row[None], "use_cache": False}
        return torch.func.functional_call(ours, {bias: value}, (row[None],), call).loss

    value = ours.get_parameter(bias).detach()
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(value, ids, torch.ones_like(ids))
    for row, gradient in zip(ids, found, strict=True):
        ours.zero_grad()
        ours(row[None], labels=row[None]).loss.backward()
        close(gradient, ours.get_parameter(bias).grad)


def test_the_flag_of_gradient_checkpointing_set_by_hand(tiny, ids):
    """As transformers' users do on its decoder."""
    _, ours = pair(tiny()[0], dropout=0.0)
    ours.train()(ids, labels=ids).loss.backward()
    wanted = ours.model.decoder.layers[0].fc1.weight.grad
    ours.zero_grad()
    ours.model.decoder.gradient_checkpointing = True
    ours(ids, labels=ids).loss.backward()
    close(ours.model.decoder.layers[0].fc1.weight.grad, wanted)


def test_rows_of_a_cache(tiny, ids):
    _, ours = pair(tiny()[0])
    token = torch.tensor([[5], [7]])
    with torch.no_grad():
        cache = ours(ids).past_key_values
        assert (len(cache), cache.get_seq_length(), cache[1][0].shape) == (3, 9, (2, 4, 9, 16))
        assert torch.equal(cache.layers[1].values, cache[1][1])
        cache.reorder_cache(torch.tensor([1, 1]))
        close(ours(token, past_key_values=cache).logits, ours(torch.cat([ids[[1, 1]], token], 1)).logits[:, -1:])
        assert ours(token, cache=ours(ids).past_key_values).cache.get_seq_length() == 10  # transformers 5.24's name
        cache.crop(-4)
        close(ours(token, past_key_values=cache).logits, ours(torch.cat([ids[[1, 1], :6], token], 1)).logits[:, -1:])
        cache = ours(ids).past_key_values
        cache.batch_repeat_interleave(2)
        close(ours(token[[0, 0, 1, 1]], past_key_values=cache).logits,
              ours(torch.cat([ids, token], 1)).logits[[0, 0, 1, 1], -1:])  # fmt: skip


def test_a_cache_of_fewer_heads(tiny, ids):
    """As pruning leaves them; the config still has all."""
    _, ours = pair(tiny()[0])
    for layer in ours.model.decoder.layers:
        attention, kept = layer.self_attn, layer.self_attn.head_dim
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight, linear.bias = nn.Parameter(linear.weight[:kept]), nn.Parameter(linear.bias[:kept])
        attention.out_proj.weight = nn.Parameter(attention.out_proj.weight[:, :kept])
    with torch.no_grad():
        past = ours(ids[:, :5]).past_key_values
        close(ours(ids[:, 5:], past_key_values=past).logits, ours(ids).logits[:, 5:])


def test_what_modules_are_given(tiny, ids):
    """Hooks see tensors of the same shapes; masks, positions and their names too, so that those who set them can."""
    mask, seen = torch.ones_like(ids), ([], [])
    mask[1, :2] = 0
    for model, shapes in zip(pair(tiny()[0], attn_implementation="eager"), seen, strict=True):

        def given(module, args, kwargs, shapes=shapes):
            tensors = {name: x for name, x in kwargs.items() if name in ("attention_mask", "position_ids")}
            shapes.append({name: (x.shape, x.dtype, (x == 0).sum()) for name, x in tensors.items()})
            shapes.append((len(args), kwargs.keys() - {"past_key_values", "cache"}))

        layer = model.model.decoder.layers[0]
        for module in (layer, layer.self_attn):
            module.register_forward_pre_hook(given, with_kwargs=True)
        for module in model.modules():
            if not [*module.children()]:
                module.register_forward_hook(lambda module, args, out, shapes=shapes: shapes.append(out.shape))
        with torch.no_grad():
            for x in (None, mask):
                model(ids, x)
    assert len(seen[0]) > 50 and seen[1] == seen[0]


def test_a_decoder_is_a_model(tiny):
    for model in pair(tiny()[0]):
        decoder = model.get_decoder()
        assert (decoder.device, decoder.dtype) == (model.device, model.dtype)
        assert decoder.get_input_embeddings() is model.get_input_embeddings() and decoder.get_decoder() is decoder
        assert decoder.num_parameters() == model.num_parameters()
        model.set_decoder(new := nn.Identity())
        assert model.get_decoder() is new


def test_a_class_of_ones_own(tiny, ids):
    """OPT's base class, an OPT as its `model`, and a head that transformers does not have."""

    def reward(base, inner):
        class Reward(base):
            def __init__(self, config):
                super().__init__(config)
                self.model = inner(config)
                self.value = nn.Linear(config.hidden_size, 1)
                self.post_init()

            def _init_weights(self, module):
                super()._init_weights(module)
                if module is self.value:
                    nn.init.constant_(module.bias, 7.0)

            def forward(self, *args):
                return self.value(self.model(*args).last_hidden_state)

        return Reward

    theirs = reward(transformers.OPTPreTrainedModel, transformers.OPTModel).from_pretrained(tiny()[0])
    ours = reward(OPTPreTrainedModel, OPTModel).from_pretrained(tiny()[0])
    assert ours.value.weight.std() > 0 and ours.value.bias == theirs.value.bias == 7
    ours.value.load_state_dict(theirs.value.state_dict())
    with torch.no_grad():
        close(ours(ids), theirs(ids))


@pytest.mark.filterwarnings("ignore:.*newly initialized")
@pytest.mark.parametrize(
    "name", ["OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"]
)
def test_a_config_of_transformers(tiny, ids, name):
    """Scripts that import the config, or AutoConfig, from there still."""
    config = transformers.AutoConfig.from_pretrained(tiny()[0], dropout=0.3, num_labels=4)
    theirs = getattr(transformers, name)(config).eval()
    for ours in (
        getattr(opt_pt, name)(config).eval(),
        getattr(opt_pt, name).from_pretrained(tiny()[0], config=config),
    ):
        assert type(ours.config) is OPTConfig and ours.config.dropout == 0.3
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            close(ours(ids)[0], theirs(ids)[0])


def test_a_decoding_loop_by_hand(tiny, ids):
    """Of the two methods that transformers' own loop is made of."""
    texts = []
    for model in pair(tiny()[0]):
        text, given, length = ids, {"attention_mask": torch.ones_like(ids), "use_cache": True}, None
        for _ in range(4):
            inputs = model.prepare_inputs_for_generation(text, next_sequence_length=length, **given)
            assert inputs["input_ids"].shape[1] == (length or 9)
            with torch.no_grad():
                out = model(**inputs)
            text = torch.cat([text, out.logits[:, -1:].argmax(dim=-1)], dim=1)
            given, length = model._update_model_kwargs_for_generation(out, given), 1
        texts.append(text)
    assert torch.equal(texts[1], texts[0])


def test_what_generate_is_given(tiny, ids):
    """Seq2SeqTrainer gives all of its batch; some give their settings second."""
    theirs, ours = pair(tiny()[0])
    options = {"labels": ids, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    config = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=2, pad_token_id=1)  # the second argument
    assert torch.equal(ours.generate(ids, config), theirs.generate(ids, config))


def test_the_loss_function_is_the_users(tiny, ids):
    for model in pair(tiny()[0]):
        plain = model(ids, labels=ids).loss
        close(model.loss_function(model(ids).logits, ids, vocab_size=96), plain)
        flat = model(ids, labels=ids.flatten()).loss  # shifted as it is: a row's last token learns the next row's first
        close(flat, nn.functional.cross_entropy(model(ids).logits.flatten(0, 1)[:-1], ids.flatten()[1:]))
        with_3 = model(ids, labels=ids.where(ids > 40, 3), ignore_index=3).loss
        close(with_3, model(ids, labels=ids.where(ids > 40, -100)).loss)
        model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().sum() / vocab_size
        close(model(ids, labels=ids).loss, model(ids).logits.square().sum() / 96)


@pytest.mark.filterwarnings("ignore:.*newly initialized")
def test_the_problem_that_labels_make(tiny, ids):
    """A model's config says from the first labels on which problem it is; pipelines go by it."""
    for package in (transformers, opt_pt):
        model = package.OPTForSequenceClassification.from_pretrained(tiny()[0], num_labels=2)
        assert (model.num_labels, model.config.problem_type) == (2, None)
        model(ids, labels=torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        assert model.config.problem_type == "multi_label_classification"


@pytest.mark.filterwarnings("ignore:.*newly initialized")
def test_answers_of_question_answering(tiny, ids):
    for package in (transformers, opt_pt):
        out = package.OPTForQuestionAnswering.from_pretrained(tiny()[0])(ids)
        assert list(out) == ["start_logits", "end_logits"]


def test_positions_for_all_rows_and_shapes_alone(tiny, ids):
    theirs, ours = pair(tiny()[0])
    with torch.no_grad():
        positions = torch.arange(9)
        close(ours(ids, position_ids=positions).logits, theirs(ids, position_ids=positions).logits)
        assert ours.to("meta")(ids.to("meta")).logits.shape == (2, 9, 96)
