"""Recording a teacher and learning from it: the gradients of online distillation, on any mesh; what is refused."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded
from online import distance, first_batch, online

from jpt.data.recorded import RecordedTargets
from jpt.data.target_store import read_manifest, write_manifest
from jpt.data.tokenizer import Tokenizer
from jpt.distill.recording import record
from jpt.sharding.grads import loss_and_grads
from jpt.sharding.layout import to_canonical_layout
from jpt.training.job import first_state, make_job
from jpt.training.loop import check_finite
from jpt.training.run import run_job

TEMPERATURE = 1.5
# Of the gradient, relative by norm: about the rounding of a log-probability times its size.
ERRORS = {'float16': 4e-4, 'bfloat16': 3e-3, 'float8_e4m3fn': 5e-2}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A teacher, texts, and what it says of them in every dtype, recorded on eight devices as data."""
    found = tmp_path_factory.mktemp('distill')
    recorded.export_teacher(found / 'teacher')
    recorded.write_texts(found / 'text.txt')
    for dtype in ERRORS:
        record(recorded.settings(found, record={'dtype': dtype}), found / dtype)
    return found


@functools.cache
def learned(folder, dtype='float16', alpha=0.7, devices=1, **mesh):
    """(loss, gradients in the canonical layout, metrics, batch) of one step of a job on recorded targets."""
    microbatches = mesh.pop('microbatches', 1)
    config = recorded.learning(
        folder,
        folder / dtype,
        distill={'temperature': TEMPERATURE, 'alpha': alpha},
        batch={'microbatches': microbatches},
        mesh=mesh,
    )
    job = make_job(config, jax.devices()[:devices])
    state, batch = first_state(job), first_batch(job)

    def step(params, frozen, batch):
        return loss_and_grads(job.objective, params, frozen, batch, job.plan)

    total, grads, sums = jax.device_get(jax.jit(step)(state.params, state.frozen, batch))
    means = {name: value / count for name, (value, count) in sums.items()}
    return float(total), to_canonical_layout(job.plan.layouts['model'], grads), means, jax.device_get(batch)


@pytest.mark.parametrize('dtype', ERRORS)
def test_gradients_are_the_online_ones_to_the_error_of_the_dtype(folder, dtype):
    total, grads, means, batch = learned(folder, dtype)
    wanted, wanted_grads = online(folder)
    error = distance(grads, wanted_grads)
    print(dtype, f'gradient {error:.1e}, loss {abs(total / wanted - 1):.1e}')
    assert ERRORS[dtype] / 20 < error < ERRORS[dtype]
    assert total == pytest.approx(wanted, rel=ERRORS[dtype])
    assert 0.05 < means['tail'] < 0.95
    assert str(batch.sparse_target.logp.dtype) == ('bfloat16' if dtype == 'bfloat16' else 'float16')


MESHES = {
    'rows': {'devices': 8, 'data': 2, 'fsdp': 4},
    'sequence_and_vocabulary': {'devices': 8, 'data': 2, 'context': 2, 'tensor': 2, 'microbatches': 2},
    'pipeline': {'devices': 8, 'pipe': 2, 'fsdp': 2, 'tensor': 2, 'microbatches': 2, 'data': 1},
}


@pytest.mark.parametrize('name', MESHES)
def test_every_mesh_gives_the_same(folder, name):
    total, grads, means, _ = learned(folder)
    on_mesh = learned(folder, **MESHES[name])
    assert on_mesh[0] == pytest.approx(total, rel=1e-6)
    assert distance(on_mesh[1], grads) < 1e-5
    assert on_mesh[2] == pytest.approx(means, rel=1e-5)


