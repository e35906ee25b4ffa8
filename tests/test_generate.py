"""Generation, judged by transformers' greedy search and by the probabilities of its float64 run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backends import Backend
from opt_common.config import OPTConfig
from opt_common.generation import GenerationConfig, Options, options, prompt

LENGTHS = [9, 4, 1]


def prompts(rng, side: str) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = np.ones((len(LENGTHS), 9), int), np.zeros((len(LENGTHS), 9), int)
    for row, n in enumerate(LENGTHS):
        columns = slice(9 - n, None) if side == "left" else slice(0, n)
        ids[row, columns], mask[row, columns] = rng.integers(3, 96, n), 1
    return ids, mask


@pytest.mark.parametrize("config", ["pre-norm", "350m", "pre-norm-narrow"])
def test_greedy(framework, config, tiny, load, rng):
    folder, reference = tiny(config)
    ids, mask = prompts(rng, "left")
    wanted = reference.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=40, do_sample=False
    ).numpy()
    assert len(set(wanted[0, 9:])) > 3, "a text of one repeated token would hide mistakes"
    model = load(framework, folder)
    np.testing.assert_array_equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=40), wanted)
    # the padding is seen without a mask too
    np.testing.assert_array_equal(model.generate(input_ids=ids, max_new_tokens=40), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_gives_what_it_gives_alone(framework, side, tiny, load, rng):
    folder, _ = tiny("350m")
    model = load(framework, folder)
    ids, mask = prompts(rng, side)
    together = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, min_new_tokens=20)
    np.testing.assert_array_equal(together[:, :9], ids)
    for row, n in enumerate(LENGTHS):
        alone = model.generate(input_ids=ids[row : row + 1][mask[row : row + 1] == 1][None], max_new_tokens=20,
                               min_new_tokens=20)  # fmt: skip
        np.testing.assert_array_equal(together[row, 9:], alone[0, n:])


def test_a_hole_in_the_prompt(framework, tiny, load, rng):
    folder, _ = tiny()
    model, ids = load(framework, folder), rng.integers(3, 96, (1, 8))
    mask = np.array([[1, 1, 0, 1, 0, 0, 1, 1]])
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12)
    alone = model.generate(input_ids=ids[mask == 1][None], max_new_tokens=12)
    np.testing.assert_array_equal(found[0, 8:], alone[0, 5:])


def test_rows_stop_at_eos(framework, tiny, load, rng):
    """As transformers: the rest of an ended row is padding, and the text ends when all rows have."""
    folder, reference = tiny()
    ids, mask = prompts(rng, "left")
    arguments = dict(attention_mask=torch.tensor(mask), max_new_tokens=30, do_sample=False)
    free = reference.generate(torch.tensor(ids), **arguments, eos_token_id=0).numpy()
    model = load(framework, folder)
    ended = 0
    for eos in ([int(free[0, 14])], [int(free[0, 14]), int(free[1, 12]), int(free[2, 20])]):
        wanted = reference.generate(torch.tensor(ids), **arguments, eos_token_id=eos, pad_token_id=1).numpy()
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=30, eos_token_id=eos)
        np.testing.assert_array_equal(found, wanted)
        ended += wanted.shape[1] < 39
    assert ended, "no case ended early"


def test_min_new_tokens_and_max_length(framework, tiny, load, rng):
    folder, reference = tiny()
    ids = rng.integers(3, 96, (1, 5))
    model = load(framework, folder)
    first = int(model.generate(input_ids=ids, max_new_tokens=1)[0, 5])
    arguments = dict(max_new_tokens=10, min_new_tokens=4, eos_token_id=first)
    wanted = reference.generate(torch.tensor(ids), do_sample=False, pad_token_id=1, **arguments).numpy()
    np.testing.assert_array_equal(model.generate(input_ids=ids, **arguments), wanted)
    assert model.generate(input_ids=ids, eos_token_id=first, max_new_tokens=10).shape == (1, 6)
    assert model.generate(input_ids=ids, eos_token_id=95, max_length=12).shape[1] <= 12
    assert model.generate(input_ids=ids, min_new_tokens=20).shape == (1, 25), "20 new ones, as in transformers 5"
    with pytest.warns(UserWarning, match="found min_new_tokens=9 and 4 new tokens at most"):
        found = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=9, eos_token_id=first)
    assert found.shape == (1, 9)
    assert first not in found[0, 5:]


@pytest.mark.parametrize("settings", [dict(top_k=5), dict(temperature=1.5, top_k=8, top_p=0.8)], ids=str)
def test_sampling_follows_the_probabilities(framework, settings, tiny, load, rng):
    """Only tokens that temperature, top-k and top-p, in this order, leave; and each about as often as it should."""
    folder, reference = tiny("350m")
    ids, rows = rng.integers(3, 96, (1, 6)), 2000
    with torch.no_grad():
        scores = reference(torch.tensor(ids)).logits[0, -1] / (8 * settings.get("temperature", 1.0))
    k = settings.get("top_k", 50)
    if k:
        scores[scores < scores.topk(k).values[-1]] = -torch.inf
    chances, order = scores.softmax(-1).sort(descending=True)
    chances[chances.cumsum(-1) - chances >= settings.get("top_p", 1.0)] = 0
    wanted = torch.zeros_like(chances).scatter(0, order, chances / chances.sum()).numpy()

    scaled = settings | {"temperature": 8 * settings.get("temperature", 1.0)}  # flat enough to have something to draw
    drawn = load(framework, folder).generate(
        input_ids=np.repeat(ids, rows, axis=0), do_sample=True, seed=1, max_new_tokens=1, **scaled
    )[:, 6]
    counts = np.bincount(drawn, minlength=96)
    assert (wanted > 0).sum() > 3
    assert counts[wanted == 0].sum() == 0
    deviation = np.sqrt(rows * wanted * (1 - wanted))
    assert (np.abs(counts - rows * wanted) <= 5 * deviation + 1e-9).all()


def test_seeds(framework, tiny, load, rng):
    folder, _ = tiny("350m")
    model, ids = load(framework, folder), rng.integers(3, 96, (2, 6))

    def draw(seed):
        return model.generate(input_ids=ids, do_sample=True, temperature=5.0, seed=seed, max_new_tokens=12).tolist()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


WRONG = {
    "max_new_tokens": (dict(max_new_tokens=0), "max_new_tokens: found 0"),
    "too long": (dict(max_new_tokens=59), "6 tokens and 59 new ones make 65, wanted at most 64"),
    "max_length": (dict(max_length=6), "max_length: found 6"),
    "min": (dict(max_new_tokens=3, min_new_tokens=-1), "min_new_tokens: found -1"),
    "temperature": (dict(max_new_tokens=3, do_sample=True, temperature=-1.0), "temperature: found -1"),
    "top_k": (dict(max_new_tokens=3, top_k=-1), "top_k: found -1"),
    "top_p": (dict(max_new_tokens=3, top_p=1.5), "top_p: found 1.5"),
    "too many beams": (dict(max_new_tokens=3, num_beams=10**20), "num_beams: found 100000000000000000000, wanted"),
    "time": (dict(max_new_tokens=3, max_time="x"), "max_time: found 'x', wanted seconds"),
    "beams": (dict(max_new_tokens=3, num_beams=2, num_return_sequences=3), "num_return_sequences: found 3, wanted at"),
    "eos": (dict(max_new_tokens=3, eos_token_id=96), "eos_token_id: found 96"),
    "empty row": (dict(max_new_tokens=3, attention_mask=np.zeros((1, 6), int)), "attention_mask.*at least one token"),
    "mask": (dict(max_new_tokens=3, attention_mask=np.ones((1, 5), int)), r"attention_mask: found shape \[1, 5\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(framework, case, tiny, load, rng):
    folder, _ = tiny()
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        load(framework, folder).generate(input_ids=rng.integers(3, 96, (1, 6)), **arguments)


def test_drafts_are_of_one_text(framework, tiny, load, rng):
    """What transformers refuses is refused, in one sentence; beams go on without a draft, as there."""
    folder, reference = tiny("350m")
    model, ids, lookup = load(framework, folder), rng.integers(3, 96, (2, 6)), dict(prompt_lookup_num_tokens=3)
    other = SimpleNamespace(config=OPTConfig(vocab_size=50))
    wrong = {
        "prompt_lookup_num_tokens: found 2 texts, wanted one": dict(input_ids=ids, **lookup),
        "assistant_model: found 3 texts, wanted one": dict(assistant_model=model.model, do_sample=True,
                                                           num_return_sequences=3),
        "use_cache: found False, wanted True with prompt_lookup": dict(use_cache=False, **lookup),
        "assistant_model: found vocab_size 50, wanted 96": dict(assistant_model=other),
    }  # fmt: skip
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            model.generate(**({"input_ids": ids[:1], "max_new_tokens": 3} | given))
    wanted = reference.generate(torch.tensor(ids), num_beams=2, max_new_tokens=9, do_sample=False).numpy()
    with pytest.warns(UserWarning, match="prompt_lookup_num_tokens: found with num_beams=2"):
        found = model.generate(input_ids=ids, num_beams=2, max_new_tokens=9, **lookup)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("options", [dict(), dict(repetition_penalty=1.5, max_length=9)], ids=str)
def test_new_ids_behind_a_cache(framework, options, tiny, load, rng):
    """With a mask of all columns, the ids may be those alone that the cache has not; as in transformers, they are then
    all of the text that options see and that is returned."""
    folder, reference = tiny("350m")
    ids, mask = prompts(rng, "left")
    ids[2], mask[2] = ids[0], mask[0]
    model, options = load(framework, folder), {"max_new_tokens": None if "max_length" in options else 8} | options
    options |= dict(do_sample=False, eos_token_id=[95], pad_token_id=1)
    seen = {"input_ids": ids[:, :6], "attention_mask": mask[:, :6]}
    with torch.no_grad():
        theirs = reference(**{name: torch.tensor(x) for name, x in seen.items()}, use_cache=True).past_key_values
    wanted = reference.generate(torch.tensor(ids[:, 6:]), attention_mask=torch.tensor(mask), past_key_values=theirs,
                                **options).numpy()  # fmt: skip
    assert wanted.shape[1] > 7

    def cache():
        return model(**seen, past_key_values=model.init_cache(3, 16)).past_key_values

    given = dict(input_ids=ids[:, 6:], past_key_values=cache(), **options)
    np.testing.assert_array_equal(model.generate(attention_mask=mask, **given), wanted)
    wrong = {
        "past_key_values: found 6 tokens, wanted fewer than the prompt's 3; or .* all 9 columns": mask[:, 6:],
        "attention_mask: found 8 columns, wanted 6 of past_key_values and 3 new": mask[:, 1:],
    }
    for message, other in wrong.items():
        with pytest.raises(ValueError, match=message):
            model.generate(attention_mask=other, **given | {"past_key_values": cache()})
    with pytest.raises(ValueError, match="use_cache: found False with past_key_values"):
        model.generate(attention_mask=mask, use_cache=False, **given | {"past_key_values": cache()})


def test_unknown_options_are_named(framework, tiny, load, rng):
    folder, _ = tiny()
    model, ids = load(framework, folder), rng.integers(3, 96, (1, 6))
    with pytest.raises(ValueError, match="generate: found unknown options beam, beams; wanted those of"):
        model.generate(input_ids=ids, max_new_tokens=3, beams=4, beam=2)
    with pytest.raises(ValueError, match="generate: found num_beam_groups=2, which is not offered; wanted 1"):
        model.generate(input_ids=ids, max_new_tokens=3, num_beams=4, num_beam_groups=2)
    assert model.generate(input_ids=ids, max_new_tokens=3, num_beam_groups=1, penalty_alpha=None).shape == (1, 9)


def test_a_generation_config_stays_with_the_model(framework, tiny, rng, tmp_path):
    """Read from its file, overridden by keywords, written back; an option that is not offered is an error."""
    folder, reference = tiny()
    shutil.copytree(folder, tmp_path / "model")
    file, ids = tmp_path / "model" / "generation_config.json", rng.integers(3, 96, (1, 6))
    first = int(reference.generate(torch.tensor(ids), max_new_tokens=1, do_sample=False)[0, -1])
    file.write_text(json.dumps({"max_new_tokens": 4, "eos_token_id": [95, first], "pad_token_id": 1, "num_beams": 1}))
    model = Backend(framework, tmp_path / "model")
    assert model.generate(input_ids=ids).shape == (1, 7), "the file's eos_token_id ends it"
    assert model.generate(input_ids=ids, eos_token_id=[]).shape == (1, 10), "the file's max_new_tokens"
    assert model.generate(input_ids=ids, eos_token_id=[], max_new_tokens=2).shape == (1, 8)
    given = GenerationConfig(max_new_tokens=3, eos_token_id=[])
    assert model.generate(input_ids=ids, generation_config=given).shape == (1, 9)
    with pytest.warns(UserWarning, match="found max_length=20 and max_new_tokens=3; the latter applies"):
        assert model.generate(input_ids=ids, generation_config=given, max_length=20).shape == (1, 9)
    two = np.concatenate([ids, ids[:, ::-1]])
    ended = dict(eos_token_id=[first], max_new_tokens=5, pad_token_id=None)
    wanted = reference.generate(torch.tensor(two), attention_mask=torch.ones(2, 6), do_sample=False, **ended)
    np.testing.assert_array_equal(model.generate(input_ids=two, **ended), wanted)
    assert (wanted[0, 6:] == first).all(), "no padding by an end"
    model.model.generation_config = GenerationConfig(max_new_tokens=5)
    assert model.generate(input_ids=ids).shape == (1, 11), "the model's config ends no text"
    model.model.generation_config = GenerationConfig(max_new_tokens=4, eos_token_id=[95, first], pad_token_id=1)
    model.model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"] == [95, first]
    file.write_text(json.dumps({"penalty_alpha": 0.6}))
    with pytest.raises(ValueError, match="found penalty_alpha=0.6, which is not offered"):
        Backend(framework, tmp_path / "model").generate(input_ids=ids)


def test_every_option_is_documented():
    text = Path(options.__file__).read_text()
    for name in Options.__annotations__:
        assert re.search(rf'^    {name}: .*\n    """\S', text, re.MULTILINE), name


