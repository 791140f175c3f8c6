"""What the parts of a job must agree on before anything is trained, and a stop between its two runs."""

import dataclasses
import os
import signal
from types import SimpleNamespace

import pytest
from tiny import ARCHITECTURE, TOKENIZER, settings

from jpt.config import ConfigError
from jpt.training import loop, run
from jpt.training.run import check_models, check_teachers, run_job, train_model


@dataclasses.dataclass
class Tokens:
    vocab_size: int
    source: str = 'folder'


def job(length, learned):
    cfg = SimpleNamespace(vocab_size=100, max_length=64, learned_positions=learned)
    batch = SimpleNamespace(length=length)
    return SimpleNamespace(
        models={'model': SimpleNamespace(cfg=cfg)},
        config=SimpleNamespace(batch=batch, named_teachers=dict),
        second=None,
    )


@pytest.mark.parametrize(
    ('length', 'learned'), [(64, True), (65, False)]
)  # rotary positions have no table to run out of
def test_what_fits(length, learned):
    check_models(job(length, learned), Tokens(100))


def test_ids_and_positions_without_an_embedding_are_named():
    with pytest.raises(ValueError, match=r'folder has ids up to 100: expected less than vocab_size=100 of the model'):
        check_models(job(64, True), Tokens(101))
    with pytest.raises(ValueError, match=r'config\.batch\.length=65: expected at most the 64 positions of the model'):
        check_models(job(65, True), Tokens(100))


@dataclasses.dataclass
class Words(Tokens):
    words: str = ''

    def fingerprint(self):
        return self.words


def test_a_teacher_with_other_words_is_refused(monkeypatch):
    """By its tokenizer; one that has none is taken at its word, and one with fewer words than the student's is not."""
    own = {'same': Words(100, words='a'), 'other': Words(100, words='b'), 'none': None}
    monkeypatch.setattr(run, 'open_model', lambda path: SimpleNamespace(assets=path))
    monkeypatch.setattr(run, 'open_tokenizer', own.get)
    distill = SimpleNamespace(alignment=None)
    config = SimpleNamespace(batch=SimpleNamespace(length=8), teacher=None, distill=distill)
    for name in own:
        config.named_teachers = lambda name=name: {'math': SimpleNamespace(path=name)}
        if name == 'other':
            with pytest.raises(
                ValueError, match=r'the math other has another tokenizer \(b\) than the student \(a, from'
            ):
                check_teachers(config, Words(100, words='a'))
        else:
            check_teachers(config, Words(100, words='a'))
    config.named_teachers = lambda: {'math': SimpleNamespace(path=None)}
    with pytest.raises(ValueError, match=r'config\.teachers\.math\.architecture: a teacher needs trained weights'):
        check_teachers(config, Words(100, words='a'))
    small = SimpleNamespace(cfg=SimpleNamespace(vocab_size=99, learned_positions=False))
    with pytest.raises(ValueError, match='expected less than vocab_size=99 of the math'):
        check_models(SimpleNamespace(models={'math': small}, config=config, second=None), Words(100, words='a'))
    # With an alignment it may have any words, and its table is to hold those.
    distill.alignment = object()
    config.named_teachers = lambda: {'math': SimpleNamespace(path='other')}
    check_teachers(config, Words(100, words='a'))
    second = SimpleNamespace(tokenizer=Words(98, words='b'), length=8)
    check_models(SimpleNamespace(models={'math': small}, config=config, second=second), Words(100, words='a'))


DISTILL = {
    'task': 'distill',
    'model': {'architecture': ARCHITECTURE},
    'teacher': {'path': str(TOKENIZER)},
    'compare': {'sample_tokens': 2},
}


def test_a_comparison_needs_held_out_text(tmp_path):
    with pytest.raises(ConfigError, match=r'compare=.*expected None, unless eval\.data\.paths names held-out text'):
        settings(tmp_path, **DISTILL, eval={})


def test_a_trace_ends_with_the_run_at_the_latest(tmp_path):
    assert settings(tmp_path, steps=4, log={'profile': (2, 4)}).log.profile == (2, 4)
    with pytest.raises(ConfigError, match=r'steps=4: expected at least 5, the last step of log\.profile'):
        settings(tmp_path, steps=4, log={'profile': (2, 5)})


def test_a_signal_during_the_last_save_is_obeyed_where_a_comparison_follows(tmp_path, monkeypatch):
    save = loop.CheckpointManager.save

    def save_and_signal(*args, **more):
        save(*args, **more)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.CheckpointManager, 'save', save_and_signal)
    config, workdir = settings(tmp_path, **DISTILL, steps=1, schedule={'lr': 1e-2}), tmp_path / 'run'
    with pytest.raises(loop.StoppedError):
        run_job(config, workdir)
    assert (workdir / 'checkpoints' / '1').is_dir()
    assert not (workdir / 'scratch').exists()
    train_model(config, workdir)  # nothing is left to train, so nothing to stop
