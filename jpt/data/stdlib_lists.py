"""Writes the list of the running interpreter's standard library: python -m jpt.data.stdlib_lists

Run once per minor version of Python; the lists are fixed from then on, and jpt/data/stdlib_corpus.py reads them.
Only what every installation has is listed: distributors put tests, Tk, IDLE, ensurepip, distutils, curses, dbm and
sqlite3 into packages of their own, and build settings (_sysconfigdata...) belong to one machine.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

from jpt.data.stdlib_corpus import LISTS, file_hash, stdlib_root

SPLIT_OFF = frozenset(
    (
        *('curses', 'dbm', 'distutils', 'ensurepip', 'idlelib', 'lib2to3', 'sqlite3', 'tkinter', 'turtledemo'),
        *('__phello__', 'site-packages', 'dist-packages'),
        'encodings',  # on every machine, but 1.4 MB of character tables
    )
)
TESTS = frozenset(('test', 'tests', 'idle_test'))
LEFT_OUT = frozenset(
    (
        'turtle.py',  # travels with Tk
        'html/entities.py',  # a table
        '_bootsubprocess.py',  # used while Python itself is built
        'sitecustomize.py',  # a distributor's
    )
)
LEFT_OUT_FOLDERS = ('ctypes/macholib/',)  # Debian removes it
SMALLEST = 200  # bytes; shorter files hold no more than an import

# About 4 % of the bytes, chosen by hand: text about numbers, time and text, parsers, containers, threads, small tools;
# none has a near copy among the training files.
HELD_OUT = frozenset(
    (
        *('asyncio/queues.py', 'calendar.py', 'concurrent/futures/thread.py', 'configparser.py', 'csv.py'),
        *('fileinput.py', 'fractions.py', 'graphlib.py', 'heapq.py', 'html/parser.py', 'pprint.py', 'statistics.py'),
        *('textwrap.py', 'timeit.py'),
    )
)


def is_listed(name: str) -> bool:
    """Whether a file, named relative to the standard library, belongs to the corpus by its name."""
    folders = name.split('/')[:-1]
    if folders and (folders[0] in SPLIT_OFF or folders[0].startswith('config-')):
        return False
    if TESTS.intersection(folders) or name.startswith(('_sysconfigdata', *LEFT_OUT_FOLDERS)):
        return False
    return name not in LEFT_OUT


def make_list(root: Path, release: str) -> dict[str, str | dict[str, str]]:
    """The content of a list: {'made_from', 'train': {name: SHA-256}, 'held_out': {name: SHA-256}}, sorted by name."""
    hashes = {}
    for path in root.rglob('*.py'):
        name = path.relative_to(root).as_posix()
        if is_listed(name) and path.stat().st_size >= SMALLEST:
            hashes[name] = file_hash(path.read_bytes())
    absent = HELD_OUT.difference(hashes)
    if absent:
        raise FileNotFoundError(f'held-out files that are not in {root}: {", ".join(sorted(absent))}')
    return {
        'made_from': release,
        'train': {name: hashes[name] for name in sorted(hashes) if name not in HELD_OUT},
        'held_out': {name: hashes[name] for name in sorted(HELD_OUT)},
    }


def main() -> None:
    """Writes jpt/data/stdlib/py3XX.json, or the file named by --output."""
    parser = argparse.ArgumentParser(description='Write the fixed list of standard library files of this interpreter.')
    default = LISTS / f'py{sys.version_info.major}{sys.version_info.minor}.json'
    parser.add_argument('--output', type=Path, default=default)
    output = parser.parse_args().output
    content = make_list(stdlib_root(), platform.python_version())
    output.write_text(json.dumps(content, indent=1) + '\n')
    print(f'wrote {output}')


if __name__ == '__main__':
    main()
