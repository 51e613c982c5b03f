"""A model's chat template, rendered as transformers renders it but without importing it.

transformers' own renderer pulls torch in; jinja2 does not. The environment below (sandbox,
white space, filters, globals) is that of ``apply_chat_template``; a test compares the two.
Templates come from the coordinator, so what a template says when it refuses a conversation is
never repeated: it could hold the conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import DataError, ModelError

Message: TypeAlias = Mapping[str, Any]

# Private-use characters: no template writes them, and a text that holds them is refused.
_OPEN, _CLOSE = "\U0010fff0", "\U0010fff1"
_MARKS = re.compile(f"([{_OPEN}{_CLOSE}])")


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as one text, and the character ranges [start, end) that the model writes.

    ``complete`` is False where the template lets only the last assistant turn be found.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    complete: bool = True


class ChatTemplate:
    """Renders conversations and finds the assistant's turns in them."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compile ``source``; ``special_tokens`` (``bos_token`` …) are variables of the template.

        Raises:
            ModelError: the template is not valid jinja2.
        """
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment(now).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the model's chat template does not parse (line {error.lineno}: {error.message}); "
                "correct chat_template.jinja in the model's folder"
            ) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, equal to what ``apply_chat_template`` returns.

        Raises:
            DataError: the template refuses the conversation.
        """
        _refuse_marks(messages)
        return _MARKS.sub("", self._render(messages, add_generation_prompt=add_generation_prompt))

    def render_turns(self, messages: Sequence[Message]) -> RenderedChat:
        """Return a conversation up to its last assistant turn, with every such turn's range.

        Where the template marks what the model writes (``{% generation %}``) those marks
        count. Else turn i is what rendering messages 0..i adds to messages 0..i-1 and the
        generation prompt. Templates that render a turn otherwise once another follows (Qwen3
        drops its reasoning) have no such increments: then only the last turn is a range.

        Raises:
            DataError: the template refuses the conversation, or hides even the last turn.
        """
        _refuse_marks(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        messages = messages[: turns[-1] + 1]
        marked = self._render(messages, add_generation_prompt=False)
        if _OPEN in marked:
            return _unmark(marked)
        spans = [self._span(messages, turn, marked) for turn in turns]
        if spans[-1] is None:
            raise DataError(
                "the model's chat template renders this conversation's last assistant turn in a "
                "way that its beginning cannot be told; use 'prompt' and 'completion' instead"
            )
        found = tuple(span for span in spans if span is not None)
        complete = len(found) == len(spans)
        return RenderedChat(marked, found if complete else found[-1:], complete)

    def _span(self, messages: Sequence[Message], turn: int, full: str) -> tuple[int, int] | None:
        try:
            before = self._render(messages[:turn], add_generation_prompt=True)
            until = self._render(messages[: turn + 1], add_generation_prompt=False)
        except DataError:  # many templates refuse an empty beginning, or one of a system message
            return None
        if not (until.startswith(before) and full.startswith(until)):
            return None
        return len(before), len(until)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                self._special_tokens,
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception:  # noqa: BLE001 - a template is foreign code: it may raise anything
            raise DataError(
                "the model's chat template refuses this conversation; most want user and "
                "assistant in turn, the user first, and some know no 'system' role"
            ) from None


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``: the template's own mark of what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - so declared by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace jinja2's filter, which escapes HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _refuse_marks(messages: Sequence[Message]) -> None:
    if _MARKS.search(json.dumps(messages, ensure_ascii=False, default=dict)):
        raise DataError(
            "a message holds the private-use character U+10FFF0 or U+10FFF1, which this program "
            "needs for itself; remove it from the text"
        )


def _unmark(marked: str) -> RenderedChat:
    text: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = 0
    for part in _MARKS.split(marked):
        if part == _OPEN:
            start = length
        elif part == _CLOSE:
            spans.append((start, length))
        else:
            text.append(part)
            length += len(part)
    return RenderedChat("".join(text), tuple(spans))
