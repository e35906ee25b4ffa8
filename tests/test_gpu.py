"""What runs on a CUDA GPU alone: `pytest tests/test_gpu.py -m gpu`, about two minutes on an H100.

The judge is a float64 run on the GPU of transformers' OPT with sdpa (its eager softmax is float32 even in float64) and
with the same weights, rounded to half precision first, so that what is measured is the arithmetic.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import opt_pt
import random_settings
from conftest import CONFIGS, SMALL, make_reference, save_reference
from learners import Learner
from opt_common.config import OPTConfig
from opt_common.hub import DEMO, fetch
from opt_common.quantization import Packing, QuantizationConfig
from opt_pt import OPTForCausalLM
from opt_pt.fast.gpu import can_step
from opt_pt.quantized import QuantizedLinear

DEVICE = "cuda"
FLASH = importlib.util.find_spec("flash_attn") is not None
ARMS = ["eager", "sdpa", *["flash_attention_2"] * FLASH]
flash = pytest.mark.skipif(torch.cuda.is_available() and not FLASH, reason="flash_attn is not installed")
IMPLEMENTATIONS = ["eager", "sdpa", pytest.param("flash_attention_2", marks=flash)]
HALVES = ["float16", "bfloat16"]


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """All but the last test, which a network is enough for."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")(test))


def copy_of(judge: nn.Module, cls: Any, config: Any, dtype: torch.dtype) -> Any:
    with torch.device(DEVICE):
        model = cls(copy.deepcopy(config)).to(dtype).eval()  # transformers' config holds the attention of its model
    model.load_state_dict(judge.state_dict())
    return model


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖Δ‖ / ‖wanted‖; infinity for a NaN, of which transformers' eager arm has some with left padding."""
    error = float((found.double() - wanted).norm() / wanted.norm())
    return math.inf if math.isnan(error) else error


# Forward and backward at published shapes

