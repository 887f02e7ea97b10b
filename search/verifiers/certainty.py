"""The policy's own certainty as a score: no training, no labels, no gold answers.

self_certainty   mean over the tokens of KL(uniform || p) = -1/V sum_j log(V p_j), p the next-token distribution at
                 temperature 1 (Kang et al. 2025, arXiv 2502.18581): how far the model is from having no idea.
logprob          mean log-probability of the tokens that were written.

Scores are squashed into [0, 1] by what keeps their order: x / (1 + x), which still tells large divergences apart, and
exp(x). Each step has the mean of its tokens, and an answer the mean of its steps, so long steps weigh no more than
short ones; the paper's is the mean over all tokens. Its Borda vote is left out: scores vote as a verifier's do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from configs.schema import CertaintyVerifier, Model
from search.engines.loading import Loaded, load_model
from search.errors import ConfigError, ModelError
from search.types import Scored, ScoreRequest, Task, VerifierFacts
from search.verifiers.layout import OwnLayout
from search.verifiers.states import StateScorer

CHUNK_LOGITS = 1 << 26  # float32 logits that exist at once: 256 MiB, and their log-probabilities as much
Measure = Literal["self_certainty", "logprob"]


class CertaintyHead:
    """Implements search.verifiers.heads.Head. `output`: the policy's output head, `num_tokens` rows of it real."""

    reads_tokens = True

    def __init__(self, output: Any, measure: Measure, num_tokens: int) -> None:
        self._output = output
        self._measure = measure
        self._num_tokens = num_tokens

    def terms(self, before_NH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        """The measure at each token, float32 [N]."""
        size = max(1, CHUNK_LOGITS // self._output.weight.shape[0])
        chunks = zip(before_NH.split(size), ids_N.split(size), strict=True)
        return torch.cat([self._measured(*chunk) for chunk in chunks])

    def _measured(self, before_NH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        logits_NV = self._output(before_NH)[:, : self._num_tokens].float()
        logprobs_NV = logits_NV.log_softmax(-1)
        if self._measure == "logprob":
            return logprobs_NV.gather(1, ids_N[:, None]).squeeze(1)
        return -logprobs_NV.mean(-1) - math.log(logprobs_NV.shape[1])

    def __call__(self, ends_KH: torch.Tensor, sums_K: torch.Tensor, counts_K: torch.Tensor) -> torch.Tensor:
        means_K = sums_K / counts_K
        if self._measure == "logprob":
            return means_K.clamp(max=0).exp()
        means_K = means_K.clamp(min=0)  # a divergence: below 0 by rounding only
        return means_K / (1 + means_K)


class Certainty:
    """Implements search.types.Verifier. `policy`: folder or hub name of the model that answers.

    An answer is read as the text of its steps, after the prompt that the policy read, attempts included. Raises
    ConfigError for a runtime that cannot do it, ModelError for a model that cannot be loaded or read.
    """

    def __init__(self, task: Task, settings: CertaintyVerifier, model: Model, policy: Path | str) -> None:
        if settings.runtime != "transformers":
            raise ConfigError(
                f"verifier.type = 'certainty' reads whole next-token distributions, which runtime = "
                f"'{settings.runtime}' does not return: set verifier.runtime = 'transformers'"
            )
        loaded = load_model(policy, model, device=settings.device)
        output = loaded.model.get_output_embeddings()
        _check_head(loaded, output, policy)
        num_tokens = min(loaded.vocab_size, len(loaded.tokenizer))
        head = CertaintyHead(output, settings.measure, num_tokens)
        self.facts = VerifierFacts(
            f"{settings.measure}-{loaded.facts.fingerprint}", loaded.facts.flops_parameters, True, "mean"
        )
        self._delimiter = task.step_delimiter
        self._layout = OwnLayout(task, loaded.tokenizer, history=True)
        self._scorer = StateScorer(loaded.model.base_model, head, settings, max_length=loaded.facts.max_length)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scored]:
        """The certainty of every step."""
        encoded = [self._layout.encode(request) for request in requests]
        return self._scorer.score(encoded, [not r.finished(self._delimiter) for r in requests])

    def reset(self) -> None:
        """Forget what earlier calls computed."""
        self._scorer.reset()


@torch.inference_mode()
def _check_head(loaded: Loaded, output: Any, policy: Path | str) -> None:
    """The head's outputs must be the model's logits: some models scale or cap them afterwards."""
    ids = torch.arange(min(4, loaded.vocab_size), device=loaded.device)[None]
    states = loaded.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.allclose(output(states).float(), loaded.model(input_ids=ids).logits.float(), rtol=0.02, atol=0.02):
        raise ModelError(
            f"the certainty of {policy} cannot be read: its logits are scaled or capped after the output head; use "
            "another verifier.type"
        )