def test_a_teacher_on_any_mesh_says_the_same(folder, tmp_path):
    config = recorded.settings(
        folder, mesh={'data': 2, 'context': 2, 'tensor': 2}, batch={'microbatches': 2, 'size': 4}
    )
    record(config, tmp_path / 'targets')
    tokenizer = Tokenizer.load(recorded.TOKENIZER)
    one, other = (
        recorded.said_of_tokens(batch)
        for place in (folder / 'float16', tmp_path / 'targets')
        for batch in recorded.batches(dataclasses.replace(config, batch=WHOLE), tokenizer, RecordedTargets(place))
    )
    assert one.keys() == other.keys()
    assert len(one) == 30
    for ids, logp, tail in one.values():
        assert ids.shape == logp.shape == (*tail.shape, 8)
    for key, (ids, logp, tail) in one.items():
        np.testing.assert_array_equal(ids, other[key][0])
        np.testing.assert_allclose(logp, other[key][1], rtol=2**-10)  # a step of float16
        np.testing.assert_allclose(tail, other[key][2], atol=1e-5)


WHOLE = dataclasses.replace(recorded.settings(recorded.ROOT).batch, size=32)


def test_another_batch_order_and_hosts_learn_from_the_same(folder):
    """The pieces of the recording, laid into other rows."""
    tokenizer, targets = Tokenizer.load(recorded.TOKENIZER), RecordedTargets(folder / 'float16')
    config = recorded.learning(folder, folder / 'float16')
    (whole,) = recorded.batches(dataclasses.replace(config, batch=WHOLE), tokenizer, targets)
    wanted = recorded.said_of_tokens(whole)
    found = {}
    small = dataclasses.replace(config, batch=dataclasses.replace(WHOLE, size=4))
    for host in range(2):
        options = {'seed': 5, 'process_index': host, 'process_count': 2}
        for batch in recorded.batches(small, tokenizer, targets, **options):
            assert batch.tokens.shape == (2, recorded.LENGTH)
            found |= recorded.said_of_tokens(batch)
    assert found.keys() == wanted.keys()
    for key, leaves in found.items():
        jax.tree.map(np.testing.assert_array_equal, leaves, wanted[key])


def test_a_run_with_held_out_text_and_a_comparison(folder, tmp_path, monkeypatch):
    """One config: recorded with its teacher, then trained without running it, evaluated, and compared with it."""
    monkeypatch.setattr(jax, 'devices', lambda *args: jax.local_devices()[:1])
    texts = recorded.write_texts(tmp_path / 'held.txt', recorded.TEXTS[3:6])
    changes = {
        'eval': {'data': {'paths': (texts,), 'separator': '<|cut|>', 'least_fill': 0.0}},
        'record': {'top_p': 0.8, 'at_least': 2, 'likely': 12},
    }
    targets = tmp_path / 'targets'
    manifest = record(recorded.settings(folder, **changes), targets)
    assert {name: split['sums']['documents'] for name, split in manifest.parts.items()} == {'train': 15, 'eval': 3}
    sums = manifest.parts['train']['sums']
    assert 2 * sums['tokens'] < sums['words'] < 12 * sums['tokens']
    assert 0 < sums['rounding'] / sums['rounding_tokens'] < 12 * 2**-11
    teacher = {'path': str(folder / 'teacher')}
    config = recorded.learning(folder, targets, teacher=teacher, compare={'sample_tokens': 1}, **changes)
    run_job(config, tmp_path / 'run')
    rows = [line for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines() if 'eval_kl' in line]
    assert len(rows) == 1
    assert '| teacher' in (tmp_path / 'run' / 'comparison.md').read_text()


def test_what_does_not_fit_is_refused_when_the_job_is_made(folder, tmp_path):
    targets = folder / 'float16'
    escaping = {'form': 'renormalized', 'reverse_kl': 1.0, 'temperature': TEMPERATURE}
    for message, changes in (
        (r'temperature=1.0: .* was recorded at 1.5', {'distill': {'temperature': 1.0}}),
        (r'was recorded of .*teacher, another model: expected that one', {'teacher': {'path': 'quickstart'}}),
        (r"reverse_kl with form='renormalized'", {'distill': escaping}),
    ):
        config = recorded.learning(folder, targets, **{'distill': {'temperature': TEMPERATURE}, **changes})
        with pytest.raises(ValueError, match=message):
            make_job(config)
    other = tmp_path / 'other'
    shutil.copytree(targets, other)
    write_manifest(other, dataclasses.replace(read_manifest(targets), tokenizer='0' * 64))
    with pytest.raises(ValueError, match='recorded with another tokenizer'):
        run_job(recorded.learning(folder, other, distill={'temperature': TEMPERATURE}), tmp_path / 'run')


