"""The shape and dtype of what stands in for an array."""

import abc
from typing import Any


class Alike(abc.ABC):
    """What has the shape and dtype of an array, or of a weight, that it is made of."""

    @property
    @abc.abstractmethod
    def _like(self) -> Any:
        """That array or weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self._like.shape

    @property
    def ndim(self) -> int:
        return self._like.ndim

    @property
    def dtype(self) -> Any:
        return self._like.dtype
