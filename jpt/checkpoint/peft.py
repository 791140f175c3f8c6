"""LoRA adapters in PEFT's form: a directory with adapter_config.json and adapter_model.safetensors.

The factors of a module lie there layer by layer, with ranks and alphas that may differ between layers. Here the layers
of a kind are stacked: smaller ranks are padded with zeros (which stay zero in training), layers without an adapter are
all zeros, and where alphas differ the ratio goes into b. Writing takes the zeros away again.
"""

import collections
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jpt.checkpoint.safetensors import load_file
from jpt.checkpoint.safetensors_writer import save_file
from jpt.models.config import ModelConfig
from jpt.models.names import Leaf, Source, TreePath, get, leaves
from jpt.quant.dot import LoraKernel, is_weight
from jpt.quant.lora import lora_scale
from jpt.quant.paths import map_with_path, path_of

ADAPTER_CONFIG = 'adapter_config.json'
_WEIGHTS = 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_READ = ('peft_type', 'r', 'lora_alpha', 'rank_pattern', 'alpha_pattern', 'use_rslora', 'bias', 'init_lora_weights')
# What these say is either in the tensors already, or is about training alone.
_NEUTRAL = {
    'auto_mapping',
    'base_model_name_or_path',
    'exclude_modules',
    'fan_in_fan_out',
    'inference_mode',
    'layers_pattern',
    'layers_to_transform',
    'lora_dropout',
    'megatron_core',
    'peft_version',
    'qalora_group_size',
    'revision',
    'target_modules',
    'task_type',
}
# Other initializations move part of the base weights into the adapter.
_INITIALIZATIONS = (True, False, 'gaussian', 'eva', 'orthogonal')


