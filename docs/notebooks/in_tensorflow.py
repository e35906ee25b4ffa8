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
# # Teach a model a song, in TensorFlow
#
# OPT in `opt_tf` is a Keras 3 model: it compiles and fits like any other. In this notebook a model learns a counting
# song. You will see its loss fall, its predictions change, and what happens to text that it has never seen.
#
# It runs on `opt-demo`, which comes with the package, in half a minute on two cores.

# %%
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

from opt_tf import GPT2Tokenizer, TFOPTForCausalLM

plt.style.use("opt_common.zoo")
keras.utils.set_random_seed(0)
name = "opt-demo"
tokenizer = GPT2Tokenizer.from_pretrained(name)
model = TFOPTForCausalLM.from_pretrained(name)
print(f"{model.count_params():,} parameters")

# %% [markdown]
# ## The song
#
# A verse for each number from ten down to one, always in the same words. The last verse is kept out of training: if the
# model can sing it, it has learnt the song and not only its letters.

# %%
numbers = "ten nine eight seven six five four three two one".split()
verses = [
    f"There were {number} little birds upon the apple tree. One flew away to look for the sea." for number in numbers
]
*lessons, kept = verses
print("\n".join(verses[:2]), "...", sep="\n")

# %% [markdown]
# ## Before
#
# What does the model make of it now? `generate` continues the text greedily, one token at a time.

# %%
start = tokenizer("There were five little birds", return_tensors="tf")


def sing() -> str:
    return tokenizer.decode(model.generate(**start, max_new_tokens=16)[0].numpy(), skip_special_tokens=True)


before = sing()
print(before)

# %% [markdown]
# And here is how much each token of the kept verse surprises it. The surprise of a token is minus the logarithm of its
# probability, in nats: 0 if the model was certain, and 8 if it held the token for one in three thousand. The mean of
# these bars is the loss.

# %%
verse = tokenizer(kept, return_tensors="tf")["input_ids"]
words = [tokenizer.decode([token]) for token in verse[0].numpy()]


@tf.function
def surprise(ids: tf.Tensor) -> tf.Tensor:
    logits = model(ids).logits[:, :-1]  # each position predicts the next token
    return keras.losses.sparse_categorical_crossentropy(ids[:, 1:], logits, from_logits=True)[0]


at_first = surprise(verse).numpy()


def draw(bars: dict[str, np.ndarray]) -> None:
    figure, panel = plt.subplots(figsize=(8.4, 3.2))
    for i, (label, heights) in enumerate(bars.items()):
        width = 0.8 / len(bars)
        panel.bar(np.arange(len(heights)) + i * width, heights, width, label=f"{label}: mean {heights.mean():.2f}")
    panel.set_xticks(np.arange(len(words) - 1) + 0.4 - 0.4 / len(bars), words[1:], rotation=60, ha="right")
    panel.set_ylabel("surprise, nats")
    panel.set_title("How much each word surprises the model")
    panel.legend()
    plt.show()


draw({"before": at_first})

# %% [markdown]
# ## Training
#
# The labels are the input itself; the model shifts them. The loss of the lessons is a mean over an epoch, with dropout,
# so at first it lies above that of the kept verse, which is taken at the end. The third curve is a text from elsewhere:
# a model that learns one thing begins to forget another, and this is where it shows.

# %%
rows = tokenizer(lessons, padding=True, return_tensors="tf")
labels = tf.where(rows["attention_mask"] == 1, rows["input_ids"], -100)  # padding does not count
elsewhere = tokenizer("Once upon a time there lived a poor man who had three sons.", return_tensors="tf")["input_ids"]
curves = {"lessons": [], "the kept verse": [], "another text": []}


class Listen(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        curves["lessons"].append(logs["loss"])
        curves["the kept verse"].append(surprise(verse).numpy().mean())
        curves["another text"].append(surprise(elsewhere).numpy().mean())


model.compile(keras.optimizers.AdamW(1e-4))
model.fit(dict(rows, labels=labels), epochs=12, batch_size=3, verbose=0, callbacks=[Listen()])

figure, panel = plt.subplots()
for label, losses in curves.items():
    panel.plot(range(1, len(losses) + 1), losses, label=label)
panel.set_ylim(0)
panel.set_xlabel("epoch")
panel.set_ylabel("loss, nats per token")
panel.set_title("Learning, and forgetting")
panel.legend()
plt.show()

# %% [markdown]
# ## After
#
# The same prompt, and the verse that it never saw.

# %%
print("before:", before)
print("after: ", sing())
draw({"before": at_first, "after": surprise(verse).numpy()})

# %% [markdown]
# Most words are now expected. What surprise is left stands at the number: it is the one word that differs from verse to
# verse, and this one was never among them.
#
# ## Keep it
#
# `save_pretrained` writes the Hub's own files, which PyTorch, JAX and transformers load.

# %%
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in sorted(Path(folder).iterdir()):
        print(f"{file.name:25} {file.stat().st_size:>12,} bytes")
