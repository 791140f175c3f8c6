"""What every recipe costs a model: size, perplexity and divergence from the original on held-out text, time to make it.

    python benchmarks/quantize_recipes.py --rows=64 --json

All formats of jpt/quant/formats.py with scales of the largest values, the recipes of jpt/quantization/named.py, the
parts these are made of, and keys and values in eight bits. The model is computed in float32, so what is measured is the
quantization alone. `bits` counts scales and factors of the quantized matrices, the worst signal over noise is that of
the output of one layer on the calibration text. --model takes another model, --calibration and --held_out other text,
--only some of the recipes.
"""

import argparse
import json
import time
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from timing import machine

import jpt
from jpt.data.batch import Batch
from jpt.data.config import TextConfig
from jpt.evaluation.text import batches_from
from jpt.model import Model
from jpt.quant.formats import FORMATS
from jpt.quant.recipes import EVERYTHING, recipe_of
from jpt.quant.tensors import QTensor
from jpt.quantization.named import NAMED, Named
from jpt.quantization.run import Quantized, quantize_model
from jpt.quantization.settings import CACHES, CalibrationConfig, KVCache

PARTS = {
    'fp8_tensor, percentile': Named('fp8_tensor', CalibrationConfig(inputs='percentile')),
    'int8_tensor, percentile': Named('int8_tensor', CalibrationConfig(inputs='percentile')),
    'int8_tensor, SmoothQuant, alpha 0.7': Named('int8_tensor', CalibrationConfig(factors='smoothquant', alpha=0.7)),
    'int8_tensor, SmoothQuant, alpha 1': Named('int8_tensor', CalibrationConfig(factors='smoothquant', alpha=1.0)),
    'int4_weights, MSE': Named('int4_weights', CalibrationConfig(weights='mse')),
    'int4_weights, AWQ alone': Named('int4_weights', CalibrationConfig(factors='awq')),
    'nvfp4, MSE': Named('nvfp4', CalibrationConfig(weights='mse')),
    'nvfp4, AWQ alone': Named('nvfp4', CalibrationConfig(factors='awq')),
    'nvfp4, AWQ, weighted MSE': Named('nvfp4', CalibrationConfig(factors='awq', weights='weighted_mse')),
}
RECIPES = {name: Named(name) for name in FORMATS} | NAMED | PARTS
WITH_CACHE: dict[str, tuple[str | None, KVCache]] = {  # a recipe of weights or none, and how keys and values are kept
    'fp8_kv': (None, CACHES['fp8_kv']),
    'fp8_kv_cast': (None, CACHES['fp8_kv_cast']),
    'fp8_block, fp8_kv': ('fp8_block', CACHES['fp8_kv']),
}


def bits_of(params: Any) -> float:
    """Bits of an element of the quantized matrices, all that comes with them included."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    tensors = [leaf for leaf in leaves if isinstance(leaf, QTensor)]
    held = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(tensors))
    return 8 * held / sum(np.prod(tensor.shape) for tensor in tensors)


def row_of(made: Quantized, seconds: float) -> dict[str, float]:
    """The measures of a quantized model; those of matrices where some are quantized."""
    told = made.models[1]
    found = {'perplexity': told.perplexity, 'kl': told.kl, 'agreement': told.agreement, 'seconds': seconds}
    if not made.layers:
        return found
    return found | {
        'bits': float(bits_of(made.model.params)),
        'error': float(np.mean([layer.error for layer in made.layers])),
        'snr': min(layer.snr for layer in made.layers if layer.snr is not None),
    }


def measured(model: Model, names: list[str], batches: tuple[list[Batch], list[Batch]]) -> dict[str, dict[str, float]]:
    """The measures of every recipe, and the perplexity of the original."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        weights, cache = WITH_CACHE.get(name, (name, 'as_it_is'))
        form, how = RECIPES[weights] if weights else (None, CalibrationConfig())
        start = time.monotonic()
        made = quantize_model(model, recipe_of([(EVERYTHING, form)]), *batches, how, kv_cache=cache)
        found.setdefault('original', {'perplexity': made.models[0].perplexity})
        found[name] = row_of(made, time.monotonic() - start)
        print(f'{name}: {found[name]}', flush=True)
    return found


def show(found: dict[str, dict[str, float]], console: Console) -> None:
    """A row per recipe."""
    names = 'recipe', 'bits', 'perplexity', 'KL', 'same top word, %', 'weight error, %', 'worst SNR, dB', 'seconds'
    table = Table(*names, box=box.MARKDOWN)
    for name, row in found.items():
        if name == 'original':
            table.add_row(name, '32', f'{row["perplexity"]:.3f}', '0', '100', '0', '', '')
            continue
        forms = {'bits': '.2f', 'perplexity': '.3f', 'kl': '.5f', 'agreement': '.2%', 'error': '.2%', 'snr': '.1f'}
        cells = [format(row[key], how).rstrip('%') if key in row else '' for key, how in forms.items()]
        table.add_row(name, *cells, f'{row["seconds"]:.0f}')
    console.print(table)


def main() -> None:
    """Runs all and prints the table, and with --json one line of JSON at the end."""
    names = [*RECIPES, *WITH_CACHE]
    parser = argparse.ArgumentParser(description='Every recipe of quantization on one model.')
    parser.add_argument('--model', default='quickstart')
    parser.add_argument('--calibration', default='stdlib:train')
    parser.add_argument('--held_out', default='stdlib:held_out')
    parser.add_argument('--rows', type=int, default=64, help='to calibrate on, and to measure on')
    parser.add_argument('--length', type=int, default=0, help='tokens of a row; 0: as the model has')
    parser.add_argument('--only', nargs='+', choices=names, default=names)
    parser.add_argument('--json', action='store_true')
    options = parser.parse_args()
    model = jpt.load(options.model, dtype='float32')
    sizes = {'rows': options.rows, 'length': options.length}
    text = TextConfig.of_files(options.calibration, options.held_out, **sizes)
    batches = batches_from(model, text)
    found = measured(model, options.only, batches)
    console = Console(width=160)
    console.print(f'{machine()}; {options.model}, {options.rows} rows of text')
    show(found, console)
    if options.json:
        print(json.dumps({'benchmark': 'quantize_recipes', 'machine': machine(), 'recipes': found}))


if __name__ == '__main__':
    main()
