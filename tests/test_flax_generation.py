"""Generation in JAX beyond the text: outputs, the caller's functions, transformations, compilations; judged by
transformers' model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
import jax.numpy as jnp  # noqa: E402

from conftest import make_reference, save_reference  # noqa: E402
from opt_common.outputs import GenerateOutput  # noqa: E402
from opt_flax import FlaxOPTForCausalLM  # noqa: E402
from opt_flax.generation import loop  # noqa: E402
from opt_flax.generation.drafts import _looked_up  # noqa: E402
from opt_flax.generation.loop import run  # noqa: E402

IDS = np.array([[1, 1, 40, 17, 63], [9, 71, 30, 52, 8]])
MASK = (IDS != 1).astype(int)
FREE = dict(eos_token_id=None, pad_token_id=1)  # no token ends a text


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' model and ours."""
    reference = make_reference(7, num_hidden_layers=1, init_std=0.4)
    folder = save_reference(reference, tmp_path_factory.mktemp("model"))
    return reference, FlaxOPTForCausalLM.from_pretrained(folder)


def judged(reference, ids, mask=None, **options):
    mask = None if mask is None else torch.tensor(mask)
    return reference.generate(torch.tensor(ids), attention_mask=mask, **(dict(do_sample=False) | options))


def close(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted.numpy(), rtol=1e-4, atol=2e-3)


OUTPUTS = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_attentions=True,
               output_hidden_states=True)  # fmt: skip


@pytest.mark.parametrize("options", [dict(repetition_penalty=1.3), dict(num_beams=3, num_return_sequences=2)], ids=str)
def test_outputs(options, pair):
    reference, model = pair
    reference.set_attn_implementation("eager")
    options = options | dict(max_new_tokens=4, eos_token_id=[17, 63, 5], pad_token_id=1) | OUTPUTS
    wanted, found = judged(reference, IDS, MASK, **options), model.generate(IDS, MASK, **options)
    reference.set_attn_implementation("sdpa")
    np.testing.assert_array_equal(found.sequences, wanted.sequences)
    for name in ("scores", "logits"):
        assert len(found[name]) == len(wanted[name])
        for x, y in zip(found[name], wanted[name], strict=True):
            close(x, y)
    for name in ("attentions", "hidden_states"):
        assert len(found[name]) == len(wanted[name])
        for layers, others in zip(found[name], wanted[name], strict=True):
            for x, y in zip(layers, others, strict=True):
                padding = np.s_[:] if x.shape[-2] == 1 else np.s_[..., 2:, :]  # what padding computes is nobody's
                close(np.asarray(x)[padding], y[padding])
    if "num_beams" in options:
        np.testing.assert_array_equal(found.beam_indices, wanted.beam_indices)
        close(found.sequences_scores, wanted.sequences_scores)
    for normalize in (False, True):
        fields = ("sequences", "scores", "beam_indices")
        close(
            model.compute_transition_scores(*(found.get(name) for name in fields), normalize_logits=normalize),
            reference.compute_transition_scores(*(wanted.get(name) for name in fields), normalize_logits=normalize),
        )


def test_a_cache_goes_on(pair):
    """From a text's own cache, and from one of a call: what the whole prompt gives."""
    _, model = pair
    first = model.generate(IDS, MASK, max_new_tokens=6, return_dict_in_generate=True, **FREE)
    assert int(first.past_key_values.length) == 10
    further = np.concatenate([first.sequences, [[30, 31], [32, 33]]], axis=1)
    mask = np.pad(MASK, ((0, 0), (0, 8)), constant_values=1)
    wanted = model.generate(further, mask, max_new_tokens=9, **FREE)
    found = model.generate(further, mask, past_key_values=first.past_key_values, max_new_tokens=9, **FREE)
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match="past_key_values: found 10 tokens, wanted fewer than the prompt's 5"):
        model.generate(IDS, past_key_values=first.past_key_values)


def test_embeddings(pair):
    reference, model = pair
    embeds = reference.get_input_embeddings()(torch.tensor(IDS)).detach()
    options = dict(max_new_tokens=6, repetition_penalty=1.5, no_repeat_ngram_size=2, do_sample=False,
                   **FREE)  # fmt: skip
    mask, given = torch.tensor(MASK), embeds.float().numpy()
    wanted = reference.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    assert wanted.shape == (2, 6)
    np.testing.assert_array_equal(model.generate(inputs_embeds=given, attention_mask=MASK, **options), wanted)
    wanted = reference.generate(torch.tensor(IDS), inputs_embeds=embeds * 0.9, attention_mask=mask, **options)
    np.testing.assert_array_equal(model.generate(IDS, MASK, inputs_embeds=given * np.float32(0.9), **options), wanted)


