"""What torch takes for the head loss: naively, and in chunks whose logits are computed again in the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np


def torch_runs(arrays: dict[str, Any], dtype: str, chunk: int) -> dict[str, Callable[[], Any]]:
    """{'ce torch naive': function, ...} of value and both gradients of the same numbers; none where torch is absent."""
    try:
        import torch
        from torch.nn import functional
        from torch.utils.checkpoint import checkpoint
    except ImportError:
        return {}
    device = 'cuda' if torch.cuda.is_available() else 'cpu'

    def tensor(x: Any) -> Any:
        if x.dtype == 'int32':
            return torch.from_numpy(np.asarray(x, np.int64)).to(device)
        return torch.from_numpy(np.array(x, np.float32)).to(device, getattr(torch, dtype))

    given = {name: tensor(x) for name, x in arrays.items()}
    hidden, kernel = (given[name].requires_grad_() for name in ('hidden', 'kernel'))
    teacher, head, targets = (given[name] for name in ('teacher_hidden', 'teacher_kernel', 'targets'))
    count = len(targets)

    def ce(h: Any, t: Any, y: Any) -> Any:
        return functional.cross_entropy((h @ kernel.T).float(), y, reduction='sum') / count

    def kl(h: Any, t: Any, y: Any) -> Any:
        theirs = torch.log_softmax((t @ head.T).float(), dim=-1)
        ours = torch.log_softmax((h @ kernel.T).float(), dim=-1)
        return functional.kl_div(ours, theirs, log_target=True, reduction='sum') / count

    def chunked(loss: Any) -> Any:
        parts = zip(*(x.split(chunk) for x in (hidden, teacher, targets)), strict=True)
        return sum(checkpoint(loss, *part, use_reentrant=False) for part in parts)

    def run(total: Callable[[], Any]) -> Callable[[], Any]:
        def both() -> float:
            hidden.grad = kernel.grad = None
            value = total()
            value.backward()
            if device == 'cuda':
                torch.cuda.synchronize()
            return float(value.detach())

        return both

    runs: dict[str, Callable[[], Any]] = {}
    for name, loss in (('ce', ce), ('kl', kl)):
        runs[f'{name} torch naive'] = run(partial(loss, hidden, teacher, targets))
        runs[f'{name} torch, chunk {chunk}'] = run(partial(chunked, loss))
    return runs
