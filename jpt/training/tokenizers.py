"""The tokenizers of a job: the student's, and where its teacher reads text in tokens of its own, the teacher's."""

from pathlib import Path

from jpt.checkpoint.assets import open_tokenizer
from jpt.checkpoint.opening import open_model
from jpt.data.alignment import SecondReader
from jpt.data.tokenizer import Tokenizer
from jpt.training.settings import TrainConfig


def open_assets(config: TrainConfig) -> tuple[Tokenizer, Path]:
    """The tokenizer of a job and the directory that it lies in.

    Raises:
        ValueError: nothing names a tokenizer.
    """
    given = [config.tokenizer, config.model.path, *(teacher.path for teacher in config.named_teachers().values())]
    for path in given:
        if path is None:
            continue
        assets = Path(path) if path == config.tokenizer else open_model(path).assets
        tokenizer = open_tokenizer(assets)
        if tokenizer is not None and assets is not None:
            return tokenizer, assets
    raise ValueError('config.tokenizer=None: expected a directory with tokenizer.json, since no model here has one')


def open_second(config: TrainConfig) -> SecondReader | None:
    """What reads the job's texts for a teacher with another tokenizer; None where all read the same tokens.

    Raises:
        ValueError: a teacher without a tokenizer, or with that of the student, or words whose bytes are not known.
    """
    alignment = config.distill.alignment
    if alignment is None or config.teacher is None:
        return None
    if config.teacher.path is None:
        raise ValueError(
            'config.teacher.architecture: a teacher with another tokenizer (config.distill.alignment) needs that: '
            'expected config.teacher.path'
        )
    theirs = open_tokenizer(open_model(config.teacher.path).assets)
    if theirs is None:
        raise ValueError(
            f'config.distill.alignment: the teacher {config.teacher.path} has no tokenizer of its own: expected '
            'tokenizer.json beside its weights, or None where it has that of the student'
        )
    ours, _ = open_assets(config)
    if ours.fingerprint() == theirs.fingerprint():
        raise ValueError(
            f'config.distill.alignment: the student reads as the teacher does, with the tokenizer of {ours.source}: '
            'expected None, or config.tokenizer the directory of another one'
        )
    return SecondReader(ours, theirs, alignment.length or config.batch.length)
