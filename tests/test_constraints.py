"""constraints/lowest.txt, with which CI runs a part of the suite, names the very lower bounds of pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
DECLARED = PROJECT['dependencies'] + PROJECT['optional-dependencies']['test']


def pins():
    """Version by name."""
    lines = (ROOT / 'constraints/lowest.txt').read_text().split()
    return dict(line.lower().replace('_', '-').split('==') for line in lines)


@pytest.mark.parametrize('requirement', DECLARED)
def test_the_lowest_version_that_is_allowed_is_the_one_tried(requirement):
    name, bound = re.match(r'([\w-]+)(?:\[\w+\])?>=([\d.]+)', requirement).groups()
    pinned = [int(number) for number in pins()[name.lower()].split('.')]
    bound = [int(number) for number in bound.split('.')]
    assert pinned[: len(bound)] == bound
