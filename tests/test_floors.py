"""A file imports from its own floor or below, without circles; and the package imports nothing that is optional."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLOORS = {
    'config': 0,
    'kernels': 0,
    'quant': 1,
    'models': 2,
    'sharding': 3,
    'data': 3,
    'checkpoint': 3,
    'generation': 4,
    'evaluation': 4,
    'training': 5,
    'distill': 5,
    'pruning': 5,
    'quantization': 5,
    'metrics': 5,
    'model': 4,
}
MAINS = 6
OPTIONAL = ('torch', 'transformers', 'pyarrow', 'tensorboardX', 'wandb', 'lm_eval', 'safetensors', 'matplotlib', 'peft')


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports_of(path):
    """Modules of jpt that a file imports at its top level, typing-only imports left out."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'jpt':
            found |= {f'{node.module}.{alias.name}' for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split('.')[0] == 'jpt'}
    return found


FILES = {module_of(path): path for path in (ROOT / 'jpt').rglob('*.py')}
GRAPH = {name: {found for found in imports_of(path) if found in FILES} for name, path in FILES.items()}


def floor(module):
    part = module.split('.')[1] if '.' in module else ''
    return FLOORS.get(part, MAINS)


@pytest.mark.parametrize('module', sorted(FILES))
def test_imports_go_down(module):
    for found in GRAPH[module] - {'jpt'}:
        assert floor(found) <= floor(module), f'{module} (floor {floor(module)}) imports {found} (floor {floor(found)})'


def test_there_are_no_circles():
    done, path = set(), []

    def visit(module):
        if module in path:
            raise AssertionError(' -> '.join([*path[path.index(module) :], module]))
        if module in done:
            return
        path.append(module)
        for found in GRAPH[module]:
            visit(found)
        done.add(path.pop())

    for module in GRAPH:
        visit(module)


def test_importing_the_package_needs_nothing_optional():
    code = f'import sys, jpt.model, jpt.training.settings\nprint([n for n in {OPTIONAL!r} if n in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