def test_right_padding_gives_what_a_row_gives_alone(pair):
    _, model = pair
    options = dict(repetition_penalty=1.7, no_repeat_ngram_size=2, max_new_tokens=8, **FREE)
    right = np.array([[40, 17, 63, 1, 1], IDS[1]])
    found, wanted = model.generate(right, **options), model.generate(right[:1, :3], **options)
    np.testing.assert_array_equal(found[0, 5:], wanted[0, 3:])


# === The caller's functions ===


def below(ids, scores):
    """Forbids what is not below the last token, and the even tokens behind an even number of them."""
    tokens, xp = np.arange(scores.shape[-1]), torch if isinstance(scores, torch.Tensor) else jnp
    forbidden = xp.asarray(tokens)[None] > ids[:, -1:] + 20
    return xp.where(forbidden | xp.asarray((tokens + ids.shape[1]) % 2 == 0), -np.inf, scores)


def below_traced(ids, scores, cur_len):
    tokens = jnp.arange(scores.shape[-1])
    forbidden = tokens > ids[:, cur_len - 1][:, None] + 20
    return jnp.where(forbidden | ((tokens + cur_len) % 2 == 0), -jnp.inf, scores)


@pytest.mark.parametrize("beams", [1, 2])
def test_logits_processor(beams, pair):
    reference, model = pair
    options = dict(num_beams=beams, max_new_tokens=8, repetition_penalty=1.2, renormalize_logits=True, **FREE)
    wanted = judged(reference, IDS, MASK, logits_processor=[below], **options)
    for function in (below, [below_traced]):
        np.testing.assert_array_equal(model.generate(IDS, MASK, logits_processor=function, **options), wanted)


def test_prefix_allowed_tokens_fn(pair):
    reference, model = pair

    def allowed(row, ids):
        last = int(ids[-1])
        return [(last * 7 + i) % 90 + 3 + row for i in range(4)] if len(ids) < 9 else [44]

    options = dict(prefix_allowed_tokens_fn=allowed, num_beams=2, num_return_sequences=2, max_new_tokens=6, **FREE)
    wanted = judged(reference, IDS, MASK, **options)
    np.testing.assert_array_equal(model.generate(IDS, MASK, **options), wanted)
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn: found no tokens for row 0"):
        model.generate(IDS, MASK, prefix_allowed_tokens_fn=lambda row, ids: [])


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3)], ids=str)
def test_what_stops_a_text(options, pair):
    """stopping_criteria and stop_strings see the tokens so far, padded on the left; rows end on their own."""
    reference, model = pair
    options = options | dict(max_new_tokens=12, eos_token_id=2, pad_token_id=1)
    free = judged(reference, IDS, MASK, **options).numpy()

    def stops(ids, scores):
        ends = [int(token) in (free[0, 8], free[1, 7]) for token in ids[:, -1]]
        return torch.tensor(ends) if isinstance(ids, torch.Tensor) else np.array(ends)

    wanted = judged(reference, IDS, MASK, stopping_criteria=[stops], **options)
    assert wanted.tolist() != free.tolist()
    np.testing.assert_array_equal(model.generate(IDS, MASK, stopping_criteria=stops, **options), wanted)
    letters = SimpleNamespace(decode=lambda ids, **how: "".join(chr(0x100 + i) for i in ids))
    strings = [chr(0x100 + int(token)) for token in (free[0, 8], free[1, 7])]
    found = model.generate(IDS, MASK, stop_strings=strings, tokenizer=letters, **options)
    np.testing.assert_array_equal(found, wanted)
    found = model.generate(IDS, MASK, max_time=0.0, **options)
    assert found.shape == (2, 6), "the first token is written whatever the time"


def test_streams(pair):
    _, model = pair
    seen = []
    streamer = SimpleNamespace(put=lambda ids: seen.append(ids.tolist()), end=lambda: seen.append("end"))
    options = dict(max_new_tokens=6, do_sample=True, temperature=5.0, seed=4, **FREE)
    text = model.generate(IDS[1:], streamer=streamer, **options)
    assert seen == [IDS[1:].tolist(), *([token] for token in np.asarray(text)[0, 5:].tolist()), "end"]
    np.testing.assert_array_equal(text, model.generate(IDS[1:], **options))
    letters = SimpleNamespace(decode=lambda ids, **how: "".join(chr(0x100 + i) for i in ids))
    pieces = list(model.stream(IDS[1:], tokenizer=letters, **options))
    assert pieces == [chr(0x100 + token) for token in np.asarray(text)[0, 5:].tolist()]
    for wrong in (dict(input_ids=IDS), dict(input_ids=IDS[1:], num_beams=2)):
        with pytest.raises(ValueError, match="input_ids: found 2 rows|num_beams: found 2, wanted 1"):
            model.stream(tokenizer=letters, **wrong)
        with pytest.raises(ValueError, match="input_ids: found 2 rows|num_beams: found 2, wanted 1"):
            model.generate(streamer=streamer, **wrong)


