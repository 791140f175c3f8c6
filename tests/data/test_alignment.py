"""Two tokenizers on one text: positions against prefixes that are decoded, words against texts, rows of a pipeline."""

import itertools
import json
import pathlib

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from jpt.data.alignment import Reading, SecondReader, align, part
from jpt.data.config import DataConfig
from jpt.data.indexed import IndexedWriter
from jpt.data.pipeline import make_pipeline
from jpt.data.records import Chat, DataError
from jpt.data.sources import MemorySource
from jpt.data.tokenizer import Tokenizer
from jpt.data.words import shared_words, word_bytes

TEXTS = [
    'The cat sat on the mat.',
    'def add(a, b):\n    """Add é and ö."""\n    return a + b\n',
    'Thé wörld \n\n日本語 😀! and  more   spaces ',
    '\nfirst a line, then e\u0301 and 👩‍👩‍👧.',
    'a',
    ' a cat in space',
]
QUICKSTART = pathlib.Path(__file__).resolve().parents[2] / 'jpt' / 'assets' / 'quickstart_teacher'
SPLIT = '▁+t ▁t+h ▁th+e ▁+c ▁c+a ▁ca+t a+t a+n r+e u+r ur+n ▁+a ▁a+n 日+本'
MERGES = [tuple(pair.split('+')) for pair in SPLIT.split()]
PAIRS = list(itertools.permutations(['small', 'quickstart', 'pieces'], 2))
TURNS = (
    '{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}'
    '{% if add_generation_prompt %}[assistant] {% endif %}'
)


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
    """A tokenizer as SentencePiece has them: a space in front, '▁' for spaces, bytes where there is no piece."""
    letters = sorted({*'▁', *''.join(TEXTS), *'abc'} - {'ö', '😀', '\n', ' ', '👩'})
    vocab = {word: i for i, word in enumerate(['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))])}
    vocab |= {word: len(vocab) + i for i, word in enumerate([*letters, *map(''.join, MERGES)])}
    backend = Backend(models.BPE(vocab=vocab, merges=MERGES, unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    backend.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    )
    backend.add_special_tokens(['<unk>', '<s>', '</s>'])
    folder = tmp_path_factory.mktemp('pieces')
    backend.save(str(folder / 'tokenizer.json'))
    config = {'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': True, 'chat_template': TURNS}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    return Tokenizer.load(folder)


@pytest.fixture(scope='module')
def small(tokenizer_folder):
    """Three hundred byte-level words."""
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope='module')
def quickstart():
    return Tokenizer.load(QUICKSTART)


def places(tokenizer, text):
    """{characters read: tokens read} where a decoded prefix is one of the text, by decoding every one of them."""
    ids = tokenizer.encode(text)
    found = {}
    for count in range(len(ids) + 1):
        read = tokenizer.decode(ids[:count])
        if '\ufffd' not in read and text.startswith(read):
            found[len(read)] = count
    return found


def assert_aligned(student, teacher, texts=TEXTS):
    """Where both have read the same characters there is a position, and no other; in front of a text there is none."""
    reader = SecondReader(student, teacher, 8)
    first = int(teacher.adds_bos)
    for text, (ids, reading) in zip(texts, reader.read(texts, False, True), strict=True):
        assert ids == student.encode(text, eos=True)
        assert reading.ids.tolist() == teacher.encode(text, bos=teacher.adds_bos)
        ours, theirs = places(student, text), places(teacher, text)
        wanted = np.full(len(ids) - 1, -1)
        for read in (ours.keys() & theirs.keys()) - {0}:
            wanted[ours[read] - 1] = theirs[read] - 1 + first
        np.testing.assert_array_equal(reading.at, wanted, err_msg=text)
        assert reading.at[-1] == len(reading.ids) - 1  # both predict the end


@pytest.mark.parametrize('pair', PAIRS)
def test_positions_are_those_that_have_read_the_same_text(pair, request):
    assert_aligned(*(request.getfixturevalue(name) for name in pair))


def test_positions_and_words_of_published_tokenizers(shared_data):
    own = {name: Tokenizer.load(shared_data / 'tokenizers' / name) for name in ('gpt2', 'phi3', 'jpt-bpe-8k')}
    for student, teacher in itertools.permutations(own.values(), 2):
        assert_aligned(student, teacher)
    assert_words(own['jpt-bpe-8k'], own['phi3'])
    # Both have all bytes, and eight thousand of the first are mostly words of the second too.
    assert (shared_words(own['gpt2'], own['jpt-bpe-8k']) >= 0).sum() > 7000


def assert_words(student, teacher):
    """Shared words add the same text behind a letter; words that have none add a text that no other word adds."""
    table = shared_words(student, teacher)
    used = table[table >= 0]
    assert len(table) == teacher.vocab_size
    assert len(used) == len(set(used.tolist()))

    def added(tokenizer, index):
        anchor = tokenizer.encode('a')
        return tokenizer.decode([*anchor, index])[1:]

    texts = {added(student, i) for i in range(student.vocab_size) if i not in student.special_ids}
    for index, own in enumerate(table.tolist()):
        if index in teacher.special_ids:
            names = ('eos_token', 'bos_token', 'pad_token')
            assert own < 0 or (own, index) in [(student.role_id(name), teacher.role_id(name)) for name in names]
            continue
        text = added(teacher, index)
        if own >= 0:
            assert added(student, own) == text
        elif '\ufffd' not in text and not teacher.backend.id_to_token(index).startswith('<0x'):
            assert text not in texts, text
    assert table[teacher.eos_id] == student.eos_id


@pytest.mark.parametrize('pair', PAIRS)
def test_shared_words_add_the_same_text(pair, request):
    assert_words(*(request.getfixturevalue(name) for name in pair))


def test_single_bytes_are_shared_between_kinds_of_vocabularies(small, pieces):
    """'<0xE6>' is the byte-level letter of 0xE6; '<0x41>' is no one's where 'A' is a piece."""
    ours, theirs = word_bytes(small), word_bytes(pieces)
    table = shared_words(small, pieces)
    byte = theirs.index(b'\xe6')
    assert ours[table[byte]] == b'\xe6'
    letter, fallback = pieces.backend.token_to_id('T'), pieces.backend.token_to_id('<0x54>')
    assert ours[table[letter]] == b'T'
    assert table[fallback] == -1
    assert word_bytes(pieces)[pieces.backend.token_to_id('▁the')] == b' the'


def test_vocabularies_of_unknown_bytes_are_refused(tmp_path, small):
    vocab = {'[UNK]': 0, 'a': 1, '##a': 2}
    Backend(models.WordPiece(vocab=vocab, unk_token='[UNK]')).save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(ValueError, match='is a WordPiece model: expected a byte-level vocabulary'):
        SecondReader(small, Tokenizer.load(tmp_path), 8)
    marked = models.BPE(vocab={'a': 0, 'a</w>': 1}, merges=[], end_of_word_suffix='</w>')
    Backend(marked).save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(ValueError, match=r"has end_of_word_suffix='</w>': expected words without a mark"):
        SecondReader(small, Tokenizer.load(tmp_path), 8)


def test_a_space_that_a_tokenizer_adds_is_no_place_to_compare_words_at(small, pieces):
    """In front of a text and behind a special token '▁the' stands for 'the': there nothing is aligned."""
    texts = [*TEXTS, 'the cat</s>the cat']
    for student, teacher in ((small, pieces), (pieces, small)):
        for text, (ids, reading) in zip(texts, SecondReader(student, teacher, 8).read(texts, True, False), strict=True):
            assert ids == student.encode(text, bos=True)
            assert reading.at[0] == -1
    behind = len(pieces.encode('the cat</s>', bos=True)) - 1
    assert pieces.backend.id_to_token(ids[behind + 1]) == '▁the'
    assert reading.at[behind] == -1
    assert reading.at[behind + 1] >= 0


def test_tokens_of_no_character_and_within_one():
    """Of positions before the same character the last counts; -1 begins nowhere."""
    ours, theirs = np.array([0, 3, -1, 5, 7]), np.array([-1, 3, 3, 4, 5, 5, 9])
    assert align(ours, theirs).tolist() == [-1, 2, -1, 5, -1]
    assert align(np.array([3, 3, 5]), np.array([5, 3])[::-1]).tolist() == [-1, 0, 1]
    assert align(np.array([], int), theirs).tolist() == []
    assert align(ours, np.array([], int)).tolist() == [-1] * 5


def test_a_piece_is_read_from_its_first_common_place_and_as_far_as_there_is_room():
    reading = Reading(np.arange(10, 20, dtype=np.int32), np.array([0, -1, 2, -1, 5, 6, -1, 9], np.int32))

    def read(*given):
        ids, at = part(reading, *given)
        return ids.tolist(), at.tolist()

    assert read(0, 8, 99) == ([*range(10, 20)], [0, -1, 2, -1, 5, 6, -1, 9])
    assert read(0, 8, 6) == ([10, 11, 12, 13, 14, 15], [0, -1, 2, -1, 5, -1, -1, -1])
    # Before the student's token 3 the teacher is before its own: it reads on from there.
    assert read(3, 3, 99) == ([13, 14, 15, 16], [-1, 2, 3])
    # Before token 2 it is within one, and begins where that ends.
    assert read(2, 4, 99) == ([13, 14, 15, 16], [-1, -1, 2, 3])
    assert read(6, 1, 99) == ([], [-1])
    assert read(0, 3, 0) == ([], [-1, -1, -1])


TEXT = DataConfig(least_fill=0.0, prefetch=0)
DOCUMENTS = [
    f'The cat number {i} sat on {i * 7} mats; é 日本 and "{"ab" * (i % 9)}".\n' * (1 + i % 3) for i in range(24)
]


def feed_of(student, second, config=TEXT, records=DOCUMENTS, **options):
    options = {'batch_size': 4, 'seq_len': 48, 'num_epochs': 1, **options}
    return make_pipeline(config, student, sources=[MemorySource(records, 'texts')], second=second, **options)


@pytest.mark.parametrize('packing', ['best_fit', 'concat', 'none'])
@pytest.mark.parametrize('names', [('small', 'pieces'), ('pieces', 'quickstart')])
def test_rows_of_a_pipeline_read_the_same_text(packing, names, request):
    """Of every aligned position: what the teacher's segment has read ends what the student's has, and is no shorter
    than a token of it; by decoding both."""
    student, teacher = (request.getfixturevalue(name) for name in names)
    config = DataConfig(least_fill=0.0, prefetch=0, packing=packing)
    counted = total = 0
    for batch in feed_of(student, SecondReader(student, teacher, 40), config):
        own = batch.teacher
        assert own.tokens.shape == own.positions.shape == own.segment_ids.shape == (4, 40)
        for b, t in np.argwhere(own.at >= 0):
            at, segment = own.at[b, t], batch.segment_ids[b, t]
            assert own.segment_ids[b, at] == segment
            start, other = t - batch.positions[b, t], at - own.positions[b, at]
            ours = student.decode(batch.tokens[b, start : t + 1].tolist(), skip_special=True)
            theirs = teacher.decode(own.tokens[b, other : at + 1].tolist(), skip_special=True)
            assert ours.endswith(theirs.lstrip(' '))
            assert len(ours) - len(theirs) < 12
        counted += (own.at >= 0).sum()
        total += (batch.segment_ids > 0).sum()
        assert (own.at[batch.segment_ids == 0] == -1).all()
        assert (np.diff(own.at, axis=1)[(own.at[:, 1:] >= 0) & (own.at[:, :-1] >= 0)] > 0).all()
    assert counted > 0.3 * total


def test_hosts_and_a_place_that_is_gone_back_to(small, quickstart):
    def feed(length=40, **options):
        return feed_of(small, SecondReader(small, quickstart, length), seed=3, **options)

    alone, together = feed(), [feed(process_index=p, process_count=2) for p in range(2)]
    first = next(alone)
    state = json.loads(json.dumps(alone.get_state()))
    for batch in [first, *alone]:
        for whole, *halves in zip(batch.teacher, *(next(own).teacher for own in together), strict=True):
            np.testing.assert_array_equal(np.concatenate(halves), whole)
    again = feed()
    again.set_state(state)
    *_, last = again
    for found, wanted in zip(last.teacher, batch.teacher, strict=True):
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match=r"saved with teacher=\{'tokenizer'"):
        feed(41).set_state(state)
    with pytest.raises(ValueError, match='but this run has teacher=None'):
        feed_of(small, None, seed=3).set_state(state)


def test_tokens_without_their_text_are_refused(small, quickstart, tmp_path):
    reader = SecondReader(small, quickstart, 40)
    with IndexedWriter(tmp_path / 'x', vocab_size=300) as writer:
        writer.add([1, 2, 3])
    config = DataConfig((str(tmp_path / 'x'),))
    with pytest.raises(ValueError, match=r'data: .*x\.bin holds token ids, but a teacher with another tokenizer'):
        make_pipeline(config, small, batch_size=1, seq_len=4, second=reader)
    with pytest.raises(DataError, match=r'texts\[\d\]: token ids, but a teacher with another tokenizer'):
        next(feed_of(small, reader, records=[np.arange(9, dtype=np.int32)] * 3))


CHATS = [
    Chat(
        [
            {'role': 'user', 'content': f'How many cats? {i}'},
            {'role': 'assistant', 'content': f'The cats are {i}, é 日本.'},
            {'role': 'user', 'content': 'And the mats?'},
            {'role': 'assistant', 'content': 'None.'},
        ]
    )
    for i in range(5)
]


def test_conversations_are_aligned_within_answers(small, pieces):
    """Each by its own template: what both have read of the answer is the same, and at its end both predict an end."""
    config = DataConfig(kind='chat', prefetch=0, shuffle=False, packing='none')
    reader = SecondReader(small, pieces, 120)
    batch = next(feed_of(small, reader, config, CHATS, seq_len=160))
    own, ends = batch.teacher, 0
    for b in range(4):
        ours, theirs = (x.tolist() for x in (batch.tokens[b], own.tokens[b]))
        assert '[assistant] The cats' in pieces.decode(theirs)
        aligned = np.flatnonzero(own.at[b] >= 0)
        assert len(aligned) > 10
        for t in aligned:
            at = own.at[b, t]
            read = small.decode(ours[: t + 1]).rpartition('assistant\n')[2]
            assert pieces.decode(theirs[: at + 1]).rpartition('[assistant] ')[2].strip() == read.strip()
            assert batch.loss_mask[b, t] == 1
            if batch.targets[b, t] == small.eos_id:
                ends += 1
                assert at + 1 == (own.segment_ids[b] > 0).sum() or theirs[at + 1] == pieces.eos_id
    assert ends == 8
