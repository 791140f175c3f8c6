"""What is refused before a model is measured."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from jpt.kernels.expert_parallel import kernel_specs
from jpt.model import Model
from jpt.models.config import ModelConfig
from jpt.quant.formats import Format
from jpt.quant.tensors import quantize
from jpt.quantization.inputs import weights_of
from jpt.quantization.settings import CalibrationConfig, KVCache


def check_measurable(model: Model, formats: Mapping[str, Format], how: CalibrationConfig) -> None:
    """Raises ValueError for histograms of the inputs of experts, for formats of experts whose products shards of the
    mesh cannot make alone, and where a weight holds NaN or infinities, which codes would hide."""
    for path, form in formats.items():
        if 'experts' in path.split('/') and form.takes_input_scale and how.inputs == 'percentile':
            raise ValueError(
                f"calibration.inputs='percentile': {path}: there are no histograms by expert: expected 'max', or a "
                f'format whose inputs are rounded per token or block (fp8_channel_token, fp8_block), or not at all'
            )
    for path, weight in weights_of(model.params, formats).items():
        check_shards(path, weight, formats[path])
        if not bool(_finite(weight)):
            raise ValueError(f'{path}: holds NaN or infinities: expected finite weights')


def check_shards(path: str, weight: jax.Array, form: Format) -> None:
    """Raises ValueError where a shard of the mesh that is set would hold a part of what products of experts
    [R, E, out, in] need whole. (Of other weights the compiler gathers what is needed.)"""
    if 'experts' not in path.split('/'):
        return
    one = jax.ShapeDtypeStruct(weight.shape[1:], weight.dtype)
    scale = jax.ShapeDtypeStruct(weight.shape[1:2], jnp.float32) if form.takes_input_scale else None
    try:
        kernel_specs(path.split('/')[-2], jax.eval_shape(partial(quantize, form=form), one, input_scale=scale))
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


_finite = jax.jit(lambda weight: jnp.all(jnp.isfinite(weight)))


def check_cache(cfg: ModelConfig, kv_cache: KVCache, how: CalibrationConfig, alone: bool) -> None:
    """Raises ValueError where keys and values would be measured after another rounding of them, and for settings of
    weights where the cache `alone` is quantized."""
    if kv_cache != 'as_it_is' and cfg.kv_cache != 'as_computed':
        raise ValueError(
            f'kv_cache={kv_cache!r}: the model keeps its keys and values in {cfg.kv_cache} already: expected '
            f"'as_it_is', or the model as jpt.convert --ignore_kv_scales writes it"
        )
    if alone and how != CalibrationConfig():
        raise ValueError(f'calibration={how}: no weight is quantized: expected the defaults, which a cache has')