B, S = 2, 160
PADDINGS = {"none": (0, 0), "left": (S // 3, 0), "right": (0, S // 3)}
# Rounding is noise, and of two arms that are equally good one is luckier. Between transformers' own eager and sdpa on a
# CPU the error of the logits differed by up to 2.5 %; that of all gradients by up to 12 % on one batch and 7 % over
# four; that of a single parameter's gradient over four by up to 20 %.
FORWARD_SLACK, GRADIENT_SLACK, PARAMETER_SLACK = 1.05, 1.10, 1.5
BATCHES = 4
SCALE = 2.0**10  # of the loss, as one does in float16, which has no numbers as small as most gradients of the logits


def batch(vocab: int, padding: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.from_numpy(np.random.default_rng(seed).integers(3, vocab, (B, S)))
    mask, (left, right) = torch.ones_like(ids), PADDINGS[padding]
    mask[1, :left] = mask[1, S - right :] = 0
    return ids.masked_fill(mask == 0, 1).to(DEVICE), mask.to(DEVICE)


def gradients(model: Any, seed: int) -> dict[str, Tensor]:
    ids, mask = batch(model.config.vocab_size, ["none", "left"][seed % 2], seed)
    labels = ids.masked_fill(mask * mask.roll(1, 1) == 0, -100)  # what padding predicts means nothing
    model.zero_grad()
    (model(input_ids=ids, attention_mask=mask if seed % 2 else None, labels=labels).loss * SCALE).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


class Half:
    """The judge's weights in half precision, in transformers' model and in ours."""

    def __init__(self, judge: transformers.OPTForCausalLM, dtype: torch.dtype) -> None:
        config = OPTConfig.from_dict(judge.config.to_dict())
        self.judge, self.theirs = judge, copy_of(judge, transformers.OPTForCausalLM, judge.config, dtype)
        self.ours, self.vocab = copy_of(judge, OPTForCausalLM, config, dtype), config.vocab_size

    @functools.cached_property
    def logits(self) -> dict[str, tuple[Tensor, float]]:
        """For each padding the judge's logits of the real tokens, and the error of transformers' best arm."""
        return {padding: self._logits(padding) for padding in PADDINGS}

    @torch.no_grad()
    def _logits(self, padding: str) -> tuple[Tensor, float]:
        ids, mask = batch(self.vocab, padding)
        masked, errors = {} if padding == "none" else {"attention_mask": mask}, []
        wanted = self.judge(ids, **masked).logits[mask == 1]
        for arm in ARMS:
            self.theirs.set_attn_implementation(arm)
            errors.append(relative(self.theirs(ids, **masked).logits[mask == 1], wanted))
        assert wanted.isfinite().all() and 0 < min(errors) < 0.1, errors
        return wanted, min(errors)

    @functools.cached_property
    def gradient_errors(self) -> dict[tuple[str, str], dict[str, float]]:
        """‖Δ‖² of each parameter's gradient, summed over BATCHES, for each arm of theirs and of ours."""
        squares = {(whose, arm): dict.fromkeys(dict(self.judge.named_parameters()), 0.0)
                   for whose in ("theirs", "ours") for arm in ARMS}  # fmt: skip
        for seed in range(BATCHES):
            wanted = gradients(self.judge, seed)
            for (whose, arm), total in squares.items():
                model = getattr(self, whose)
                model.set_attn_implementation(arm)
                for name, gradient in gradients(model, seed).items():
                    error = float((gradient.double() - wanted[name]).norm()) ** 2
                    total[name] += math.inf if math.isnan(error) else error
                model.zero_grad()
            del wanted, gradient
            self.judge.zero_grad()
        return squares


@pytest.fixture(scope="module", params=["350m", "1.3b", "2.7b"])
def judge(request: pytest.FixtureRequest) -> transformers.OPTForCausalLM:
    """Float64, of a published shape, with random weights that float16 and bfloat16 both hold exactly."""
    gc.collect()  # the size before this one
    torch.cuda.empty_cache()
    config = transformers.OPTConfig.from_dict(OPTConfig.from_size(request.param).to_dict())
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.OPTForCausalLM(config).eval()
    # float64 weights and gradients, two half-precision models and the gradients of one, and room to compute
    needed, there = 22 * model.num_parameters() + 12e9, torch.cuda.get_device_properties(0).total_memory
    if there < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of GPU memory, found {there / 1e9:.0f}")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at 1 and biases at 0: swapped or dropped ones would not show
                parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.copy_(parameter.bfloat16())
            parameter.masked_fill_(parameter.abs() < 2.0**-14, 0)  # below, float16 is the coarser
    return model.double()


@pytest.fixture(scope="module", params=HALVES)
def half(request: pytest.FixtureRequest, judge: transformers.OPTForCausalLM) -> Half:
    return Half(judge, getattr(torch, request.param))


@gpu
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_forward(half, implementation, padding):
    """No further from the judge than the best of transformers' arms."""
    ids, mask = batch(half.vocab, padding)
    wanted, limit = half.logits[padding]
    half.ours.set_attn_implementation(implementation)
    logits = half.ours(ids, None if padding == "none" else mask).logits
    assert logits.isfinite().all(), "a padded row made a NaN"
    assert relative(logits[mask == 1], wanted) <= FORWARD_SLACK * limit


@gpu
@torch.no_grad()
def test_one_disturbed_weight_shows(half):
    """Distrust: a single number of the last layer, changed, must turn test_forward red."""
    wanted, limit = half.logits["none"]
    half.ours.set_attn_implementation("sdpa")
    bias = half.ours.model.decoder.layers[-1].fc2.bias
    before = bias[7].clone()
    bias[7] += 16
    error = relative(half.ours(batch(half.vocab, "none")[0]).logits.flatten(0, 1), wanted)
    bias[7] = before
    assert error > FORWARD_SLACK * limit


@gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients(half, implementation):
    """All together no further from the judge than the best of transformers' arms, and no parameter's further than with
    the same arm. (Arms differ there: a flash backward starts from the rounded output, for which the gradients of q and
    k pay.)"""
    found = half.gradient_errors["ours", implementation]
    best = min(sum(errors.values()) for (whose, _), errors in half.gradient_errors.items() if whose == "theirs")
    assert sum(found.values()) <= GRADIENT_SLACK**2 * best
    same = half.gradient_errors["theirs", implementation]
    assert not [name for name in found if found[name] > PARAMETER_SLACK**2 * same[name]]


# Every implementation, with everything that a batch can hold

ODD = dict(hidden_size=160, num_attention_heads=2, ffn_dim=200, vocab_size=1003)  # nothing is a power of two
SHAPES: dict[str, dict[str, Any]] = CONFIGS | {
    "odd": ODD,
    "odd-350m": ODD | CONFIGS["350m"] | dict(word_embed_proj_dim=72),
    "125m": dict(hidden_size=768, num_attention_heads=12, num_hidden_layers=4, ffn_dim=3072, vocab_size=50272,
                 max_position_embeddings=128),  # of its 12 layers 4, to save time
}  # fmt: skip


class Trio(NamedTuple):
    ours: OPTForCausalLM
    theirs: transformers.OPTForCausalLM
    judge: transformers.OPTForCausalLM


def trio(name: str, dtype: str, **changes: Any) -> Trio:
    """Weights that let no text be one token over and over, and yet not so large that rounding decides it."""
    changes, half = SMALL | SHAPES[name] | changes, getattr(torch, dtype)
    changes["init_std"] = 0.8 / changes["hidden_size"] ** 0.5
    judge = make_reference(2, **changes)
    judge.model.decoder.embed_positions.weight.data *= 4
    judge = judge.to(half).double().to(DEVICE)
    ours = copy_of(judge, OPTForCausalLM, OPTConfig(**changes), half)
    return Trio(ours, copy.deepcopy(judge).to(half), judge)


LAYOUTS = {  # a letter is a token of the document of that name, a dot is padding
    "left": ["aaaaaaaaaaaaaaaa", "....aaaaaaaaaaaa", "...............a"],
    "right": ["aaaaaaaaaaaaaaaa", "aaaaaaaaaaa.....", "a..............."],
    "holes": ["aaaaaaaaaaaaaaaa", ".aa..aaa.aaaaaaa", "aaa.aaaaaaaaaa.."],
    "one row, left": ["........aaaaaaaa"],
    "one row, right": ["aaaaaaaa........"],
    "packed": ["aaaaabbbbbbbbbcc", "abbbbbbbbbbbbbbc"],
    "packed, padded": ["...aaaaabbbbbccc", "aaaaaaaa..bbbb..", "......a.b......."],
}
PIECES = {"at once": [16], "through the cache": [7, 1, 4, 1, 1, 2]}


@gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", ["pre-norm", "odd-350m"])
@torch.no_grad()
def test_documents(config, layout, pieces, implementation):
    """Each gives what it gives alone: whatever stands beside it, and however many tokens come at a time."""
    ours, theirs, judge = trio(config, "float16")
    ours.set_attn_implementation(implementation)
    letters = np.array([list(row) for row in LAYOUTS[layout]])
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 96, letters.shape)).to(DEVICE)
    documents = [(row, columns) for row, line in enumerate(letters) for letter in "abc"
                 if len(columns := np.flatnonzero(line == letter))]  # fmt: skip
    mask, positions = torch.from_numpy((letters != ".").astype(int)).to(DEVICE), torch.zeros_like(ids)
    for row, columns in documents:
        positions[row, columns] = torch.arange(len(columns), device=DEVICE)
    cache, start, parts = None if pieces == "at once" else ours.init_cache(len(ids), 16), 0, []
    for n in PIECES[pieces]:
        end = start + n
        masked = {"attention_mask": mask[:, :end]} if "." in letters else {}
        packed = {"position_ids": positions[:, start:end]} if "packed" in layout else {}
        out = ours(ids[:, start:end], past_key_values=cache, **masked, **packed)
        cache, start = out.past_key_values, end
        parts.append(out.logits)
    logits = torch.cat(parts, dim=1)
    assert logits.isfinite().all()
    alone = [ids[row, columns][None] for row, columns in documents]
    wanted = torch.cat([judge(text).logits[0] for text in alone])
    limit = relative(torch.cat([theirs(text).logits[0] for text in alone]), wanted)
    found = torch.cat([logits[row, columns] for row, columns in documents])
    # Rounding is noise: on a CPU this came to 0.92 to 1.06. One query that misses one token comes to 14 and more
    assert relative(found, wanted) <= 1.5 * limit


@gpu
@flash
@torch.no_grad()
def test_attention_weights_are_the_eager_formulas():
    ours, theirs, judge = trio("350m", "float16")
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 96, (2, 16))).to(DEVICE)
    ours.set_attn_implementation("flash_attention_2")
    for model in (theirs, judge):
        model.set_attn_implementation("eager")
    found, own, wanted = (model(ids, output_attentions=True).attentions for model in (ours, theirs, judge))
    assert len(found) == len(wanted) == 3
    for weights, their, right in zip(found, own, wanted, strict=True):
        assert relative(weights, right) <= 1.5 * relative(their, right)


@gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_captured(implementation, padding):
    """As a CUDA graph, by PyTorch's own tool, the forward pass answers for other tokens and masks what it does without.
    Padding that flash-attn is to take out is an error that names it."""
    model = OPTForCausalLM.from_pretrained(DEMO, dtype="float16", device=DEVICE, attn_implementation=implementation)
    ids, mask = batch(model.config.vocab_size, padding)
    others, other_mask = batch(model.config.vocab_size, padding, seed=1)[0].flip(0), mask.flip(0)
    given, later = ((ids,), (others,)) if padding == "none" else ((ids, mask), (others, other_mask))
    with torch.no_grad():
        wanted = model(*later).logits
        wrong = implementation == "flash_attention_2" and padding != "none"
        with pytest.raises(ValueError, match="attention_mask") if wrong else nullcontext():
            graphed = torch.cuda.make_graphed_callables(lambda *given: model(*given).logits, given)
            found = graphed(*later)
            assert relative(found[other_mask == 1], wanted[other_mask == 1].double()) < 1e-3


@gpu
@flash
def test_what_flash_attention_cannot_do():
    """Says what and what to do instead, and runs nothing else in its place."""
    ids = torch.full((1, 4), 5)

    def refusal(dtype: torch.dtype, device: str) -> str:
        with pytest.raises(ValueError, match="flash_attention_2") as caught:
            model = OPTForCausalLM(OPTConfig(**SMALL), attn_implementation="flash_attention_2").to(device, dtype)
            model(ids.to(device))
        return str(caught.value)

    assert all(word in refusal(torch.float32, DEVICE) for word in ("float32", "float16", "bfloat16", "sdpa"))
    for dtype in (torch.float32, torch.float16):
        assert all(word in refusal(dtype, "cpu").lower() for word in ("cpu", "gpu", "sdpa"))


# Heads, with every implementation's backward pass

HEADS = ["OPTForSequenceClassification", "OPTForQuestionAnswering"]
DEEP = {"num_hidden_layers": 4, "init_std": 0.05, "num_labels": 3, "dropout": 0.0, "max_position_embeddings": S}
Made = dict[str, np.ndarray]