# === JAX's own ===


def test_sequences(pair):
    """An array, with what transformers' scripts look for."""
    _, model = pair
    text = model.generate(IDS, MASK, max_new_tokens=3)
    assert isinstance(text, jax.Array) and text.sequences.tolist() == text.tolist()
    text = jax.jit(lambda ids: model.generate(ids, max_new_tokens=3))(IDS)
    assert isinstance(text, jax.Array) and text.sequences.tolist() == text.tolist()

    def uses(ids):
        text = model.generate(ids, max_new_tokens=3)
        return text[:, 5:] + 0, text.shape[1] + jnp.asarray(text), text == text.sequences, len(text)

    new, shifted, same, rows = jax.jit(uses)(IDS)
    np.testing.assert_array_equal(new, text[:, 5:])
    np.testing.assert_array_equal(shifted, text + 8)
    assert same.all() and rows == 2


@pytest.mark.parametrize(
    "options",
    [dict(do_sample=True, seed=3, temperature=9.0), dict(num_beams=2, use_cache=False), dict(logits_processor=below)],
    ids=["rows", "beams", "function"],
)  # fmt: skip
def test_under_jit_and_pmap(options, pair):
    """The same text, with all columns."""
    _, model = pair
    options = dict(max_new_tokens=4, eos_token_id=80, pad_token_id=1) | options
    wanted = np.asarray(model.generate(IDS, MASK, **options))
    wanted = np.pad(wanted, ((0, 0), (0, 9 - wanted.shape[1])), constant_values=1)

    def write(ids, mask):
        return model.generate(ids, mask, **options).sequences

    np.testing.assert_array_equal(jax.jit(write)(IDS, MASK), wanted)
    if "seed" in options:
        np.testing.assert_array_equal(jax.pmap(write)(IDS[None], MASK[None])[0], wanted)


def test_outputs_under_jit(pair):
    _, model = pair
    options = dict(max_new_tokens=3, **FREE, **OUTPUTS)
    found = jax.jit(lambda ids, mask: model.generate(ids, mask, **options))(IDS, MASK)
    wanted = model.generate(IDS, MASK, **options)
    assert isinstance(found, GenerateOutput) and [*found] == [*wanted]
    for name in ("scores", "logits", "hidden_states", "attentions"):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3), found[name], wanted[name])


def test_keys_and_what_jit_cannot_have(pair):
    _, model = pair
    options = dict(do_sample=True, temperature=9.0, max_new_tokens=8, **FREE)

    def draw(**how):
        return model.generate(IDS, MASK, **options, **how).tolist()

    assert draw(prng_key=jax.random.PRNGKey(3)) == draw(prng_key=jax.random.PRNGKey(3))
    assert draw(prng_key=jax.random.PRNGKey(3)) != draw(prng_key=jax.random.PRNGKey(4))
    assert draw(seed=(3, 4)) == draw(seed=(3, 4)) != draw(seed=(3, 5))
    drawn = jax.jit(lambda key: model.generate(IDS, MASK, prng_key=key, **options))(jax.random.key(5))
    assert drawn.tolist() == draw(prng_key=jax.random.key(5))
    with pytest.raises(ValueError, match="max_time: found one under jit"):
        jax.jit(lambda ids: model.generate(ids, max_time=1.0))(IDS)
    with pytest.raises(ValueError, match="prng_key: found None under jit"):
        jax.jit(lambda ids: model.generate(ids, **options))(IDS)


def test_a_number_needs_no_other_program(pair):
    _, model = pair
    many = [
        dict(top_k=4, top_p=0.8, temperature=2.0, repetition_penalty=1.1, no_repeat_ngram_size=2, min_p=0.1,
             suppress_tokens=[4], eos_token_id=[5], min_new_tokens=2, seed=0, max_new_tokens=4),
        dict(top_k=9, top_p=0.7, temperature=3.0, repetition_penalty=0.9, no_repeat_ngram_size=4, min_p=0.2,
             suppress_tokens=[4, 8], eos_token_id=[], min_new_tokens=None, seed=1, max_new_tokens=20),
        dict(num_beams=2, length_penalty=0.5, sequence_bias={(4, 5): 1.0}, max_new_tokens=4),
        dict(num_beams=2, length_penalty=2.0, sequence_bias={(7, 8): 2.0}, max_new_tokens=9),
    ]  # fmt: skip
    many[1] |= dict(eos_token_id=[6, 7], min_new_tokens=3)
    counts = [run._cache_size()]
    for options in many:
        model.generate(IDS, MASK, do_sample="seed" in options, **options)
        counts.append(run._cache_size())
    assert [after - before for before, after in zip(counts, counts[1:], strict=False)] == [1, 0, 1, 0]


