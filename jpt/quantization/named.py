"""Recipes by name: one format for all layers, and how its scales are chosen."""

from typing import NamedTuple

from jpt.quant.formats import FORMATS
from jpt.quantization.settings import CalibrationConfig


class Named(NamedTuple):
    """A format of jpt.quant.formats and the calibration that goes with it."""

    format: str
    calibration: CalibrationConfig = CalibrationConfig()


# Formats by themselves have their own names, with scales of the largest values.
NAMED: dict[str, Named] = {
    'int8_sq': Named('int8_tensor', CalibrationConfig(factors='smoothquant')),
    'int4_awq': Named('int4_weights', CalibrationConfig(factors='awq', weights='weighted_mse')),
    'int4_mse': Named('int4_weights', CalibrationConfig(weights='weighted_mse')),
    'w4a8_awq': Named('w4a8', CalibrationConfig(factors='awq')),
    'nvfp4_mse': Named('nvfp4', CalibrationConfig(weights='weighted_mse')),
}


def named(name: str) -> Named:
    """The recipe of this name, or the format of this name and calibration as it is by default.

    Raises:
        ValueError: there is none.
    """
    if name not in NAMED and name not in FORMATS:
        raise ValueError(f'recipe {name!r}: expected one of {", ".join(NAMED)}, or of {", ".join(FORMATS)}')
    return NAMED.get(name) or Named(name)