def questions(architecture: str, vocab: int, seed: int) -> Made:
    """What a headed model learns from. The scores of padding are in the loss of question answering: none there."""
    reads = architecture == "OPTForQuestionAnswering"
    ids, mask = batch(vocab, "none" if reads else ["left", "right"][seed % 2], seed)
    first, second = np.random.default_rng(seed).integers(0, S if reads else 3, (2, B))
    if reads:
        return {"input_ids": ids.cpu().numpy(), "start_positions": first, "end_positions": second}
    return {"input_ids": ids.cpu().numpy(), "attention_mask": mask.cpu().numpy(), "labels": first}


def learn(model: Any, given: Made) -> Made:
    model.zero_grad()
    (model(**{name: torch.as_tensor(array, device=DEVICE) for name, array in given.items()}).loss * SCALE).backward()
    return {name: parameter.grad.double().cpu().numpy() / SCALE for name, parameter in model.named_parameters()}


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("config", ["125m", "odd-350m"])
@pytest.mark.parametrize("architecture", HEADS)
def test_heads_learn(architecture, config, dtype, tmp_path):
    """No implementation's gradients are further from the judge than the same arm's of transformers, and those of
    opt_flax, with cuDNN, no further than the worst of its arms."""
    changes, half = SMALL | SHAPES[config] | DEEP, getattr(torch, dtype)
    given = [questions(architecture, changes["vocab_size"], seed) for seed in range(BATCHES)]
    torch.manual_seed(0)
    theirs = getattr(transformers, architecture)(transformers.OPTConfig(**changes)).eval().to(DEVICE, half)
    theirs.save_pretrained(tmp_path)
    ours = getattr(opt_pt, architecture).from_pretrained(tmp_path, device=DEVICE, dtype=dtype)
    wanted = [learn(copy.deepcopy(theirs).double(), one) for one in given]

    def error(gradients: Callable[[Made], Made]) -> float:
        """‖Δ‖ of all gradients of all batches."""
        pairs = zip(map(gradients, given), wanted, strict=True)
        return math.sqrt(sum(float(np.sum((a[name] - b[name]) ** 2)) for a, b in pairs for name in b))

    limits, found = {}, {}
    for arm in ARMS:
        theirs.set_attn_implementation(arm)
        ours.set_attn_implementation(arm)
        limits[arm], found[arm] = error(functools.partial(learn, theirs)), error(functools.partial(learn, ours))
    for arm, limit in limits.items():
        assert found[arm] <= GRADIENT_SLACK * limit, arm
    if importlib.util.find_spec("flax") and dtype == "bfloat16":  # which needs no scale
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        learner = Learner("flax", tmp_path, architecture, dtype=dtype, attn_implementation="cudnn")
        assert error(lambda one: learner.gradients(**one)[1]) <= GRADIENT_SLACK * max(limits.values())


# Generation


