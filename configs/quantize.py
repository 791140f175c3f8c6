"""Quantize a model: all linear layers in one format, or each pattern in its own.

    python -m jpt.quantize --config=configs/quantize.py:MODEL,RECIPE --output=out/small

MODEL is a Hugging Face directory, a jpt checkpoint or 'quickstart'; RECIPE a name of jpt/quantization/named.py (as
int8_sq or int4_awq) or of a format in jpt/quant/formats.py, fp8_block by default, or 'auto': of nvfp4, fp8_tensor
and none one per layer and group of weights, by what each costs (--config.auto.bits=5.5 --config.auto.score=kl).
MODEL,RECIPE,fp8_kv keeps keys and values in eight bits too, MODEL,fp8_kv nothing else (fp8_kv_cast: without scales).
Some weights otherwise: --config.recipe="(('layers/**', 'nvfp4'), ('layers/**/down', 'fp8_block'))", where the last pair
that covers a weight holds, and 'none' leaves weights as they are. Scales otherwise: --config.calibration.weights=mse
and its like, see jpt/quantization/settings.py. Text of yours: --config.text.calibration.paths=train.jsonl
--config.text.held_out.paths=held_out.jsonl, with all settings of config.data in training. See docs/quantize.md.
"""

import dataclasses

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.quant.recipes import EVERYTHING, KEEP
from jpt.quantization.named import named
from jpt.quantization.settings import CACHES, AutoConfig, KVCache, QuantizeConfig

AUTO = 'auto'


def get_config(options: str = 'quickstart') -> ConfigDict:
    """Settings, from 'MODEL' and, with commas between, a recipe and a name of the cache's."""
    model, *names = options.split(',')
    cache: KVCache = 'as_it_is'
    if names and names[-1] in CACHES:
        cache = CACHES[names.pop()]
    if len(names) > 1:
        raise ValueError(f'{options!r}: expected MODEL,RECIPE or MODEL,RECIPE,CACHE with one of {", ".join(CACHES)}')
    name = names[0] if names and names[0] else 'fp8_block'
    given = named('fp8_block' if name == AUTO else name)
    auto = AutoConfig(formats=('nvfp4', 'fp8_tensor', KEEP)) if name == AUTO else AutoConfig()
    settings = {'model': model, 'recipe': ((EVERYTHING, given.format),), 'kv_cache': cache}
    if cache != 'as_it_is' and not names:
        settings['recipe'] = ((EVERYTHING, KEEP),)
    parts = {'calibration': dataclasses.asdict(given.calibration), 'auto': dataclasses.asdict(auto)}
    return config_dict(QuantizeConfig, settings | parts)
