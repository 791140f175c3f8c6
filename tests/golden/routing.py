"""What the routers of a transformers model choose, and how far each choice is from a tie."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

# The gap between the last chosen and the first unchosen score, in standard deviations of the layer's scores.
LEAST_GAP = 1e-3


@dataclasses.dataclass(frozen=True)
class Routing:
    """The choices of one layer for all tokens N of a batch, in the order of rows.

    Attributes:
        layer: index of the layer in the model.
        logits: float32 [N, E], the product with the router's weight (and its bias, where it has one).
        top: int64 [N, k], the chosen experts, best score for choice first.
        weights: float32 [N, k], what multiplies each chosen expert, in the order of `top`.
        gap: the least distance of a choice, of a group or of an expert, from a tie.
    """

    layer: int
    logits: np.ndarray
    top: np.ndarray
    weights: np.ndarray
    gap: float

    @property
    def uses_every_expert(self) -> bool:
        return len(np.unique(self.top)) == self.logits.shape[-1]


def is_router(module: Any) -> bool:
    return type(module).__name__.lower().endswith('router')


def routings_of(model: Any, tokens: np.ndarray) -> list[Routing]:
    """The choices of every layer that has a router, for one batch of tokens."""
    return routings_during((model,), lambda: model(torch.from_numpy(tokens), use_cache=False))


def routings_during(models: Sequence[Any], call: Callable[[], Any]) -> list[Routing]:
    """The choices of all routers of some models while `call` runs, in the order in which they are made."""
    routings: list[Routing] = []

    def record(layer: int) -> Any:
        def hook(module: Any, _: Any, output: Any) -> None:
            routings.append(_routing(module, layer, *output))

        return hook

    handles = [
        module.register_forward_hook(record(next(int(part) for part in name.split('.') if part.isdigit())))
        for model in models
        for name, module in model.named_modules()
        if is_router(module)
    ]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return routings


def _routing(router: Any, layer: int, *output: torch.Tensor) -> Routing:
    """One router's output again from its logits; the two must agree."""
    dense = len(output) == 2  # Llama 4 gives the weights of all experts, and the logits second
    logits = output[1] if dense else output[0]
    bias = getattr(router, 'e_score_correction_bias', None)
    scores = logits if bias is None else logits.sigmoid() + bias
    gap, allowed = _allowed(router, scores)
    top = allowed.topk(router.top_k, dim=-1).indices
    ranked = allowed.sort(dim=-1, descending=True).values
    if router.top_k < scores.shape[-1]:
        gap = min(gap, float((ranked[:, router.top_k - 1] - ranked[:, router.top_k]).min()))
    if dense:
        weights = output[0].gather(1, top)
    else:
        place = (output[2][:, None, :] == top[:, :, None]).int()
        assert bool((place.sum(-1) == 1).all()), f'layer {layer}: the chosen experts are not those of the scores'
        weights = output[1].gather(1, place.argmax(-1))
    return Routing(layer, logits.numpy(), top.numpy(), weights.numpy(), gap / float(scores.std()))


def _allowed(router: Any, scores: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The scores with -inf outside the chosen groups, and the least gap between groups (inf without groups)."""
    groups = getattr(router, 'num_group', 1)
    if groups == 1 or router.topk_group == groups:
        return float('inf'), scores
    grouped = scores.view(len(scores), groups, -1)
    ranked, order = grouped.topk(2, dim=-1).values.sum(dim=-1).sort(dim=-1, descending=True)
    gap = float((ranked[:, router.topk_group - 1] - ranked[:, router.topk_group]).min())
    chosen = torch.zeros(len(scores), groups, dtype=torch.bool).scatter_(1, order[:, : router.topk_group], True)
    return gap, grouped.masked_fill(~chosen[..., None], float('-inf')).view(scores.shape)


def least_gap(routings: list[Routing]) -> float:
    """The least gap of all layers; inf without routers."""
    return min((routing.gap for routing in routings), default=float('inf'))


def arrays_of(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """router_logits_L, router_top_L and router_weights_L of every layer L with experts; and aux_loss.

    aux_loss is transformers' load balancing loss of these logits without an attention mask, for the families whose
    training adds it.
    """
    routings = routings_of(model, tokens)
    arrays: dict[str, Any] = {}
    for routing in routings:
        arrays[f'router_logits_{routing.layer}'] = routing.logits
        arrays[f'router_top_{routing.layer}'] = routing.top.astype(np.int32)
        arrays[f'router_weights_{routing.layer}'] = routing.weights
    if model.config.model_type in ('qwen3_moe', 'mixtral'):
        balance = __import__(type(model).__module__, fromlist=['']).load_balancing_loss_func
        logits = tuple(torch.from_numpy(routing.logits) for routing in routings)
        loss = balance(logits, model.config.num_local_experts, model.config.num_experts_per_tok)
        arrays['aux_loss'] = loss.numpy()
    return arrays
