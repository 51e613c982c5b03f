"""From text to tokens: the model's tokenizer, chat template and end-of-text token.

Uses `tokenizers` and `tokenizer.json`, never transformers' AutoTokenizer (it imports torch).
Raw text comes in from `edge_agent.records` and goes no further: what leaves are token ids for
the device's own front. No error or log line holds text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Encoding

from edge_agent.backends.base import NO_TARGET
from edge_agent.chat_template import ChatTemplate, RenderedChat
from edge_agent.dataset import IntArray, Sequences
from edge_agent.records import Record, Records
from shared.errors import DataError, ModelError
from shared.prompt_tokens import FramedTokenizer, Tokens
from shared.protocol.messages import ModelDescription

logger = logging.getLogger(__name__)

_ENCODE_AT_ONCE = 1024
"""Records per call of the tokenizer, which spreads a call over the cores."""


class Vocabulary:
    """How one model reads text."""

    def __init__(self, tokenizer_file: Path, model: ModelDescription) -> None:
        """Load ``tokenizer.json`` and compile the chat template, if the model has one.

        Raises:
            ModelError: either is damaged.
        """
        self._tokenizer = FramedTokenizer(tokenizer_file, eos_token_id=model.eos_token_id)
        self._model = model
        self._template = _template(model)

    def tokenise(self, records: Records, *, max_length: int) -> Sequences:
        """Return the records as sequences of at most ``max_length`` input tokens.

        ``text``: all tokens are targets, and the end-of-text token after them. ``prompt``:
        only the completion's tokens and the end-of-text token (`FramedTokenizer.completed`).
        ``messages``: only what the assistant writes, its end of turn included; the template
        sets all special tokens.
        What the tokenizer puts in front of a text (often a begin-of-text token) stands in
        front of the first segment only.

        Sequences without a target within ``max_length`` are dropped, with one warning.

        Raises:
            DataError: nothing is left, or the chat template refuses a conversation.
            ModelError: there are ``messages`` but the model has no chat template, or the
                tokenizer makes an id that the model does not know.
        """
        cut = (
            (ids[: max_length + 1], targets[: max_length + 1])
            for ids, targets in self._tokens(records)
        )
        kept = [_shifted(ids, targets) for ids, targets in cut if any(targets[1:])]
        _report_dropped(records, kept=len(kept), max_length=max_length)
        sequences = Sequences.join(kept)
        self.check_ids(sequences)
        return sequences

    def encode_whole(
        self, texts: Sequence[str | tuple[str, str]], *, max_length: int
    ) -> list[Encoding]:
        """Return texts, or pairs of texts, as a classifier reads them (`FramedTokenizer.whole`).

        Raises:
            DataError: ``max_length`` has no room for a token of each text.
        """
        parts = (texts[i : i + _ENCODE_AT_ONCE] for i in range(0, len(texts), _ENCODE_AT_ONCE))
        return [e for part in parts for e in self._tokenizer.whole(part, max_length=max_length)]

    def _tokens(self, records: Records) -> Iterator[Tokens]:
        make = {"text": self._texts, "prompt": self._prompts, "messages": self._chats}
        for first in range(0, len(records), _ENCODE_AT_ONCE):
            part = records.records[first : first + _ENCODE_AT_ONCE]
            yield from make[records.format](replace(records, records=part))

    def _texts(self, records: Records) -> Iterator[Tokens]:
        for text in self._tokenizer.encode([record.row["text"] for record in records.records]):
            yield self._tokenizer.framed([], text.ids)

    def _prompts(self, records: Records) -> Iterator[Tokens]:
        rows = [record.row for record in records.records]
        yield from self._tokenizer.completed(
            [row["prompt"] for row in rows], [row["completion"] for row in rows]
        )

    def _chats(self, records: Records) -> Iterator[Tokens]:
        chats = [self._render(record, records.path) for record in records.records]
        last_only = sum(not chat.complete for chat in chats)
        if last_only:
            logger.warning(
                "%s: in %d conversations only the last assistant turn is learnt, because the "
                "chat template renders earlier turns in another way than it renders the last; "
                "make one line of each turn to learn them all",
                records.path,
                last_only,
            )
        encodings = self._tokenizer.encode([chat.text for chat in chats])
        for chat, encoding in zip(chats, encodings, strict=True):
            yield encoding.ids, _inside(encoding, chat.spans)

    def _render(self, record: Record, path: Path) -> RenderedChat:
        if self._template is None:
            raise ModelError(
                f"{path} holds 'messages', but the model {self._model.name} has no chat template; "
                "use 'prompt' and 'completion', or a model that was trained on conversations"
            )
        try:
            return self._template.render_turns(record.row["messages"])
        except DataError as error:
            raise DataError(f"{path}:{record.line}: {error}") from None

    def check_ids(self, sequences: Sequences) -> None:
        """Check that the model knows every token, as input or to be predicted.

        Raises:
            ModelError: it does not: tokenizer and weights are not of the same model.
        """
        size = json.loads(self._model.config_json).get("vocab_size")
        largest = int(max(sequences.input_ids_M.max(), sequences.labels_M.max()))
        if size is not None and largest >= size:
            raise ModelError(
                f"the tokenizer of {self._model.name} makes token id {largest}, but the model "
                f"knows {size} tokens; its tokenizer.json belongs to another model"
            )


def _template(model: ModelDescription) -> ChatTemplate | None:
    if model.chat_template is None:
        return None
    return ChatTemplate(model.chat_template, special_tokens=model.special_tokens)


def _inside(encoding: Encoding, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Return which tokens begin in, or reach into, one of the character ranges."""
    return [
        any(start <= first < end or first < start < last for start, end in spans)
        for first, last in encoding.offsets
    ]


def _shifted(ids: list[int], targets: list[bool]) -> tuple[IntArray, IntArray]:
    tokens = np.asarray(ids, dtype=np.int32)
    labels = np.where(np.asarray(targets[1:]), tokens[1:], np.int32(NO_TARGET))
    return tokens[:-1], labels.astype(np.int32)


def _report_dropped(records: Records, *, kept: int, max_length: int) -> None:
    dropped = len(records) - kept
    what = f"{records.path}: {dropped} of {len(records)} records have nothing to learn within"
    do = "raise training.max_length, or shorten prompts"
    if kept == 0:
        raise DataError(f"{what} {max_length} tokens; {do}")
    if dropped:
        logger.warning("%s %d tokens and are left out; %s", what, max_length, do)
