"""What opt_tf has of its own: one program for many numbers, tf.function, SavedModel, and what the host does."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_reference, save_reference

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from opt_common.config import OPTConfig  # noqa: E402
from opt_common.generation import TextStreamer  # noqa: E402
from opt_common.tokenizer import GPT2Tokenizer  # noqa: E402
from opt_tf import TFOPTForCausalLM  # noqa: E402
from opt_tf.generation import programs  # noqa: E402
from opt_tf.generation.drafts import draft  # noqa: E402
from opt_tf.generation.generate import _generate  # noqa: E402
from opt_tf.generation.prompts import prepared  # noqa: E402
from opt_tf.layers import Linear  # noqa: E402
from opt_tf.model import OPTDecoderLayer  # noqa: E402

SIZE = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, init_std=0.4)


@pytest.fixture(scope="module")
def reference():
    model = make_reference(7, **SIZE)
    model.set_attn_implementation("eager")  # else there are no attentions
    return model


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    return TFOPTForCausalLM.from_pretrained(save_reference(reference, tmp_path_factory.mktemp("small") / "model"))


@pytest.fixture(scope="module")
def prompts():
    """Two rows of seven and four tokens, the padding on the left, and their mask."""
    ids = np.random.default_rng(1).integers(3, 96, (2, 7))
    ids[1, :3] = 1
    return ids, (ids != 1).astype(int)


def wanted(reference, prompts, **options):
    ids, mask = map(torch.tensor, prompts)
    return reference.generate(ids, attention_mask=mask, **options)


def test_another_number_takes_no_other_program(model, prompts):
    def traces(**options) -> int:
        before = _generate[0].experimental_get_tracing_count()
        texts = [model.generate(*prompts, max_new_tokens=5, **{k: v[i] for k, v in options.items()}).numpy().tolist()
                 for i in range(2)]  # fmt: skip
        assert texts[0] != texts[1], "the numbers did nothing"
        return _generate[0].experimental_get_tracing_count() - before

    drawn = dict(do_sample=(True, True), temperature=(3.0, 1.0), top_k=(9, 50), top_p=(0.9, 0.5), seed=(1, 2))
    assert traces(**drawn) == 1
    bias = {(5,): 2.0, (7, 8): 1.0}, {(9,): 90.0, (5, 8): -1.0}
    looked = dict(repetition_penalty=(1.1, 1.9), no_repeat_ngram_size=(2, 3), sequence_bias=bias)
    assert traces(num_beams=(2, 2), length_penalty=(0.0, 2.0), **looked) == 1


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_returned_cache_takes_no_program_of_its_width(num_beams, model, prompts):
    """Prompts of 7, 6 and 5 columns share one program, and the cache, which a call goes on from, has theirs alone."""
    traces, (ids, mask) = [], prompts
    for width in (7, 6, 5):
        given = ids[:, -width:], mask[:, -width:]
        out = model.generate(*given, max_new_tokens=4, num_beams=num_beams, return_dict_in_generate=True)
        traces.append(_generate[0].experimental_get_tracing_count())
        cache, T = out.past_key_values, out.sequences.shape[1]
        assert cache.get_seq_length() == T - 1
        if num_beams == 1:  # a beam search's has rows for all beams
            seen = np.concatenate([given[1], np.ones((2, 4), int)], axis=1)
            last = model(out.sequences[:, -1:], attention_mask=seen, past_key_values=cache).logits[:, 0]
            np.testing.assert_allclose(last, model(out.sequences, attention_mask=seen).logits[:, -1], rtol=0, atol=1e-4)
    assert traces[0] == traces[-1]


@pytest.mark.parametrize("jit", [True, False])
def test_in_a_function(jit, model, reference, prompts):
    """The width is fixed there: what eager calls leave out is padding."""
    options = dict(max_new_tokens=9, no_repeat_ngram_size=2, eos_token_id=int(model.generate(*prompts)[0, 9]))
    run = tf.function(model.generate, jit_compile=jit)
    found = run(*map(tf.constant, prompts), **options).numpy()
    assert found.shape == (2, 16)
    text = wanted(reference, prompts, pad_token_id=1, **options).numpy()
    np.testing.assert_array_equal(found[:, : text.shape[1]], text)
    assert (found[:, text.shape[1] :] == 1).all()
    with pytest.raises(ValueError, match="streamer: found in a tf.function"):
        run(*map(tf.constant, prompts), streamer=print)


def test_a_saved_model_serves_without_this_package(model, prompts, tmp_path):
    spec = [tf.TensorSpec((None, None), tf.int32, name) for name in ("input_ids", "attention_mask")]
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", lambda i, m: {"sequences": model.generate(i, m, max_new_tokens=6)}, spec)
    archive.write_out(tmp_path / "served", verbose=False)
    ids, mask = prompts
    np.savez(tmp_path / "prompts.npz", ids=ids, mask=mask)
    code = """
        import sys
        import numpy as np, tensorflow as tf
        serve = tf.saved_model.load("served").signatures["serving_default"]
        given = np.load("prompts.npz")
        for rows in (1, 2):
            ids, mask = (tf.constant(given[k][:rows, 3 * (rows - 2) :], tf.int32) for k in ("ids", "mask"))
            np.save(f"{rows}.npy", serve(input_ids=ids, attention_mask=mask)["sequences"])
        assert not {"opt_tf", "opt_common"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True)
    for rows in (1, 2):
        cut = [x[:rows, 3 * (rows - 2) :] for x in prompts]
        np.testing.assert_array_equal(np.load(tmp_path / f"{rows}.npy"), model.generate(*cut, max_new_tokens=6))


