"""How far the gradient of a sparse target is from that of the teacher's whole distribution, by form and by words kept.

    python benchmarks/sparse_targets.py MODEL=TEXT [MODEL=TEXT ...] [--tokens=2048] [--plot=FILE.png] [--json]

Of forward KL: ||g - g_full|| / ||g_full|| and the cosine, over the gradients in the student's logits of all tokens
together. The teacher is a real one on real text. The student has its weights with noise of some share of each kernel's
size: a little as late in training, much as early.
"""

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpt
from jpt.kernels.divergences import Divergence
from jpt.kernels.sparse_target import FORMS, SparseTarget, sparse_divergence
from jpt.kernels.vocab_shard import VocabShard

WORDS = (8, 16, 32, 64, 128, 256)
NOISES = (0.05, 0.2, 0.5)
LENGTH = 256


def tokens_of(model: jpt.Model, path: Path, count: int) -> np.ndarray:
    """The first tokens of a text, in rows of LENGTH."""
    opener = lzma.open if path.suffix == '.xz' else open
    with opener(path, 'rt', encoding='utf-8') as file:
        text = file.read(16 * count)
    assert model.tokenizer is not None
    ids = np.asarray(model.tokenizer.encode(text)[:count], np.int32)
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def noisy(model: jpt.Model, share: float) -> Any:
    """The weights with Gaussian noise of this share of each kernel's standard deviation."""
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(model.params))))

    def perturbed(leaf: jax.Array) -> jax.Array:
        noise = share * jnp.std(leaf) * jax.random.normal(next(keys), leaf.shape)
        return leaf + (noise if leaf.ndim > 1 else 0)

    return jax.tree.map(perturbed, model.params)


@jax.jit
def errors(teacher: jax.Array, student: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """By form and number of words: relative error and cosine of the gradient; and the mass that the words leave."""
    logp, logq = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    full = jnp.exp(logq) - jnp.exp(logp)
    vocab, found = VocabShard((), logp.shape[1], logp.shape[1]), {}
    for words in (words for words in WORDS if words < logp.shape[1]):
        best, ids = jax.lax.top_k(logp, words)
        target = SparseTarget(ids.astype(jnp.int32), best)
        for form in FORMS:
            gradient = sparse_divergence(Divergence(), form, target, logq, vocab)[1]
            norms = jnp.linalg.norm(gradient) * jnp.linalg.norm(full)
            found[f'{form} {words}'] = {
                'error': jnp.linalg.norm(gradient - full) / jnp.linalg.norm(full),
                'cosine': jnp.vdot(gradient, full) / norms,
                'tail': jnp.mean(jnp.exp(target.tail())),
            }
    return found


def measured(name: str, text: Path, count: int) -> list[dict[str, Any]]:
    """The rows of one model."""
    model = jpt.load(name)
    tokens = tokens_of(model, text, count)
    flat = model.config.vocab_size
    teacher, rows = model.logits(tokens).reshape(-1, flat).astype(jnp.float32), []
    for share in NOISES:
        student = jpt.Model(model.config, noisy(model, share)).logits(tokens).reshape(-1, flat).astype(jnp.float32)
        logp, logq = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
        kl = float(jnp.mean(jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)))
        found = jax.device_get(errors(teacher, student))
        for key in sorted(found, key=lambda key: int(key.split()[1])):
            form, words = key.split()
            numbers = {metric: float(value) for metric, value in found[key].items()}
            case = {'model': Path(name).name, 'vocabulary': flat, 'noise': share, 'kl': kl}
            rows.append(case | {'form': form, 'words': int(words)} | numbers)
    return rows


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Relative error by words kept, one panel per model and noise."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models, noises = (
        list(dict.fromkeys(row['model'] for row in rows)),
        list(dict.fromkeys(row['noise'] for row in rows)),
    )
    figure = Figure(figsize=(4 * len(noises), 3.4 * len(models)), layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(models), len(noises), squeeze=False, sharex=True, sharey=True)
    for line, model in zip(panels, models, strict=True):
        for panel, noise in zip(line, noises, strict=True):
            own = [row for row in rows if (row['model'], row['noise']) == (model, noise)]
            for form in FORMS:
                points = [(row['words'], row['error']) for row in own if row['form'] == form]
                panel.plot(*zip(*points, strict=True), marker='o', label=form)
            panel.set(xscale='log', yscale='log', title=f'{model}, noise {noise} (KL {own[0]["kl"]:.2f})')
            panel.set_xticks(WORDS, [str(words) for words in WORDS], minor=False)
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel('words kept')
    for line in panels:
        line[0].set_ylabel('relative error of the gradient')
    panels[0][0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'cases', nargs='+', metavar='MODEL=TEXT', help="a model or 'quickstart', and a text that it knows"
    )
    parser.add_argument('--tokens', type=int, default=2048)
    parser.add_argument('--plot')
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    cases = [case.split('=') for case in args.cases]
    rows = [row for name, text in cases for row in measured(name, Path(text), args.tokens)]
    if args.plot:
        draw(rows, args.plot)
    if args.json:
        print(json.dumps(rows))
        return
    errors_of = ' | '.join(f'error, {form}' for form in FORMS)
    print(f'| model | noise | KL | words | left out | {errors_of} | cosine, tail | cosine, truncated |')
    print('| --- |' + ' ---: |' * 9)
    for first in rows:
        if first['form'] != FORMS[0]:
            continue
        case = [row for row in rows if all(row[key] == first[key] for key in ('model', 'noise', 'words'))]
        by_form = {row['form']: row for row in case}
        values = [f'{by_form[form]["error"]:.4f}' for form in FORMS]
        values += [f'{by_form[form]["cosine"]:.4f}' for form in FORMS[:2]]
        start = f'| {first["model"]} | {first["noise"]} | {first["kl"]:.2f} | {first["words"]} | {first["tail"]:.4f} | '
        print(start + ' | '.join(values) + ' |')


if __name__ == '__main__':
    main()
