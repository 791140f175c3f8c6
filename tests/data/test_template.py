"""ChatTemplate: what transformers renders, and what the sandbox refuses."""

import datetime

import pytest

from jpt.data.template import ChatTemplate, TemplateError

HI = [{'role': 'user', 'content': 'hi'}]
SPECIAL = {'bos_token': '<|bos|>', 'eos_token': '<|end|>', 'pad_token': '<|pad|>'}


def template(source):
    return ChatTemplate(source, 'test', SPECIAL)


def test_the_text_is_that_of_transformers(golden):
    for case in golden['cases']:
        made = template(golden['templates'][case['template']])
        tools = golden['tools'] if case['template'] == 'tools' else None
        arguments = {'add_generation_prompt': case['add_generation_prompt'], 'tools': tools}
        if 'error' in case:
            with pytest.raises(TemplateError, match=case['error']):
                made.render(golden['chats'][case['chat']], **arguments)
        else:
            assert made.render(golden['chats'][case['chat']], **arguments) == case['text']
    assert {case['template'] for case in golden['cases'] if 'error' in case} == {'strict'}


def test_spans_survive_loops_macros_and_set_blocks():
    source = (
        '{% macro say(text) %}<{% generation %}{{ text }}{% endgeneration %}>{% endmacro %}'
        '{% for m in messages %}{% set kept %}{{ say(m.content) }}{% endset %}{{ loop.index }}{{ kept }}{% endfor %}'
    )
    text, spans = template(source).render_spans([*HI, {'role': 'user', 'content': ''}])
    assert text == '1<hi>2<>'
    assert spans == [(2, 4), (7, 7)]
    assert template(source).marks_generation
    assert not template('{% for m in messages %}generation{% endfor %}').marks_generation


def test_marks_inside_of_marks_or_of_messages_are_refused():
    nested = '{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}'
    with pytest.raises(TemplateError, match='inside another'):
        template(nested).render(HI)
    with pytest.raises(TemplateError, match='reserved'):
        template('{{ messages[0].content }}').render([{'role': 'user', 'content': 'a\ufdd0b'}])


def test_the_date_can_be_fixed():
    source = "{{ strftime_now('%d %b %Y') }}"
    fixed = ChatTemplate(source, 'test', now=datetime.datetime(2024, 7, 26))
    assert fixed.render(HI) == '26 Jul 2024'
    assert len(template(source).render(HI)) == len('26 Jul 2024')


def test_json_is_not_escaped_and_takes_its_options():
    messages = [{'role': 'user', 'content': '', 'x': {'b': '<ü & "q">', 'a': [1, None, True]}}]
    assert template('{{ messages[0].x | tojson }}').render(messages) == '{"b": "<ü & \\"q\\">", "a": [1, null, true]}'
    source = "{{ messages[0].x.a | tojson(indent=1, separators=(',', ':')) }}"
    assert template(source).render(messages) == '[\n 1,\n null,\n true\n]'
    assert template('{{ {"b": 1, "a": "ü"} | tojson(sort_keys=True, ensure_ascii=True) }}').render(HI) == (
        '{"a": "\\u00fc", "b": 1}'
    )


def test_templates_read_variables_and_missing_names_are_empty():
    source = '{% if think is defined and think %}T{% else %}F{% endif %}{{ nothing }}'
    assert template(source).render(HI) == 'F'
    assert template(source).render(HI, think=True) == 'T'


@pytest.mark.parametrize(
    'source',
    [
        "{{ ''.__class__.__mro__ }}",
        '{{ messages.__init__.__globals__ }}',
        "{{ messages.append('x') }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__['json'] }}",
        '{% for i in range(999999999) %}{% endfor %}',
        "{{ lipsum.__globals__['os'].popen('true').read() }}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(TemplateError):
        template(source).render(HI)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ("{{ raise_exception('only pairs') }}", 'chat template of test: only pairs'),
        ("{{ messages[0]['content'] + 1 }}", 'TypeError'),
        ('{{ messages[5].content.strip() }}', 'no element 5'),
    ],
)
def test_failures_say_which_template(source, message):
    with pytest.raises(TemplateError, match=message):
        template(source).render(HI)


def test_a_template_that_is_no_jinja_names_its_line():
    with pytest.raises(TemplateError, match='chat template of test, line 2'):
        template('ok\n{% for %}').render(HI)
