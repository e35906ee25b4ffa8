"""Programs around a model, run on ours and on transformers' OPT in turn: they must not tell the two apart. The table in
docs/coming-from-transformers.md lists these tests."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import nn
from torch.distributed import fsdp

import opt_common
import opt_pt
from opt_pt import OPTForCausalLM

DEMO = str(Path(opt_common.__file__).parent / "opt-demo")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def ids(rng):
    return torch.from_numpy(rng.integers(3, 96, (4, 9)))


def both(folder, name="OPTForCausalLM", **options):
    """transformers' model and ours, with the same head."""
    theirs = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **options)
    ours = getattr(opt_pt, name).from_pretrained(folder, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


# === transformers ===


def rows_for(name, ids):
    if name == "OPTForCausalLM":
        return [{"input_ids": row, "labels": row} for row in ids]
    if name == "OPTForSequenceClassification":
        return [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]
    return [{"input_ids": row, "start_positions": int(row[0]) % 9, "end_positions": 8} for row in ids]


@pytest.mark.filterwarnings("ignore:.*newly initialized", "ignore:.*deprecated")
@pytest.mark.parametrize("name", ["OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"])
def test_trainer(tiny, ids, tmp_path, name):
    """Train, save, resume from the second step, evaluate, predict; what it saved is a checkpoint of ours."""
    options = {"num_labels": 3} if name == "OPTForSequenceClassification" else {}
    found = []
    for kind, model in zip(("theirs", "ours"), both(tiny()[0], name, dropout=0.0, **options), strict=True):
        start = {key: p.clone() for key, p in model.state_dict().items()}
        args = transformers.TrainingArguments(
            str(tmp_path / kind), max_steps=3, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
            report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        losses = []
        for resume in (None, str(tmp_path / kind / "checkpoint-2")):
            model.load_state_dict(start)
            trainer = transformers.Trainer(model, args, train_dataset=rows_for(name, ids))
            trainer.train(resume_from_checkpoint=resume)
            losses.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
        assert losses[0] == losses[1] and len(losses[0]) == 3
        trainer.save_model()
        again = getattr(opt_pt, name).from_pretrained(tmp_path / kind)
        close(again(ids)[0], model.eval()(ids)[0])
        result = trainer.predict(rows_for(name, ids))
        arrays = result.predictions if isinstance(result.predictions, tuple) else (result.predictions,)
        arrays = [torch.as_tensor(x) for x in arrays if hasattr(x, "shape")]
        found.append((losses[0], result.metrics["test_loss"], arrays, again.config.architectures))
    (a, b, c, d), (e, f, g, h) = found
    assert e == pytest.approx(a, rel=1e-4) and f == pytest.approx(b, rel=1e-4) and d == h
    for x, y in zip(g, c, strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*newly initialized")
@pytest.mark.parametrize("task", ["text-generation", "text-classification", "feature-extraction"])
def test_pipelines(task):
    name = {"text-classification": "OPTForSequenceClassification", "feature-extraction": "OPTModel"}
    answers = []
    for model in both(DEMO, name.get(task, "OPTForCausalLM")):
        tokenizer = opt_pt.GPT2Tokenizer.from_pretrained(DEMO, padding_side="left")
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        options = {"max_new_tokens": 5, "do_sample": False} if task == "text-generation" else {}
        answers.append(pipe(["Once upon a time", "The king"], **options))
    theirs, ours = answers
    if task == "text-generation":
        assert ours == theirs
    elif task == "text-classification":
        assert [x["label"] for x in ours] == [x["label"] for x in theirs]
        assert [x["score"] for x in ours] == pytest.approx([x["score"] for x in theirs], abs=1e-5)
    else:
        for a, b in zip(ours, theirs, strict=True):
            close(torch.tensor(a), torch.tensor(b))


def test_a_text_model_of_blip(tiny, ids):
    """The language model of BLIP-2 replaced by ours."""
    theirs, ours = both(tiny()[0])
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    qformer = vision | {"encoder_hidden_size": 16, "vocab_size": 8}
    config = transformers.Blip2Config(
        vision_config=vision | {"image_size": 8, "patch_size": 4}, qformer_config=qformer,
        text_config=theirs.config.to_dict(), num_query_tokens=2, image_token_id=5,
    )  # fmt: skip
    torch.manual_seed(0)
    blip = transformers.Blip2ForConditionalGeneration(config).eval()
    prompt = torch.where(ids == 5, 6, ids)
    prompt[:, :2] = 5  # where the image's two tokens go
    given = {"pixel_values": torch.rand(4, 3, 8, 8), "input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    logits = []
    for model in (theirs, ours):
        blip.language_model = model
        with torch.no_grad():
            logits.append(blip(**given).logits)
    close(logits[1], logits[0])


def test_classes_of_transformers(tiny, ids):
    """isinstance finds ours where it looks for transformers'; the types, and what runs, stay ours."""
    from transformers.models.opt import modeling_opt

    theirs, ours = both(tiny()[0])
    layer, output = ours.model.decoder.layers[0], ours(ids)
    tokenizer = opt_pt.GPT2Tokenizer.from_pretrained(DEMO)
    for x, cls in (
        (ours, transformers.PreTrainedModel), (ours, transformers.OPTForCausalLM), (ours.model, transformers.OPTModel),
        (layer, modeling_opt.OPTDecoderLayer), (layer.self_attn, modeling_opt.OPTAttention),
        (output, transformers.utils.ModelOutput), (ours.config, transformers.OPTConfig),
        (output.past_key_values, transformers.DynamicCache), (ours.model.decoder, transformers.PreTrainedModel),
        (tokenizer, transformers.PreTrainedTokenizerFast), (tokenizer("a"), transformers.BatchEncoding),
    ):  # fmt: skip
        assert isinstance(x, cls) and isinstance(x, type(x)) and issubclass(x.__class__, type(x))
        assert type(x).__module__.startswith("opt_") and x.__class__.__name__ == type(x).__name__
        if x is not output.past_key_values:  # it holds results with gradients
            assert type(pickle.loads(pickle.dumps(x))) is type(x)
    assert not isinstance(ours, transformers.OPTModel) and not isinstance(ours.model, transformers.OPTForCausalLM)
    assert type(ours.__class__(ours.config)) is OPTForCausalLM
    # a class made of x.__class__, as parametrizations and FSDP2 make one, still runs what is ours
    wanted = theirs(ids).logits
    nn.utils.parametrize.register_parametrization(ours.model.decoder.embed_positions, "weight", nn.Identity())
    for module in (ours, layer):
        module.__class__ = type("Made", (module.__class__,), {})
        assert type(module).__name__ == "Made"
    close(ours(ids).logits, wanted)


# === peft ===


def adapted(model, config):
    """The model with an adapter whose new weights are the same in every such model."""
    model = peft.get_peft_model(model, config)
    for _, p in sorted(model.named_parameters()):
        if p.requires_grad:
            p.data = torch.sin(torch.arange(p.numel()) * 0.37).view_as(p) * 0.05
    return model.eval()


ADAPTERS = {
    "all-linear": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    "embedding": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"]),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, encoder_dropout=0.0
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(tiny, ids, tmp_path, kind):
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    found = []
    for model in both(tiny()[0], dropout=0.0):
        model = adapted(model, ADAPTERS[kind]())
        model(**given).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            logits = model(**given).logits
            if kind in ("all-linear", "IA3"):  # merged, saved and loaded it says the same
                model.merge_and_unload().save_pretrained(tmp_path / type(model).__name__)
                again = OPTForCausalLM.from_pretrained(tmp_path / type(model).__name__)
                torch.testing.assert_close(again(ids, mask).logits, logits, atol=1e-3, rtol=1e-3)
        found.append((gradients, logits))
    (wanted_gradients, wanted), (gradients, logits) = found
    real = mask.bool() if wanted.shape == logits.shape == (*ids.shape, 96) else slice(None)
    torch.testing.assert_close(logits[real], wanted[real], atol=1e-4, rtol=1e-4)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        assert float((gradients[name] - gradient).abs().max()) < 1e-4 * float(gradient.abs().max()), name


# === accelerate, PyTorch, lm-evaluation-harness ===


def test_device_map_by_room(tiny, ids, tmp_path):
    """What does not fit into the memory allowed goes to disk, and comes from there as it is needed."""
    folder, _ = tiny()
    wanted = OPTForCausalLM.from_pretrained(folder)
    room = {"device_map": "auto", "max_memory": {"cpu": "300KB"}, "offload_folder": tmp_path}
    ours = OPTForCausalLM.from_pretrained(folder, **room)
    assert any(p.is_meta for p in ours.parameters()) and not all(p.is_meta for p in ours.parameters())
    with torch.no_grad():
        close(ours(ids).logits, wanted(ids).logits)
    found = ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert torch.equal(found, wanted.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3))


def test_fully_sharded(tiny, ids):
    """FSDP2, in a group of one."""
    theirs, ours = both(tiny()[0], dropout=0.0)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in ours.model.decoder.layers:
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(ours, mesh=mesh)
        for model in (theirs, ours):
            model(ids, labels=ids).loss.backward()
        for name, p in theirs.named_parameters():
            gradient = ours.get_parameter(name).grad.full_tensor()
            assert float((gradient - p.grad).abs().max()) < 1e-4 * float(p.grad.abs().max()), name
    finally:
        torch.distributed.destroy_process_group()


def test_int8_of_torchao(tiny, ids):
    torchao = pytest.importorskip("torchao.quantization")
    logits = []
    for model in both(tiny()[0]):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        with torch.no_grad():
            logits.append(model(ids).logits)
    close(logits[1], logits[0])


def test_likelihoods_of_lm_eval():
    """lm-evaluation-harness's own HFLM around our model and our tokenizer."""
    requests = [("The dog", " sat by the door"), ("The king", " said to the queen")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(requests)]
    scores = []
    for package, model in zip((transformers, opt_pt), both(DEMO), strict=True):
        judge = HFLM(pretrained=model, tokenizer=package.GPT2Tokenizer.from_pretrained(DEMO), batch_size=2)
        scores.append([score for score, _ in judge.loglikelihood(requests, disable_tqdm=True)])
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*newly initialized")
@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward"])
def test_trl(tmp_path, kind):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = {"chosen": ["the king", "said he"] * 2, "rejected": ["a dog", "the wolf"] * 2}
    data = {"text": data["chosen"]} if kind == "SFT" else data | ({"prompt": ["Once"] * 4} if kind == "DPO" else {})
    losses = []
    for model in both(DEMO, *(["OPTForSequenceClassification"] if kind == "Reward" else []), dropout=0.0):
        args = getattr(trl, f"{kind}Config")(
            str(tmp_path), max_steps=2, logging_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        tokenizer = transformers.GPT2Tokenizer.from_pretrained(DEMO)
        trainer = getattr(trl, f"{kind}Trainer")(
            model, args=args, train_dataset=datasets.Dataset.from_dict(data), processing_class=tokenizer
        )
        trainer.train()
        losses.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0]


# === Settings of other models ===


def test_galactica(rng):
    """Neither biases nor learnt norms, GELU, and no token that begins a text."""
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, init_std=0.2,
        max_position_embeddings=32, activation_function="gelu", enable_bias=False,
        layer_norm_elementwise_affine=False, bos_token_id=0,
    )  # fmt: skip
    theirs = transformers.OPTForCausalLM(config).eval()
    ours = OPTForCausalLM(opt_pt.OPTConfig(**config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.from_numpy(rng.integers(3, 96, (2, 9)))
    with torch.no_grad():
        close(ours(ids).logits, theirs(ids).logits)


def test_the_table_of_the_programs():
    """Each row names tests that exist."""
    table = (ROOT / "docs" / "coming-from-transformers.md").read_text().partition("| program |")[2].partition("\n\n")[0]
    named = re.findall(r"`(test_\w+)\.(test_\w+)`", table)
    assert len(named) >= table.count("\n") - 2 > 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(), f"{file}.{test}"
