"""What a checkpoint says of itself, there and back, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from jpt.checkpoint import about as layout
from jpt.checkpoint.manifest import CheckpointMismatch
from jpt.checkpoint.tree import LeafSpec
from jpt.models.config import LayerKind, ModelConfig, Rope, Segment
from jpt.models.families import config_from_hf

GLOBAL = LayerKind(Rope(1e6, 'yarn', 4.0, 32, attention_factor=0.1 + 0.2, truncate=False), None, 24)
CONFIG = ModelConfig(
    family='gemma3_text',
    vocab_size=11,
    width=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    segments=(Segment((LayerKind(Rope(1e4), 16, 24), GLOBAL), 3), Segment((LayerKind(None, 16, 24),), 1)),
    max_length=64,
    norm_eps=1e-6,
    embed_scale=8**0.5,
    logit_soft_cap=30.0,
    tied=True,
)
ABOUT = layout.About('model', {'params/x': LeafSpec('bfloat16', (2, 3))}, CONFIG, 'abc')


def write(directory: Path, content: object) -> None:
    (directory / 'model').mkdir(exist_ok=True)
    (directory / 'model' / 'model.json').write_text(json.dumps(content))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    write(tmp_path, layout.to_json(ABOUT))
    again = layout.read_about(tmp_path)
    assert again == ABOUT
    assert hash(again.model) == hash(CONFIG)


def test_a_checkpoint_without_a_model_config(tmp_path: Path) -> None:
    about = ABOUT._replace(kind='training', model=None, tokenizer=None)
    write(tmp_path, layout.to_json(about))
    assert layout.read_about(tmp_path) == about


def test_the_file_is_plain_json_that_names_its_writer() -> None:
    content = json.loads(json.dumps(layout.to_json(ABOUT)))
    assert content['format'] == 1
    assert content['leaves'] == {'params/x': ['bfloat16', [2, 3]]}
    assert content['model']['segments'][0]['kinds'][1]['rope']['kind'] == 'yarn'
    assert content['jpt']


def test_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'is not a jpt checkpoint: it has no model/model\.json'):
        layout.read_about(tmp_path)
    assert not layout.is_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'format': 2, 'jpt': '9.0'}, 'format 2 .written by jpt 9.0.: expected 1'),
        ({'model': {'segments': []} | {'novel_gate': 1}}, 'ModelConfig has fields that this version .*: novel_gate'),
        ({'leaves': {'x': ['int8']}}, 'cannot be read as the description of a checkpoint'),
        ({'leaves': []}, 'cannot be read as the description of a checkpoint'),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    write(tmp_path, layout.to_json(ABOUT) | change)
    with pytest.raises(ValueError, match=message):
        layout.read_about(tmp_path)


def test_an_unknown_field_deep_inside_is_refused(tmp_path: Path) -> None:
    content = json.loads(json.dumps(layout.to_json(ABOUT)))
    content['model']['segments'][0]['kinds'][0]['rope']['phase'] = 1.0
    write(tmp_path, content)
    with pytest.raises(ValueError, match='Rope has fields that this version of jpt does not know: phase'):
        layout.read_about(tmp_path)


def test_differences_of_models_name_the_fields() -> None:
    other = dataclasses.replace(CONFIG, vocab_size=12, tied=False)
    assert layout.model_differences(CONFIG, other) == [
        'model.vocab_size: 11 in the checkpoint, expected 12',
        'model.tied: True in the checkpoint, expected False',
    ]
    assert layout.model_differences(CONFIG, CONFIG) == []


@pytest.mark.parametrize('field', ['format', 'statics', 'tokenizer'])
def test_a_description_without_a_field_is_of_an_older_format(tmp_path: Path, field: str) -> None:
    content = layout.to_json(ABOUT)
    del content[field]
    write(tmp_path, content)
    with pytest.raises(CheckpointMismatch, match=f"no field '{field}': written in an older format"):
        layout.read_about(tmp_path)


MODELS = Path(__file__).parents[1] / 'golden' / 'models'


@pytest.mark.parametrize('name', sorted(path.name for path in MODELS.iterdir()))
def test_every_kind_of_model_is_described_whole(name: str, tmp_path: Path) -> None:
    """Experts, latents, state spaces and all else that a config holds come back from JSON as they were."""
    cfg = config_from_hf(json.loads((MODELS / name / 'config.json').read_text()))
    write(tmp_path, json.loads(json.dumps(layout.to_json(ABOUT._replace(model=cfg)))))
    assert layout.read_about(tmp_path).model == cfg