def test_the_random_state_and_seeds(model, prompts):
    def text(**options):
        return model.generate(*prompts, do_sample=True, temperature=4.0, max_new_tokens=8, **options).numpy().tolist()

    texts = []
    for set_seed in (tf.random.set_seed, keras.utils.set_random_seed):
        for _ in range(2):
            set_seed(3)
            texts.append((text(), text()))
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert texts[0][0] != texts[0][1]
    assert text(seed=[1, 2]) == text(seed=(1, 2)) != text(seed=[2, 1])
    with pytest.raises(ValueError, match=r"seed: found \(1, 2, 3\), wanted a number or two"):
        text(seed=[1, 2, 3])


def test_logits_processors_of_both_forms(model, prompts):
    """The width of the text so far, prompt included, is the token that they ask for."""
    V = model.config.vocab_size
    forms = [
        lambda ids, scores: tf.where(tf.range(V) == tf.shape(ids)[1], 1e4, scores),
        lambda ids, scores, cur_len: tf.where(tf.range(V) == cur_len, 1e4, scores),
    ]
    for form in forms:
        found = model.generate(*prompts, max_new_tokens=4, logits_processor=[form])
        np.testing.assert_array_equal(found[:, 7:], [[7, 8, 9, 10]] * 2)


def test_what_the_host_does(model, reference, prompts):
    """Allowed tokens and criteria, of beams and of rows, as transformers has them."""

    def allowed(row, tokens):
        return [5 + row, 30, 40, int(tokens[-1]) % 90, int(tokens[0])]

    def criterion(ids, scores, **_):
        assert scores is None
        return [len(ids[0]) >= 10 + row for row in range(len(ids))]

    beams = dict(max_new_tokens=6, num_beams=2, prefix_allowed_tokens_fn=allowed)
    np.testing.assert_array_equal(model.generate(*prompts, **beams), wanted(reference, prompts, **beams))
    rows = dict(max_new_tokens=9, prefix_allowed_tokens_fn=allowed, stopping_criteria=[criterion])
    found = model.generate(*prompts, **rows)
    text = wanted(reference, prompts, **rows | {"stopping_criteria": [lambda *args: torch.tensor(criterion(*args))]})
    np.testing.assert_array_equal(found, text)
    assert found.shape == (2, 11)
    assert model.generate(*prompts, max_new_tokens=9, max_time=0.0).shape == (2, 8)