class Factors(NamedTuple):
    """The adapter of one module: a [rank, in], b [out, rank] of scale * b a; or of a stack of them."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def read_adapter(directory: str | Path, cfg: ModelConfig, params: Any) -> Any:
    """The params with the adapter of a PEFT directory: kernels that it covers become LoraKernel.

    Its factors are float32 numpy arrays.

    Raises:
        ValueError: a config field that jpt does not compute, a tensor that is missing, unexpected or of another shape.
    """
    factors = read_factors(directory, cfg)
    adapted = {_name(leaf): leaf.path for leaf in _kernel_leaves(cfg) if leaf.path in factors}

    def wrap(path: str, kernel: Any) -> Any:
        if path not in adapted:
            return kernel
        if isinstance(kernel, LoraKernel):
            raise ValueError(f'{directory}: {path} has an adapter already: merge it first')
        return LoraKernel(kernel, *factors[adapted[path]])

    return map_with_path(wrap, params, is_leaf=is_weight)


def read_factors(directory: str | Path, cfg: ModelConfig) -> dict[TreePath, Factors]:
    """The factors of a PEFT directory, float32 and stacked as the kernels they belong to: a [R, rank, in].

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: as `read_adapter`.
    """
    directory = Path(directory)
    config_path, weights = directory / ADAPTER_CONFIG, directory / _WEIGHTS
    config = _check_config(json.loads(config_path.read_text('utf-8')), config_path)
    if not weights.is_file():
        raise FileNotFoundError(f'{directory}: no {_WEIGHTS} (pickled adapters are not read)')
    tensors = load_file(weights)
    used: set[str] = set()
    found: dict[TreePath, Factors] = {}
    for leaf in _kernel_leaves(cfg):
        layers = [_read_factors(tensors, leaf, source, config, directory, used) for source in leaf.sources]
        if any(layers):
            found[leaf.path] = _stack(leaf, layers, directory)
    if unexpected := sorted(set(tensors) - used):
        shown = ', '.join(unexpected[:8])
        raise ValueError(f'{directory}: tensors that belong to no linear layer of the model: {shown}')
    return found


def write_adapter(directory: str | Path, cfg: ModelConfig, params: Any, base_model: str | None = None) -> None:
    """Writes the adapter in `params` (every LoraKernel of the layers) as a directory that PEFT loads.

    Raises:
        ValueError: there is no LoraKernel.
    """
    modules: dict[str, list[tuple[Source, Factors]]] = {}
    for leaf in _kernel_leaves(cfg):
        kernel = get(params, leaf.path)
        if isinstance(kernel, LoraKernel):
            for index, source in enumerate(leaf.sources):
                factors = _trim(np.asarray(kernel.a)[index], np.asarray(kernel.b)[index], kernel.scale)
                modules.setdefault(_module(source), []).append((source, factors))
    joined = {module: _join(parts) for module, parts in modules.items()}
    joined = {module: factors for module, factors in joined.items() if factors.a.shape[0]}
    if not joined:
        raise ValueError(f'{directory}: the model has no adapter to write')
    tensors = {}
    for module, factors in joined.items():
        tensors[f'{_PREFIX}{module}.lora_A.weight'] = np.ascontiguousarray(factors.a)
        tensors[f'{_PREFIX}{module}.lora_B.weight'] = np.ascontiguousarray(factors.b)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = _config_of(joined, cfg, base_model)
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
    save_file(directory / _WEIGHTS, tensors, {'format': 'pt'})


def _check_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    if config.get('peft_type') != 'LORA':
        raise ValueError(f"{path}: peft_type={config.get('peft_type')!r}: expected 'LORA'")
    if config.get('bias', 'none') != 'none':
        raise ValueError(f"{path}: bias={config['bias']!r}: expected 'none'")
    if config.get('init_lora_weights', True) not in _INITIALIZATIONS:
        raise ValueError(
            f'{path}: init_lora_weights={config["init_lora_weights"]!r} changes the base weights: expected one of '
            f'{_INITIALIZATIONS}; PEFT converts it with save_pretrained(path_initial_model_for_weight_conversion=...)'
        )
    for name, value in config.items():
        if name not in _READ and name not in _NEUTRAL and value not in (None, False, [], {}):
            raise ValueError(f'{path}: {name}={value!r} is not supported: expected it to be absent, null or false')
    return config


def _read_factors(
    tensors: Mapping[str, np.ndarray],
    leaf: Leaf,
    source: Source,
    config: dict[str, Any],
    directory: Path,
    used: set[str],
) -> Factors | None:
    module = _module(source)
    names = [f'{_PREFIX}{module}.lora_{factor}.weight' for factor in 'AB']
    present = [name for name in names if name in tensors]
    if not present:
        return None
    if len(present) == 1:
        raise ValueError(f'{directory}: {present[0]} is there, {(set(names) - set(present)).pop()} is missing')
    used.update(names)
    a, b = (tensors[name].astype(np.float32) for name in names)
    rank = _by_pattern(config.get('rank_pattern'), module, config['r'])
    if a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(f'{directory}: {names[0]} {a.shape}, lora_B {b.shape}: adapter_config.json says rank {rank}')
    alpha = _by_pattern(config.get('alpha_pattern'), module, config['lora_alpha'])
    if b.shape[0] == source.total:
        b = b[source.within(slice(0, leaf.own_shape[0]))]
    return Factors(a, b, lora_scale(rank, alpha, config.get('use_rslora', False)))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the module's name or the end of it, as a regular expression."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf'(.*\.)?({key})$', module)), default)


def _stack(leaf: Leaf, layers: list[Factors | None], directory: Path) -> Factors:
    repeats, out, inner = leaf.shape
    present = [factors for factors in layers if factors is not None]
    rank, scale = max(factors.a.shape[0] for factors in present), present[0].scale
    a, b = np.zeros((repeats, rank, inner), np.float32), np.zeros((repeats, out, rank), np.float32)
    for index, factors in enumerate(layers):
        if factors is None:
            continue
        own = factors.a.shape[0]
        if factors.a.shape[1] != inner or factors.b.shape[0] != out:
            raise ValueError(
                f'{directory}: {_module(leaf.sources[index])}: lora_A {factors.a.shape}, lora_B {factors.b.shape}: '
                f'expected (rank, {inner}) and ({out}, rank)'
            )
        a[index, :own], b[index, :, :own] = factors.a, factors.b * np.float32(factors.scale / scale)
    return Factors(a, b, scale)


def _trim(a: np.ndarray, b: np.ndarray, scale: float) -> Factors:
    """Without the ranks that are zero in both factors: padding."""
    real = a.any(axis=1) | b.any(axis=0)
    return Factors(a[real], b[:, real], scale)


def _join(parts: list[tuple[Source, Factors]]) -> Factors:
    """The factors of a module from those of the parts that it is here (GPT-2's queries, keys and values)."""
    first, factors = parts[0]
    if first.total == factors.b.shape[0]:
        return factors
    if sum(own.b.shape[0] for _, own in parts) == first.total and all(
        np.array_equal(own.a, factors.a) and own.scale == factors.scale for _, own in parts
    ):
        return Factors(factors.a, np.concatenate([own.b for _, own in parts]), factors.scale)
    rank = sum(own.a.shape[0] for _, own in parts)
    b = np.zeros((first.total, rank), factors.b.dtype)
    start = 0
    for source, own in parts:
        end = start + own.a.shape[0]
        b[(*source.within(slice(0, own.b.shape[0])), slice(start, end))] = own.b * (own.scale / factors.scale)
        start = end
    return Factors(np.concatenate([own.a for _, own in parts]), b, factors.scale)


def _config_of(modules: Mapping[str, Factors], cfg: ModelConfig, base_model: str | None) -> dict[str, Any]:
    ranks = {module: factors.a.shape[0] for module, factors in modules.items()}
    alphas = {module: factors.scale * ranks[module] for module, factors in modules.items()}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    return {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': base_model,
        'bias': 'none',
        'inference_mode': True,
        'r': rank,
        'lora_alpha': alpha,
        'lora_dropout': 0.0,
        'use_rslora': False,
        'fan_in_fan_out': any(source.transposed for leaf in _kernel_leaves(cfg) for source in leaf.sources),
        'target_modules': _targets(modules, cfg),
        'rank_pattern': {module: own for module, own in ranks.items() if own != rank},
        'alpha_pattern': {module: own for module, own in alphas.items() if not math.isclose(own, alpha, rel_tol=1e-12)},
    }


def _targets(modules: Mapping[str, Any], cfg: ModelConfig) -> list[str]:
    """The shortest names: the last word of a module where all modules that end so are adapted, else the whole name."""
    everywhere = {_module(source) for leaf in _kernel_leaves(cfg) for source in leaf.sources}
    targets = set()
    for module in modules:
        last = module.rsplit('.', 1)[-1]
        alike = {other for other in everywhere if other.endswith(f'.{last}')}
        targets.add(last if alike <= set(modules) else module)
    return sorted(targets)


def _kernel_leaves(cfg: ModelConfig) -> Iterator[Leaf]:
    return (
        leaf
        for leaf in leaves(cfg)
        if leaf.path[0] == 'layers' and leaf.role == 'kernel' and 'experts' not in leaf.path
    )


def _name(leaf: Leaf) -> str:
    keys = (jax.tree_util.SequenceKey(key) if isinstance(key, int) else jax.tree_util.DictKey(key) for key in leaf.path)
    return path_of(tuple(keys))


def _module(source: Source) -> str:
    return source.name.removesuffix('.weight')