def test_the_prompt_in_numpy():
    """`prompt` prepares what TensorFlow and JAX continue: the mask is found where none is given."""
    found = prompt(OPTConfig(), [[1, 1, 7], [5, 6, 1]], None, {"max_new_tokens": 4, "seed": 9})
    np.testing.assert_array_equal(found.mask, [[False, False, True], [True, True, False]])
    assert (found.settings.max_new_tokens, found.settings.seed) == (4, 9)
    given = prompt(OPTConfig(), [[1, 1, 7]], [[0, 2, 1]], {})
    np.testing.assert_array_equal(given.mask, [[False, True, True]])
    assert given.settings.max_new_tokens == 20  # as in transformers 5
    real = prompt(OPTConfig(), [[1, 1, 7]], None, {"eos_token_id": [2, 1]})
    assert real.mask.all(), "padding that ends a text too is not known by its token"


CALLS = {
    "neither": (dict(), "input_ids, inputs_embeds: found neither"),
    "rank": (dict(inputs_embeds=np.ones((5, 64), np.float32)), r"inputs_embeds: found shape \[5, 64\]"),
    "token": (dict(input_ids=np.full((1, 5), 96)), "input_ids: found token 96, wanted 0 to 95"),
    "negative": (dict(input_ids=np.full((1, 5), -1)), "input_ids: found token -1"),
    "embeds": (dict(inputs_embeds=np.ones((1, 5, 7), np.float32)), r"inputs_embeds: found shape \[1, 5, 7\]"),
    "empty": (dict(input_ids=np.ones((2, 0), int)), "input_ids: found no tokens"),
    "low": (dict(input_ids=np.ones((1, 5), int), position_ids=np.full((1, 5), -2)), "position_ids: found position -2"),
    "wide": (dict(input_ids=np.ones((1, 65), int), use_cache=True), "found a cache of 64 slots|found position 64"),
    "mask": (dict(input_ids=np.ones((1, 5), int), attention_mask=np.ones((1, 4), int)), "attention_mask: found shape"),
    "positions": (dict(input_ids=np.ones((1, 5), int), position_ids=np.ones((1, 4), int)), "position_ids: found shape"),
    "far": (dict(input_ids=np.ones((1, 5), int), position_ids=np.full((1, 5), 64)), "position_ids: found position 64"),
    "labels": (dict(input_ids=np.ones((1, 5), int), labels=np.ones((1, 4), int)), "labels: found shape"),
    "kept": (dict(input_ids=np.ones((1, 5), int), labels=np.ones((1, 5), int), logits_to_keep=2), "labels, logits_to"),
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_calls(framework, case, tiny, load):
    folder, _ = tiny()
    arguments, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        load(framework, folder)(**arguments)


def test_a_full_cache_is_an_error(framework, tiny, load):
    folder, _ = tiny()
    model = load(framework, folder)
    with pytest.raises(ValueError, match="past_key_values: found a cache of 4 slots, 0 .* wanted room for 5 new"):
        model(input_ids=np.ones((1, 5), int), past_key_values=model.init_cache(1, 4))
    with pytest.raises(ValueError, match="past_key_values: found a cache of 2 rows, wanted 1"):
        model(input_ids=np.ones((1, 3), int), past_key_values=model.init_cache(2, 4))
