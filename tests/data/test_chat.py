"""Loss on the assistant's tokens only: against transformers' masks, and read back as text."""

import pytest

from jpt.data.chat import check_messages, encode_chat
from jpt.data.template import ChatTemplate, TemplateError
from jpt.data.tokenizer import Tokenizer

TWO = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'hi'},
    {'role': 'assistant', 'content': 'n'},
    {'role': 'user', 'content': 'n?'},
    {'role': 'assistant', 'content': 'yes\n\n'},
]


def template(tokenizer, source):
    return ChatTemplate(source, 'test', tokenizer.special_tokens)


def learned(tokenizer, chat):
    """The text of every run of tokens with loss."""
    runs, before = [], False
    for token, loss in zip(chat.ids.tolist(), chat.loss.tolist(), strict=True):
        if loss and not before:
            runs.append([])
        if loss:
            runs[-1].append(token)
        before = loss > 0
    return [tokenizer.decode(run) for run in runs]


def test_ids_and_mask_are_those_of_transformers(tokenizer, golden):
    checked = 0
    for case in golden['cases']:
        messages = golden['chats'][case['chat']]
        answered = messages[-1]['role'] == 'assistant'
        if 'error' in case or case['add_generation_prompt'] or not answered:
            continue
        made = template(tokenizer, golden['templates'][case['template']])
        tools = golden['tools'] if case['template'] == 'tools' else None
        chat = encode_chat(tokenizer, made, messages, tools=tools)
        if case['template'] == 'tools':  # ends with a line end, so eos is added, which transformers does not
            assert chat.ids.tolist() == [*case['ids'], tokenizer.eos_id]
            assert chat.loss.tolist() == [*case['mask'], 1]
        else:
            assert chat.ids.tolist() == case['ids']
            assert chat.loss.tolist() == case['mask']
        checked += 1
    assert checked == 10


def test_without_marks_the_turns_show_who_wrote_what(tokenizer):
    chat = encode_chat(tokenizer, tokenizer.chat_template(), TWO)
    text = ''.join(f'<|turn|>{m["role"]}\n{m["content"]}<|end|>\n' for m in TWO)
    assert tokenizer.decode(chat.ids.tolist()) == text
    assert learned(tokenizer, chat) == ['n<|end|>', 'yes\n\n<|end|>']  # the line end after a turn is not learned


def test_padding_like_eos_does_not_take_eos_out_of_the_loss(tmp_path, write_tokenizer):
    config = {'eos_token': '<|end|>', 'pad_token': '<|end|>'}
    same = Tokenizer.load(write_tokenizer(tmp_path, config))
    source = (
        "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}{{ 'a' if add_generation_prompt }}"
    )
    chat = encode_chat(same, template(same, source), TWO)
    assert learned(same, chat) == ['n<|end|>', 'yes\n\n<|end|>']


def test_a_last_turn_that_is_written_differently(tokenizer):
    # As Phi-3 does: eos after the last turn only, the end of a turn and the next mark begin alike.
    source = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + m.content + '<|end|>' }}{% endfor %}"
        "{{ '<|turn|>assistant' if add_generation_prompt else '<|bos|>' }}"
    )
    chat = encode_chat(tokenizer, template(tokenizer, source), TWO)
    assert learned(tokenizer, chat) == ['n<|end|>', 'yes\n\n<|end|><|bos|>']


def test_thoughts_that_only_the_last_turn_shows(tokenizer):
    # As Qwen3 does.
    source = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>' + m.thought + '</think>' }}{% endif %}"
        "{{ m.content + '<|end|>\\n' }}{% endfor %}{{ '<|turn|>assistant\\n' if add_generation_prompt }}"
    )
    messages = [m | {'thought': 'hm'} for m in TWO]
    chat = encode_chat(tokenizer, template(tokenizer, source), messages)
    assert learned(tokenizer, chat) == ['n<|end|>', '<think>hm</think>yes\n\n<|end|>']


def test_plain_text_turns_end_with_eos(tokenizer):
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{{ 'assistant:' if add_generation_prompt }}"
    )
    chat = encode_chat(tokenizer, template(tokenizer, source), TWO)
    assert learned(tokenizer, chat) == [' n\n', ' yes\n\n\n<|end|>']


def test_a_block_closed_before_the_end_of_turn_still_learns_it(tokenizer):
    source = (
        "{% for m in messages %}{{ '<|turn|>' + m.role }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|end|>\\n' }}{% endfor %}"
    )
    chat = encode_chat(tokenizer, template(tokenizer, source), TWO)
    assert learned(tokenizer, chat) == ['n<|end|>', 'yes\n\n<|end|>']


def test_a_message_may_weigh_less_or_nothing(tokenizer):
    messages = [dict(m) for m in TWO]
    messages[2]['weight'], messages[4]['weight'] = 0, 0.5
    chat = encode_chat(tokenizer, tokenizer.chat_template(), messages)
    assert learned(tokenizer, chat) == ['yes\n\n<|end|>']
    assert set(chat.loss.tolist()) == {0.0, 0.5}


