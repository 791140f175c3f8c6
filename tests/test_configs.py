"""Every file of configs/ makes a job that trains, in two steps of small sizes, or quantizes a small model."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jpt.config import from_config_dict
from jpt.distill.recording import record
from jpt.model import Model
from jpt.models.families import config_from_hf
from jpt.models.transformer import init
from jpt.training.run import run_job
from jpt.training.settings import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEACHER = ROOT / 'jpt' / 'assets' / 'quickstart_teacher'
CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem != 'quantize')
SMALL = {'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 2}
SMALL |= {'num_key_value_heads': 2, 'head_dim': 8, 'vocab_size': 4096}
# Those that take a checkpoint's directory, and what follows it.
NAMED = {'sft': '', 'distill': ',{0}', 'distill_qwen3': '', 'distill_teachers': ',{0},{0}'}
TALK = [
    {'role': 'user', 'content': 'What is 1 + 1?'},
    {'role': 'assistant', 'content': 'It is 2.'},
]


def get(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'configs' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A Hugging Face directory of a tiny model with the quickstart's tokenizer."""
    cfg = config_from_hf({'model_type': 'llama', 'max_position_embeddings': 64, 'tie_word_embeddings': True} | SMALL)
    folder = tmp_path_factory.mktemp('checkpoint') / 'model'
    Model(cfg, jax.jit(init, static_argnums=0)(cfg, jax.random.key(0)), None, TEACHER).export(folder)
    return folder


def other_tokenizer(folder):
    """That of the quickstart's teacher with the ids in another order, which makes it another one."""
    folder.mkdir()
    for path in TEACHER.glob('*token*'):
        (folder / path.name).write_bytes(path.read_bytes())
    file = folder / 'tokenizer.json'
    words = json.loads(file.read_text())
    vocab = words['model']['vocab']
    last, before = sorted(vocab, key=vocab.get)[-1:-3:-1]
    vocab[last], vocab[before] = vocab[before], vocab[last]
    file.write_text(json.dumps(words))
    return folder


def made_small(config, folder):
    """The same job on a tiny model and two steps, on one device."""
    config.steps = 2
    config.batch.size, config.batch.length, config.batch.microbatches = 2, 32, 1
    config.schedule.warmup = 0
    config.schedule.decay_steps = None if config.schedule.kind != 'wsd' else 1
    config.log.every = 1
    if config.model.architecture is not None:
        config.model.architecture = dict(config.model.architecture.to_dict()) | SMALL
    if config.distill.schedule is not None:
        config.distill.schedule.end = 2
    if config.model.layers:
        config.model.layers = (1,)
    config.mesh.update(dict.fromkeys(('pipe', 'data', 'fsdp', 'tensor'), 1))
    config.compute.xla_flags = None
    if config.data.paths == ('train.jsonl',) and config.data.kind == 'text':
        path = folder / 'text.jsonl'
        path.write_text(''.join(json.dumps({'text': f'{i} + {i} = {2 * i}. ' * 8}) + '\n' for i in range(40)))
        config.data.paths = (str(path),)
    if config.data.kind == 'chat':
        path = folder / 'talk.jsonl'
        path.write_text(''.join(json.dumps({'messages': TALK}) + '\n' for _ in range(8)))
        config.data.paths = (str(path),)
        config.tokenizer = str(TEACHER)
    if config.eval.data is not None and config.eval.data.paths:
        config.eval.batches, config.eval.every = 1, 0
    if config.task == 'distill' and config.distill.alignment is not None:
        config.tokenizer = str(other_tokenizer(folder / 'tokenizer'))
    if config.compare is not None:
        config.compare.sample_tokens = 4
    return from_config_dict(TrainConfig, config, 'config')


