"""README.md of an exported model: what the Hub reads, what the model is, and the card of the model it was made from.

The last is there only where weights were read from that model. The card that lies beside a tokenizer says nothing of
weights that were drawn at random, or came from elsewhere.
"""

import math
import re
from pathlib import Path

from jpt import __version__
from jpt.checkpoint.assets import CARD_FILE
from jpt.models.config import ModelConfig
from jpt.models.names import leaves

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- jpt
---
"""
_OWN = 'Exported by jpt '
_SOURCE = '## The card of the model that this was made from\n'


def model_card(cfg: ModelConfig, dtype: str, source: Path | None = None) -> str:
    """The card of a model, with that of the directory `source` below it where that has one.

    The metadata (licence, languages, base model) stays as the source has it: it belongs to the weights. So `source` is
    the directory of the model that the weights were read from, and None where they were drawn at random.
    """
    count = sum(math.prod(leaf.shape) for leaf in leaves(cfg))
    kinds = 'layers' if cfg.num_layers > 1 else 'layer'
    front, below = _source_card(source)
    return f"""{front}
# {cfg.family} with {count:,} parameters

{_OWN}{__version__}: {cfg.num_layers} {kinds}, width {cfg.width}, {cfg.num_heads} query heads,
{cfg.num_kv_heads} key and value heads, vocabulary {cfg.vocab_size:,}, up to {cfg.max_length:,} positions, weights in
{dtype}.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained('.', dtype='auto')
```
{below}"""


def _source_card(source: Path | None) -> tuple[str, str]:
    """The metadata block and the text below the new card."""
    path = None if source is None else source / CARD_FILE
    if path is None or not path.is_file():
        return _FRONT, ''
    text = path.read_text('utf-8', errors='replace')
    block = re.match(r'---\n.*?\n---\n', text, re.DOTALL)
    front, body = (block[0], text[block.end() :]) if block else (_FRONT, text)
    if _OWN in body:  # a card of jpt: what it says is said anew, what it was made from goes on
        body = body.partition(_SOURCE)[2]
    return front, f'\n{_SOURCE}\n{body.lstrip()}' if body.strip() else ''
