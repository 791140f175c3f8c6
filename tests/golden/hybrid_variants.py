"""Golden models with state-space layers: Mamba-2, and Nemotron-H with and without experts."""

from variant import Variant

HYBRID_VARIANTS: tuple[Variant, ...] = ()
