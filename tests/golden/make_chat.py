"""Writes tests/golden/chat.json: what transformers renders, encodes and masks for chat templates of several kinds.

Needs transformers (5.x) and tokenizers; run from the repository root: python tests/golden/make_chat.py
"""

import json
import pathlib
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = ['<|end|>', '<|pad|>', '<|turn|>', '<|bos|>']
CHATML = (
    '{%- for m in messages %}\n'
    "    {{- '<|turn|>' + m.role + '\\n' }}\n"
    '    {%- if m.role == "assistant" %}\n'
    "        {%- generation %}{{- m.content + '<|end|>' }}{%- endgeneration %}\n"
    '    {%- else %}\n'
    "        {{- m.content + '<|end|>' }}\n"
    '    {%- endif %}\n'
    "    {{- '\\n' }}\n"
    '{%- endfor %}\n'
    "{%- if add_generation_prompt %}{{- '<|turn|>assistant\\n' }}{%- endif %}"
)
# White space control as templates leave it to trim_blocks and lstrip_blocks, a loop control, tools by tojson, a macro.
TOOLS = """{% macro turn(role, text) %}<|turn|>{{ role }}
{{ text }}<|end|>
{% endmacro %}
{{ bos_token }}{% if tools %}
    {{ turn('tools', tools | tojson(indent=2)) }}
{% endif %}
{% for m in messages %}
    {% if m.role == 'note' %}
        {% continue %}
    {% endif %}
    {% set name = m.role | trim | upper %}
    {% if m.role == 'assistant' %}
        {% generation %}
{{ turn(name, m.content) }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}
        {% endgeneration %}
    {% else %}
        {{ turn(name, m.content) }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<|turn|>ASSISTANT
{% endif %}"""
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[Q] ' + m['content'] + ' [A]' }}"
    "{% else %}{% generation %} {{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
TEMPLATES = {'chatml': CHATML, 'tools': TOOLS, 'strict': STRICT}
SYSTEM = {'role': 'system', 'content': 'Antworte kurz, höflich, "genau" & <klar>.'}
CHATS: dict[str, list[dict[str, Any]]] = {
    'one': [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'Hello, world!'}],
    'two': [
        {'role': 'user', 'content': 'What is 2+2?\n'},
        {'role': 'assistant', 'content': '  It is 4.  '},
        {'role': 'user', 'content': 'naïve café 日本 😀'},
        {'role': 'assistant', 'content': '😀 日本語\n\n  code'},
    ],
    'system': [SYSTEM, {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}],
    'open': [{'role': 'user', 'content': 'ends with a question'}],
    'note': [
        {'role': 'note', 'content': 'not shown'},
        {'role': 'user', 'content': 'look it up'},
        {'role': 'assistant', 'content': '', 'tool_calls': [{'name': 'f', 'arguments': {'x': 'ü', 'y': [1, None]}}]},
    ],
}
FUNCTION = [{'type': 'function', 'function': {'name': 'f', 'parameters': {'x': {'type': 'string'}}}}]


def make_tokenizer() -> tokenizers.Tokenizer:
    """A small byte-level BPE tokenizer, trained on the texts above."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [m['content'] for chat in CHATS.values() for m in chat]
    tokenizer.train_from_iterator([*texts, 'assistant user system'] * 4, trainer)
    return tokenizer


def main() -> None:
    backend = make_tokenizer()
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token='<|bos|>', eos_token='<|end|>', pad_token='<|pad|>'
    )
    cases = []
    for name, template in TEMPLATES.items():
        for chat, messages in CHATS.items():
            for prompt in (False, True):
                case: dict[str, Any] = {'template': name, 'chat': chat, 'add_generation_prompt': prompt}
                tools = FUNCTION if name == 'tools' else None
                arguments = {'chat_template': template, 'tools': tools, 'add_generation_prompt': prompt}
                try:
                    case['text'] = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
                except Exception as error:
                    case['error'] = str(error)
                else:
                    encoded = tokenizer.apply_chat_template(
                        messages, return_dict=True, return_assistant_tokens_mask=True, **arguments
                    )
                    case |= {'ids': encoded['input_ids'], 'mask': encoded['assistant_masks']}
                cases.append(case)
    content = {
        'transformers': transformers.__version__,
        'tokenizer': json.loads(backend.to_str()),
        'templates': TEMPLATES,
        'chats': CHATS,
        'tools': FUNCTION,
        'cases': cases,
    }
    path = pathlib.Path(__file__).parent / 'chat.json'
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(',', ':')) + '\n', encoding='utf-8')
    print(f'{path.name}: {len(cases)} cases, {path.stat().st_size:,} bytes')


if __name__ == '__main__':
    main()
