"""Models of several parts, such as text and images, of which jpt computes the text model.

Their config.json has the text model's fields in `text_config`, and their tensors stand below `language_model`; the
tensors of the other parts have prefixes of their own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jpt.models.families.fields import HARMLESS, Fields

# As published, and as transformers 5 has them in memory: prefixes of other parts, and names of the text model.
_PARTS = ('vision_model.', 'vision_tower.', 'multi_modal_projector.')
OTHER_PARTS = (*_PARTS, *(f'model.{part}' for part in _PARTS))
TEXT_NAMES = ((r'^language_model\.', ''), (r'^model\.language_model\.', 'model.'))
_SHARED = ('vision_config', 'boi_token_index', 'eoi_token_index', 'image_token_index')
# What a config says of the whole and of the text model alike.
_OF_BOTH = ('tie_word_embeddings', 'quantization_config')


@dataclasses.dataclass(frozen=True)
class Multimodal:
    """One model_type: that of its text model, the fields beside it, and what is meant where `text_config` is silent."""

    text: str
    fields: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


MULTIMODAL = {
    'llama4': Multimodal('llama4_text'),
    'gemma3': Multimodal(
        'gemma3_text',
        ('mm_tokens_per_image',),
        {'vocab_size': 262208, 'num_attention_heads': 8, 'num_key_value_heads': 4},
    ),
}


class TextPart(NamedTuple):
    """The config.json that the text model would have alone; and whether it is a part of something."""

    config: Mapping[str, Any]
    of_many: bool


def text_part(config: Mapping[str, Any]) -> TextPart:
    """The part of a config.json that is about text, which may be all of it.

    Raises:
        ValueError: no such part, or a field beside it that is not known, or that it contradicts.
    """
    name = config.get('model_type')
    if name not in MULTIMODAL:
        return TextPart(config, False)
    whole, fields = MULTIMODAL[name], Fields(config, name)
    text = fields.get('text_config')
    if not isinstance(text, Mapping) or text.get('model_type', whole.text) != whole.text:
        raise ValueError(
            f'config.json: text_config={text!r}: expected an object with model_type={whole.text!r} ({name})'
        )
    fields.ignore(*_SHARED, *whole.fields, *_OF_BOTH)
    fields.check_all_read()
    both = {field: config[field] for field in _OF_BOTH if config.get(field) is not None}
    for field, value in both.items():
        if text.get(field, value) != value:
            raise ValueError(f'config.json: {field}={value!r}: text_config says {text[field]!r} ({name})')
    named = {field: value for field, value in config.items() if field in HARMLESS}
    return TextPart({**whole.defaults, **text, **named, **both, 'model_type': whole.text}, True)
