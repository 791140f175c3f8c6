"""What a distillation ends with: a table that compares models on held-out text, samples of their text, and curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Scores(NamedTuple):
    """One model on held-out text."""

    model: str
    parameters: int
    loss: float  # mean negative log-likelihood, nats per token
    kl: float  # mean KL(teacher || model), nats per token; 0 for the teacher itself
    agreement: float  # share of tokens where the most likely next token is the teacher's, 0 to 1


class Sample(NamedTuple):
    """A prompt and what a model made of it."""

    model: str
    prompt: str
    text: str


class Curve(NamedTuple):
    """Values over the tokens trained on, in order."""

    tokens: Sequence[float]
    values: Sequence[float]


def table(rows: Sequence[Scores]) -> str:
    """The scores as a Markdown table that also reads well on a terminal."""
    head = ('model', 'parameters', 'loss', 'KL to teacher', 'top-1 agreement')
    cells = [
        (row.model, f'{row.parameters:,}', f'{row.loss:.4f}', f'{row.kl:.4f}', f'{100 * row.agreement:.2f} %')
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]

    def line(values: Sequence[str]) -> str:
        first, *rest = (
            value.ljust(width) if i == 0 else value.rjust(width)
            for i, (value, width) in enumerate(zip(values, widths, strict=True))
        )
        return f'| {" | ".join((first, *rest))} |'

    rule = '| ' + ' | '.join(['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]) + ' |'
    return '\n'.join((line(head), rule, *(line(row) for row in cells)))


def verdict(distilled: Scores, scratch: Scores) -> str:
    """One sentence on what the teacher was worth; it says so too where the teacher did not help."""
    gain, kl = scratch.loss - distilled.loss, scratch.kl - distilled.kl
    agreement = 100 * (distilled.agreement - scratch.agreement)
    word = 'better' if gain > 0 else 'worse'
    return (
        f'On the same tokens, {distilled.model} is {word} than {scratch.model} by {abs(gain):.4f} nats per token '
        f'(KL to the teacher {"lower" if kl > 0 else "higher"} by {abs(kl):.4f}, agreement {agreement:+.2f} points).'
    )


def sample_text(samples: Sequence[Sample]) -> str:
    """The samples one below the other: each prompt once, then every model's continuation as a block of code."""
    parts = []
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        for sample in samples:
            if sample.prompt == prompt:
                parts.append(f'{sample.model}:\n\n```python\n{prompt}{sample.text}\n```')
    return '\n\n'.join(parts)


def read_curve(path: Path, x: str, y: str) -> Curve:
    """Two columns of a file of JSON lines; lines that lack one are passed over (evaluations are rarer than steps).

    Raises ValueError naming the line that is not JSON, unless it is the last: a killed run may have cut it off.
    """
    tokens, values = [], []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f'{path}:{number}: not JSON: {error}') from error
        if x in row and y in row:
            tokens.append(float(row[x]))
            values.append(float(row[y]))
    return Curve(tokens, values)


def smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average with its start corrected, so that the first value is the first input."""
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(total / weight)
    return result


def save_curves(path: Path, curves: Mapping[str, Curve], teacher_loss: float, title: str = '') -> None:
    """Writes a PNG of loss over tokens, one line per model, and the teacher's held-out loss as a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot([tokens / 1e6 for tokens in curve.tokens], curve.values, label=name, linewidth=1.6)
    axes.axhline(teacher_loss, color='0.4', linestyle='--', linewidth=1.2, label='teacher, on held-out text')
    axes.set_xlabel('training tokens, millions')
    axes.set_ylabel('cross-entropy on training text, nats per token')
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