@pytest.mark.parametrize("options", [
    dict(num_beams=2), dict(return_dict_in_generate=True, output_scores=True),
    dict(prefix_allowed_tokens_fn=lambda row, ids: [*range(3, 60)]), dict(stopping_criteria=lambda ids, scores: False),
    dict(logits_processor=lambda ids, scores: scores),
], ids=lambda options: [*options][-1])  # fmt: skip
def test_other_lengths_compile_nothing(options, pair, caplog):
    """Not even a slice."""
    _, model = pair
    model.generate(IDS, MASK, max_new_tokens=4, **FREE, **options)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for T, new in ((3, 6), (4, 3), (5, 7)):
            model.generate(IDS[:, -T:], MASK[:, -T:], max_new_tokens=new, **FREE, **options)
    assert [record.message for record in caplog.records if "ompil" in record.message] == []


@pytest.mark.parametrize(
    "limit", [(loop, "KEPT", 2), (loop, "crowded", lambda: loop._counted >= 1)], ids=["kept", "room"]
)
def test_programs_are_forgotten_when_there_are_many(limit, pair, monkeypatch):
    """Or the process would run into Linux's limit of memory maps."""
    monkeypatch.setattr(*limit)
    loop.forget(())
    for rows in range(1, 4):
        pair[1].generate(np.repeat(IDS[:1], rows, axis=0), max_new_tokens=2)
    assert sum(program._cache_size() for program in loop.PROGRAMS) <= 2


# === Drafts ===


class Counted(FlaxOPTForCausalLM):
    """Counts its passes behind the prompt."""

    passes = 0

    def __call__(self, *args, **kwargs):
        jax.debug.callback(self.count)
        return super().__call__(*args, **kwargs)

    @classmethod
    def count(cls):
        cls.passes += 1


DRAFTED = dict(do_sample=True, seed=3, temperature=6.0, no_repeat_ngram_size=3, max_new_tokens=30)


@pytest.mark.parametrize(
    ("help", "options"),
    [("itself", DRAFTED), ("another", dict(eos_token_id=[17])), ("lookup", dict(max_new_tokens=57))],
)
def test_drafts_change_nothing_but_the_passes(help, options, pair, tmp_path):
    """Greedy, with an end, and drawn; up to the last position that there is."""
    _, model = pair
    model.save_pretrained(tmp_path)
    counted, another = Counted.from_pretrained(tmp_path), FlaxOPTForCausalLM(model.config, rngs=nnx.Rngs(1))
    how = {"itself": dict(assistant_model=model, num_assistant_tokens=5), "another": dict(assistant_model=another),
           "lookup": dict(prompt_lookup_num_tokens=4)}[help]  # fmt: skip
    ids, options = np.array([[1, 40, 17, 63, 40, 17, 63, 40]]), FREE | dict(max_new_tokens=40) | options
    wanted = model.generate(ids, **options)
    Counted.passes = 0
    np.testing.assert_array_equal(counted.generate(ids, **how, **options), wanted)
    jax.effects_barrier()
    new = wanted.shape[1] - 8
    assert new > 20
    assert Counted.passes <= (-(-(new - 1) // 6) if help == "itself" else new - 1)


def test_what_is_looked_up():
    """Behind the latest of the longest matches, over and over."""
    ids = jnp.array([[9, 9, 4, 5, 6, 7, 5, 6, 8, 5, 6, 1, 1, 1, 1, 1]])
    for longest, wanted in ((3, [8, 5, 6, 8, 5]), (1, [8, 5, 6, 8, 5])):
        assert _looked_up(ids, 2, jnp.array(11), longest, 5)[0, 11:].tolist() == wanted
    ids = ids.at[0, 8].set(4)  # 4 5 6 is there at the beginning
    assert _looked_up(ids, 2, jnp.array(11), 3, 5)[0, 11:].tolist() == [7, 5, 6, 4, 5]
    assert _looked_up(ids, 2, jnp.array(11), 2, 5)[0, 11:].tolist() == [4, 5, 6, 4, 5]
