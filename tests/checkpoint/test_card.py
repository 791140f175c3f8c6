"""The card of an exported model, and what of its source's card it keeps."""

from pathlib import Path

from jpt.checkpoint.assets import copy_companions
from jpt.checkpoint.card import model_card
from jpt.models.config import LayerKind, ModelConfig, Rope, Segment

CFG = ModelConfig('llama', 31, 8, 2, 1, 4, (Segment((LayerKind(Rope(), None, 16),), 2),), 32)
FRONT = '---\nlicense: llama3.1\nlanguage:\n- en\n---\n'


def written(source: Path | None = None) -> str:
    return model_card(CFG, 'bfloat16', source)


def test_a_card_without_a_source_says_what_the_model_is(tmp_path):
    for source in (None, tmp_path):  # the second has no card
        card = written(source)
        assert card.startswith('---\nlibrary_name: transformers\n')
        assert '# llama with 1,688 parameters' in card
        assert '2 layers, width 8' in card
        assert 'made from' not in card


def test_licence_and_text_of_the_source_stay(tmp_path):
    (tmp_path / 'README.md').write_text(FRONT + '# Some model\n\nTrained --- carefully.\n')
    card = written(tmp_path)
    assert card.startswith(FRONT)
    assert '1,688 parameters' in card
    assert card.endswith('made from\n\n# Some model\n\nTrained --- carefully.\n')
    assert card.count('\n---\n') == 1


def test_a_second_export_says_nothing_twice(tmp_path):
    first, second = tmp_path / 'first', tmp_path / 'second'
    for directory in (first, second):
        directory.mkdir()
    (first / 'README.md').write_text(FRONT + '# Some model\n')
    card = written(first)
    (second / 'README.md').write_text(card)
    copy_companions(second, second, tmp_path / 'assets')  # as into a jpt checkpoint
    assert written(tmp_path / 'assets') == card
    (second / 'README.md').write_text(written())
    assert written(second) == written()


def test_a_card_without_metadata_gets_some(tmp_path):
    (tmp_path / 'README.md').write_text('Just text.\n')
    assert written(tmp_path).startswith('---\nlibrary_name: transformers\n')
    assert written(tmp_path).endswith('\n\nJust text.\n')


def test_the_card_beside_a_tokenizer_does_not_travel(tmp_path):
    tokenizer, base = tmp_path / 'tokenizer', tmp_path / 'base'
    for directory, text in ((tokenizer, 'of the tokenizer'), (base, 'of the base')):
        directory.mkdir()
        (directory / 'README.md').write_text(text)
        (directory / 'config.json').write_text(text)
    for origin, card in ((None, None), (base, 'of the base')):
        target = tmp_path / f'assets of {card}'
        copy_companions(tokenizer, origin, target)
        assert (target / 'config.json').read_text() == 'of the tokenizer'
        assert ((target / 'README.md').read_text() if (target / 'README.md').exists() else None) == card
