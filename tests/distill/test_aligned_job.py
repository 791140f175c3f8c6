"""jpt.train with a teacher of another tokenizer: what is learned, where it goes on, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
import recorded

from jpt.config import ConfigError
from jpt.data.alignment import SecondReader
from jpt.data.tokenizer import Tokenizer
from jpt.distill.aligned import words_of
from jpt.models.families import config_from_hf
from jpt.sharding.mesh import MeshConfig
from jpt.training.job import make_job
from jpt.training.overview import flops_of, overview
from jpt.training.run import train_model
from jpt.training.settings import teacher_alone
from jpt.training.tokenizers import open_second

GOLDEN = recorded.ROOT / 'tests' / 'golden' / 'chat.json'
WORDS = 301
MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A teacher with the tokenizer of the quickstart, one of three hundred words for the student, and texts."""
    found = tmp_path_factory.mktemp('aligned')
    recorded.export_teacher(found / 'teacher')
    recorded.write_texts(found / 'text.txt', recorded.TEXTS * 2)
    (found / 'words').mkdir()
    content = json.loads(GOLDEN.read_text(encoding='utf-8'))['tokenizer']
    (found / 'words' / 'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')
    config = {'bos_token': '<|bos|>', 'eos_token': '<|end|>', 'pad_token': '<|pad|>', 'add_bos_token': True}
    (found / 'words' / 'tokenizer_config.json').write_text(json.dumps(config))
    return found


def settings(folder, **changes):
    values = {
        'model': {'architecture': recorded.STUDENT | {'vocab_size': WORDS}},
        'tokenizer': str(folder / 'words'),
        'distill': {'alignment': {'likely': 32, 'length': 16}, 'temperature': 1.5, 'alpha': 0.9},
    }
    return recorded.settings(folder, **values | changes)


def rows(workdir):
    """{step: what was measured}, without what depends on clocks."""
    timed = ('seconds', 'tokens_per_second', 'memory', 'eta', 'mfu')
    found = {}
    for line in (workdir / 'metrics.jsonl').read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row['step'], {}).update({k: v for k, v in row.items() if not k.startswith(timed)})
    return found


def test_a_student_learns_goes_on_bit_for_bit_and_keeps_its_words(folder, tmp_path):
    changes = {'steps': 6, 'checkpoint': {'every': 3, 'export': True}, 'schedule': {'lr': 3e-2}, 'mesh': MESH}
    data = {'paths': (str(folder / 'text.txt'),), 'separator': '<|cut|>', 'prefetch': 0}
    config = settings(folder, **changes, eval={'data': data, 'batches': 2, 'every': 1})
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    model = train_model(config, whole)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / 'checkpoints' / '6')  # as if it had ended before that was saved
    resumed = train_model(config, parts)
    assert rows(parts) == rows(whole)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.params), jax.device_get(model.params))

    found = rows(whole)
    for name in ('kl', 'loss'):  # of the same texts each time
        assert found[6][f'eval_{name}'] < 0.9 * found[1][f'eval_{name}'], name
    for name in ('kl', 'uld', 'aligned', 'unshared', 'tail', 'ce'):
        assert np.isfinite(found[6][f'eval_{name}'])
    assert 0.2 < found[6]['aligned'] < 1
    parts = found[6]['kl_weighted'] + found[6]['uld_weighted'] + found[6]['ce_weighted']
    assert found[6]['loss'] == pytest.approx(parts, rel=1e-5)
    own = Tokenizer.load(folder / 'words').fingerprint()
    assert Tokenizer.load(whole / 'model').fingerprint() == own


def test_a_job_says_what_is_shared_and_counts_the_tokens_that_the_teacher_reads(folder):
    usual = make_job(settings(folder), jax.devices()[:1])
    assert usual.batch.teacher.tokens.shape == (8, 16)
    assert usual.batch.teacher.at.shape == (8, 24)
    assert 'words of the teacher, which reads rows of 16 tokens of its own' in overview(usual)
    longer = make_job(settings(folder, distill={'alignment': {'length': 32}}), jax.devices()[:1])
    teacher = flops_of(longer) - flops_of(usual)
    assert teacher > 0
    same = make_job(settings(folder, distill={'alignment': {}}), jax.devices()[:1])
    assert same.second.length == 24


