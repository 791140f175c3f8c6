"""The least sum of losses within a budget, beside every choice there is."""

import itertools

import numpy as np
import pytest

from jpt.quantization.allocation import least


def by_trying(costs, losses, budget):
    """The least sum over all choices."""
    every = itertools.product(*(range(len(each)) for each in costs))
    sums = [
        sum(loss[at] for loss, at in zip(losses, choice, strict=True))
        for choice in every
        if sum(cost[at] for cost, at in zip(costs, choice, strict=True)) <= budget
    ]
    return min(sums)


@pytest.mark.parametrize('kind', ['any', 'whole', 'falling', 'as the cost', 'far apart'])
def test_no_choice_within_the_budget_loses_less(kind):
    rng = np.random.default_rng(0)
    for _ in range(100):
        costs = [rng.integers(0, 20, rng.integers(1, 5)) for _ in range(rng.integers(1, 7))]
        make = {
            'any': lambda cost: rng.exponential(size=len(cost)),
            'whole': lambda cost: rng.integers(0, 4, len(cost)),  # many choices are as good
            'falling': lambda cost: -np.sort(-rng.lognormal(0, 3, len(cost)))[np.argsort(np.argsort(cost))],
            'as the cost': lambda cost: 20.0 - cost,  # all that spend as much are as good
            'far apart': lambda cost: 10.0 ** rng.uniform(-12, 3, len(cost)),
        }[kind]
        losses = [make(cost) for cost in costs]
        low, high = (sum(int(end(cost)) for cost in costs) for end in (min, max))
        budget = int(rng.integers(low, high + 1))
        found = least(costs, losses, budget)
        assert sum(cost[at] for cost, at in zip(costs, found, strict=True)) <= budget
        total = sum(loss[at] for loss, at in zip(losses, found, strict=True))
        assert total == pytest.approx(by_trying(costs, losses, budget), rel=1e-8, abs=1e-20)


def test_what_cannot_be_chosen_is_an_error():
    with pytest.raises(ValueError, match='a budget of 6: expected 7 at least'):
        least([[3, 5], [4]], [[1.0, 0.0], [2.0]], 6)
    with pytest.raises(ValueError, match='NaN or infinities'):
        least([[3, 5]], [[np.nan, 0.0]], 6)


def test_a_large_model_takes_no_time():
    rng = np.random.default_rng(1)
    sizes = [8192 * 10240, 8192 * 8192, 2 * 8192 * 28672, 8192 * 28672] * 80
    costs = [[int(4.5 * size) + 32, 8 * size + size // 512, 16 * size] for size in sizes]
    losses = [[50**one, 50**one / ratio, 0.0] for one, ratio in rng.uniform((0, 8), (1, 16), (320, 2))]
    budget = 6 * sum(sizes)
    found = least(costs, losses, budget)
    spent = sum(cost[at] for cost, at in zip(costs, found, strict=True))
    assert spent <= budget
    # Lagrange: no choice within the budget is below min (loss + price * cost) - price * budget, at any price.
    total = sum(loss[at] for loss, at in zip(losses, found, strict=True))
    bounds = [
        sum(min(a + price * c for a, c in zip(*pair, strict=True)) for pair in zip(losses, costs, strict=True))
        - price * budget
        for price in np.geomspace(1e-12, 1e-6, 2000)
    ]
    assert max(bounds) <= total * (1 + 1e-9)
    assert total <= max(bounds) * 1.001
