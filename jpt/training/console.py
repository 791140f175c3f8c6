"""Progress of a run for the eyes: one live line on a terminal, one line per row elsewhere."""

import sys
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jpt.training.writers import Values

# What a line shows, in this order, where a row has it; other values are for the files.
_FORMATS = {
    'loss': 'loss {:.4f}',
    'kl': 'KL {:.4f}',
    'ce': 'CE {:.4f}',
    'eval_loss': 'held-out loss {:.4f}',
    'eval_kl': 'KL {:.4f}',
    'eval_ce': 'CE {:.4f}',
    'eval_agreement': 'agreement {:.2%}',
    'grad_norm': 'grad {:.3g}',
    'lr': 'lr {:.2e}',
    'tokens_per_second': '{:,.0f} tok/s',
    'mfu': 'MFU {:.1%}',
    'memory_gib': 'mem {:.1f} GiB',
}


class Console:
    """Writes rows and messages; on a terminal the latest row stays at the bottom with a bar and the time left."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._progress: Progress | None = None
        if self._stream.isatty():
            columns = (BarColumn(24), MofNCompleteColumn(), TextColumn('{task.description}'))
            self._progress = Progress(*columns, console=RichConsole(file=self._stream), refresh_per_second=2)
            self._task = self._progress.add_task('', total=total_steps)
            self._progress.start()

    def say(self, message: str) -> None:
        """A message that stays."""
        if self._progress is not None:
            self._progress.console.print(message, highlight=False, markup=False)
        else:
            print(message, file=self._stream, flush=True)

    def write(self, step: int, values: Values) -> None:
        """A row: the live line of training, or a line that stays."""
        text = line_of(values)
        if self._progress is not None and 'eta_seconds' in values:
            self._progress.update(self._task, completed=step, description=text)
        else:
            self.say(f'step {step}/{self._total}  {text}')

    def close(self) -> None:
        """Leaves the last line as it is."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def line_of(values: Values) -> str:
    """The values that a person wants to see, in a fixed order.

    A loss that is nothing but a KL says so, since it cannot be compared with a cross-entropy, which then stands beside
    it; a loss that is nothing but a cross-entropy is shown once.
    """
    hidden = set()
    names = {}
    for prefix, word in (('', 'loss'), ('eval_', 'held-out loss')):
        loss = values.get(f'{prefix}loss')
        if loss is not None and loss == values.get(f'{prefix}ce'):
            hidden.add(f'{prefix}ce')
        elif loss is not None and loss == values.get(f'{prefix}kl'):
            hidden.add(f'{prefix}loss')
            names[f'{prefix}kl'] = f'{word} = KL {{:.4f}}'
    shown = [name for name in _FORMATS if name in values and name not in hidden]
    parts = [names.get(name, _FORMATS[name]).format(values[name]) for name in shown]
    if 'eta_seconds' in values:
        parts.append(f'ETA {duration(values["eta_seconds"])}')
    return '  '.join(parts)


def duration(seconds: float) -> str:
    """Seconds in words: '42 s', '3 min 20 s', '5 h 07 min'."""
    whole = round(seconds)
    if whole < 60:
        return f'{whole} s'
    if whole < 3600:
        return f'{whole // 60} min {whole % 60:02d} s'
    return f'{whole // 3600} h {whole % 3600 // 60:02d} min'