REFUSED = [
    ({'distill': {'alignment': {'likely': 0}}}, 'likely=0: expected a positive integer'),
    ({'distill': {'alignment': {'length': 0}}}, 'length=0: expected a positive integer or None'),
    ({'distill': {'alignment': {'uld': -1.0}}}, 'uld=-1.0: expected a finite number of 0 or more'),
    ({'distill': {'alignment': {}, 'targets': 'there'}}, 'alignment=.*: expected None where targets is given'),
    (
        {'distill': {'alignment': {}, 'pairs': ({'student': 'embed.output', 'teacher': 'embed.output'},)}},
        'pairs=.*: expected none where alignment is given',
    ),
    (
        {'teacher': None, 'teachers': {'a': {'path': 'x'}, 'b': {'path': 'y'}}},
        'teachers=.*: expected one teacher where distill.alignment is given',
    ),
    ({'compare': {'sample_tokens': 2}}, 'compare=.*: expected None'),
]


@pytest.mark.parametrize(('changes', 'message'), REFUSED)
def test_settings_that_do_not_go_together(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(folder, **changes)


def test_what_a_job_refuses(folder):
    with pytest.raises(ValueError, match=r'mesh\.context=2: with config\.distill\.alignment'):
        make_job(settings(folder, mesh={'context': 2, 'data': 4}))
    with pytest.raises(ValueError, match=r'likely=4097: expected at most the vocabulary of the teacher, 4096'):
        make_job(settings(folder, distill={'alignment': {'likely': 4097}}), jax.devices()[:1])
    with pytest.raises(ValueError, match=r'config\.distill\.alignment=.*recorded of its own tokens'):
        teacher_alone(settings(folder), MeshConfig(), 1)
    own = settings(folder, tokenizer=str(recorded.TOKENIZER), model={'architecture': recorded.STUDENT})
    with pytest.raises(ValueError, match=r'the student reads as the teacher does'):
        make_job(own, jax.devices()[:1])
    planned = settings(folder, teacher={'architecture': recorded.TEACHER, 'path': None})
    with pytest.raises(ValueError, match=r'config\.teacher\.architecture: a teacher with another tokenizer'):
        make_job(planned, jax.devices()[:1])
    bare = folder / 'bare'
    shutil.copytree(folder / 'teacher', bare, ignore=shutil.ignore_patterns('tokenizer*', 'special*'))
    with pytest.raises(ValueError, match=r'the teacher .*bare has no tokenizer of its own'):
        make_job(settings(folder, teacher={'path': str(bare)}), jax.devices()[:1])


def test_special_tokens_and_rows_without_a_word_are_nobodys_words(folder):
    """Among the student's own words are neither, nor what both have; rows that pad a table are not shared."""
    config = settings(folder, model={'architecture': recorded.STUDENT | {'vocab_size': WORDS + 3}})
    reader = open_second(config)
    cfgs = (
        config_from_hf(recorded.STUDENT | {'vocab_size': WORDS + 3}),
        config_from_hf(recorded.TEACHER | {'vocab_size': 4099}),
    )
    words = words_of(config.distill, *cfgs, reader)
    student, teacher = reader.student, reader.tokenizer
    assert words.table.shape == (4099,)
    assert (words.table[4096:] == -1).all()
    assert words.table[teacher.eos_id] == student.eos_id
    assert words.lacking.shape == (WORDS + 3,)
    assert not words.lacking[WORDS:].any()
    assert not words.lacking[sorted(student.special_ids)].any()
    assert not words.lacking[words.table[words.table >= 0]].any()
    assert words.loss.uld == 1
    everything = words_of(config.distill, cfgs[1], cfgs[1], SecondReader(teacher, teacher, 8))
    assert not everything.lacking.any()
    assert everything.loss.uld == 0
    text = teacher.encode('for')
    assert len(text) == 1
    spelled = student.encode('for')
    assert words.table[text[0]] == (spelled[0] if len(spelled) == 1 else -1)
