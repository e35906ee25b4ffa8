"""What `generate` takes and returns in PyTorch alone: transformers' own objects, torch's random state, and modules that
somebody watches. Judged by transformers' `generate` with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from conftest import make_reference
from opt_common.config import OPTConfig
from opt_common.hub import fetch
from opt_common.tokenizer import GPT2Tokenizer
from opt_pt import OPTForCausalLM
from opt_pt.generation.choosing import Chooser
from opt_pt.generation.drafts import _speculated

DICT = {"return_dict_in_generate": True}


def twins(**changes: Any) -> tuple[OPTForCausalLM, transformers.OPTForCausalLM]:
    """The same weights here and there, float32."""
    reference = make_reference(7, **{"num_hidden_layers": 2, "init_std": 0.4, **changes}).float()
    ours = OPTForCausalLM(OPTConfig.from_dict(reference.config.to_dict())).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


@pytest.fixture(scope="module")
def models() -> tuple[OPTForCausalLM, transformers.OPTForCausalLM]:
    return twins()


@pytest.fixture
def ids(rng) -> Tensor:
    """Two prompts, the second with padding on the left."""
    ids = torch.tensor(rng.integers(3, 96, (2, 7)))
    ids[1, :3] = 1
    return ids


def both(models: Any, *arguments: Any, new: int = 9, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """What ours and theirs return; options that are functions of a model are called with it."""
    results = []
    for model in models:
        given = {k: v(model) if getattr(v, "__name__", "") == "of" else v for k, v in options.items()}
        torch.manual_seed(seed)
        results.append(model.generate(*arguments, max_new_tokens=new, **given))
    return results[0], results[1]


def close(found: Any, wanted: Any) -> None:
    """Tensors in the same nesting, equal to 1e-4."""
    if isinstance(wanted, Tensor):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    else:
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            close(one, other)


def halved(model: Any) -> Any:
    return model.model.decoder.layers[1].fc2.register_forward_hook(lambda module, inputs, y: y / 2)


SAMPLING = [
    dict(), dict(num_return_sequences=3), dict(top_k=0, top_p=0.8, temperature=3.0), dict(temperature=0.5, min_p=0.05),
    dict(typical_p=0.6), dict(epsilon_cutoff=0.01, top_k=0), dict(eta_cutoff=0.02, renormalize_logits=True),
    dict(num_beams=3, num_return_sequences=2, temperature=3.0, eos_token_id=[*range(20, 60)]),
]  # fmt: skip


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_a_seed_draws_what_it_draws_there(options, models, ids):
    """torch.manual_seed gives the same text in both: the same filters, and the same draw."""
    found, wanted = both(models, ids, attention_mask=(ids != 1).long(), do_sample=True, **options)
    assert torch.equal(found, wanted)
    other, _ = both(models, ids, attention_mask=(ids != 1).long(), do_sample=True, seed=1, **options)
    assert not torch.equal(other, wanted)


class Third(transformers.LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, int(input_ids[0, -1]) % 5 :: 3] = -1e9
        return scores


class Even(transformers.StoppingCriteria):
    def __repr__(self) -> str:
        return "even"  # a name of the test, in every worker the same

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] % 2 == 0


CALLBACKS = {
    "processor": dict(logits_processor=transformers.LogitsProcessorList([Third()])),
    "in place of the option": dict(
        logits_processor=[transformers.RepetitionPenaltyLogitsProcessor(3.0)], repetition_penalty=1.01
    ),
    "criterion": dict(stopping_criteria=transformers.StoppingCriteriaList([Even()])),
    "no end": dict(stopping_criteria=transformers.StoppingCriteriaList([Even()]), eos_token_id=None),
    "length": dict(stopping_criteria=transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(11)])),
    "time": dict(max_time=1e-9),
    "allowed": dict(prefix_allowed_tokens_fn=lambda row, ids: [5 + row, 9, 30 + len(ids)]),
    "allowed for each draw": dict(
        prefix_allowed_tokens_fn=lambda row, ids: range(row, 90, 4), do_sample=True, num_return_sequences=2
    ),
    "unsatisfied": dict(prefix_allowed_tokens_fn=lambda row, ids: [5, 6], suppress_tokens=[5, 6]),
    "guidance": dict(guidance_scale=1.6),
    "config": dict(generation_config=transformers.GenerationConfig(repetition_penalty=2.0, eos_token_id=2)),
}


# transformers gives its beams room for the length that the options say
@pytest.mark.parametrize("case, beams", [(case, n) for case in CALLBACKS for n in (1, 3) if (case, n) != ("length", 3)])
def test_callbacks_of_transformers(case, beams, models, ids):
    found, wanted = both(models, ids, attention_mask=(ids != 1).long(), num_beams=beams, **CALLBACKS[case])
    assert torch.equal(found, wanted)
    if case != "allowed":
        plain, _ = both(models[:1] * 2, ids, attention_mask=(ids != 1).long(), num_beams=beams)
        assert not torch.equal(found, plain), "it changes nothing"


def embedded(ids: Tensor) -> Callable[[Any], Tensor]:
    def of(model: Any) -> Tensor:
        return model.model.decoder.embed_tokens(ids).detach()

    return of


def cached(ids: Tensor) -> Callable[[Any], Any]:
    def of(model: Any) -> Any:
        return model(ids, use_cache=True).past_key_values

    return of


def test_other_inputs(models, ids):
    ids = ids[:1]
    for beams in (1, 2):
        close(*both(models, inputs_embeds=embedded(ids), num_beams=beams, repetition_penalty=1.5))
        close(*both(models, ids, inputs_embeds=embedded(ids.flip(1)), num_beams=beams, no_repeat_ngram_size=2))
        close(*both(models, num_beams=beams))  # begins with bos
    padded = {"inputs_embeds": embedded(ids), "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1]])}
    close(*both(models, **padded, repetition_penalty=1.5))  # not of so many new tokens, as there
    close(*both(models, inputs=ids))
    close(*both(models, ids, use_cache=False))
    close(*both(models, ids, past_key_values=cached(ids[:, :4])))
    close(*both(models, ids.int()))
    start = torch.arange(3, 10)[None]
    found, wanted = both(models, ids, position_ids=start)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, models[0].generate(ids, max_new_tokens=9)), "positions change nothing"


def test_a_cache_of_transformers(models, ids):
    cache = transformers.DynamicCache()
    with torch.no_grad():
        models[1](ids[:1, :4], past_key_values=cache, use_cache=True)
    found = models[0].generate(ids[:1], past_key_values=cache, max_new_tokens=9)
    assert torch.equal(found, models[1].generate(ids[:1], max_new_tokens=9))
    assert cache.get_seq_length() == found.shape[1] - 1


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, top_k=9)],
                         ids=str)  # fmt: skip
def test_outputs(options, models, ids):
    names = dict(output_scores=True, output_logits=True, output_hidden_states=True)
    found, wanted = both(models, ids, attention_mask=(ids != 1).long(), **DICT, **names, **options)
    theirs = [name for name in wanted if name != "past_key_values"]
    assert [name for name in found if name != "past_key_values"] == theirs
    for name in theirs:
        close(found[name], wanted[name])
    assert found.past_key_values.get_seq_length() == found.sequences.shape[1] - 1
    for normalize in (False, True):
        close(*(
            model.compute_transition_scores(out.sequences, out.scores, out.get("beam_indices"), normalize)
            for model, out in zip(models, (found, wanted), strict=True)
        ))  # fmt: skip
    bare = models[0].generate(ids[:1], max_new_tokens=3, **DICT, **options)
    assert bare.keys() == {"sequences", "past_key_values"} | ({"beam_indices"} if "num_beams" in options else set())


def test_the_returned_cache_goes_on(models, ids):
    """It grows, knows its padding, and holds all tokens but the last."""
    model, mask = models[0], (ids != 1).long()
    out = model.generate(ids, mask, max_new_tokens=6, eos_token_id=[], **DICT)
    longer = torch.cat([mask, mask.new_ones(2, 6)], dim=1)
    with torch.no_grad():
        found = model(out.sequences[:, -1:], longer, past_key_values=out.past_key_values).logits[:, -1]
        wanted = model(out.sequences, longer).logits[:, -1]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    model(out.sequences[:, -1:], past_key_values=out.past_key_values)


def test_results_can_be_learned_from(models, ids):
    model = twins()[0]
    text = model.generate(ids[:1], max_new_tokens=3, do_sample=True)
    assert not text.is_inference()
    model(text, labels=text).loss.backward()
    assert model.lm_head.weight.grad is not None


MODES = [
    dict(num_beams=2), dict(do_sample=True, num_return_sequences=2), dict(repetition_penalty=1.5),
    dict(prompt_lookup_num_tokens=3), dict(output_scores=True, **DICT),
]  # fmt: skip


@pytest.mark.parametrize("options", MODES, ids=str)
def test_what_is_done_to_a_module_shows_in_every_mode(options, models, ids):
    plain, _ = both(models[:1] * 2, ids[:1], **options)
    hooks = [halved(model) for model in models]
    found, wanted = both(models, ids[:1], **options)
    for hook in hooks:
        hook.remove()
    texts = [out if isinstance(out, Tensor) else out.sequences for out in (found, wanted, plain)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


DRAFTED = [dict(), dict(repetition_penalty=1.3, no_repeat_ngram_size=3), dict(eos_token_id=[2, 62]),
           dict(stopping_criteria=[Even()]), dict(output_scores=True, output_logits=True, **DICT)]  # fmt: skip


GUESSES = [dict(assistant_model="itself"), dict(assistant_model="another", num_assistant_tokens=4),
           dict(prompt_lookup_num_tokens=4)]  # fmt: skip


@pytest.mark.parametrize("drafts", GUESSES, ids=str)
@pytest.mark.parametrize("options", DRAFTED, ids=str)
def test_drafts_change_no_text(options, drafts, models, ids, monkeypatch):
    """And what is guessed right takes fewer passes."""
    model = models[0]
    prompt = torch.cat([ids[:1]] * 3, dim=1)
    wanted = model.generate(prompt, max_new_tokens=20, **options)
    assistant = {"itself": model, "another": twins(num_hidden_layers=1)[0]}.get(drafts.get("assistant_model"))
    drafts = drafts if assistant is None else drafts | {"assistant_model": assistant}
    found = model.generate(prompt, max_new_tokens=20, **options, **drafts)
    for one, other in zip(
        *([out] if isinstance(out, Tensor) else out.to_tuple()[:3] for out in (found, wanted)), strict=True
    ):
        close(one, other)
    assert torch.equal(model.generate(prompt, max_new_tokens=1, **drafts), model.generate(prompt, max_new_tokens=1))


def test_drafts_save_passes(models, ids):
    model, passes = models[0], []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, y: passes.append(y.shape[1]))
    text = model.generate(ids[:1], max_new_tokens=20, eos_token_id=[])
    plain, passes[:] = len(passes), []
    again = torch.cat([text, text[:, 7:9]], dim=1)
    model.generate(again, max_new_tokens=12, eos_token_id=[], prompt_lookup_num_tokens=5)
    hook.remove()
    assert plain == 20
    assert len(passes) < 12 and max(passes[1:]) > 1


def test_speculative_sampling_draws_from_the_models_own_probabilities(models):
    """Whatever the guess is drawn from: chi-square over 4,000 draws of 6 tokens, 5 degrees of freedom."""
    torch.manual_seed(0)
    own, other = torch.randn(2, 6).mul(1.5).softmax(dim=-1)

    class Plain:
        logits, rng, draw = None, None, staticmethod(lambda chances: torch.multinomial(chances, 1))
        process = staticmethod(lambda logits: logits)

    chooser: Any = Plain()
    guesses = torch.multinomial(other, 4000, replacement=True).tolist()
    drawn = [int(_speculated(chooser, own.log()[None], guess, other)) for guess in guesses]
    counts = np.bincount(drawn, minlength=6)
    expected = own.numpy() * 4000
    assert float(((counts - expected) ** 2 / expected).sum()) < 25
    assert np.mean(np.array(drawn) == guesses) > 0.3, "guesses are hardly ever taken"


class Recorder:
    def __init__(self) -> None:
        self.put_: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.put_.append(value.tolist())

    def end(self) -> None:
        self.put_.append("end")


def test_streamers(models, ids):
    ended = models[1].generate(ids[:1], max_new_tokens=20)[0, 12].item()
    seen = []
    for model in models:
        recorder = Recorder()
        model.generate(ids[:1], max_new_tokens=20, eos_token_id=int(ended), streamer=recorder)
        seen.append(recorder.put_)
    assert seen[0] == seen[1]
    assert len(seen[0]) < 20 and seen[0][-1] == "end"


def test_stream(models, ids):
    model, tokenizer = OPTForCausalLM.from_pretrained("opt-demo"), GPT2Tokenizer.from_pretrained("opt-demo")
    given = tokenizer("Once upon", return_tensors="pt")
    wanted = tokenizer.decode(model.generate(**given, max_new_tokens=12)[0, given["input_ids"].shape[1] :])
    pieces = list(model.stream(**given, max_new_tokens=12, tokenizer=tokenizer))
    assert "".join(pieces) == wanted and len(pieces) > 5
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="stream: found 2 rows or beams, wanted one"):
        model.stream(ids, tokenizer=tokenizer)
    reference = transformers.GPT2Tokenizer.from_pretrained(fetch("opt-demo", []))
    streamer = transformers.TextIteratorStreamer(reference, skip_prompt=True)
    model.generate(**given, max_new_tokens=12, streamer=streamer)
    assert "".join(streamer) == wanted


def test_unknown_arguments_are_named(models, ids):
    with pytest.raises(ValueError, match="found unknown options pixel_values"):
        models[0].generate(ids, max_new_tokens=2, pixel_values=ids)


def test_the_choice_of_a_plain_search_is_the_likeliest(models):
    """Which the GPU's own kernel takes; anything else goes through Chooser."""
    from opt_common.generation import prompt
    from opt_pt.generation.text import Text

    def greedy(**options: Any) -> bool:
        given = prompt(models[0].config, [[5, 6]], None, options)
        return Chooser(given.settings, Text(given, 96, torch.device("cpu"))).greedy

    assert greedy() and greedy(temperature=0.5) and greedy(do_sample=True, temperature=0.0)
    assert not greedy(do_sample=True) and not greedy(repetition_penalty=1.1) and not greedy(min_new_tokens=2)
    assert not greedy(output_scores=True, **DICT)
