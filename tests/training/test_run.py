"""What a job and its tokenizer must agree on before anything is trained."""

import dataclasses
from types import SimpleNamespace

import pytest

from jpt.training.run import check_vocabulary


@dataclasses.dataclass
class Tokens:
    vocab_size: int
    source: str = 'folder'


def job(length, learned):
    cfg = SimpleNamespace(vocab_size=100, max_length=64, learned_positions=learned)
    batch = SimpleNamespace(length=length)
    return SimpleNamespace(models={'model': SimpleNamespace(cfg=cfg)}, config=SimpleNamespace(batch=batch))


@pytest.mark.parametrize(
    ('length', 'learned'), [(64, True), (65, False)]
)  # rotary positions have no table to run out of
def test_what_fits(length, learned):
    check_vocabulary(job(length, learned), Tokens(100))


def test_ids_and_positions_without_an_embedding_are_named():
    with pytest.raises(ValueError, match=r"folder has ids up to 100: expected less than the model's vocab_size=100"):
        check_vocabulary(job(64, True), Tokens(101))
    with pytest.raises(ValueError, match=r"config\.batch\.length=65: expected at most the model's 64 positions"):
        check_vocabulary(job(65, True), Tokens(100))
