"""The number formats of quantized weights: what an element is, which elements share a scale, what becomes of inputs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

Element = Literal['e4m3', 'e2m1', 'int8', 'int4']
Scale = Literal['float32', 'power_of_two', 'e8m0', 'e4m3', 'e4m3_grid']
Inputs = Literal['as_they_are', 'tensor', 'token', 'block']


class ElementType(NamedTuple):
    """Of one element: its largest number, and how many bits it takes."""

    largest: float
    bits: int


ELEMENTS: dict[Element, ElementType] = {
    'e4m3': ElementType(448.0, 8),
    'e2m1': ElementType(6.0, 4),
    'int8': ElementType(127.0, 8),
    'int4': ElementType(7.0, 4),
}
SCALE_BITS: dict[Scale, int] = {'float32': 32, 'power_of_two': 32, 'e8m0': 8, 'e4m3': 8, 'e4m3_grid': 32}


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight [..., out, in] is stored: number = code * scale, with a scale per block of `rows` x `columns`.

    rows, columns: of a block, along out and in; 0 means all of them. Blocks at the edges may be smaller.
    scale: 'float32' is amax / largest, rounded once; 'power_of_two' the power of two at or above it, as float32; 'e8m0'
        the same in a byte; 'e4m3' is relative to a second, float32 scale of the whole weight (NVFP4). 'e4m3_grid' is
        'float32', and what code * scale gives is rounded once more, to E4M3 times a second, float32 scale of the whole
        weight, its amax / 448: 4-bit integers that are multiplied in eight bits (W4A8).
    inputs: what a linear layer makes of its input before the product: nothing; rounded with one scale known beforehand
        ('tensor'); with one scale per token ('token'), or per token and `input_columns` of them ('block'): in the
        weight's element, or in E4M3 with 'e4m3_grid'.
    input_columns: with inputs='block'; 0: as many as `columns`.

    Raises:
        ValueError: an unknown name, or fields that do not go together.
    """

    element: Element
    rows: int = 0
    columns: int = 0
    scale: Scale = 'float32'
    inputs: Inputs = 'as_they_are'
    input_columns: int = 0

    def __post_init__(self) -> None:
        for name, kind in (('element', Element), ('scale', Scale), ('inputs', Inputs)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f'format: {name}={getattr(self, name)!r}: expected one of {", ".join(get_args(kind))}')
        for name in ('rows', 'columns', 'input_columns'):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f'format: {name}={getattr(self, name)!r}: expected a number of at least 0 (0: all)')
        if self.scale == 'e4m3' and self.element != 'e2m1':
            raise ValueError(f"format: scale='e4m3' with element={self.element!r}: expected element='e2m1'")
        grid = self.scale == 'e4m3_grid'
        if grid and self.element != 'int4':
            raise ValueError(f"format: scale='e4m3_grid' with element={self.element!r}: expected element='int4'")
        if self.scale != 'float32' and self.element in ('int8', 'int4') and not grid:
            raise ValueError(f"format: scale={self.scale!r} with element={self.element!r}: expected scale='float32'")
        self._check_input_columns()
        if self.inputs != 'as_they_are' and self.element == 'int4' and not grid:
            raise ValueError(f"format: inputs={self.inputs!r} with element='int4': expected 'as_they_are'")
        if grid and self.inputs not in ('tensor', 'token'):
            raise ValueError(f"format: inputs={self.inputs!r} with scale='e4m3_grid': expected 'tensor' or 'token'")

    def _check_input_columns(self) -> None:
        if self.inputs == 'block' and not self.input_block:
            raise ValueError("format: inputs='block' with columns=0: expected the number of inputs that share a scale")
        if self.input_columns == self.columns:
            object.__setattr__(self, 'input_columns', 0)  # one way to say it
        if self.input_columns and (self.inputs != 'block' or self.scale not in ('float32', 'power_of_two')):
            raise ValueError(
                f'format: input_columns={self.input_columns} with inputs={self.inputs!r} and scale={self.scale!r}: '
                "expected inputs='block', and the scale 'float32' or 'power_of_two'"
            )

    @property
    def input_block(self) -> int:
        """How many inputs of a token share a scale with inputs='block'."""
        return self.input_columns or self.columns

    @property
    def largest(self) -> float:
        """The largest number of an element."""
        return ELEMENTS[self.element].largest

    @property
    def operand(self) -> Element:
        """The element in which a product is made, and inputs are rounded."""
        return 'e4m3' if self.scale == 'e4m3_grid' else self.element

    @property
    def has_second(self) -> bool:
        """Whether the whole weight has a second scale."""
        return self.scale in ('e4m3', 'e4m3_grid')

    @property
    def is_mx(self) -> bool:
        """Whether this is a format of OCP Microscaling: 32 neighbours along `in` share a power of two."""
        return (self.rows, self.columns, self.scale) == (1, 32, 'e8m0')

    @property
    def takes_input_scale(self) -> bool:
        """Whether inputs have a scale that calibration gives: of 'tensor', and the second one of E2M1 in blocks."""
        return self.inputs == 'tensor' or (self.inputs == 'block' and self.scale == 'e4m3')

    @property
    def packed(self) -> bool:
        """Whether a byte holds two elements, neighbours along `in`."""
        return ELEMENTS[self.element].bits == 4

    def scales_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight of this shape: [..., out / rows, in / columns], rounded up."""
        *lead, out, inner = shape
        return (*lead, -(-out // (self.rows or out)), -(-inner // (self.columns or inner)))

    def bits(self, shape: tuple[int, ...]) -> float:
        """Bits that an element takes, its share of the scales included."""
        out, inner = shape[-2:]
        one = self.scales_of((out, inner))
        second = 32 if self.has_second else 0
        return ELEMENTS[self.element].bits + (SCALE_BITS[self.scale] * one[0] * one[1] + second) / (out * inner)

    def check(self, shape: tuple[int, ...], place: str) -> None:
        """Whether a weight of this shape can have this format.

        Raises:
            ValueError: an odd number of inputs, of which two are to share a byte.
        """
        if len(shape) < 2 or 0 in shape:
            raise ValueError(f'{place}: shape {shape}: expected [..., out, in]')
        if self.packed and shape[-1] % 2:
            raise ValueError(f'{place}: {shape[-1]} inputs: expected an even number, two of which share a byte')


FORMATS: dict[str, Format] = {
    'fp8_tensor': Format('e4m3', inputs='tensor'),
    'fp8_channel_token': Format('e4m3', rows=1, inputs='token'),
    'fp8_block': Format('e4m3', 128, 128, inputs='block'),
    'fp8_block_ue8m0': Format('e4m3', 128, 128, scale='power_of_two', inputs='block'),
    'fp8_weights': Format('e4m3', rows=1),
    'fp8_block_weights': Format('e4m3', 128, 128),
    'mxfp8': Format('e4m3', 1, 32, scale='e8m0', inputs='block'),
    'nvfp4': Format('e2m1', 1, 16, scale='e4m3', inputs='block'),
    'nvfp4_weights': Format('e2m1', 1, 16, scale='e4m3'),
    'int8': Format('int8', rows=1, inputs='token'),
    'int8_tensor': Format('int8', rows=1, inputs='tensor'),
    'int8_weights': Format('int8', rows=1),
    'int4_weights': Format('int4', 1, 128),
    'w4a8': Format('int4', 1, 128, scale='e4m3_grid', inputs='tensor'),
}


def format_of(given: str | Format | Mapping[str, Any], place: str) -> Format:
    """A format by its name or its fields.

    Raises:
        ValueError: an unknown name, or fields that do not go together.
    """
    if isinstance(given, Format):
        return given
    if isinstance(given, str):
        if given not in FORMATS:
            raise ValueError(
                f'{place}: format {given!r}: expected one of {", ".join(FORMATS)}, or fields of Format (recipes that '
                'calibrate, as int8_sq does, are those of python -m jpt.quantize)'
            )
        return FORMATS[given]
    try:
        return Format(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{place}: {error}') from error


def name_of_format(form: Format) -> str:
    """The name of a format, or where it has none its element."""
    return next((name for name, known in FORMATS.items() if known == form), form.element)
