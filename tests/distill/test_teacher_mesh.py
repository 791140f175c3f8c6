"""A teacher on a mesh of its own: the step of one program, whatever the two meshes; runs that go on; refusals."""

import dataclasses
import json

import jax
import processes
import pytest
import recorded
from online import TEMPERATURE, distance, first_batch, online

from jpt.distill.recording import record
from jpt.distill.teacher import make_teacher
from jpt.sharding.grads import loss_and_grads
from jpt.sharding.layout import to_canonical_layout
from jpt.training.job import first_state, make_job
from jpt.training.overview import flops_of, overview
from jpt.training.run import run_job


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp('teacher_mesh')
    recorded.export_teacher(found / 'teacher')
    recorded.write_texts(found / 'text.txt')
    return found


def losses(workdir):
    rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return {row['step']: row['loss'] for row in rows if 'loss' in row}


def job_of(folder, teacher_mesh, devices=8, **changes):
    """A job with its teacher's program."""
    given = {'teacher_mesh': teacher_mesh, 'distill': {'temperature': TEMPERATURE, 'alpha': 0.7}, **changes}
    config = recorded.settings(folder, **given)
    job = make_job(config, jax.devices()[:devices])
    return job._replace(teacher=make_teacher(config, job.apart, job.models['model'].cfg.vocab_size))


MESHES = {
    'all devices, in another layout': ({'fsdp': 4, 'tensor': 2}, {'mesh': {'data': 2, 'context': 2, 'fsdp': 2}}),
    'two devices of its own beside a pipeline': (
        {'data': 2, 'devices': 2, 'microbatches': 2},
        {'mesh': {'data': 1, 'pipe': 2, 'tensor': 2}, 'batch': {'microbatches': 4}, 'devices': 6},
    ),
}


@pytest.mark.parametrize('name', MESHES)
def test_the_step_is_that_of_one_program(folder, name):
    teacher_mesh, changes = MESHES[name]
    job = job_of(folder, teacher_mesh, **changes)
    state, batch = first_state(job), first_batch(job)
    assert 'teacher' not in state.frozen
    assert batch.sparse_target.ids.sharding.device_set == set(job.mesh.devices.flat)

    def step(params, frozen, batch):
        return loss_and_grads(job.objective, params, frozen, batch, job.plan)

    total, grads, sums = jax.device_get(jax.jit(step)(state.params, state.frozen, batch))
    wanted, wanted_grads = online(folder)
    assert float(total) == pytest.approx(wanted, rel=1e-6)
    assert distance(to_canonical_layout(job.plan.layouts['model'], grads), wanted_grads) < 1e-5
    assert 0.05 < sums['tail'][0] / sums['tail'][1] < 0.95


def test_a_run_on_disjoint_devices_goes_on_where_it_was(folder, tmp_path):
    """With held-out text, and a comparison with the teacher and with the student that has none."""
    held = recorded.write_texts(tmp_path / 'held.txt', recorded.TEXTS[3:6])
    changes = {
        'teacher_mesh': {'devices': 4, 'data': 2, 'tensor': 2},
        'mesh': {'data': 4},
        'eval': {'data': {'paths': (held,), 'separator': '<|cut|>'}},
        'compare': {'sample_tokens': 1},
        'schedule': {'kind': 'constant'},
    }
    whole, half = (recorded.settings(folder, **changes, steps=4, checkpoint={'every': 2}) for _ in range(2))
    run_job(whole, tmp_path / 'whole')
    run_job(dataclasses.replace(half, steps=2, compare=None), tmp_path / 'half')
    run_job(half, tmp_path / 'half')
    found = [losses(tmp_path / name) for name in ('whole', 'half')]
    assert len(found[0]) == 4
    assert found[0] == found[1]
    assert 'eval_kl' in (tmp_path / 'whole' / 'metrics.jsonl').read_text()
    assert '| teacher' in (tmp_path / 'whole' / 'comparison.md').read_text()


