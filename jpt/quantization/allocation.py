"""A choice for each of several things, such that losses add up to the least that a budget of costs allows.

This is the knapsack problem with classes (Kellerer, Pferschy and Pisinger, Knapsack Problems, chapter 11). It is solved
exactly, up to SLACK: partial choices are kept that cost less or lose less than all others, and of those the ones that
can still end below the best choice known. What the rest loses at the least is bounded by a price per unit of cost.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SLACK = 1e-9  # of the least sum: choices that close are taken for equal


class _Partial(NamedTuple):
    """Choices for the first things: what they cost and lose, and how each is made of one for a thing less."""

    costs: np.ndarray  # int64, ascending
    losses: np.ndarray  # float64, descending
    before: np.ndarray
    option: np.ndarray


def least(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The number of the option for each thing, with the least sum of losses among those whose costs add up to `budget`.

    Args:
        costs: of each option of each thing, not negative.
        losses: likewise; finite.
        budget: what the costs may add up to.

    Raises:
        ValueError: even the cheapest options cost more, or a loss that is no number.
    """
    price = [np.asarray(each, np.int64) for each in costs]
    loss = [np.asarray(each, np.float64) for each in losses]
    if not all(np.isfinite(each).all() for each in loss):
        raise ValueError('losses hold NaN or infinities: expected numbers')
    cheapest = sum(int(each.min()) for each in price)
    if cheapest > budget:
        raise ValueError(f'a budget of {budget}: expected {cheapest} at least, which the cheapest options cost')
    multiplier, known = _by_price(price, loss, budget)
    reduced = [np.min(one + multiplier * cost) for one, cost in zip(loss, price, strict=True)]
    rest_reduced = np.append(np.cumsum(reduced[::-1])[::-1], 0.0)
    rest_cost = np.append(np.cumsum([each.min() for each in price][::-1])[::-1], 0)
    best = sum(float(one[at]) for one, at in zip(loss, known, strict=True)) * (1 - SLACK)
    steps = [_Partial(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))]
    for at in range(len(price)):
        step = _extended(steps[-1], price[at], loss[at])
        bound = step.losses + multiplier * (step.costs - budget) + rest_reduced[at + 1]
        keep = (step.costs + rest_cost[at + 1] <= budget) & (bound < best)
        steps.append(_Partial(*(part[keep] for part in step)))
    if not len(steps[-1].losses) or steps[-1].losses.min() >= best:
        return known
    at, found = int(np.argmin(steps[-1].losses)), []
    for step in reversed(steps[1:]):
        found.append(int(step.option[at]))
        at = int(step.before[at])
    return found[::-1]


def _extended(partial: _Partial, costs: np.ndarray, losses: np.ndarray) -> _Partial:
    """Every partial choice with every option of one thing more, but for those that another beats in both."""
    count = len(partial.costs)
    made = _Partial(
        (partial.costs[None] + costs[:, None]).reshape(-1),
        (partial.losses[None] + losses[:, None]).reshape(-1),
        np.tile(np.arange(count), len(costs)),
        np.repeat(np.arange(len(costs)), count),
    )
    order = np.lexsort((made.losses, made.costs))
    made = _Partial(*(part[order] for part in made))
    before = np.minimum.accumulate(np.append(np.inf, made.losses[:-1]))
    return _Partial(*(part[made.losses < before] for part in made))


def _by_price(costs: list[np.ndarray], losses: list[np.ndarray], budget: int) -> tuple[float, list[int]]:
    """(price per unit of cost at which the best options just fit the budget, these options, made better greedily)."""

    def chosen(price: float) -> list[int]:
        return [int(np.lexsort((cost, loss + price * cost))[0]) for cost, loss in zip(costs, losses, strict=True)]

    def spent(options: Sequence[int]) -> int:
        return sum(int(cost[at]) for cost, at in zip(costs, options, strict=True))

    if spent(chosen(0.0)) <= budget:
        return 0.0, chosen(0.0)
    low, high = 0.0, 1.0
    while spent(chosen(high)) > budget:
        high *= 2
        if high > 1e300:  # only the cheapest options are left, and they fit
            return 0.0, [int(np.lexsort((loss, cost))[0]) for cost, loss in zip(costs, losses, strict=True)]
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(chosen(middle)) <= budget else (middle, high)
    options, left = chosen(high), budget - spent(chosen(high))
    while True:
        gains = [
            (float(losses[i][now] - losses[i][to]), i, to)
            for i, now in enumerate(options)
            for to in range(len(costs[i]))
            if costs[i][to] - costs[i][now] <= left and losses[i][to] < losses[i][now]
        ]
        if not gains:
            return high, options
        _, i, to = max(gains)
        left -= int(costs[i][to] - costs[i][options[i]])
        options[i] = to
