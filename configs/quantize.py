"""Quantize a model: all linear layers in one format, or each pattern in its own.

    python -m jpt.quantize --config=configs/quantize.py:MODEL,FORMAT --output=out/small

MODEL is a Hugging Face directory, a jpt checkpoint or 'quickstart'; FORMAT a name of jpt/quant/formats.py, fp8_block by
default. Some weights otherwise: --config.recipe="(('layers/**', 'nvfp4'), ('layers/**/down', 'fp8_block'))", where the
last pair that covers a weight holds, and 'none' leaves weights as they are. Text of yours:
--config.text.calibration=train.jsonl --config.text.held_out=held_out.jsonl. See docs/quantize.md.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.quant.recipes import EVERYTHING
from jpt.quantization.settings import QuantizeConfig


def get_config(options: str = 'quickstart') -> ConfigDict:
    """Settings, from 'MODEL' or 'MODEL,FORMAT'."""
    model, _, name = options.partition(',')
    return config_dict(QuantizeConfig, {'model': model, 'recipe': ((EVERYTHING, name or 'fp8_block'),)})