def prompts(rows: int, width: int, vocab: int = 96) -> tuple[Tensor, Tensor]:
    """Rows that are full, padded left, padded right, with holes, and of a single token, in turn."""
    ids, mask = np.random.default_rng(width).integers(3, vocab, (rows, width)), np.ones((rows, width), int)
    mask[1::5, : width // 3] = 0
    mask[2::5, -(width // 4) :] = 0
    mask[3::5, [0, 2, 3, width // 2]] = 0
    mask[4::5] = np.arange(width) == width // 2
    return torch.tensor(np.where(mask, ids, 1), device=DEVICE), torch.tensor(mask, device=DEVICE)


@torch.no_grad()
def excess(models: Trio, found: Tensor, ids: Tensor, mask: Tensor, eos: Sequence[int] = (), least: int = 0) -> float:
    """How far the judge's logit of an emitted token is below its largest one, at worst, in units of what rounding can
    explain: transformers' own largest error in the same dtype on the same text, for either of the two logits. So at 1
    or less every token is the likeliest one, or a tie. Each row is judged alone and without its padding."""
    assert torch.equal(found[:, : ids.shape[1]], ids)
    gaps, errors, leads = [], [], []
    for row, told in enumerate(found[:, ids.shape[1] :]):
        ended = torch.isin(told, torch.tensor(eos, device=DEVICE, dtype=told.dtype)).nonzero()
        if len(ended):
            assert (told[int(ended[0]) + 1 :] == 1).all(), "an ended row goes on"
            told = told[: int(ended[0]) + 1]
        prompt = ids[row][mask[row] == 1]
        text, last = torch.cat([prompt, told])[None], len(prompt) - 1
        wanted, own = (model(text).logits[0, last:-1].double() for model in (models.judge, models.theirs))
        errors.append(float((own - wanted).abs().max()))
        wanted[:least, list(eos)] = -math.inf
        top = wanted.topk(2).values
        gaps.append(float((top[:, 0] - wanted.gather(1, told[:, None])[:, 0]).max()))
        leads.append(top[:, 0] - top[:, 1])
    margin = 2 * max(errors)
    assert (torch.cat(leads) > margin).double().mean() > 0.5, "most of this text is ties: it proves little"
    return max(gaps) / margin


def greedy(models: Trio, ids: Tensor, mask: Tensor, new: int = 24) -> Tensor:
    """Generated and judged."""
    found = models.ours.generate(ids, mask, max_new_tokens=new, eos_token_id=[])
    assert found.shape == (len(ids), ids.shape[1] + new)
    assert excess(models, found, ids, mask) <= 1
    return found


GREEDY = [(name, "float16") for name in SHAPES if name != "125m"]
GREEDY += [("pre-norm", "bfloat16"), ("odd-350m", "bfloat16"), ("350m", "float32")]


@gpu
@pytest.mark.parametrize("config, dtype", GREEDY)
def test_greedy(config, dtype):
    models = trio(config, dtype)
    ids, mask = prompts(5, 12, models.judge.config.vocab_size)
    found = greedy(models, ids, mask)
    assert len(set(found[0, 12:].tolist())) > 3, "a text of one repeated token would hide mistakes"
    for row in (0, 1, 3):
        greedy(models, ids[row : row + 1], mask[row : row + 1])


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("config", ["pre-norm", "350m"])
@pytest.mark.parametrize("bits, group", [(8, None), (8, 32), (4, 32), (4, 128)])
def test_greedy_of_few_bits(bits, group, config, dtype):
    """By the kernels that read packed weights, from one row to more than the matrix units take at once."""
    wide = dict(hidden_size=256, num_attention_heads=4, ffn_dim=1152, num_hidden_layers=3)
    models = trio(config, dtype, **wide | dict(word_embed_proj_dim=256 if config == "pre-norm" else 32))
    packing = QuantizationConfig.rounding(bits, group)
    values = models.ours.config.to_dict() | {"quantization_config": packing.to_dict()}
    ours = OPTForCausalLM(OPTConfig.from_dict(values)).to(DEVICE, getattr(torch, dtype)).eval()
    ours.load_state_dict(models.ours.state_dict(), strict=False)  # the packed ones stay as they were drawn
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            exact = copy.deepcopy(module).double().dequantize()
            models.judge.get_submodule(name).weight.data = exact
    models = Trio(ours, copy.deepcopy(models.judge).to(getattr(torch, dtype)), models.judge)
    ids, mask = prompts(70, 12)
    assert can_step(ours, ids)
    for rows in (1, 3, 20, 70):
        greedy(models, ids[:rows], mask[:rows])


@gpu
@pytest.mark.parametrize("scales", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits, group", [(8, None), (8, 32), (4, None), (4, 128), (4, 8)])
def test_floats_of_packed_weights(bits, group, scales):
    """By one kernel, the bits that PyTorch's operations give on a CPU, over the edges of its blocks."""
    linear = QuantizedLinear(1152, 301, Packing(bits, group)).to(getattr(torch, scales))
    linear.reset_parameters()
    linear.weight_scale.data.uniform_(-1, 1)
    there = copy.deepcopy(linear).to(DEVICE)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(there.dequantize(dtype).cpu(), linear.dequantize(dtype))
    there.weight_packed.data[-1, -1] ^= 1
    assert not torch.equal(there.dequantize().cpu(), linear.dequantize())


@gpu
@pytest.mark.parametrize("part", range(3))
def test_random_settings(part, tmp_path):
    """Texts that do not hang on half precision, token for token as transformers' in float64: processors and beams in
    the graph."""
    models = {}
    for name in random_settings.MODELS:
        folder = save_reference(random_settings.reference(name), tmp_path / name)
        models[name] = OPTForCausalLM.from_pretrained(folder, dtype="float16", device=DEVICE)
    wrong = []
    for case in random_settings.cases(part, 30, distance=8e-3):
        if "exponential_decay_length_penalty" in case.options:
            continue  # of an end that is suppressed as well, transformers before 5.20 makes NaN, and then the end
        ids, mask = torch.tensor(case.ids, device=DEVICE), torch.tensor(case.mask, device=DEVICE)
        found = models[case.model].generate(ids, mask, **case.options).cpu().numpy()
        if not np.array_equal(found, case.wanted):
            wrong.append(f"{case}\nfound {found.tolist()}\nwanted {case.wanted.tolist()}")
    assert not wrong, f"{len(wrong)} differ:\n\n" + "\n\n".join(wrong[:3])


@gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_greedy_after_every_way_to_read_the_prompt(implementation):
    models = trio("350m", "float16")
    models.ours.set_attn_implementation(implementation)
    greedy(models, *prompts(5, 12))
    greedy(models, *prompts(1, 12))


@gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_one_call_after_another(dtype):
    """Other numbers of rows and tokens each time, on one model."""
    models = trio("125m", dtype)
    for rows, width, new in ((1, 12, 12), (17, 9, 8), (2, 30, 8), (16, 8, 12), (3, 12, 8), (1, 40, 12), (17, 9, 8)):
        greedy(models, *prompts(rows, width, 50272), new)


@gpu
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_to_the_last_position(rows):
    """Prompts that leave room for the new tokens and no more; with padding, more columns than positions."""
    models = trio("pre-norm", "float16")
    ids, mask = prompts(rows, 56)
    greedy(models, ids, mask, 8)
    mask[:, :20] = 0
    greedy(models, ids, mask, 64 - 36)
    if rows < 65:
        models = trio("odd", "float16", max_position_embeddings=2048)
        for width in (300, 2040):
            greedy(models, *prompts(rows, width, 1003), 8)


@gpu
def test_rows_stop_at_eos():
    models = trio("pre-norm", "float16")
    ids, mask = prompts(4, 12)
    free = greedy(models, ids, mask, 40)[:, 12:]
    for eos in ([int(free[0, 6])], [int(free[row, 3 + 7 * row]) for row in range(4)]):
        found = models.ours.generate(ids, mask, max_new_tokens=40, eos_token_id=eos)
        ends = [next((i for i, token in enumerate(row) if token in eos), 39) + 1 for row in free.tolist()]
        assert found.shape[1] == 12 + max(ends), "the text ends when all rows have"
        assert excess(models, found, ids, mask, eos) <= 1
    assert max(ends) < 40, "no case ended early"


@gpu
def test_min_new_tokens():
    models = trio("pre-norm", "float16")
    ids, mask = prompts(4, 12)
    eos = sorted({int(token) for token in greedy(models, ids, mask, 5)[:, 12:].flatten()})
    found = models.ours.generate(ids, mask, max_new_tokens=20, min_new_tokens=5, eos_token_id=eos)
    assert found.shape[1] > 12 + 5
    assert not torch.isin(found[:, 12:17], torch.tensor(eos, device=DEVICE)).any()
    assert excess(models, found, ids, mask, eos, least=5) <= 1


def set_weight(models: Trio, name: str, value: Tensor, how: str) -> None:
    for model in models:
        module, _, leaf = name.rpartition(".")
        if how == "replaced" and model is models.ours:
            setattr(model.get_submodule(module), leaf, nn.Parameter(value.clone()))
        else:
            model.get_parameter(name).data.copy_(value)  # of which autograd, and so a version counter, knows nothing


@gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("how", ["in place", "replaced"])
@torch.no_grad()
def test_changed_weights_are_seen(how, rows):
    """No copy of a weight outlives it: after each change the text is that of the new weights, and not the old one."""
    models = trio("untied", "float16")
    ids, mask = prompts(rows, 12)
    found, noise = greedy(models, ids, mask, 16), torch.Generator().manual_seed(0)
    names = [name for name, _ in models.ours.named_parameters() if "layers.0" not in name and "layers.2" not in name]
    assert len(names) == 5 + 16
    names.remove("model.decoder.layers.1.self_attn.k_proj.bias")  # which the softmax cancels
    for name in names:
        old = models.theirs.get_parameter(name).clone()
        new = old + torch.randn(old.shape, generator=noise).to(old) * 3 * (0.3 if old.ndim == 1 else old.std())
        set_weight(models, name, new, how)
        assert excess(models, found, ids, mask) > 1, f"{name}: the change does not show"
        greedy(models, ids, mask, 16)
        set_weight(models, name, old, how)
    greedy(models, ids, mask, 16)


class Negative(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@gpu
def test_changed_modules_are_seen():
    """Hooks and modules of other classes run in generate too; so does another dtype."""
    models = trio("pre-norm", "float16")
    ids, mask = prompts(3, 12)
    found, layers = greedy(models, ids, mask), [model.model.decoder.layers[1] for model in models]
    hooks = [layer.fc2.register_forward_hook(lambda *call: -call[-1]) for layer in layers]
    assert excess(models, found, ids, mask) > 1
    greedy(models, ids, mask)
    for hook, layer in zip(hooks, layers, strict=True):
        hook.remove()
        layer.fc1 = Negative(layer.fc1)
    assert excess(models, found, ids, mask) > 1
    greedy(models, ids, mask)
    for layer in layers:
        layer.fc1 = layer.fc1[0]
    greedy(models, ids, mask)
    models.judge.bfloat16().double()
    greedy(Trio(models.ours.bfloat16(), models.theirs.bfloat16(), models.judge), ids, mask)


@gpu
def test_modes():
    """With and without gradients; and what generate leaves behind does not disturb training."""
    models = trio("350m", "float16")
    ids, mask = prompts(3, 12)
    for mode in (nullcontext, torch.no_grad, torch.inference_mode, nullcontext):
        with mode():
            greedy(models, ids, mask)
    models.ours(ids, mask, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in models.ours.parameters())


@gpu
def test_the_host_does_not_wait_for_each_token(monkeypatch):
    models = trio("pre-norm", "float16", max_position_embeddings=128)
    ids, mask = prompts(3, 12)
    free = greedy(models, ids, mask, 64)
    eos = next(token for token in range(3, 96) if not (free[:, 12:] == token).any())  # looked for, never found
    waits: list[str] = []
    for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        wait = owner.synchronize
        monkeypatch.setattr(owner, "synchronize", lambda *a, wait=wait, **k: (waits.append("wait"), wait(*a, **k))[1])

    def count(new: int) -> int:
        models.ours.generate(ids, mask, max_new_tokens=new, eos_token_id=eos)  # whatever is made once is made here
        waits.clear()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                models.ours.generate(ids, mask, max_new_tokens=new, eos_token_id=eos)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return len(waits) + sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)

    few, many = count(16), count(64)
    assert few > 0, "the counter does not count: generate waits for the result at least"
    assert many <= few + (64 - 16) // 16 + 1, "more than a look every 16 tokens whether all rows have ended"


# Sampling


def likely(count: Tensor, chances: Tensor) -> bool:
    """Whether so many of each kind are likely among events of these chances [events, kinds]. By Freedman's inequality,
    which holds for draws that depend on those before, a kind is off by more once in a million."""
    expected, variance, L = chances.sum(0), (chances * (1 - chances)).sum(0), math.log(2e6)
    return bool(((count - expected).abs() <= L / 3 + (L * L / 9 + 2 * variance * L).sqrt()).all())


SETTINGS = [
    dict(temperature=0.5, top_k=0),
    dict(temperature=0.5, top_k=5),
    dict(temperature=0.5, top_k=0, top_p=0.6),
    dict(temperature=0.8, top_k=8, top_p=0.8),
]


@gpu
@pytest.mark.parametrize("rows, new", [(2000, 1), (16, 58), (1, 58)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_sampling_follows_the_probabilities(settings, rows, new):
    """Only tokens that temperature, top-k and top-p, in this order, leave; each as often as it should be, by its id and
    by its rank; at the first token, which the prompt gives, and at later ones."""
    models = trio("350m", "float16")
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 96, (1, 6))).to(DEVICE).expand(rows, 6)
    found = models.ours.generate(ids, do_sample=True, seed=1, max_new_tokens=new, eos_token_id=[], **settings)
    drawn, texts = found[:, 6:].flatten()[:, None], found[:, :-1]
    temperature, k, p = settings["temperature"], settings["top_k"], settings.get("top_p", 1.0)
    scores, own = (m(texts).logits[:, 5:].flatten(0, 1).double() / temperature for m in (models.judge, models.theirs))
    margin = 2 * float((own - scores).abs().max())  # so much closer or further may rounding move two scores

    score = scores.gather(1, drawn)
    if k:
        least = scores.topk(k).values[:, -1:]
        assert (score >= least - margin).all()
        scores[scores < least] = -math.inf
    chances = scores.softmax(-1)
    # a chance is off by a factor of exp(margin) at most; what is likelier by more than rounding stands before
    before = (chances * (scores > score + margin)).sum(-1) * math.exp(-margin)
    assert (before < p).all()
    ordered, order = chances.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= p] = 0
    ordered /= ordered.sum(-1, keepdim=True)
    chances = torch.zeros_like(chances).scatter(1, order, ordered)
    assert (chances > 0).sum(-1).double().mean() > 3, "too little to choose from"
    assert likely(drawn.flatten().bincount(minlength=96), chances)
    assert likely((order == drawn).sum(0), ordered)


@gpu
def test_every_draw_is_a_new_one():
    """At a temperature that makes all 96 tokens alike, neighbours in a row or a column are alike once in 96."""
    models = trio("350m", "float16")
    ids = torch.full((16, 6), 5, device=DEVICE)
    found = models.ours.generate(ids, do_sample=True, temperature=1e4, top_k=0, seed=1, max_new_tokens=58,
                                 eos_token_id=[])[:, 6:]  # fmt: skip
    assert likely(found.flatten().bincount(minlength=96), torch.full((found.numel(), 96), 1 / 96, device=DEVICE))
    for alike in (found[1:] == found[:-1], found[:, 1:] == found[:, :-1]):
        assert likely(alike.sum()[None], torch.full((alike.numel(), 1), 1 / 96, device=DEVICE))


@gpu
def test_seeds():
    models = trio("350m", "float16")
    ids, mask = prompts(3, 12)

    def draw(seed: int | None) -> list[list[int]]:
        settings = dict(do_sample=True, max_new_tokens=20, eos_token_id=[])
        return models.ours.generate(ids, mask, seed=seed, **settings).tolist()

    first = draw(3)
    assert draw(4) != first
    assert draw(3) == first
    assert draw(None) != draw(None)


# Other ways to write


@gpu
@pytest.mark.parametrize("drafts", [dict(prompt_lookup_num_tokens=3), dict(prompt_lookup_num_tokens=70),
                                    dict(num_assistant_tokens=4), dict(num_assistant_tokens=40)], ids=str)  # fmt: skip
@pytest.mark.parametrize("config", ["350m", "odd"])
def test_drafts_change_nothing(config, drafts):
    """Whatever is guessed, each token is the likeliest, or a tie; twice, as the second call finds everything loaded."""
    models = trio(config, "float16")
    ids, mask = prompts(2, 24, models.judge.config.vocab_size)
    ids[:, 12:] = ids[:, :12]
    if "num_assistant_tokens" in drafts:
        drafts = drafts | {"assistant_model": models.ours}
    for row in (0, 1, 0):
        one, seen = ids[row : row + 1], mask[row : row + 1]
        found = models.ours.generate(one, seen, max_new_tokens=30, eos_token_id=[], **drafts)
        assert found.shape == (1, 54)
        assert excess(models, found, one, seen) <= 1


@gpu
@torch.no_grad()
def test_beams():
    """Their scores are those of the judge, and no worse than the judge's own beams but for rounding."""
    models = trio("350m", "float16")
    ids, mask = prompts(3, 12)
    how = dict(num_beams=4, num_return_sequences=2, max_new_tokens=20, return_dict_in_generate=True, output_scores=True)
    found = models.ours.generate(ids, mask, eos_token_id=[], **how)
    assert found.sequences.shape == (6, 32) and found.beam_indices.shape == (6, 20)

    def score(model: Any, text: Tensor) -> Tensor:
        logs = model(text).logits[:, -21:-1].double().log_softmax(-1)
        return logs.gather(2, text[:, -20:, None]).mean()

    for row in range(3):
        prompt = ids[row][mask[row] == 1][None]
        texts = [torch.cat([prompt, told[None, 12:]], dim=1) for told in found.sequences[2 * row : 2 * row + 2]]
        wanted, own = (torch.stack([score(m, text) for text in texts]) for m in (models.judge, models.theirs))
        margin = max(4 * float((own - wanted).abs().max()), 1e-3)
        assert (found.sequences_scores[2 * row : 2 * row + 2] - wanted).abs().max() <= margin
        best = models.judge.generate(prompt, do_sample=False, eos_token_id=None, **how).sequences_scores
        assert wanted[0] >= best[0] - 10 * margin


@gpu
@pytest.mark.parametrize("more", [{}, dict(num_beams=3), dict(do_sample=True, temperature=2.0, num_return_sequences=3)],
                         ids=str)  # fmt: skip
def test_what_changes_the_logits_does_so_in_the_graph(more):
    models, never = trio("pre-norm", "float16"), [5, 6, 7, 8, 50, 51, 52]
    ids, mask = prompts(2, 12)
    more = dict(max_new_tokens=40, eos_token_id=[]) | more
    how = dict(repetition_penalty=1.1, no_repeat_ngram_size=2, suppress_tokens=never, bad_words_ids=[[9, 10]])

    def pairs(options: dict[str, Any]) -> list[list[tuple[int, int]]]:
        texts = models.ours.generate(ids, mask, **more, **options)[:, 12:].tolist()
        return [list(zip(text, text[1:], strict=False)) for text in texts]

    for _ in range(2):  # the second call replays what the first has loaded
        for text in pairs(how):
            assert len({*text}) == len(text), "a pair comes twice"
            assert not {token for pair in text for token in pair} & {*never} and (9, 10) not in text
    unchanged = pairs({})
    assert unchanged != pairs(how), "nothing would come that is excluded"
    assert "do_sample" in more or any(len({*text}) < len(text) for text in unchanged), "no pair would come twice anyhow"


# The snippet of transformers' documentation page

SNIPPET = r"""
import torch
from transformers import OPTForCausalLM, GPT2Tokenizer
device = "cuda" # the device to load the model onto

model = OPTForCausalLM.from_pretrained("facebook/opt-350m", torch_dtype=torch.float16, attn_implementation="flash_attention_2")
tokenizer = GPT2Tokenizer.from_pretrained("facebook/opt-350m")

prompt = ("A chat between a curious human and the Statue of Liberty.\n\nHuman: What is your name?\nStatue: I am the "
              "Statue of Liberty.\nHuman: Where do you live?\nStatue: New York City.\nHuman: How long have you lived "
              "there?")

model_inputs = tokenizer([prompt], return_tensors="pt").to(device)
model.to(device)

generated_ids = model.generate(**model_inputs, max_new_tokens=30, do_sample=False)
answer = tokenizer.batch_decode(generated_ids)[0]
""".replace("from transformers", "from opt_pt")  # noqa: E501
ANSWER = (
    "</s>A chat between a curious human and the Statue of Liberty.\n\nHuman: What is your name?\nStatue: I am the "
    "Statue of Liberty.\nHuman: Where do you live?\nStatue: New York City.\nHuman: How long have you lived there?\n"
    "Statue: I have lived here for about a year.\nHuman: What is your favorite place to eat?\nStatue: I love"
)


@gpu
@flash
def test_snippet(tmp_path):
    judge = make_reference(4, **CONFIGS["350m"], vocab_size=4096, max_position_embeddings=256)
    folder = save_reference(judge, tmp_path, torch.float16)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(fetch(DEMO, [name]) / name, folder)
    scope: dict[str, Any] = {}
    exec(SNIPPET.replace("facebook/opt-350m", str(folder)).replace('"cuda"', repr(DEVICE)), scope)
    tokenizer, ids = transformers.GPT2Tokenizer.from_pretrained(folder), scope["model_inputs"]["input_ids"]
    assert ids.tolist() == tokenizer([scope["prompt"]]).input_ids
    theirs = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float16).to(DEVICE)
    models = Trio(scope["model"], theirs, judge.to(DEVICE))
    assert excess(models, scope["generated_ids"], ids, torch.ones_like(ids), eos=[2]) <= 1
    assert scope["answer"] == tokenizer.batch_decode(scope["generated_ids"])[0]
    assert scope["answer"].startswith("</s>" + scope["prompt"])


@pytest.mark.network
def test_snippet_on_the_real_checkpoint(request):
    if "network" not in request.config.getoption("-m"):
        pytest.skip("reaches the Hugging Face Hub; run with -m network")
    program = SNIPPET + "print(answer)"
    if not torch.cuda.is_available():
        program = program.replace('"cuda"', '"cpu"').replace("float16", "float32")
    if not (FLASH and torch.cuda.is_available()):
        program = program.replace("flash_attention_2", "sdpa")
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert printed == ANSWER + "\n"
