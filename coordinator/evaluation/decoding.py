"""What an adapted model writes after each prompt: transformers' own search, set as in the papers.

Shape suffixes: B beams of all prompts at once, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from coordinator.evaluation.choices import Decoding
from coordinator.evaluation.examples import Example
from coordinator.evaluation.opening import AdaptedModel
from coordinator.evaluation.progress import Progress
from shared.errors import DataError
from shared.modeling.compute import explained_out_of_memory


class _NoRepeatedNGram(LogitsProcessor):
    """Forbids repetitions within what is written, as the papers' code does.

    transformers' own option also counts the prompt, so that no answer could say a name or a
    price of four tokens that it is asked to say.
    """

    def __init__(self, size: int, *, prompt_length: int) -> None:
        self._inner = NoRepeatNGramLogitsProcessor(size)
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return ``scores`` (B, V) without what would repeat a run of ``input_ids`` (B, T)."""
        written = input_ids[:, self._prompt_length :]
        allowed: torch.Tensor = self._inner(written, scores)
        return allowed


def decode(
    adapted: AdaptedModel, examples: Sequence[Example], how: Decoding, progress: Progress
) -> tuple[str, ...]:
    """Return what the model writes after each example's prompt, without space at its ends.

    It ends at the end-of-text token that training puts after a completion.

    Raises:
        DataError: a prompt leaves no room for ``max_new_tokens``.
        MemoryFullError: ``batch`` is too large.
    """
    prompts = adapted.tokenizer.prompts([example.prompt for example in examples])
    _check_room(adapted, examples, prompts, how)
    written: dict[int, str] = {}
    longest_first = sorted(range(len(prompts)), key=lambda one: len(prompts[one]), reverse=True)
    lower = "--batch or --beams"
    with explained_out_of_memory("the evaluation", lower=lower), progress.over(len(prompts)) as bar:
        for first in range(0, len(prompts), how.batch):
            chosen = longest_first[first : first + how.batch]
            texts = _generate(adapted, [prompts[one] for one in chosen], how)
            written |= dict(zip(chosen, texts, strict=True))
            bar.update(len(chosen))
    return tuple(written[one] for one in range(len(prompts)))


def _check_room(
    adapted: AdaptedModel,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    how: Decoding,
) -> None:
    for example, ids in zip(examples, prompts, strict=True):
        if adapted.positions and len(ids) + how.max_new_tokens > adapted.positions:
            raise DataError(
                f"{example.where}: a prompt of {len(ids)} tokens and {how.max_new_tokens} new ones "
                f"are more than the {adapted.positions} that the model reads; lower "
                "--max-answer, or shorten the prompt"
            )


@torch.inference_mode()
def _generate(adapted: AdaptedModel, prompts: Sequence[list[int]], how: Decoding) -> list[str]:
    longest = max(map(len, prompts))
    found = adapted.model.generate(  # type: ignore[no-untyped-call]
        input_ids=_padded(prompts).to(adapted.device),
        attention_mask=_padded([[1] * len(ids) for ids in prompts]).to(adapted.device),
        generation_config=_search(adapted, how),
        logits_processor=_processors(how, prompt_length=longest),
    )
    return [
        adapted.tokenizer.text(_written(ids[longest:], adapted)).strip() for ids in found.tolist()
    ]


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return rows padded on the left, so that all are continued at the same place."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_side="left")


def _written(ids: Sequence[int], adapted: AdaptedModel) -> list[int]:
    """Return the tokens before the end-of-text token, after which is only padding."""
    ids = list(ids)
    end = adapted.eos_token_id
    return ids[: ids.index(end)] if end is not None and end in ids else ids


def _search(adapted: AdaptedModel, how: Decoding) -> GenerationConfig:
    of_beams = {"length_penalty": how.length_penalty} if how.beams > 1 else {}
    end = adapted.eos_token_id
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=how.beams,
        max_new_tokens=how.max_new_tokens,
        eos_token_id=end,
        pad_token_id=0 if end is None else end,
        **of_beams,
    )


def _processors(how: Decoding, *, prompt_length: int) -> LogitsProcessorList:
    if not how.no_repeat_ngram:
        return LogitsProcessorList()
    return LogitsProcessorList([_NoRepeatedNGram(how.no_repeat_ngram, prompt_length=prompt_length)])
