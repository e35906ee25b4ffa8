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
# # Inside a language model, in PyTorch
#
# A language model does one thing: it reads some tokens and says how likely each token is to come next. This
# notebook opens one up. You will see what it predicts, where its attention goes, how a prediction forms layer by
# layer, and what FlashAttention saves.
#
# It runs on `opt-demo`, a small OPT that comes with the package. Any other works too: set `name` to
# `"facebook/opt-125m"` or to a folder of yours.

# %%
import time

import matplotlib.pyplot as plt
import torch

from opt_pt import GPT2Tokenizer, OPTForCausalLM

plt.style.use("opt_common.zoo")
name = "opt-demo"
tokenizer = GPT2Tokenizer.from_pretrained(name)
model = OPTForCausalLM.from_pretrained(name, attn_implementation="eager")  # keeps the attention weights
print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {len(model.model.decoder.layers)} layers")

# %% [markdown]
# ## What comes next?
#
# Text goes in as tokens: words, or pieces of words with the space before them. Each becomes a number. The first one,
# `</s>`, starts every text. The prompt is half a sentence from the fairy tales that `opt-demo` was trained on.

# %%
prompt = "There lived a king whose daughters were all"
inputs = tokenizer(prompt, return_tensors="pt")
words = [tokenizer.decode([token]) for token in inputs["input_ids"][0]]
print(words)

# %% [markdown]
# `model(...)` returns a score for every token of the vocabulary at every position: the logits, of shape
# `[1, tokens, vocabulary]`. The softmax of the last position's scores is the distribution of the next token. Here are
# its ten most likely ones.

# %%
with torch.no_grad():
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
probabilities = out.logits[0, -1].softmax(-1)
best = probabilities.topk(10)

figure, panel = plt.subplots()
panel.barh(range(10), best.values)
panel.set_yticks(range(10), [repr(tokenizer.decode([token])) for token in best.indices])
panel.invert_yaxis()
panel.grid(axis="x")
panel.grid(visible=False, axis="y")
panel.set_xlabel("probability")
panel.set_title(f"What comes after “… {' '.join(prompt.split()[-4:])}”?")
plt.show()

# %% [markdown]
# ## Where does it look?
#
# To predict a token, the model looks back at those before it. Each attention head has its own way of looking: a row
# below is the token that looks, a column the one it looks at, and each row sums to one. Nothing lies above the
# diagonal, because nobody sees the future.
#
# Three patterns are worth looking for. A dark first column is a head with nothing to say: it parks its attention on
# `</s>`. A dark line next to the diagonal looks at the previous token: the pieces of a word find each other so. And a
# dark cell far from both is a head that fetches one certain word from a distance.

# %%
attentions = torch.stack(out.attentions)[:, 0]  # [layers, heads, tokens, tokens]
layer = len(attentions) // 2
heads = attentions[layer][:4]

figure, panels = plt.subplots(1, len(heads), figsize=(8.4, 2.9), sharey=True)
for head, panel in enumerate(panels):
    panel.imshow(heads[head], vmin=0, vmax=1, cmap="Blues")
    panel.set_xticks(range(len(words)), words, rotation=90, fontsize=6.5)
    panel.set_yticks(range(len(words)), words, fontsize=6.5)
    panel.set_title(f"layer {layer}, head {head}")
    panel.grid(visible=False)
plt.show()

# %% [markdown]
# All heads of all layers in one number each: how much of its attention a head spends on the first token, and on the one
# before. Heads that do neither are the interesting ones.

# %%
first = attentions[:, :, 1:, 0].mean(-1)
previous = attentions.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)

figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.2))
for panel, share, title in zip(panels, (first, previous), ("on the first token", "on the previous token"), strict=True):
    image = panel.imshow(share, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for at, value in enumerate(share.flatten()):
        row, column = divmod(at, share.shape[1])
        color = "white" if value > 0.6 else "black"
        panel.text(column, row, f"{value:.0%}", ha="center", va="center", color=color, fontsize=8.5)
    panel.set_xticks(range(share.shape[1]))
    panel.set_yticks(range(share.shape[0]))
    panel.set_xlabel("head")
    panel.set_ylabel("layer")
    panel.set_title(title)
    panel.grid(visible=False)
plt.show()

# %% [markdown]
# ## The logit lens
#
# Every layer adds something to a running sum, the hidden state, and only the last one is turned into logits. The logit
# lens asks what the model would say if it stopped early: it takes the hidden state after each layer through the final
# layer norm and the output matrix. In the modules of this model, that is one line.
#
# Each cell is the most likely next token at that point; the darker, the surer. Read a column upwards. The bottom row
# repeats its own token, because the output matrix is the embedding matrix. Above it the guess often follows from the
# current word alone; further up the context takes over. The top row is the model's answer.

# %%
decoder = model.model.decoder
with torch.no_grad():
    states = [decoder.final_layer_norm(state[0]) for state in out.hidden_states[:-1]] + [out.hidden_states[-1][0]]
    lens = torch.stack([model.lm_head(state).softmax(-1) for state in states])  # [layers + 1, tokens, vocabulary]
surest = lens.max(-1)

figure, panel = plt.subplots(figsize=(8.4, 3.6))
panel.imshow(surest.values, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
for y in range(lens.shape[0]):
    for x in range(lens.shape[1]):
        color = "white" if surest.values[y, x] > 0.6 else "black"
        text = tokenizer.decode([surest.indices[y, x]]).strip()
        panel.text(x, y, text, ha="center", va="center", color=color, fontsize=7.5)
panel.set_xticks(range(len(words)), words, fontsize=8.5)
panel.set_yticks(range(len(states)), ["embedding", *(f"after layer {i}" for i in range(len(states) - 1))])
panel.set_title("What each layer would say")
panel.grid(visible=False)
plt.show()

# %% [markdown]
# The same as a curve: the probability that each layer gives to the token the model settles on in the end.

# %%
final = lens[-1, -1].argmax()
figure, panel = plt.subplots(figsize=(7.2, 3))
panel.plot(lens[:, -1, final], marker="o")
panel.set_xticks(range(len(states)), ["embedding", *(f"layer {i}" for i in range(len(states) - 1))])
panel.set_ylim(0)
panel.set_ylabel("probability")
panel.set_title(f"On the way to {tokenizer.decode([final])!r}")
plt.show()

# %% [markdown]
# ## Does a layer matter?
#
# The modules are the model: take one out, and the model runs without it. Here a forward hook on each layer returns its
# input unchanged, so that the layer is skipped, and the loss on the prompt says how much it is missed.

# %%
ids = inputs["input_ids"]
with torch.no_grad():
    whole = model(ids, labels=ids).loss.item()
    losses = []
    for layer in decoder.layers:
        handle = layer.register_forward_hook(lambda layer, given, result: given[0])
        losses.append(model(ids, labels=ids).loss.item())
        handle.remove()

figure, panel = plt.subplots(figsize=(7.2, 3))
panel.bar(range(len(losses)), losses)
panel.axhline(whole, color="#333333", linestyle=":")
panel.annotate("all layers", (len(losses) - 0.5, whole), (4, 3), textcoords="offset points")
panel.set_xticks(range(len(losses)))
panel.set_xlabel("layer left out")
panel.set_ylabel("loss, nats per token")
panel.set_title("The loss without one layer")
plt.show()

# %% [markdown]
# ## FlashAttention-2 against eager
#
# `eager` attention writes the whole matrix of attention weights to memory, which grows with the square of the length.
# FlashAttention-2 computes the same in small tiles that never leave the chip. It needs an NVIDIA GPU and the package
# `flash-attn`; without them this cell says so.

# %%
try:
    import flash_attn  # noqa: F401

    ready = torch.cuda.is_available()
except ImportError:
    ready = False

if not ready:
    print("No NVIDIA GPU with flash-attn here: not measured. On one H100, see the page Benchmarks.")
else:
    kinds = ("eager", "flash_attention_2")
    lengths = [n for n in (64, 128, 256, 512, 1024, 2048) if n <= model.config.max_position_embeddings]
    milliseconds = {kind: [] for kind in kinds}
    for kind in kinds:
        fast = OPTForCausalLM.from_pretrained(name, dtype="float16", device="cuda", attn_implementation=kind)
        for length in lengths:
            ids = torch.randint(4, fast.config.vocab_size, (16, length), device="cuda")
            with torch.inference_mode():
                for repeat in range(8):
                    if repeat == 3:  # the first ones warm up
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                    fast(ids, use_cache=False)
                torch.cuda.synchronize()
            milliseconds[kind].append(1000 * (time.perf_counter() - start) / 5)

    figure, panel = plt.subplots()
    for kind in kinds:
        panel.plot(lengths, milliseconds[kind], marker="o", label=kind)
    panel.set_xlabel("tokens in each of 16 rows")
    panel.set_ylabel("forward pass, ms")
    panel.set_title("The same numbers, with and without the matrix")
    panel.legend()
    plt.show()
