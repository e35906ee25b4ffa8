"""Sequence classification and question answering: one body for all frameworks, against transformers in float64."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from backends import Backend, relative_error
from conftest import CONFIGS, SMALL, save_reference
from opt_common.checkpoints.convert import convert
from opt_common.config import OPTConfig
from opt_common.inputs import check_labels

B, T, LABELS = 4, 9, 3
CLASSIFIER, READER = "OPTForSequenceClassification", "OPTForQuestionAnswering"
HEADED = ["pre-norm", "350m", "no-bias", "untied"]
IDS = np.random.default_rng(1).integers(3, 96, (B, T))
SIDES = {
    "none": None,
    "left": [[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1], [0] + [1] * 8],
    "right": [[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8, [1] * 8 + [0]],
}


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    """headed(architecture, name of a config) -> (checkpoint folder, transformers' float64 model of it)."""
    made = {}

    def make(architecture: str, name: str = "pre-norm", **changes):
        key = (architecture, name, *changes.items())
        if key not in made:
            torch.manual_seed(0)
            own = {"num_labels": LABELS, "init_std": 0.1} | changes
            config = transformers.OPTConfig(**(SMALL | CONFIGS[name] | own))
            model = getattr(transformers, architecture)(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
            made[key] = save_reference(model.double(), tmp_path_factory.mktemp("headed") / name), model
        return made[key]

    return make


def padded(side: str) -> dict[str, np.ndarray]:
    """Ids, the padding among them, and the mask if there is any."""
    if SIDES[side] is None:
        return {"input_ids": IDS}
    mask = np.array(SIDES[side])
    return {"input_ids": np.where(mask, IDS, 1), "attention_mask": mask}


def judge(model, **arguments):
    with torch.no_grad():
        return copy.deepcopy(model)(**{k: torch.as_tensor(v) for k, v in arguments.items()})  # it writes to its config


PROBLEMS = {
    "regression": (1, np.array([0.5, -1.0, 2.0, 0.25], np.float32)),
    "several regressions": (3, np.linspace(-1, 2, 12, dtype=np.float32).reshape(B, 3)),
    "single label": (3, np.array([2, 0, -100, 1])),
    "multi label": (3, np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0], [0.5, 1, 0]], np.float32)),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("config", HEADED)
def test_classifier_logits(framework, config, side, headed):
    """Of the rightmost token that is no padding, on whichever side the padding is."""
    folder, reference = headed(CLASSIFIER, config)
    found = Backend(framework, folder, architecture=CLASSIFIER)(**padded(side))
    assert relative_error(found.logits, judge(reference, **padded(side)).logits.numpy()) <= 2e-5
    assert found.loss is None


@pytest.mark.parametrize("problem", PROBLEMS)
def test_classifier_losses(framework, problem, headed):
    labels, values = PROBLEMS[problem]
    # transformers takes a problem of several numbers for multi-label unless told
    told = {"problem_type": "regression"} if problem == "several regressions" else {}
    folder, reference = headed(CLASSIFIER, "350m", num_labels=labels, **told)
    model = Backend(framework, folder, architecture=CLASSIFIER)
    wanted = judge(
        reference, **padded("left"), labels=values if labels == 3 and values.ndim == 1 else values.astype(float)
    )
    found = model(**padded("left"), labels=values)
    # a square doubles the relative error
    assert found.loss == pytest.approx(float(wanted.loss), rel=2e-6 if "regression" in problem else 1e-6)
    if values.ndim == 1:
        assert model(**padded("left"), labels=values[:, None]).loss == found.loss
    else:
        with pytest.raises(ValueError, match=r"labels: found shape \[4, 2\], wanted \[4, 3\]"):
            model(**padded("left"), labels=values[:, :2])


def test_problem_types():
    two = OPTConfig(num_labels=2)
    assert check_labels(two, 4, (4,), True) == "single_label_classification"
    assert check_labels(two, 4, (4, 2), False) == "multi_label_classification"
    assert check_labels(OPTConfig(num_labels=1), 4, (4, 1), False) == "regression"
    assert check_labels(OPTConfig(num_labels=2, problem_type="multi_label_classification"), 4, (4, 2), True)
    for shape in ((3,), (4, 2), (1, 4)):
        with pytest.raises(ValueError, match=r"labels: found shape .* single_label_classification with num_labels 2"):
            check_labels(two, 4, shape, True)
    with pytest.raises(ValueError, match="labels: found fractions, wanted whole numbers below 2"):
        check_labels(OPTConfig(problem_type="single_label_classification"), 4, (4,), False)