def test_text_as_it_is_written(model, prompts, capsys):
    tokenizer = GPT2Tokenizer.from_pretrained("opt-demo")
    ids = prompts[0][:1]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=8)[0, 7:].numpy(), skip_special_tokens=True)
    assert "".join(model.stream(ids, tokenizer=tokenizer, max_new_tokens=8)) == text
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(ids, max_new_tokens=8, streamer=streamer)
    assert capsys.readouterr().out == text + "\n"
    with pytest.raises(ValueError, match="stream: found 2 texts, wanted one"):
        model.stream(prompts[0], tokenizer=tokenizer)


def test_drafts_change_nothing_but_the_passes(model, prompts, tmp_path):
    near = make_reference(7, **SIZE)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    assistant = TFOPTForCausalLM.from_pretrained(save_reference(near, tmp_path / "near"))
    ids = prompts[0][:1]

    def passes(**how) -> int:
        text = model.generate(ids, **options)
        np.testing.assert_array_equal(model.generate(ids, **options, **how), text)
        call = prepared(model, ids, None, options | how)
        run = tf.function(
            lambda: draft(*call.models, call.start, call.ahead, call.numbers, call.plan)[1], autograph=False
        )
        return int(run())

    options = dict(max_new_tokens=57)  # the last drafts reach beyond the position table
    assert passes(assistant_model=assistant, num_assistant_tokens=4) < 40
    options = dict(max_new_tokens=20, do_sample=True, temperature=2.0, seed=3, repetition_penalty=1.2)
    assert passes(assistant_model=assistant, num_assistant_tokens=4) < 16
    options = dict(max_new_tokens=30, bad_words_ids=[[i] for i in range(3, 90)])  # a text that repeats itself
    assert passes(prompt_lookup_num_tokens=4) < 25


def by_hand(model, ids, new: int) -> np.ndarray:
    """Continued by the modules, which nothing has compiled."""
    for _ in range(new):
        ids = np.concatenate([ids, np.argmax(model(ids).logits[:, -1:], axis=-1)], axis=1)
    return ids


def drawn(seed: int) -> Any:
    return TFOPTForCausalLM(
        OPTConfig(**SIZE, vocab_size=96, eos_token_id=None), keras.initializers.RandomNormal(0, 0.4, seed)
    )


def test_models_of_one_kind_share_their_programs(prompts, tmp_path):
    ids, counts = prompts[0][:1], []
    drawn(0).save_pretrained(tmp_path / "0")
    drawn(1).save_pretrained(tmp_path / "1")
    for name in "01":
        model = TFOPTForCausalLM.from_pretrained(tmp_path / name)
        np.testing.assert_array_equal(model.generate(ids, max_new_tokens=6), by_hand(model, ids, 6))
        counts.append(_generate[0].experimental_get_tracing_count())
    assert counts[0] == counts[1]
    model.compile("adam")
    model.generate(ids, max_new_tokens=6)
    assert counts[0] == _generate[0].experimental_get_tracing_count()


class Other(Linear):
    def call(self, x, training=None):
        return -9 * super().call(x)


def other_class(layer):
    old, layer.fc2 = layer.fc2, Other(32, 32)
    layer.fc2.build()
    layer.fc2.set_weights(old.get_weights())


def other_call(layer):
    usual = layer.fc2.call
    layer.fc2.call = lambda x, **how: -9 * usual(x, **how)


def other_number(layer):
    layer.self_attn.scaling = 4.0


def other_function(layer):
    layer.activation_fn = tf.nn.sigmoid


@pytest.mark.parametrize("change", [other_class, other_call, other_number, other_function])
def test_a_changed_model_takes_other_programs(change, prompts):
    """Whether it was changed before its first text or after it; and the next model is not taken for it."""
    ids = prompts[0][:1]
    whole, changed, last = (drawn(3) for _ in range(3))
    before = whole.generate(ids, max_new_tokens=6)
    np.testing.assert_array_equal(changed.generate(ids, max_new_tokens=6), before)
    change(changed.model.decoder.layers[0])
    found = changed.generate(ids, max_new_tokens=6)
    assert not np.array_equal(found, before), "the change did nothing"
    np.testing.assert_array_equal(found, by_hand(changed, ids, 6))
    np.testing.assert_array_equal(last.generate(ids, max_new_tokens=6), before)


