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
# # Gradients, batches and compilation, in JAX
#
# OPT in `opt_flax` is a Flax NNX module: plain Python that JAX differentiates, maps and compiles. This notebook asks
# which words a prediction depends on, watches a prediction form layer by layer, and fine-tunes with a training step of
# ten lines.
#
# It runs on `opt-demo`, which comes with the package, in half a minute on two cores.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from opt_flax import FlaxOPTForCausalLM, GPT2Tokenizer

plt.style.use("opt_common.zoo")
name = "opt-demo"
tokenizer = GPT2Tokenizer.from_pretrained(name)
model = FlaxOPTForCausalLM.from_pretrained(name)

prompt = "Once upon a time there was a king who had a beautiful"
inputs = tokenizer(prompt, return_tensors="jax")
words = [tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist()]
print(words)

# %% [markdown]
# ## What comes next, and how boldly to choose
#
# Dividing the logits by a temperature sharpens the distribution below 1 and flattens it above. At a low temperature the
# model always says the likeliest word; at a high one it says anything.

# %%
out = nnx.jit(lambda model, ids: model(ids, output_hidden_states=True))(model, inputs["input_ids"])
logits = out.logits[0, -1]
best = jax.lax.top_k(logits, 8)[1]

figure, panel = plt.subplots()
temperatures = (0.5, 1.0, 2.0)
for i, temperature in enumerate(temperatures):
    probabilities = jax.nn.softmax(logits / temperature)[best]
    panel.bar(np.arange(8) + 0.27 * i, probabilities, 0.25, label=f"temperature {temperature}")
panel.set_xticks(np.arange(8) + 0.27, [tokenizer.decode([token]) for token in best.tolist()])
panel.set_ylabel("probability")
panel.set_title("The eight likeliest next words")
panel.legend()
plt.show()

# %% [markdown]
# ## Which words does it depend on?
#
# The gradient of the likeliest token's logit with respect to the input embeddings says which of them the prediction is
# sensitive to: one number for each token, the length of its gradient times that of its embedding. `jax.grad` needs a
# function of the embeddings, and the model takes them as `inputs_embeds`.

# %%
embeds = model.model.decoder.embed_tokens(inputs["input_ids"])


def score(embeds: jax.Array) -> jax.Array:
    return model(inputs_embeds=embeds).logits[0, -1, best[0]]


gradient = jax.grad(score)(embeds)[0]
influence = jnp.linalg.norm(gradient, axis=-1) * jnp.linalg.norm(embeds[0], axis=-1)

figure, panel = plt.subplots(figsize=(8.4, 2.8))
panel.bar(range(len(words)), influence)
panel.set_xticks(range(len(words)), words, fontsize=8)
panel.set_ylabel("sensitivity")
panel.set_title(f"What {tokenizer.decode([best[0].item()])!r} depends on")
plt.show()

# %% [markdown]
# ## The logit lens
#
# What would the model say if it stopped after each layer? The hidden state goes through the final norm and, the head
# being tied, through the embedding matrix. The heat is the probability of the token that really comes next in the
# prompt: dark cells are words that the model saw coming, and the row where a column turns dark is the layer that knew.

# %%
decoder = model.model.decoder
states = [decoder.final_layer_norm(state[0]) for state in out.hidden_states[:-1]] + [out.hidden_states[-1][0]]
lens = jnp.stack([jax.nn.softmax(state @ decoder.embed_tokens.embedding[...].T) for state in states])
coming = inputs["input_ids"][0, 1:]
seen = lens[:, jnp.arange(len(coming)), coming]  # [layers + 1, tokens - 1]

figure, panel = plt.subplots(figsize=(8.4, 3.2))
image = panel.imshow(seen, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
panel.set_xticks(range(len(coming)), words[1:], fontsize=8)
panel.set_yticks(range(len(states)), ["embedding", *(f"after layer {i}" for i in range(len(states) - 1))])
panel.set_title("The probability of the word that comes, layer by layer")
panel.grid(visible=False)
figure.colorbar(image, ax=panel)
plt.show()

# %% [markdown]
# ## One step of training
#
# `nnx.value_and_grad` differentiates the loss with respect to the model's parameters, and `nnx.jit` compiles the step,
# once: the first call takes seconds, the others milliseconds. Dropout draws from the model's own random numbers.

# %%
lines = [
    f"The {animal} said to the moon: I shall sing you my song, and the moon said to the {animal}: do not sing too long."
    for animal in ("fox", "bear", "hare", "wolf", "frog", "goose", "cat", "crow")
]
rows = tokenizer(lines, padding=True, return_tensors="jax")
labels = jnp.where(rows["attention_mask"] == 1, rows["input_ids"], -100)  # padding does not count
optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, rows, labels):
    def loss(model):
        return model(**rows, labels=labels).loss

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


model.train()
losses = [step(model, optimizer, dict(rows), labels).item() for _ in range(40)]
model.eval()

figure, panel = plt.subplots()
panel.plot(losses)
panel.set_ylim(0)
panel.set_xlabel("step")
panel.set_ylabel("loss, nats per token")
panel.set_title("A song for the moon")
plt.show()

# %% [markdown]
# ## What it learnt
#
# A dog was not among the animals. If the model brings in one that was, it has learnt the song by heart, with the animal
# in it: eight lines are too few to learn that this word is the one that changes.

# %%
start = tokenizer("The dog said to the moon", return_tensors="jax")
print(tokenizer.decode(model.generate(**start, max_new_tokens=30)[0].tolist(), skip_special_tokens=True))