@pytest.mark.parametrize(
    ('name', 'option'),
    [
        *((name, None) for name in CONFIGS if name not in NAMED),
        *NAMED.items(),
        ('sft', ',lora'),
        ('distill', ',{0},aligned'),
    ],
)
def test_config_trains(name, option, tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax, 'devices', lambda *args: jax.local_devices()[:1])
    given = get(name) if option is None else get(name, f'{checkpoint}{option.format(checkpoint)}')
    config = made_small(given, tmp_path)
    model = run_job(config, tmp_path / 'run')
    assert np.isfinite(np.asarray(model.logits([[1, 2, 3]]))).all()
    assert (tmp_path / 'run' / 'model' / 'config.json').is_file()
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows if 'loss' in row] == [1, 2]
    assert (tmp_path / 'run' / 'adapter' / 'adapter_config.json').is_file() == (config.lora is not None)
    if config.compare is not None:
        scores = json.loads((tmp_path / 'run' / 'comparison.json').read_text())
        assert [row['model'] for row in scores] == ['teacher', 'distilled', 'from scratch']
        assert scores[0]['kl'] == pytest.approx(0, abs=1e-5)
        assert (tmp_path / 'run' / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_the_config_that_is_recorded_first(tmp_path, monkeypatch):
    """Both commands of configs/distill_recorded.py, on a few texts; trained online too, which starts alike."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax, 'devices', lambda *args: jax.local_devices()[:1])
    given = get('distill_recorded')
    for name, place in (('train', given.data), ('held_out', given.eval.data)):
        (tmp_path / f'{name}.jsonl').write_text(
            ''.join(json.dumps({'text': f'{name} {i} ' * i}) + '\n' for i in range(9))
        )
        place.paths = (str(tmp_path / f'{name}.jsonl'),)
    given.record.likely = 4000  # of 4,096: next to nothing is left out
    config = made_small(given, tmp_path)
    record(config, tmp_path / 'recorded')
    recorded = dataclasses.replace(config.distill, targets=str(tmp_path / 'recorded'))
    run_job(dataclasses.replace(config, distill=recorded), tmp_path / 'offline')
    run_job(config, tmp_path / 'online')
    offline, online = (
        [json.loads(line) for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
        for name in ('offline', 'online')
    )
    assert [row['kl'] for row in offline if 'kl' in row] == pytest.approx(
        [row['kl'] for row in online if 'kl' in row], rel=1e-3
    )
    assert offline[-1]['eval_kl'] == pytest.approx(online[-1]['eval_kl'], rel=1e-3)


def test_teachers_by_a_field_of_the_data(tmp_path, monkeypatch, checkpoint):
    """The config of several teachers, each one's documents named in the data; it goes on where it was stopped."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax, 'devices', lambda *args: jax.local_devices()[:1])
    config = get('distill_teachers', f'{checkpoint},{TEACHER},{checkpoint}')
    config.teachers.second.weight = 1.0
    rows = [{'text': f'{i} + {i} = {2 * i}. ' * 3, 'subject': ('first', 'second')[i % 3 == 0]} for i in range(40)]
    for name, lines in (('train', rows), ('held_out', rows[:6])):
        (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in lines))
    config.data.paths, config.data.route_key = (str(tmp_path / 'train.jsonl'),), 'subject'
    config.eval.data = ConfigDict({'paths': (str(tmp_path / 'held_out.jsonl'),), 'route_key': 'subject'})
    config.checkpoint.every = 1
    given = made_small(config, tmp_path)
    given = dataclasses.replace(given, batch=dataclasses.replace(given.batch, size=8))
    run_job(dataclasses.replace(given, steps=2), tmp_path / 'run')
    run_job(dataclasses.replace(given, steps=3), tmp_path / 'run')
    found = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    steps = [row for row in found if 'loss' in row]
    assert [row['step'] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row['share/first'] + row['share/second'] == pytest.approx(1)
    assert steps[0]['kl/second'] < 1e-4 < steps[0]['kl/first']  # the second one is the student itself
    scores = found[-1]
    assert scores['eval_share/first'] == pytest.approx(2 / 3, abs=0.1)


def test_what_a_config_may_be_given():
    with pytest.raises(ValueError, match="expected MODEL or MODEL,lora, found 'loar'"):
        get('sft', 'path/to/model,loar')
    going_on = get('pretrain', 'path/to/model')
    assert (going_on.model.path, going_on.model.architecture, going_on.tokenizer) == ('path/to/model', None, None)
    assert from_config_dict(TrainConfig, get('sft'), 'config').eval.data is None  # until paths are given