def test_padding_without_a_mask(framework, headed):
    """The padding token says what the mask would; without either, the last column counts."""
    folder, reference = headed(CLASSIFIER)
    model, given = Backend(framework, folder, architecture=CLASSIFIER), padded("right")
    ids = {"input_ids": given["input_ids"]}
    assert relative_error(model(**ids).logits, judge(reference, **ids).logits.numpy()) <= 2e-5
    embeds = reference.model.decoder.embed_tokens.weight.detach().numpy()[ids["input_ids"]].astype(np.float32)
    mask = given["attention_mask"]
    wanted = judge(reference, **given).logits.numpy()
    assert relative_error(model(inputs_embeds=embeds, attention_mask=mask).logits, wanted) <= 2e-5
    last = judge(reference, inputs_embeds=embeds.astype(float)).logits.numpy()
    assert relative_error(model(inputs_embeds=embeds).logits, last) <= 2e-5


@pytest.mark.parametrize("architecture", [CLASSIFIER, READER])
def test_past(framework, architecture, headed):
    """The last tokens of each row through the cache give what all at once give."""
    folder, _ = headed(architecture)
    model, given = Backend(framework, folder, architecture=architecture), padded("left")
    whole = model(**given)
    start = {name: array[:, :5] for name, array in given.items()}
    cache = model.init_cache(B, T)
    past = getattr(model(**start, past_key_values=cache), "past_key_values", None)
    past = cache if past is None else past  # opt_pt's is written in place, and not returned by a reader, as there
    rest = given | {"input_ids": given["input_ids"][:, 5:]}
    found = model(**rest, past_key_values=past)
    if architecture == CLASSIFIER:
        assert relative_error(found.logits, whole.logits) <= 2e-5
    else:
        keep = given["attention_mask"][:, 5:] > 0
        assert relative_error(found.start_logits[keep], whole.start_logits[:, 5:][keep]) <= 2e-5


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("config", HEADED)
def test_answers(framework, config, side, headed):
    folder, reference = headed(READER, config)
    spans = {"start_positions": np.array([0, 3, 8, 2]), "end_positions": np.array([2, 9, 8, 40])}  # two lie outside
    wanted = judge(reference, **padded(side), **spans)
    found = Backend(framework, folder, architecture=READER)(**padded(side), **spans, output_hidden_states=True)
    keep = np.ones((B, T), bool) if SIDES[side] is None else np.array(SIDES[side], bool)
    assert relative_error(found.start_logits[keep], wanted.start_logits.numpy()[keep]) <= 2e-5
    assert relative_error(found.end_logits[keep], wanted.end_logits.numpy()[keep]) <= 2e-5
    assert found.hidden_states is not None and len(found.hidden_states) == 4
    if SIDES[side] is None:  # transformers' own scores of padding are in its loss
        assert found.loss == pytest.approx(float(wanted.loss), rel=1e-6)


def test_positions_outside(framework, headed):
    folder, reference = headed(READER)
    model = Backend(framework, folder, architecture=READER)
    inside = {"start_positions": np.array([0, 3, 8, 2]), "end_positions": np.array([2, 4, 8, 8])}
    outside = {"start_positions": np.array([0, 3, 8, 9]), "end_positions": np.array([2, 4, -1, 99])}
    rows = [
        judge(reference, input_ids=IDS[i : i + 1], **{k: v[i : i + 1] for k, v in inside.items()}) for i in range(B)
    ]
    starts, ends = (np.array([logits_of(row, name) for row in rows]) for name in ("start_logits", "end_logits"))
    wanted = (loss_of(starts[:3], inside["start_positions"][:3]) + loss_of(ends[:2], inside["end_positions"][:2])) / 2
    assert model(input_ids=IDS, **outside).loss == pytest.approx(wanted, rel=1e-6)
    column = {name: values[:, None] for name, values in outside.items()}
    assert model(input_ids=IDS, **column).loss == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="start_positions, end_positions: found only one"):
        model(input_ids=IDS, start_positions=inside["start_positions"])
    with pytest.raises(ValueError, match=r"end_positions: found shape \[3\], wanted \[4\]"):
        model(input_ids=IDS, start_positions=np.zeros(4, int), end_positions=np.zeros(3, int))


def logits_of(row, name: str) -> np.ndarray:
    return getattr(row, name)[0].numpy()


