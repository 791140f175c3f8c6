"""Post-training for language models in JAX: `jpt.load(path)` opens a checkpoint, `python -m jpt.train` trains one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jpt.model import Model, load

__version__ = '0.1.0'
__all__ = ['Model', '__version__', 'load']


def __getattr__(name: str) -> Any:
    # The face imports everything; a command that only reads data or a config should not wait for it.
    if name in ('Model', 'load'):
        from jpt import model

        return getattr(model, name)
    raise AttributeError(f'module jpt has no attribute {name!r}')
