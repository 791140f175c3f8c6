"""Loss and every gradient on a dozen meshes against whole logits on one device, in float64."""

import itertools

import jax
import numpy as np
import pytest
from sharded_steps import MODELS, canonical_params, make_batch, reference, step_on, worst_error

from jpt.sharding.mesh import AXES, MeshConfig
from jpt.sharding.rules import shardings

# Every pair of axes that can meet does so at least once; 'even' has 7 layers, 3 KV heads and 50,257 rows of vocabulary.
CASES = {
    'data8': ('even', {'data': 8}, 1, {}),
    'data-fsdp-tensor': ('even', {'data': 2, 'fsdp': 2, 'tensor': 2}, 2, {'remat': 'full'}),
    'fsdp-expert-context': ('mixed', {'fsdp': 2, 'expert': 2, 'context': 2}, 2, {}),
    'data-context': ('mixed', {'data': 2, 'context': 4}, 4, {}),
    'expert-fsdp-tensor': ('mixed', {'expert': 2, 'fsdp': 2, 'tensor': 2}, 1, {}),
    'pipe-tensor': ('even', {'pipe': 4, 'tensor': 2}, 4, {}),
    'pipe-fsdp-context': ('even', {'pipe': 2, 'fsdp': 2, 'context': 2}, 4, {'chunks': 3}),
    'gpipe-data': ('even', {'pipe': 4, 'data': 2}, 4, {'schedule': 'gpipe'}),
    'gpipe-context-tensor': ('mixed', {'pipe': 2, 'context': 2, 'tensor': 2}, 2, {'schedule': 'gpipe'}),
    'pipe-fsdp': ('mixed', {'pipe': 4, 'fsdp': 2}, 4, {}),
    'pipe-data-tensor': ('mixed', {'pipe': 2, 'data': 2, 'tensor': 2}, 2, {'chunks': 2, 'remat': 'full'}),
    'pipe-data-expert': ('even', {'pipe': 2, 'data': 2, 'expert': 2}, 1, {}),
    'over-heads-fsdp-tensor': ('over_heads', {'data': 2, 'fsdp': 2, 'tensor': 2}, 2, {}),
    'experts-data8': ('experts', {'data': 8}, 1, {}),
    'experts-tensor': ('batch_balanced', {'data': 2, 'expert': 2, 'tensor': 2}, 2, {}),
    'experts-fsdp-context': ('experts', {'fsdp': 2, 'expert': 2, 'context': 2}, 1, {}),
    'experts-context': ('batch_balanced', {'expert': 4, 'context': 2}, 1, {}),
    'experts-pipe': ('batch_balanced', {'pipe': 2, 'data': 2, 'expert': 2}, 2, {}),
    'hybrid-fsdp-expert-tensor': ('hybrid', {'fsdp': 2, 'expert': 2, 'tensor': 2}, 1, {}),
    'hybrid-pipe-tensor': ('hybrid', {'pipe': 2, 'data': 1, 'tensor': 4}, 4, {}),
    'experts-pipe-tensor': ('experts', {'pipe': 2, 'expert': 2, 'tensor': 2}, 4, {'remat': 'full'}),
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def check(step, model, tolerance=1e-10):
    total, grads, _ = reference(model)
    assert abs(step.total - total) < tolerance * total
    assert worst_error(step.grads, grads) < tolerance


@pytest.mark.parametrize('case', CASES)
def test_loss_and_gradients_are_those_of_one_device(case):
    model, sizes, microbatches, options = CASES[case]
    step = step_on(model, MeshConfig(**{'data': 1} | sizes), microbatches, **options)
    check(step, model)
    weight = make_batch(MODELS[model].vocab_size).loss_mask.sum()
    loss, count = step.sums['loss']
    assert float(count) == pytest.approx(weight, rel=1e-12)
    assert float(loss) == pytest.approx(weight * reference(model)[2], rel=1e-10)


def test_every_pair_of_axes_meets_in_a_case():
    pairs = {pair for _, sizes, *_ in CASES.values() for pair in itertools.combinations(sorted(sizes), 2)}
    assert pairs == set(itertools.combinations(sorted(AXES), 2))


def test_float32_agrees_to_1e_5_and_an_empty_batch_gives_nothing():
    step = step_on('mixed', MeshConfig(pipe=2, data=1, fsdp=2, tensor=2), 4, dtype='float32')
    check(step, 'mixed', 1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(step.grads)} == {np.dtype('float32')}
    empty = step.batch._replace(loss_mask=0 * step.batch.loss_mask)
    total, grads, _ = step.run(step.params, step.frozen, empty)
    assert float(total) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
    wanted = jax.tree.leaves(shardings(step.plan.mesh, step.plan.specs))
    for leaf, place in zip(jax.tree.leaves(grads), wanted, strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_frozen_leaves_have_no_gradient_and_the_others_keep_theirs():
    frozen = ('embed', 'layers/*/attn', '!layers/*/attn/q')
    step = step_on('even', MeshConfig(pipe=2, data=1, fsdp=2, tensor=2), 2, frozen=frozen)
    check(step, 'even')
    attention = step.grads['layers'][0][0]['attn']
    assert attention['k']['kernel'] is None
    assert attention['q']['kernel'].shape == canonical_params('even')['layers'][0][0]['attn']['q']['kernel'].shape
    assert step.grads['embed']['embedding'] is None


def products_of_eight():
    """All meshes of eight devices that the models fit, with what else varies dealt out in turn."""
    found = []
    sizes = [shape for shape in itertools.product((1, 2, 4, 8), repeat=len(AXES)) if np.prod(shape) == 8]
    for index, shape in enumerate(sizes):
        mesh = dict(zip(AXES, shape, strict=True))
        if mesh['pipe'] > 7 or mesh['tensor'] > 2:
            continue
        rows = mesh['data'] * mesh['fsdp'] * mesh['expert']
        microbatches = min(8 // rows, (1, 2, 4)[index % 3])
        chunks = (1, 2, 3)[index % 3] if mesh['pipe'] == 2 else 1
        schedule = 'gpipe' if chunks == 1 and index % 2 else '1f1b'
        remat = ('none', 'full', 'dots')[index % 3]
        for model in MODELS:
            name = f'{model}-{"x".join(map(str, shape))}'
            found.append(pytest.param(model, mesh, microbatches, chunks, schedule, remat, id=name))
    return found


@pytest.mark.full
@pytest.mark.parametrize(('model', 'mesh', 'microbatches', 'chunks', 'schedule', 'remat'), products_of_eight())
def test_all_meshes_of_eight_devices(model, mesh, microbatches, chunks, schedule, remat):
    check(step_on(model, MeshConfig(**mesh), microbatches, chunks=chunks, schedule=schedule, remat=remat), model)