def test_a_conversation_that_ends_with_a_question(tokenizer):
    chat = encode_chat(tokenizer, tokenizer.chat_template(), TWO[:4])
    assert learned(tokenizer, chat) == ['n<|end|>']


def test_characters_of_several_tokens_are_learned_whole(tokenizer):
    messages = [{'role': 'user', 'content': '😀'}, {'role': 'assistant', 'content': '😀é'}]
    chat = encode_chat(tokenizer, tokenizer.chat_template(), messages)
    assert learned(tokenizer, chat) == ['😀é<|end|>']


def test_a_template_that_is_not_prefix_stable_is_an_error(tokenizer):
    counts = "{{ messages | length }}{% for m in messages %}{{ m.role + m.content + '<|end|>' }}{% endfor %}"
    with pytest.raises(
        TemplateError, match=r'of test is not prefix-stable: .*messages\[2\].*at character 0.*generation'
    ):
        encode_chat(tokenizer, template(tokenizer, counts), TWO)


def test_an_end_that_cannot_be_told_is_an_error(tokenizer):
    # Heads agree, but what follows an answer shares no special token.
    source = (
        "{% for m in messages %}{{ m.role + m.content }}{{ 'Z' if loop.last and m.role == 'assistant' }}{% endfor %}"
        "{{ 'assistant' if add_generation_prompt }}"
    )
    with pytest.raises(TemplateError, match=r'cannot tell where messages\[1\] ends'):
        encode_chat(tokenizer, template(tokenizer, source), TWO[1:])


@pytest.mark.parametrize(
    ('messages', 'message'),
    [
        ([], 'a list that is not empty'),
        ('hi', 'a list that is not empty'),
        ([{'content': 'a'}], r'messages\[0\]: expected an object with "role"'),
        ([{'role': 'assistant', 'content': 3}], r'messages\[0\].content: expected a string, .*, found 3'),
        ([{'role': 'assistant', 'content': [{'type': 'text'}]}], r'messages\[0\].content: expected parts'),
        (
            [{'role': 'assistant', 'content': [{'type': 'image_url', 'url': 'x'}]}],
            'images and sound are not read',
        ),
        ([{'role': 'assistant', 'content': None}], 'or null beside tool_calls, found None'),
        ([{'role': 'assistant', 'content': 'a', 'weight': -1}], 'weight: expected a number of at least 0'),
        ([{'role': 'assistant', 'content': 'a', 'weight': True}], 'weight: expected a number'),
        ([{'role': 'user', 'content': 'a'}], 'nothing to learn from'),
    ],
)
def test_messages_that_are_none(messages, message):
    with pytest.raises(ValueError, match=message):
        check_messages(messages)


def test_tool_calls_may_stand_without_content():
    check_messages([{'role': 'assistant', 'content': None, 'tool_calls': [{'name': 'f'}]}])


CALLS = (
    "{% for m in messages %}{{ '<|turn|>' + m.role + ':' }}"
    '{% for call in m.tool_calls or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor %}'
    "{{ (m.content or '') + '<|end|>' }}{% endfor %}{{ '<|turn|>assistant:' if add_generation_prompt }}"
)


def calling(arguments):
    call = {'type': 'function', 'id': '1', 'function': {'name': 'add', 'arguments': arguments}}
    return [
        {'role': 'user', 'content': [{'type': 'text', 'text': '1 + '}, {'type': 'text', 'text': '2?'}]},
        {'role': 'assistant', 'content': None, 'tool_calls': [call]},
        {'role': 'tool', 'content': '3', 'tool_call_id': '1'},
        {'role': 'assistant', 'content': [{'type': 'text', 'text': 'three'}]},
    ]


@pytest.mark.parametrize('arguments', ['{"a": 1, "b": 2}', {'a': 1, 'b': 2}], ids=['text', 'object'])
def test_tool_calls_and_lists_of_text_parts(tokenizer, arguments):
    chat = encode_chat(tokenizer, template(tokenizer, CALLS), calling(arguments))
    assert tokenizer.decode(chat.ids) == (
        '<|turn|>user:1 + 2?<|end|><|turn|>assistant:add{"a": 1, "b": 2}<|end|><|turn|>tool:3<|end|>'
        '<|turn|>assistant:three<|end|>'
    )
    assert learned(tokenizer, chat) == ['add{"a": 1, "b": 2}<|end|>', 'three<|end|>']


def test_arguments_that_are_no_json_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"messages\[1\].tool_calls\[0\].function.arguments: not JSON: '\{a'"):
        encode_chat(tokenizer, template(tokenizer, CALLS), calling('{a'))


def test_the_templates_of_real_models(shared_data):
    for name in ('phi3', 'jpt-bpe-8k'):
        real = Tokenizer.load(shared_data / 'tokenizers' / name)
        runs = learned(real, encode_chat(real, real.chat_template(), TWO[1:]))
        end = {'phi3': '<|end|>', 'jpt-bpe-8k': '<|im_end|>'}[name]
        assert runs[0] == 'n' + end
        assert runs[1].startswith('yes\n\n' + end)
