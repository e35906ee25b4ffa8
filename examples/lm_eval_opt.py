"""lm-evaluation-harness (0.4) on a model of OPT Zoo: its own command line, with `opt-zoo` among its models.

python examples/lm_eval_opt.py --model opt-zoo --model_args pretrained=opt-demo,framework=flax --tasks lambada_openai
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import track

from opt_common.frameworks import registered
from opt_common.tokenizer import GPT2Tokenizer

BLOCK = 32  # rows are padded to a multiple of so many tokens: JAX compiles for each width


@register_model("opt-zoo")
class OPT(TemplateLM):
    """pretrained: a Hub name or a folder. framework: its key, such as pt."""

    def __init__(self, pretrained: str, framework: str = "pt", batch_size: int | str = 8, **unused: Any) -> None:
        super().__init__()
        self.framework, self.rows = registered()[framework], int(batch_size)
        self.model = self.framework.model_class().from_pretrained(pretrained)
        self.tokenizer = GPT2Tokenizer.from_pretrained(pretrained)
        self.most = self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether it is what greedy decoding says."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        batches = [order[i : i + self.rows] for i in range(0, len(order), self.rows)]
        for batch in track(batches, "log-likelihoods", disable=disable_tqdm):
            rows = [(requests[i][1] + requests[i][2])[-self.most - 1 :] for i in batch]
            width = min(self.most, -(-max(len(row) - 1 for row in rows) // BLOCK) * BLOCK)
            ids = np.full((len(rows), width), self.tokenizer.pad_token_id)
            for line, row in zip(ids, rows, strict=True):
                line[: len(row) - 1] = row[:-1]
            mask = np.arange(width) < np.array([[len(row) - 1] for row in rows])
            given = [self.framework.tensor(array.astype(np.int64)) for array in (ids, mask)]
            logits = self.framework.numpy(self.model(*given).logits)
            for i, row, scores in zip(batch, rows, logits, strict=True):
                n = len(requests[i][2])
                scores, wanted = scores[len(row) - 1 - n : len(row) - 1].astype(np.float64), np.array(row[-n:])
                chosen = scores[np.arange(n), wanted]
                largest = scores.max(-1)
                likelihood = chosen - largest - np.log(np.exp(scores - largest[:, None]).sum(-1))
                found[i] = float(likelihood.sum()), bool((chosen == largest).all())
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows that overlap in one token."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.most, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (likelihood, _) in zip(owners, found, strict=True):
            totals[owner] += likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What greedy decoding says, up to the first of the texts that a task stops at."""
        said = []
        for request in track(requests, "texts", disable=disable_tqdm):
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise ValueError(f"do_sample: found {options}, wanted greedy decoding")
            until = options.get("until") or []
            new = int(options.get("max_gen_toks", 256))
            prompt = np.array([self.tok_encode(context)[-(self.most - new) :]])
            tokens = self.framework.numpy(self.model.generate(self.framework.tensor(prompt), max_new_tokens=new))[0]
            text = self.tokenizer.decode(tokens[prompt.shape[1] :].tolist(), skip_special_tokens=True)
            for end in [until] if isinstance(until, str) else until:
                text = text.split(end)[0] if end else text
            said.append(text)
        return said


if __name__ == "__main__":
    cli_evaluate()
