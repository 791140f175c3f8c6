"""What a quantization can be told: the dataclasses behind `python -m jpt.quantize --config=...`."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from jpt.checkpoint.shards import parse_size
from jpt.config import ConfigError, require
from jpt.data.config import TextConfig
from jpt.quant.formats import FORMATS
from jpt.quant.recipes import EVERYTHING, KEEP, NUMBERED, Recipe, recipe_of
from jpt.sharding.mesh import MeshConfig

# 'fp8': E4M3 with a scale that takes the largest |x| of a layer to 448; 'fp8_cast': with 1, as ModelOpt's fp8_cast.
KVCache = Literal['as_it_is', 'fp8', 'fp8_cast']
CACHES: dict[str, KVCache] = {'fp8_kv': 'fp8', 'fp8_kv_cast': 'fp8_cast'}  # as configs/quantize.py calls them


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """How scales are chosen: of inputs where a format wants them beforehand, of weights, and what is moved between."""

    # A static scale of inputs is that of the largest |x|, or of what `percentile` of 100 elements do not exceed.
    inputs: Literal['max', 'percentile'] = 'max'
    percentile: float = 99.99
    # A scale of weights is that of the largest |w| of a block, or of the multiple of it with the least squares of
    # errors; these plain, or each times the mean square of the input that it meets (jpt/quant/amax_search.py).
    weights: Literal['max', 'mse', 'weighted_mse'] = 'max'
    # What inputs are multiplied by and weights divided by (jpt/quant/input_factors.py). 'awq' goes through the
    # calibration text a dozen times.
    factors: Literal['none', 'smoothquant', 'awq'] = 'none'
    alpha: float = 0.5  # of SmoothQuant: 1 moves all differences between channels of inputs into the weights

    def __post_init__(self) -> None:
        require(self, 'percentile', 0 < self.percentile <= 100, 'more than 0 and at most 100')
        require(self, 'alpha', 0 <= self.alpha <= 1, 'a number from 0 to 1')


@dataclasses.dataclass(frozen=True)
class AutoConfig:
    """A format per layer and group of weights, by what each would cost the model (jpt/quantization/auto.py)."""

    # What may be chosen: names of formats, and 'none' for weights as they are. Empty: the recipe is taken as it is;
    # else it says which weights are chosen for.
    formats: tuple[str, ...] = ()
    bits: float = 6.0  # of a weight on average, scales included, weights that stay as they are counted as they are
    score: Literal['gradient', 'kl'] = 'gradient'  # a backward pass per format, or a forward pass per format and group
    seed: int = 0  # of the words that 'gradient' draws from the model

    def __post_init__(self) -> None:
        known = {*FORMATS, KEEP}
        for name in self.formats:
            require(self, 'formats', name in known, f'some of {", ".join((*FORMATS, KEEP))}')
        require(self, 'formats', len(set(self.formats)) == len(self.formats), 'each name once')
        require(self, 'formats', self.formats != (KEEP,), f'a format beside {KEEP!r}')
        require(self, 'bits', self.bits > 0, 'more than 0')


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """A model, a recipe, and the text that says what the recipe costs."""

    model: str = 'quickstart'  # a Hugging Face directory or a jpt checkpoint; 'quickstart' is the one that jpt ships
    dtype: str | None = None  # cast the weights first; also what a quantized model is taken back to
    # Pairs of a pattern over weights (jpt/quant/paths.py) and a format (jpt/quant/formats.py) or 'none'; the last pair
    # that covers a weight holds for it.
    recipe: tuple[tuple[str, str], ...] = ((EVERYTHING, 'fp8_block'),)
    calibration: CalibrationConfig = CalibrationConfig()
    auto: AutoConfig = AutoConfig()
    # Of keys and values; where they are quantized, a recipe may leave all weights as they are.
    kv_cache: KVCache = 'as_it_is'
    # Where the model lies: weights as in training, but the stages of `pipe` take turns; None: on one device.
    mesh: MeshConfig | None = None
    to: Literal['hf', 'jpt'] = 'jpt'  # what is written: a Hugging Face directory or a jpt checkpoint
    text: TextConfig = dataclasses.field(default_factory=TextConfig)  # what calibrates and measures
    # From files to files, a piece of a weight in memory at a time: for a model larger than memory. No text is read and
    # nothing is calibrated but scales of weights.
    stream: bool = False
    max_shard_size: str = '5GB'  # largest safetensors file, where a Hugging Face directory is written

    def __post_init__(self) -> None:
        try:
            self.choices()
        except ValueError as error:
            raise ConfigError(type(self).__name__, 'recipe', self.recipe, str(error)) from error
        try:
            parse_size(self.max_shard_size)
        except ValueError as error:
            raise ConfigError(type(self).__name__, 'max_shard_size', self.max_shard_size, str(error)) from error
        default = type(self)
        if self.to != 'hf':
            require(self, 'max_shard_size', self.max_shard_size == default.max_shard_size, "its default, or to='hf'")
        if not self.auto.formats:
            require(self, 'auto', self.auto == AutoConfig(), 'auto.formats, of which one is chosen, or all defaults')
        if self.stream:
            self._check_stream()

    def _check_stream(self) -> None:
        """Whether every setting has an effect where no text is read."""
        how, default = self.calibration, CalibrationConfig()
        wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
            'kv_cache': (self.kv_cache, ('as_it_is',)),
            'auto.formats': (self.auto.formats, ((),)),
            'mesh': (self.mesh, (None,)),
            'calibration.factors': (how.factors, ('none',)),
            'calibration.inputs': (how.inputs, ('max',)),
            'calibration.weights': (how.weights, ('max', 'mse')),
            'calibration.percentile': (how.percentile, (default.percentile,)),
            'calibration.alpha': (how.alpha, (default.alpha,)),
        }
        numbers = [pattern for pattern, _ in self.recipe if pattern.startswith(NUMBERED)]
        require(self, 'recipe', not numbers, 'patterns without numbers of layers with stream=True')
        usual = dict(_leaves(TextConfig(), 'text'))
        wanted |= {name: (value, (usual[name],)) for name, value in _leaves(self.text, 'text')}
        for name, (value, allowed) in wanted.items():
            if value not in allowed:
                expected = f'{" or ".join(map(repr, allowed))} with stream=True, which reads no text'
                raise ConfigError(type(self).__name__, name, value, expected)

    def choices(self) -> Recipe:
        """The recipe."""
        return recipe_of([(pattern, None if name == KEEP else name) for pattern, name in self.recipe])


def _leaves(config: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The settings of a dataclass and of those within it, by name."""
    for field in dataclasses.fields(config):
        name, value = f'{place}.{field.name}', getattr(config, field.name)
        yield from _leaves(value, name) if dataclasses.is_dataclass(value) else ((name, value),)
