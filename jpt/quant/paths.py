"""Names for the leaves of a parameter tree, and patterns over them, as users write them in configs.

The path of a leaf joins its keys by '/', and consecutive list indices by '.': 'layers/0.0/attn/q/kernel' is segment 0,
kind 0. In a pattern '*' stands for any text within one part, '**' for any parts, '{q,v}' for either word. A pattern
that matches a node covers everything below it, so 'layers/*/attn' and 'layers/*/attn/**' are the same.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax


def path_of(keys: Sequence[Any]) -> str:
    """The path of a leaf from its jax key path."""
    path = ''
    previous_index = False
    for key in keys:
        is_index = isinstance(key, jax.tree_util.SequenceKey)
        part = next(str(getattr(key, name)) for name in ('key', 'name', 'idx') if hasattr(key, name))
        separator = '.' if is_index and previous_index else '/'
        path += separator + part if path else part
        previous_index = is_index
    return path


def map_with_path(
    function: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """jax.tree.map with the path of each leaf as the first argument."""

    def call(keys: Sequence[Any], *leaves: Any) -> Any:
        return function(path_of(keys), *leaves)

    return jax.tree_util.tree_map_with_path(call, tree, *rest, is_leaf=is_leaf)


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """The paths of all leaves, in tree order."""
    return [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches this path or a node above it."""
    return re.fullmatch(f'(?:{_regex(pattern)})(?:/.*)?', path) is not None


def select(patterns: Iterable[str], among: Sequence[str], place: str) -> frozenset[str]:
    """The paths that any of the patterns covers. `place` says in messages where the patterns come from.

    Raises:
        ValueError: a pattern that covers nothing; the message names the nearest nodes that exist.
    """
    selected: set[str] = set()
    for pattern in patterns:
        found = {path for path in among if matches(pattern, path)}
        if not found:
            raise ValueError(f'{place}: the pattern {pattern!r} matches nothing: {_near_misses(pattern, among)}')
        selected |= found
    return frozenset(selected)


def _regex(pattern: str) -> str:
    regex = ''
    for token in re.findall(r'\*\*/|\*\*|\*|\{[^{}]*\}|[^*{}]+|[{}]', pattern):
        if token == '**/':
            regex += '(?:.*/)?'
        elif token == '**':
            regex += '.*'
        elif token == '*':
            regex += '[^/]*'
        elif len(token) > 1 and token.startswith('{'):
            regex += f'(?:{"|".join(map(re.escape, token[1:-1].split(",")))})'
        else:
            regex += re.escape(token)
    return regex


def _near_misses(pattern: str, among: Sequence[str]) -> str:
    nodes: dict[str, None] = {}
    for path in among:
        parts = re.sub(r'(?<=/)[\d.]+(?=/)', '*', path).split('/')
        nodes.update(('/'.join(parts[: end + 1]), None) for end in range(len(parts)))
    close = difflib.get_close_matches(pattern.removesuffix('/**'), nodes, n=3, cutoff=0.4)
    return f'near it are {", ".join(close)}' if close else f'there are {", ".join(list(nodes)[:8])}'
