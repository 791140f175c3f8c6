"""What jpt knows of a family of models: how its config.json is read and written, and how its tensors are named."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from jpt.models.config import ModelConfig
from jpt.models.families.dialect import Dialect
from jpt.models.families.fields import Fields


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type of Hugging Face.

    `completed` corrects a model by the names of the tensors that a checkpoint has, where configs leave a part unsaid.
    """

    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    dialect: Dialect
    completed: Callable[[ModelConfig, Collection[str]], ModelConfig] = lambda cfg, names: cfg