def loss_of(scores: np.ndarray, columns: np.ndarray) -> float:
    shifted = scores - scores.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(columns)), columns]
    return float(losses.mean())


@pytest.mark.parametrize("architecture", [CLASSIFIER, READER])
def test_saving(framework, architecture, headed, tmp_path):
    """What is saved is what was loaded; transformers loads it without a word, with its labels."""
    folder, reference = headed(architecture, "350m")
    names = {"id2label": {0: "no", 1: "yes", 2: "who knows"}} if architecture == CLASSIFIER else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Backend(framework, folder, architecture=architecture, **names).model.save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]
    theirs, info = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    if names:
        assert theirs.config.id2label == names["id2label"] == OPTConfig.from_pretrained(tmp_path).id2label
    wanted, found = (judge(m.double(), input_ids=IDS) for m in (reference, theirs))
    assert torch.equal(found[0], wanted[0])


@pytest.mark.filterwarnings("error")
def test_from_a_language_model_and_back(framework, tiny, tmp_path):
    """A head that is not there is drawn and named, in a line; one that is of no use is dropped and named."""
    folder, _ = tiny("350m")
    with pytest.warns(UserWarning, match=r"newly initialized, so train before use: score.weight$") as told:
        model = Backend(framework, folder, architecture=CLASSIFIER, num_labels=5)
    assert len(told) == 1
    assert model(input_ids=IDS).logits.shape == (B, 5)
    model.model.save_pretrained(tmp_path / "classifier")
    drawn = load_file(tmp_path / "classifier" / "model.safetensors")["score.weight"]
    assert drawn.shape == (5, 32) and 0.15 < drawn.std() < 0.45  # init_std is 0.3
    with pytest.warns(UserWarning, match=r"newly initialized.*: qa_outputs.weight, qa_outputs.bias$"):
        model = Backend(framework, folder, architecture=READER)
    model.model.save_pretrained(tmp_path / "reader")
    saved = load_file(tmp_path / "reader" / "model.safetensors")
    assert saved["qa_outputs.weight"].std() > 0.1 and not saved["qa_outputs.bias"].any()

    with pytest.warns(UserWarning, match=r"not used: score.weight$"):
        again = Backend(framework, tmp_path / "classifier")
    wanted = Backend(framework, folder)(input_ids=IDS).logits
    assert np.array_equal(again(input_ids=IDS).logits, wanted)
    again.model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["OPTForCausalLM"]
    with pytest.warns(UserWarning) as told:
        Backend(framework, tmp_path / "classifier", architecture=READER)
    assert [str(w.message).split(": ", 1)[1].split(":")[0] for w in told] == [
        "newly initialized, so train before use",
        "not used",
    ]


def test_misfits_are_errors(framework, headed):
    """A head of another width is no new head."""
    folder, _ = headed(CLASSIFIER)
    with pytest.raises(ValueError, match=r"score.weight: found shape \[3, 64\], wanted \[7, 64\]"):
        Backend(framework, folder, architecture=CLASSIFIER, num_labels=7)
    with pytest.raises(TypeError, match="found argument 'num_lables'"):
        Backend(framework, folder, architecture=CLASSIFIER, num_lables=7)


@pytest.mark.parametrize("architecture", [CLASSIFIER, READER])
def test_converting(architecture, headed, tmp_path):
    """Where the layout is transformers' PyTorch's; the others have no place for these heads, and say so."""
    folder, _ = headed(architecture)
    for source, to in ((folder, "torch"), (tmp_path / "torch", "state-dict"), (tmp_path / "state-dict", "safetensors")):
        convert(source, tmp_path / to, to)
    first, last = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "safetensors"))
    assert first.keys() == last.keys() and all(np.array_equal(first[name], last[name]) for name in first)
    with pytest.raises(
        ValueError, match=f"is an {architecture}; wanted one of safetensors, torch, state-dict, keras, orbax to write"
    ):
        convert(folder, tmp_path / "h5", "tf-h5")


def test_one_disturbed_weight_shows(framework, headed):
    """Distrust: a hundredth added to a single number of the head must turn this red."""
    folder, reference = headed(CLASSIFIER)
    disturbed = copy.deepcopy(reference)
    with torch.no_grad():
        disturbed.score.weight[1, 7] += 1e-2
    found = Backend(framework, folder, architecture=CLASSIFIER)(input_ids=IDS).logits
    assert relative_error(found, judge(disturbed, input_ids=IDS).logits.numpy()) > 2e-5