def test_a_student_may_have_rows_that_its_teacher_has_not(folder):
    """As where one family pads its tables to several sizes: only the words of both are compared."""
    student = {'architecture': recorded.STUDENT | {'vocab_size': 4100}}
    job = make_job(recorded.learning(folder, folder / 'float16', model=student, distill={'temperature': TEMPERATURE}))
    assert job.models['model'].cfg.vocab_size == 4100
    assert job.targets.manifest.vocab_size == 4096
    fewer = {'architecture': recorded.STUDENT | {'vocab_size': 4090}}
    with pytest.raises(ValueError, match=r'recorded over 4096 words, .* --config\.record\.vocab_size=4090'):
        make_job(recorded.learning(folder, folder / 'float16', model=fewer, distill={'temperature': TEMPERATURE}))


def test_a_teacher_with_other_words_is_not_recorded(folder, tmp_path):
    """Its ids would be taken for those of the student's tokenizer."""
    teacher = tmp_path / 'teacher'
    shutil.copytree(folder / 'teacher', teacher)
    file = teacher / 'tokenizer.json'
    words = json.loads(file.read_text())
    names = sorted(words['model']['vocab'], key=words['model']['vocab'].get)
    words['model']['vocab'] = dict(zip(names, [*range(1, len(names)), 0], strict=True))
    file.write_text(json.dumps(words))
    with pytest.raises(ValueError, match='has another tokenizer'):
        record(recorded.settings(folder, teacher={'path': str(teacher)}), tmp_path / 'targets')


def test_what_cannot_be_recorded(folder, tmp_path):
    texts = recorded.write_texts(tmp_path / 'text.txt', ['something', 'else'])
    data = dataclasses.asdict(recorded.settings(folder).data) | {'paths': (texts,)}
    for message, changes in (
        (r'config.mesh.pipe=2: a teacher is recorded without a pipeline', {'mesh': {'pipe': 2}}),
        (r'record.likely=5000: expected at most the vocabulary of the teacher', {'record': {'likely': 5000}}),
        (r'likely=8, and here it is 9: expected the same settings and data', {'record': {'likely': 9}}),
        (r'data.train.sources=.*expected the same settings and data', {'data': data}),
    ):
        config = recorded.settings(folder, **changes)
        with pytest.raises(ValueError, match=message):
            record(config, folder / 'float16')


def test_a_refused_batch_is_saved_with_its_targets(folder, tmp_path):
    batch = jax.tree.map(jnp.asarray, learned(folder, 'bfloat16')[3])
    values = {'accepted': 0.0, 'loss': float('nan'), 'grad_norm': float('nan')}
    with pytest.raises(FloatingPointError, match='step 3'):
        check_finite(values, (3, batch), tmp_path)
    saved = np.load(tmp_path / 'refused_batch_3_process_0.npz')
    assert saved['logp'].dtype == np.float32
    np.testing.assert_array_equal(saved['ids'], batch.sparse_target.ids)
    np.testing.assert_array_equal(saved['tokens'], batch.tokens)


def test_a_recording_says_where_rows_of_training_will_not_fit(folder, tmp_path, capsys):
    changes = {'data': {'paths': (recorded.write_texts(tmp_path / 'text.txt', ['def f():']),), 'packing': 'concat'}}
    record(recorded.settings(folder, **changes), tmp_path / 'targets')
    assert 'note     config.data.packing=concat' in capsys.readouterr().out


def test_a_teacher_that_overflows_is_not_recorded(folder, tmp_path):
    broken = recorded.export_teacher(tmp_path / 'teacher', scale=float('nan'))
    config = recorded.settings(folder, teacher={'path': str(broken)})
    with pytest.raises(
        FloatingPointError, match=r'text.txt: byte \d+: the teacher gives log-probabilities that are not'
    ):
        record(config, tmp_path / 'targets')
    assert [path.name for path in (tmp_path / 'targets').iterdir()] == ['manifest.json']