def test_two_processes_and_a_teacher_in_another_layout(folder, tmp_path):
    """The student divided by rows, the teacher by its weights: the losses of one process."""
    flags = ('--config.mesh.data=2', "--config.teacher_mesh={'data': 1, 'fsdp': 2}")
    job = processes.start_training(f'{recorded.__file__}:{folder}', tmp_path / 'two', *flags)
    try:
        results = [job.result(index) for index in range(2)]
    finally:
        job.kill()
    assert [code for code, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    run_job(recorded.settings(folder, teacher_mesh={'data': 8}), tmp_path / 'one')
    found = [losses(tmp_path / name) for name in ('two', 'one')]
    assert found[0].keys() == found[1].keys() == {1, 2}
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_held_out_data_that_cannot_be_read_are_refused_before_the_first_step(folder, tmp_path):
    (tmp_path / 'held.jsonl').write_text('{"words": "none"}\n')
    config = recorded.settings(folder, eval={'data': {'paths': (str(tmp_path / 'held.jsonl'),)}})
    with pytest.raises(ValueError, match=r'held\.jsonl:1'):
        run_job(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_what_the_overview_says_of_it(folder):
    shared = make_job(recorded.settings(folder, teacher_mesh={'tensor': 2, 'data': -1}))
    own = make_job(recorded.settings(folder, teacher_mesh={'devices': 4}), jax.devices()[:8])
    alone = make_job(recorded.settings(folder))
    assert "8 likely words\n         on the student's devices, data=4, tensor=2 (8 x cpu)" in overview(shared)
    assert 'on devices of its own, data=4 (4 x cpu)' in overview(own)
    assert own.mesh.size == 4
    # Work of the student's devices: a teacher elsewhere is not theirs.
    assert flops_of(shared) == flops_of(alone) > flops_of(own)


def test_the_dtype_of_teachers(folder):
    """In a program of its own, and beside the student, whose dtype stays."""
    dtypes = {'compute': {'teacher_dtype': 'bfloat16'}}
    job = job_of(folder, {'data': 2}, devices=2, mesh={'data': 2}, **dtypes)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(job.teacher.params)} == {'bfloat16'}
    beside = make_job(recorded.settings(folder, **dtypes), jax.devices()[:1])
    state = first_state(beside)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.frozen['teacher'])} == {'bfloat16'}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {'float32'}
    batch = first_batch(beside)
    carries = jax.eval_shape(beside.objective.first, state.params, state.frozen, batch)
    found = {name: carry.hidden_BTD.dtype.name for name, carry in carries.items()}
    assert found == {'student': 'float32', 'teacher': 'bfloat16'}
    _, sums = beside.step(state, batch)
    assert sums['accepted'][0] == 1


def test_a_teacher_recorded_in_its_own_dtype_is_known_again(folder, tmp_path):
    dtypes = {'compute': {'teacher_dtype': 'bfloat16'}}
    manifest = record(recorded.settings(folder, mesh={'data': -1}, **dtypes), tmp_path / 'targets')
    assert manifest.teacher['dtype'] == 'bfloat16'
    teacher = {'path': str(folder / 'teacher')}
    assert make_job(recorded.learning(folder, tmp_path / 'targets', teacher=teacher)).targets is not None


def test_a_student_in_several_chunks_of_a_pipeline(folder):
    changes = {'mesh': {'pipe': 2, 'data': 2}, 'batch': {'microbatches': 2}, 'compute': {'chunks': 2}}
    deep = {'architecture': recorded.STUDENT | {'num_hidden_layers': 4}}
    job = make_job(recorded.settings(folder, teacher_mesh={'devices': 4}, model=deep, **changes), jax.devices()[:8])
    assert job.plan.layouts['model'].chunks == 2
    assert job.apart.mesh.shape['data'] == 4


REFUSED = {
    r'teacher_mesh.*expected None, unless there is one teacher': {'distill': {'targets': 'somewhere'}},
    r'teacher_mesh.pipe=2: expected 1': {'teacher_mesh': {'pipe': 2}},
    r'teacher_mesh.devices=8: expected less than the 8 devices': {'teacher_mesh': {'devices': 8}},
    r'config.teacher_mesh: mesh\(.*data=3.* asks for 3 devices, but there are 8': {'teacher_mesh': {'data': 3}},
    r'record.likely=5000: expected at most the vocabulary of the teacher': {'record': {'likely': 5000}},
    r'record.likely=8: expected at most the vocabulary of the student, 7': {
        'model': {'architecture': recorded.STUDENT | {'vocab_size': 7}}
    },
    r'config.teacher_mesh: .*microbatches=3: expected a divisor of size=8': {'teacher_mesh': {'microbatches': 3}},
    r"distill.form='truncated': expected 'tail' where": {'teacher_mesh': None, 'distill': {'form': 'truncated'}},
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_does_not_fit_is_refused_when_the_job_is_made(folder, message):
    with pytest.raises(ValueError, match=message):
        make_job(recorded.settings(folder, **{'teacher_mesh': {'data': -1}, **REFUSED[message]}))