def test_a_changed_class_takes_other_programs(prompts, monkeypatch):
    ids, model = prompts[0][:1], drawn(3)
    before = model.generate(ids, max_new_tokens=6)
    whole = OPTDecoderLayer.call
    monkeypatch.setattr(OPTDecoderLayer, "call", lambda self, x, *args, **kwargs: whole(self, -x, *args, **kwargs))
    for each in (model, drawn(3)):
        found = each.generate(ids, max_new_tokens=6)
        assert not np.array_equal(found, before), "the change did nothing"
        np.testing.assert_array_equal(found, by_hand(each, ids, 6))


def test_without_xla_when_there_are_many_programs(model, prompts, monkeypatch):
    """Or the process would run into Linux's limit of memory maps."""
    ids, mask = (np.concatenate([x, x[:1]]) for x in prompts)  # a number of rows that no other test has
    with_xla = model.generate(*prompts, max_new_tokens=6)
    monkeypatch.setattr(programs, "MOST", 0)
    before = _generate[0].experimental_get_tracing_count()
    np.testing.assert_array_equal(model.generate(ids, mask, max_new_tokens=6)[:2], with_xla)
    assert _generate[0].experimental_get_tracing_count() == before


def test_other_inputs(model, reference, prompts):
    ids, mask = prompts
    options = dict(max_new_tokens=6, repetition_penalty=1.3)
    text = wanted(reference, prompts, **options).numpy()
    np.testing.assert_array_equal(model.generate({"input_ids": ids, "attention_mask": mask}, **options), text)
    cache = model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=model.init_cache(2, 9)).past_key_values
    np.testing.assert_array_equal(model.generate(ids, mask, past_key_values=cache, **options), text)
    embeds = reference.get_input_embeddings()(torch.tensor(ids)).detach().numpy().astype(np.float32)
    found = model.generate(ids, mask, inputs_embeds=embeds, **options)
    np.testing.assert_array_equal(found, text)
    plain = wanted(reference, prompts, max_new_tokens=6).numpy()
    np.testing.assert_array_equal(
        model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6), plain[:, 7:]
    )
    assert model.generate(max_new_tokens=2)[0, 0] == model.config.bos_token_id


def close(found, wanted) -> None:
    np.testing.assert_allclose(np.asarray(found), wanted.float().detach().numpy(), rtol=0, atol=2e-4)


def test_the_output(model, reference, prompts):
    options = dict(max_new_tokens=4, return_dict_in_generate=True, output_scores=True, output_logits=True,
                   output_attentions=True, output_hidden_states=True)  # fmt: skip
    ours, theirs = model.generate(*prompts, **options), wanted(reference, prompts, **options)
    assert ours.past_key_values.length == 10
    for name in ("scores", "logits"):
        assert len(ours[name]) == 4
        for x, y in zip(ours[name], theirs[name], strict=True):
            close(x, y)
    for name in ("attentions", "hidden_states"):
        for found, made in zip(ours[name], theirs[name], strict=True):
            for x, y in zip(found, made, strict=True):
                close(x[0], y[0])  # of the row without padding
    options = dict(max_new_tokens=6, num_beams=3, num_return_sequences=2, return_dict_in_generate=True,
                   output_scores=True, eos_token_id=[*range(3, 20)])  # fmt: skip
    ours, theirs = model.generate(*prompts, **options), wanted(reference, prompts, **options)
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    np.testing.assert_array_equal(ours.beam_indices, theirs.beam_indices)
    close(ours.sequences_scores, theirs.sequences_scores)
    fields = "sequences", "scores", "beam_indices"
    for normalize in (True, False):
        found = model.compute_transition_scores(*map(ours.get, fields), normalize_logits=normalize)
        close(found, reference.compute_transition_scores(*map(theirs.get, fields), normalize_logits=normalize))
