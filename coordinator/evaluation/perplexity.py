"""How well an adapted model expects the references, counted as a run's evaluation counts it.

Shape suffixes: B sequences, T tokens, V vocabulary, M positions with a target.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from coordinator.evaluation.examples import Example
from coordinator.evaluation.opening import AdaptedModel
from coordinator.evaluation.progress import Progress
from shared.errors import DataError
from shared.modeling.compute import explained_out_of_memory
from shared.prompt_tokens import Tokens

logger = logging.getLogger(__name__)

LOGITS_AT_ONCE = 1 << 26
"""256 MiB in float32; a batch has as many sequences as make no more, and at least one."""

_Batch: TypeAlias = list[Tokens]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Summed negative log-likelihood of all targets, and how many there are."""

    nats: float
    target_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(Σ nats / Σ targets): of one target token on average."""
        try:
            return math.exp(self.nats / self.target_tokens)
        except OverflowError:
            return math.inf


def measure(adapted: AdaptedModel, examples: Sequence[Example], progress: Progress) -> Likelihood:
    """Return the likelihood of every reference, given its prompt.

    Targets are the reference's tokens and the end-of-text token, as in training: sequences are
    cut after ``max_length`` input tokens, and one without a target before that is left out.

    Raises:
        DataError: no sequence has a target.
        MemoryFullError: the memory does not hold one batch.
    """
    sequences = _sequences(adapted, examples)
    nats, targets = 0.0, 0
    lower = "--max-length"
    with explained_out_of_memory("the evaluation", lower=lower), progress.over(len(sequences)) as b:
        for batch in _batches(sequences, vocabulary=adapted.vocabulary):
            own_nats, own_targets = _of_batch(adapted, batch)
            nats, targets = nats + own_nats, targets + own_targets
            b.update(len(batch))
    return Likelihood(nats, targets)


def _sequences(adapted: AdaptedModel, examples: Sequence[Example]) -> list[Tokens]:
    pairs = [(example.prompt, text) for example in examples for text in example.references]
    end = adapted.max_length + 1
    cut = [
        (ids[:end], targets[:end])
        for ids, targets in adapted.tokenizer.completed(
            [prompt for prompt, _ in pairs], [text for _, text in pairs]
        )
    ]
    kept = [(ids, targets) for ids, targets in cut if any(targets[1:])]
    left_out = len(cut) - len(kept)
    what = f"{left_out} of {len(cut)} references begin after {adapted.max_length} tokens"
    if not kept:
        raise DataError(f"{what}: nothing to measure; raise --max-length, or shorten prompts")
    if left_out:
        logger.warning("%s and do not count for perplexity; raise --max-length", what)
    return kept


def _batches(sequences: Sequence[Tokens], *, vocabulary: int) -> Iterator[_Batch]:
    """Yield all sequences, the longest first, so that little of what is computed is padding."""
    rest = sorted(sequences, key=lambda tokens: len(tokens[0]), reverse=True)
    while rest:
        size = max(1, LOGITS_AT_ONCE // (len(rest[0][0]) * vocabulary))
        yield rest[:size]
        rest = rest[size:]


@torch.inference_mode()
def _of_batch(adapted: AdaptedModel, batch: _Batch) -> tuple[float, int]:
    """Return (Σ nats, targets); softmax in float32, sum in float64.

    Padded on the right: under a causal mask that changes nothing to its left.
    """
    tokens_BT = _padded([ids for ids, _ in batch]).to(adapted.device)
    wanted_BT = _padded([targets for _, targets in batch]).to(adapted.device)
    seen_BT = _padded([[True] * len(ids) for ids, _ in batch]).to(adapted.device)
    logits_BTV = adapted.model(input_ids=tokens_BT[:, :-1], attention_mask=seen_BT[:, :-1]).logits
    chosen_BT = wanted_BT[:, 1:]
    logits_MV, labels_M = logits_BTV[chosen_BT].float(), tokens_BT[:, 1:][chosen_BT]
    nats_M = functional.cross_entropy(logits_MV, labels_M, reduction="none")
    return float(nats_M.sum(dtype=torch.float64)), len(labels_M)


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
