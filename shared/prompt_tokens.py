"""A model's tokenizer, and what stands around a text: the one rule for training and evaluation.

Uses `tokenizers` and `tokenizer.json`, never transformers' AutoTokenizer (it imports torch).
No error holds text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from tokenizers import Encoding, Tokenizer

from shared.errors import DataError, ModelError

Tokens: TypeAlias = tuple[list[int], list[bool]]
"""Ids, and which of them the model is to learn to write."""


class FramedTokenizer:
    """A tokenizer with its begin-of-text tokens, and the model's end-of-text token."""

    def __init__(self, tokenizer_file: Path, *, eos_token_id: int | None) -> None:
        """Load ``tokenizer.json``; without ``eos_token_id`` a text has no end.

        Raises:
            ModelError: the file is damaged.
        """
        self._tokenizer = _load(tokenizer_file)
        self._start = _begin_of_text(self._tokenizer)
        self._end = [] if eos_token_id is None else [eos_token_id]

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return each text's own tokens, without any around it."""
        encodings: list[Encoding] = self._tokenizer.encode_batch(
            list(texts), add_special_tokens=False
        )
        return encodings

    def whole(self, texts: Sequence[str | tuple[str, str]], *, max_length: int) -> list[Encoding]:
        """Return texts, or pairs of texts (one kind), as the tokenizer itself frames them.

        With its special tokens, and cut to ``max_length`` tokens in all; of a pair the longer
        text is cut first.

        Raises:
            DataError: ``max_length`` has no room for a token of each text.
        """
        paired = isinstance(texts[0], tuple)
        framing = self._tokenizer.num_special_tokens_to_add(paired)
        if max_length < framing + 1 + paired:
            raise DataError(
                f"training.max_length is {max_length}, and the tokenizer's own tokens take "
                f"{framing} of that: raise it"
            )
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")
        try:
            encodings: list[Encoding] = self._tokenizer.encode_batch(list(texts))
            return encodings
        finally:
            self._tokenizer.no_truncation()

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids that the model continues, for each prompt."""
        return [[*self._start, *encoding.ids] for encoding in self.encode(texts)]

    def framed(self, prompt: Sequence[int], completion: Sequence[int]) -> Tokens:
        """Return a whole sequence; the completion and the end-of-text token are targets."""
        end = [] if list(completion[-1:]) == self._end else self._end
        ids = [*self._start, *prompt, *completion, *end]
        known = len(self._start) + len(prompt)
        return ids, [index >= known for index in range(len(ids))]

    def completed(self, prompts: Sequence[str], completions: Sequence[str]) -> Iterator[Tokens]:
        """Yield each prompt with its completion as one sequence.

        The seam: in use, the prompt is tokenised by itself and continued, so training keeps
        exactly the prompt's own tokens. If the joined text begins with these, the rest of its
        tokens are the completion (a SentencePiece tokenizer then sets no word boundary of its
        own at the seam); if a token would straddle the seam, the completion is tokenised by
        itself.
        """
        texts = list(zip(prompts, completions, strict=True))
        joined = self.encode([prompt + completion for prompt, completion in texts])
        for (_, text), prompt, whole in zip(texts, self.encode(prompts), joined, strict=True):
            seam = len(prompt.ids)
            continues = whole.ids[:seam] == prompt.ids
            completion = whole.ids[seam:] if continues else self.encode([text])[0].ids
            yield self.framed(prompt.ids, completion)

    def text(self, ids: Sequence[int]) -> str:
        """Return what ids say, without special tokens."""
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded


def _load(tokenizer_file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(
            f"{tokenizer_file} is not a tokenizer.json that this version of tokenizers reads "
            f"({error}); save it again with a current transformers, or update tokenizers here"
        ) from error
    # Both may be stored in the file; cutting is ours, and nothing is ever padded.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _begin_of_text(tokenizer: Tokenizer) -> list[int]:
    """Return what the tokenizer's post-processor puts in front of a text."""
    probe = tokenizer.encode("a", add_special_tokens=True)
    marked = zip(probe.ids, probe.special_tokens_mask, strict=True)
    return [id_ for id_, _ in itertools.takewhile(lambda pair: pair[1] == 1, marked)]
