"""The pruning command as a user types it, and its errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import jpt
from jpt.data.config import TextConfig
from jpt.evaluation.text import batches_from, mean_loss
from jpt.prune import prune
from jpt.pruning.target import Target

WORDS = ('the', 'cat', 'sat', 'on', 'a', 'mat', 'and', 'saw', 'dog', 'that', 'ran', 'after', 'it', 'over', 'hill')


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> Path:
    """A few texts of different lengths."""
    rng = np.random.default_rng(0)
    texts = [' '.join(rng.choice(WORDS, int(rng.integers(3, 40)))) for _ in range(12)]
    path = tmp_path_factory.mktemp('corpus') / 'texts.jsonl'
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return path


def of_corpus(corpus: Path, **settings: int) -> TextConfig:
    """The corpus both to calibrate and to measure."""
    return TextConfig.of_files(str(corpus), str(corpus), **settings)


def run(*arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-m', 'jpt.prune', *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_depth_and_width_on_the_command_line(corpus: Path, tmp_path: Path) -> None:
    sizes = {'num_hidden_layers': 2, 'intermediate_size': 160, 'num_attention_heads': 5, 'hidden_size': 80}
    flags = [f'--{name}={size}' for name, size in sizes.items()]
    out = tmp_path / 'small'
    done = run('--input=quickstart', f'--output={out}', f'--data={corpus}', *flags, '--rows=6', '--length=32')
    assert done.returncode == 0, done.stderr
    report = json.loads((out / 'prune.json').read_text())
    names = ['the whole model', *(f'fewer {part}' for part in ('layers', 'MLP channels', 'heads', 'hidden dimensions'))]
    assert [row['model'] for row in report['losses']] == names
    for row in report['losses']:
        assert f'loss {row["loss"]:.4f}' in done.stdout
    counts = [row['parameters'] for row in report['losses']]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == sum(tensor.size for tensor in load_file(out / 'model.safetensors').values())

    model = jpt.load(out)
    written = json.loads((out / 'config.json').read_text())
    assert {name: written[name] for name in sizes} == sizes
    assert (written['num_key_value_heads'], written['head_dim']) == (5, 32)
    assert model.tokenizer is not None
    held_out, _ = batches_from(model, of_corpus(corpus, rows=6, length=32))
    np.testing.assert_allclose(mean_loss(model, held_out), report['losses'][-1]['loss'], rtol=1e-3)

    # what prune.json says was kept is what is there
    kept, whole = report['kept'], jpt.load('quickstart')
    assert len(kept['layers']) == 2
    table = np.asarray(whole.params['embed']['embedding'], np.float32)[:, kept['width']]
    np.testing.assert_array_equal(np.asarray(model.params['embed']['embedding'], np.float32), table)
    up = np.asarray(whole.params['layers'][0][0]['mlp']['up']['kernel'], np.float32)
    for n, layer in enumerate(kept['layers']):
        wanted = up[layer][kept['mlp'][n]][:, kept['width']]
        ours = np.asarray(model.params['layers'][0][0]['mlp']['up']['kernel'], np.float32)[n]
        np.testing.assert_array_equal(ours, wanted)


def test_layers_that_the_loss_needs_least_go(corpus: Path, tmp_path: Path) -> None:
    """Held-out losses without each layer alone are told, and decide."""
    lines: list[str] = []
    text = of_corpus(corpus, rows=4, length=16, batch_size=4)
    target = Target(num_hidden_layers=3)
    report = prune('quickstart', tmp_path / 'small', target, text, layer_importance='loss', say=lines.append)
    scores = report['layer_scores']
    assert report['kept']['layers'] == tuple(n for n in range(4) if n != np.argmin(scores))
    np.testing.assert_allclose(report['losses'][1]['loss'], min(scores), rtol=1e-6)
    for layer, loss in enumerate(scores):
        assert f'loss {loss:.4f} without layer {layer}' in lines


@pytest.mark.parametrize(
    ('target', 'settings', 'message'),
    [
        (Target(), {}, 'nothing to prune'),
        (Target(layers=(0, 9)), {}, r'layers=\(0, 9\): expected numbers from 0 to 3'),
        (
            Target(num_hidden_layers=2),
            {'layer_importance': 'size'},
            '--layer_importance=size: expected',
        ),
        (Target(num_hidden_layers=2), {'max_shard_size': 'much'}, 'much'),
    ],
)
def test_errors_of_python_calls(target, settings, message, corpus, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        prune('quickstart', tmp_path / 'out', target, of_corpus(corpus, rows=2, length=8), **settings)
    assert not (tmp_path / 'out').exists()


def test_errors_are_plain(corpus: Path, tmp_path: Path) -> None:
    there = tmp_path / 'there'
    there.mkdir()
    (there / 'file').touch()
    cases = {
        ('--input=nowhere', f'--output={tmp_path}/out'): 'error: nowhere: no such directory',
        ('--input=quickstart', f'--output={there}'): f'error: {there} exists already and is not empty',
        ('--input=quickstart', f'--output={tmp_path}/out', '--rows=0'): 'error: --rows=0: expected 1 or more',
    }
    for arguments, message in cases.items():
        done = run(*arguments, f'--data={corpus}', '--intermediate_size=8')
        assert done.returncode == 1
        assert done.stderr.strip().startswith(message)
    assert not (tmp_path / 'out').exists()
