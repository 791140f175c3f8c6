"""The teacher that travels with the package: small, whole, and better at held-out code than anything untrained."""

import json
import pathlib
import struct

import numpy as np

import jpt
from jpt.checkpoint.opening import model_directory
from jpt.data.stdlib_corpus import read_stdlib


def test_shipped_files_fit_into_the_package():
    directory = pathlib.Path(model_directory('quickstart'))
    assert sum(path.stat().st_size for path in directory.iterdir()) < 16e6
    raw = (directory / 'model.safetensors').read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack('<Q', raw[:8])[0]])
    header.pop('__metadata__', None)
    assert {entry['dtype'] for entry in header.values()} == {'BF16'}
    # By hand: the tied embedding, four layers (q, k, v, o, three of the MLP, two norms) and the last norm.
    layer = 320 * 320 + 2 * 160 * 320 + 320 * 320 + 3 * 864 * 320 + 2 * 320
    assert sum(int(np.prod(entry['shape'])) for entry in header.values()) == 4096 * 320 + 4 * layer + 320
    config = json.loads((directory / 'config.json').read_text())
    assert (config['eos_token_id'], config['pad_token_id']) == (0, 1)


def test_teacher_predicts_held_out_code():
    model = jpt.load('quickstart')
    held_out = read_stdlib('held_out')
    text = held_out.texts[held_out.names.index('configparser.py')]
    assert model.tokenizer is not None
    ids = np.array(model.tokenizer.encode(text[8000:])[: 4 * 129], np.int32).reshape(4, 129)
    logits = np.asarray(model.logits(ids[:, :-1]), np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    log_prob = logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
    loss = -np.take_along_axis(log_prob, ids[:, 1:, None], axis=-1).mean()
    # ln 4096 = 8.3 untrained; 4.06 on all held-out text, and this file is about as hard.
    assert loss < 4.8
