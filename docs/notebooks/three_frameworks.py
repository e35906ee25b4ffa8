# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One model in three frameworks
#
# The same checkpoint, the same text, three programs that share no arithmetic: PyTorch's kernels, TensorFlow's, and
# whatever XLA compiles for JAX. Do they compute the same? This notebook measures it, against a fourth program that is
# slow and as exact as can be: OPT in plain numpy, in float64.
#
# It runs on `opt-demo`, which comes with the package, in half a minute on two cores, and compares the frameworks that
# are installed.

# %%
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import matplotlib.pyplot as plt
import numpy as np

from opt_common.checkpoints.pretrained import open_pretrained
from opt_common.frameworks import registered
from opt_common.parity import TOLERANCE, relative_error
from opt_common.plots import draw_errors, style
from opt_common.reference import forward
from opt_common.tokenizer import GPT2Tokenizer

plt.style.use("opt_common.zoo")
name = "opt-demo"
tokenizer = GPT2Tokenizer.from_pretrained(name)
frameworks = {key: framework for key, framework in registered().items() if not framework.missing}
models = {key: framework.model_class().from_pretrained(name) for key, framework in frameworks.items()}
for key, framework in frameworks.items():
    print(f"{framework.title:10} {framework.version:12} {type(models[key]).__name__}")

# %% [markdown]
# ## The same words
#
# Greedy generation takes the likeliest token again and again. One different choice, and everything after it would
# differ.

# %%
prompt = "Once upon a time"
tokens = {}
for key, framework in frameworks.items():
    found = models[key].generate(**tokenizer(prompt, return_tensors=framework.tensors), max_new_tokens=60)
    tokens[key] = framework.numpy(found)[0].tolist()
    print(f"{framework.title}: {tokenizer.decode(tokens[key], skip_special_tokens=True)}\n")

assert len({tuple(row) for row in tokens.values()}) == 1

# %% [markdown]
# ## The same probabilities
#
# The five likeliest next tokens, by every framework. You should see bars of equal height, and nothing else.

# %%
ids = np.array([next(iter(tokens.values()))])
outputs = {
    key: models[key](framework.tensor(ids.astype(framework.ids)), output_hidden_states=True)
    for key, framework in frameworks.items()
}
logits = {key: framework.numpy(outputs[key].logits)[0] for key, framework in frameworks.items()}


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores.astype(np.float64) - scores.max())
    return powers / powers.sum()


after = len(tokenizer(prompt)["input_ids"]) - 1
best = np.argsort(-next(iter(logits.values()))[after])[:5]
figure, panel = plt.subplots()
for i, (key, framework) in enumerate(frameworks.items()):
    width = 0.8 / len(frameworks)
    heights = softmax(logits[key][after])[best]
    panel.bar(np.arange(5) + i * width, heights, 0.9 * width, color=style(key)["color"], label=framework.title)
panel.set_xticks(np.arange(5) + 0.4 - 0.4 / len(frameworks), [repr(tokenizer.decode([token])) for token in best])
panel.set_ylabel("probability")
panel.set_title(f"What comes after “{prompt}”?")
panel.legend()
plt.show()

# %% [markdown]
# ## How far apart, layer by layer
#
# Bars hide what happens in the seventh digit. So here is the largest error of each hidden state, over its largest
# magnitude, against the float64 run. float32 has 24 bits: rounding a single number costs up to 6e-8 of it, the dotted
# line. A layer rounds thousands of times, so the lines lie above; but they stay together, and far below the limit of
# 2e-5 that every framework is tested against.
#
# The embedding is a sum of two float16 numbers, which float32 often holds exactly: an error of 0 at the left is no
# mistake.

# %%
opened = open_pretrained(name, "OPTForCausalLM", "float64")
weights = {spec.name: array for spec, array in opened.tensors}
exact_logits, exact_states = forward(opened.config, weights.get, ids)

errors = {}
for key, framework in frameworks.items():
    states = [framework.numpy(state) for state in outputs[key].hidden_states]
    compared = zip([*states, logits[key][None]], [*exact_states, exact_logits], strict=True)
    errors[framework.title] = (key, [relative_error(found, wanted) for found, wanted in compared])

figure, panel = plt.subplots(figsize=(7.2, 4))
draw_errors(panel, errors, TOLERANCE)
panel.set_title("float32: distance from a float64 run")
figure.legend(loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# ## Where the errors are
#
# The same errors spread out: one framework's last hidden state, token by token and dimension by dimension. Noise
# without a pattern is rounding. A mistake would show as a stripe: a wrong position as a row, a wrong weight as a
# column.

# %%
key, framework = next(iter(frameworks.items()))
apart = framework.numpy(outputs[key].hidden_states[-1])[0] - exact_states[-1][0]
scale = np.abs(exact_states[-1]).max()

figure, panel = plt.subplots(figsize=(8.4, 3))
most = np.abs(apart / scale).max()
image = panel.imshow(apart / scale, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
figure.colorbar(image, ax=panel, label="error / largest magnitude")
panel.set_xlabel("dimension")
panel.set_ylabel("token")
panel.set_title(f"{framework.title}: the last hidden state, less the float64 one")
panel.grid(visible=False)
plt.show()

# %% [markdown]
# ## Proof that the measure can fail
#
# A measurement that never fails proves nothing. Add a hundredth to a single weight of the middle layer, one number
# among millions, and ask again: the error jumps right there, and stays.

# %%
layer = opened.config.num_hidden_layers // 2
disturbed = dict(weights)
spoilt = f"model.decoder.layers.{layer}.self_attn.v_proj.weight"
disturbed[spoilt] = weights[spoilt].copy()
disturbed[spoilt][3, 5] += 0.01
other_logits, other_states = forward(opened.config, disturbed.get, ids)
pairs = zip([*other_states, other_logits], [*exact_states, exact_logits], strict=True)
errors["one weight off by 0.01"] = ("", [relative_error(found, wanted) for found, wanted in pairs])

figure, panel = plt.subplots(figsize=(7.2, 4))
draw_errors(panel, errors, TOLERANCE)
panel.set_title(f"A hundredth on one weight of layer {layer}")
figure.legend(loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# `opt-zoo parity --plot errors.png` draws the same for any checkpoint, with transformers beside it where it is
# installed.
