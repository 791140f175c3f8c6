"""What `jpt.evaluate` prints and writes."""

import json
import math

from jpt.evaluate import as_json, show


def test_values_are_shown_with_their_units():
    text = show({'tokens': 12345, 'loss': 1.5, 'bits_per_byte': 0.9, 'by_subject': {'law': 0.25, 'art': 1.0}})
    assert text.splitlines() == [
        'tokens         12,345',
        'loss           1.5000      nats per token',
        'bits_per_byte  0.9000',
        '  art  1.0000',
        '  law  0.2500',
    ]


def test_what_is_written_is_json():
    written = json.dumps(as_json({'perplexity': math.inf, 'loss': 800.0, 'tokens': 3}), allow_nan=False)
    assert json.loads(written) == {'perplexity': None, 'loss': 800.0, 'tokens': 3}
