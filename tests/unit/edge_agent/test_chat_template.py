"""Our rendering of chat templates against transformers' own."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from edge_agent.chat_template import ChatTemplate
from shared.errors import DataError, ModelError
from tests.support import vocabularies

SPECIAL = {"bos_token": vocabularies.BOS, "eos_token": vocabularies.EOS}
TEMPLATES = {
    "one line a message": """\
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>' + '\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}""",
    "instruction brackets": """\
{% if messages[0]['role'] == 'system' %}
    {% set begin = '<<' + messages[0]['content'] | trim + '>>' %}
    {% set rest = messages[1:] %}
{% else %}
    {% set begin = '' %}
    {% set rest = messages %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('user and assistant must take turns') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[' + (begin if loop.first else '') + message['content'] + ']' }}
    {% else %}
        {{ ' ' + message['content'] | trim + ' ' + eos_token }}
    {% endif %}
{% endfor %}""",
    "dates, json and loop controls": """\
{{- bos_token }}
{%- if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}
{%- set seen = namespace(users=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}
{{ message | tojson }} {{ seen.users }}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}""",
    "marks of what is written": """\
{% for message in messages %}
{{ message.role }}: {% if message.role == 'assistant' %}
{% generation %}
{{ message.content }}{{ eos_token }}
{% endgeneration %}
{% else %}
{{ message.content }}
{% endif %}
{% endfor %}""",
}
CONVERSATIONS = (
    [("user", '2 < 3 & "café"?'), ("assistant", " yes \n")],
    [("system", " Brief. "), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "")],
    [("user", "{{ 1 + 1 }}"), ("assistant", "{% raw %}"), ("user", "")],
)  # fmt: skip


def messages(conversation: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in conversation]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_the_text_is_what_transformers_renders(template, generation_prompt, conversation):
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabularies.byte_level(), chat_template=template, **SPECIAL
    )
    ours = ChatTemplate(template, special_tokens=SPECIAL)
    expected = reference.apply_chat_template(
        messages(conversation), tokenize=False, add_generation_prompt=generation_prompt
    )
    rendered = ours.render(messages(conversation), add_generation_prompt=generation_prompt)
    assert rendered == expected


def test_marked_turns_are_those_of_transformers_assistant_mask():
    transformers = pytest.importorskip("transformers")
    template = TEMPLATES["marks of what is written"]
    tokenizer = vocabularies.byte_level()
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, **SPECIAL
    )
    conversation = messages([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    expected = reference.apply_chat_template(
        conversation, return_dict=True, return_assistant_tokens_mask=True
    )
    turns = ChatTemplate(template, special_tokens=SPECIAL).render_turns(conversation)
    offsets = tokenizer.encode(turns.text, add_special_tokens=False).offsets
    ours = [any(s <= first < e for s, e in turns.spans) for first, _ in offsets]
    assert ours == [bool(one) for one in expected["assistant_masks"]]
    assert [turns.text[s:e] for s, e in turns.spans] == ["b<|end|>\n", "d<|end|>\n"]


def test_turns_are_found_by_what_each_adds():
    template = ChatTemplate(TEMPLATES["one line a message"], special_tokens=SPECIAL)
    turns = template.render_turns(messages(CONVERSATIONS[1]))
    assert [turns.text[s:e] for s, e in turns.spans] == ["b<|end|>\n", "<|end|>\n"]
    assert turns.complete


def test_a_template_that_refuses_to_begin_with_the_assistant_hides_only_that_turn():
    source = TEMPLATES["one line a message"]
    strict = "{% if not messages %}{{ raise_exception('empty') }}{% endif %}" + source
    template = ChatTemplate(strict, special_tokens=SPECIAL)
    turns = template.render_turns(messages([("assistant", "a"), ("user", "b"), ("assistant", "c")]))
    assert [turns.text[s:e] for s, e in turns.spans] == ["c<|end|>\n"]
    assert not turns.complete


def test_a_template_that_hides_the_last_turn_is_refused():
    backwards = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(backwards, special_tokens={})
    with pytest.raises(DataError, match="use 'prompt' and 'completion' instead"):
        template.render_turns(messages([("user", "a"), ("assistant", "b")]))


def test_the_date_is_an_argument():
    template = ChatTemplate(
        "{{ strftime_now('%d %b %Y') }}",
        special_tokens={},
        now=lambda: datetime(2024, 7, 26, tzinfo=timezone.utc),
    )
    assert template.render([]) == "26 Jul 2024"


def test_a_template_that_does_not_parse_is_named_with_its_line():
    with pytest.raises(ModelError, match="does not parse \\(line 2"):
        ChatTemplate("\n{% for %}", special_tokens={})


@pytest.mark.parametrize(
    "source", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"]
)
def test_a_template_cannot_reach_out_of_its_sandbox(source):
    template = ChatTemplate(source, special_tokens={})
    with pytest.raises(DataError, match="refuses this conversation"):
        template.render([])


def test_reserved_characters_in_a_message_are_refused():
    template = ChatTemplate("x", special_tokens={})
    with pytest.raises(DataError, match=r"U\+10FFF0"):
        template.render(messages([("user", "a\U0010fff0b")]))
