"""Teacher, distilled student and the same student from scratch, side by side on held-out text."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from jpt.checkpoint.source import to_host
from jpt.data.pipeline import make_pipeline
from jpt.evaluation.score import Reference, score
from jpt.model import Model, load
from jpt.sharding.watchdog import Watchdog
from jpt.training.job import teacher_dtype
from jpt.training.overview import count_parameters
from jpt.training.report import Curve, Sample, Scores, read_curve, sample_text, save_curves, smooth, table, verdict
from jpt.training.settings import TrainConfig

NAMES = ('teacher', 'distilled', 'from scratch')


def compare(config: TrainConfig, distilled: Model, scratch: Model, workdir: Path, dog: Watchdog) -> str:
    """Writes workdir/comparison.json, comparison.md and curves.png, and returns the text of comparison.md.

    `dog` watches over the processes, and is told what this one begins.

    Raises:
        ValueError: no held-out text, no comparison asked for, or no teacher.
    """
    if config.compare is None or config.teacher is None or config.teacher.path is None or config.eval.data is None:
        raise ValueError('config.compare needs config.teacher and config.eval.data')
    teacher = load(config.teacher.path, dtype=teacher_dtype(config), mtp=False)
    if jax.process_count() > 1:  # each process compares for itself, on a device of its own
        distilled, scratch = (
            dataclasses.replace(m, params=jax.tree.map(to_host, m.params)) for m in (distilled, scratch)
        )
    models = dict(zip(NAMES, (teacher, distilled, scratch), strict=True))
    scores = [held_out(name, model, teacher, config, dog) for name, model in models.items()]
    samples = [sample for name, model in models.items() for sample in _samples(name, model, config, dog)]
    parts = [table(scores), verdict(scores[1], scores[2])]
    if samples:
        parts += ['Samples:', sample_text(samples)]
    text = '\n\n'.join(parts)
    if jax.process_index() != 0:
        return text
    dog.beat(config.steps, 'comparison, curves')
    png = workdir / 'curves.png'
    paths = {'distilled': workdir / 'metrics.jsonl', 'from scratch': workdir / 'scratch' / 'metrics.jsonl'}
    curves = {name: _curve(path) for name, path in paths.items()}
    save_curves(png, curves, scores[0].loss, 'Student with and without its teacher')
    (workdir / 'comparison.md').write_text(text + '\n')
    (workdir / 'comparison.json').write_text(json.dumps([row._asdict() for row in scores], indent=1) + '\n')
    return f'\n{text}\n\nCurves: {png}\nStudent: {workdir / "model"}'


def _samples(name: str, model: Model, config: TrainConfig, dog: Watchdog) -> list[Sample]:
    """What a model writes after each prompt."""
    assert config.compare is not None
    dog.beat(config.steps, f'comparison, samples of {name}')
    results = model.generate(
        list(config.compare.prompts),
        max_new_tokens=config.compare.sample_tokens,
        temperature=config.compare.temperature,
    )
    return [Sample(name, prompt, result.text) for prompt, result in zip(config.compare.prompts, results, strict=True)]


def _curve(path: Path) -> Curve:
    """Cross-entropy over the tokens trained on, smoothed; both runs report it, whatever they minimize."""
    curve = read_curve(path, 'tokens', 'ce')
    return Curve(curve.tokens, smooth(curve.values, 0.8))


def held_out(name: str, model: Model, teacher: Model, config: TrainConfig, dog: Watchdog) -> Scores:
    """One model's scores on all of the held-out text."""
    assert config.eval.data is not None
    assert model.tokenizer is not None
    pipeline = make_pipeline(
        config.eval.data,
        model.tokenizer,
        batch_size=config.batch.size,
        seq_len=config.batch.length,
        evaluate=True,
    )
    sums, tokens = np.zeros(3), 0.0
    reference = None if model is teacher else Reference(teacher.config, teacher.params)
    for number, batch in enumerate(pipeline):
        if config.eval.batches and number == config.eval.batches:
            break
        dog.beat(config.steps, f'comparison, {name}, batch {number}')
        scores = score(model.config, model.params, batch, reference=reference, compute=model.compute)
        mask = np.asarray(batch.loss_mask, np.float64)
        parts = (-scores.log_prob, scores.kl, scores.agreement)
        sums += [float(np.sum(np.asarray(part, np.float64) * mask)) for part in parts]
        tokens += float(mask.sum())
    pipeline.close()
    loss, kl, agreement = sums / tokens
    if model is teacher:  # it need not be run twice to agree with itself
        kl, agreement = 0.0, 1.0
    return Scores(name, count_parameters(model.params), loss, kl, agreement)
