"""Windows: the next stretch of the global order, read, tokenized and packed into rows.

Every host computes every window, so that all agree on the rows without talking; it makes arrays of its own rows only.
Of indexed token files a window reads the index alone; text is tokenized on every host.
"""

import collections
import dataclasses
import datetime
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jpt.data.alignment import SecondReader
from jpt.data.blend import Order, derive_seed, permutation
from jpt.data.chat import ChatTokens, RenderedChat, encode_rendered, render_chat
from jpt.data.config import DataConfig
from jpt.data.packing import PACKINGS, Row, cut_to_fill
from jpt.data.records import Chat, DataError, Record, Routed, check_unicode
from jpt.data.sources import Source
from jpt.data.tokenizer import Tokenizer

BLOCK = 256  # documents whose sizes are looked up at once
MOST_DOCUMENTS = 1 << 16  # in a window, however short they are
FORMAT = 1  # counts up when a change of this package changes which token stands where
# What happens to documents; counted, and reported by Pipeline.progress().
COUNTS = ('skipped', 'empty', 'split', 'truncated', 'dropped')

_Chats = list[RenderedChat]  # of a conversation by the student's template, and by its teacher's where that reads too


class Window(NamedTuple):
    """Packed rows, and the documents that their pieces point into.

    end, taken: where the next window begins (see Order). counts: how many documents each of COUNTS happened to.
    """

    rows: list[Row]
    documents: list[ChatTokens]
    places: list[tuple[int, int]]  # of each document: source, and index in it
    routes: list[int]  # of each document: the number of its teacher, 0 where data have no routes
    end: int
    taken: list[int]
    counts: dict[str, int]


class WindowReader:
    """Reads any window of the global order, given where it begins."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        sources: Sequence[Source],
        *,
        seq_len: int,
        seed: int,
        evaluate: bool = False,
        second: SecondReader | None = None,
        routes: Sequence[str] = (),
    ):
        """evaluate: the order of the files, without weights. second: reads every text with a teacher's tokenizer too.
        routes: what config.route_key may say, by number.

        Raises ValueError where a source is empty, weights do not match, the tokenizer lacks what the config wants, or
        there are routes without a key or a key without routes.
        """
        empty = [source.name for source in sources if not len(source)]
        if empty and (config.weights or len(empty) == len(sources)):
            raise ValueError(f'data: {", ".join(empty)} has no records')
        if not sources:
            raise ValueError('DataConfig.paths is empty: name at least one file')
        if config.weights and len(config.weights) != len(sources):
            raise ValueError(f'DataConfig.weights={config.weights!r}: expected one for each of {len(sources)} sources')
        self.config, self.tokenizer, self.sources, self.seq_len = config, tokenizer, sources, seq_len
        self.second = second
        if second is not None and (ready := [source.name for source in sources if source.tokenized]):
            raise ValueError(
                f'data: {", ".join(ready)} holds token ids, but a teacher with another tokenizer '
                '(config.distill.alignment) must read the text: expected text'
            )
        if bool(routes) != bool(config.route_key):
            raise ValueError(
                f'DataConfig.route_key={config.route_key!r}: expected a key where there are routes: '
                f'{", ".join(routes) or "none"}'
            )
        self._routes = {name: number for number, name in enumerate(routes)}
        self._shuffle, self._seed = config.shuffle and not evaluate, seed
        weights = None if evaluate else config.weights or None
        self.order = Order([len(source) for source in sources], weights, seed, self._shuffle)
        self._bos = tokenizer.adds_bos if config.add_bos is None else config.add_bos
        day = datetime.datetime.fromisoformat(config.chat_date)
        readers = [tokenizer] if second is None else [tokenizer, second.tokenizer]
        self._templates = [(each, each.chat_template(now=day)) for each in readers] if config.is_chat else []

    def read(self, position: int, taken: Sequence[int]) -> Window:
        """The window that begins at `position` of the order, in which source i gave taken[i] documents before."""
        source, index = self._extent(position, taken)
        counts: collections.Counter[str] = collections.Counter(dict.fromkeys(COUNTS, 0))
        documents, places, routes = self._documents(source, index, counts)
        lengths = [self._length(document, place, counts) for document, place in zip(documents, places, strict=True)]
        rows = PACKINGS[self.config.packing](lengths, self.seq_len)
        rows = cut_to_fill(rows, self.seq_len, self.config.cut_until)
        counts['split'] = len({piece.document for row in rows for piece in row if piece.start})
        if self._shuffle:  # best fit puts long documents first
            rows = [rows[i] for i in permutation(len(rows), derive_seed('rows', self._seed, position))]
        given = np.asarray(taken) + np.bincount(source, minlength=len(self.sources))
        return Window(rows, documents, places, routes, position + len(source), given.tolist(), dict(counts))

    def fingerprint(self) -> dict[str, Any]:
        """Whatever decides which token stands where; equal for pipelines that give the same rows."""
        config = dataclasses.asdict(self.config)
        for name in ('paths', 'prefetch'):  # content counts, not where it lies
            del config[name]
        if not self._routes:  # a place in data without routes is one of before there were any
            del config['route_key']
        templates = [hashlib.sha256(own.source.encode()).hexdigest()[:16] for _, own in self._templates]
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in config.items()},
            'sources': [source.fingerprint() for source in self.sources],
            'tokenizer': self.tokenizer.fingerprint(),
            'chat_template': '+'.join(templates),
            'format': FORMAT,
            'seq_len': self.seq_len,
            'seed': self._seed,
            'shuffle': self._shuffle,
            'weights': list(self.order.weights or ()),
            **({} if self.second is None else {'teacher': self.second.fingerprint()}),
            **({'routes': sorted(self._routes)} if self._routes else {}),
        }

    def _extent(self, position: int, taken: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The documents from `position` on whose estimated tokens make window_rows rows, within the epoch."""
        budget = self.config.window_rows * self.seq_len
        left = min(self.order.epoch_length - position % self.order.epoch_length, MOST_DOCUMENTS)
        given = np.asarray(taken)
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        while left and budget > 0:
            source, index = self.order.block(position, min(left, BLOCK), given.tolist())
            sizes = np.zeros(len(source), np.int64)
            for s in np.unique(source):
                sizes[source == s] = self.sources[s].sizes(index[source == s])
            before = np.cumsum(sizes) - sizes
            count = int(np.searchsorted(before, budget))  # at least one, as before[0] is 0
            source, index = source[:count], index[:count]
            parts.append((source, index))
            budget -= int(sizes[:count].sum())
            given = given + np.bincount(source, minlength=len(given))
            position, left = position + count, left - count
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _documents(
        self, source: np.ndarray, index: np.ndarray, counts: collections.Counter[str]
    ) -> tuple[list[ChatTokens], list[tuple[int, int]], list[int]]:
        records: list[str | Chat | _Chats | np.ndarray] = []
        places: list[tuple[int, int]] = []
        routes: list[int] = []
        for s, i in zip(source.tolist(), index.tolist(), strict=True):
            try:
                raw, route = self._routed(self.sources[s][i], s, i)
                place = self.sources[s].place(i) if self._templates else ''
                records.append(self._render(raw, place) if self._templates else raw)
                places.append((s, i))
                routes.append(route)
            except DataError as error:
                if self.config.malformed == 'error':
                    raise
                counts['skipped'] += 1
                _report(error)
        # Encoded together, on all cores.
        next_chat = iter(self._encode_chats([record for record in records if isinstance(record, list)]))
        next_text = iter(self._encode_texts([record for record in records if isinstance(record, str)]))
        documents = []
        for record, (s, i) in zip(records, places, strict=True):
            if isinstance(record, np.ndarray):
                if self.second is not None:
                    raise DataError(
                        self.sources[s].place(i),
                        'token ids, but a teacher with another tokenizer (config.distill.alignment) must read the '
                        'text: expected text',
                    )
                documents.append(_all_learned(record))
            else:
                documents.append(next(next_text if isinstance(record, str) else next_chat))
        return documents, places, routes

    def _routed(self, record: Record, source: int, index: int) -> tuple[str | Chat | np.ndarray, int]:
        """A record without its route, and the number of that; 0 where there are none."""
        given = record.route if isinstance(record, Routed) else None
        plain = record.record if isinstance(record, Routed) else record
        if not self._routes:
            return plain, 0
        if not isinstance(given, str) or given not in self._routes:
            key, place = self.config.route_key, self.sources[source].place(index)
            found = f'{key!r} is {given!r}' if given is not None else f'no teacher in {key!r}'
            raise DataError(place, f'{found}: expected one of {", ".join(self._routes)}')
        return plain, self._routes[given]

    def _encode_texts(self, texts: list[str]) -> list[ChatTokens]:
        if self.second is not None:
            read = self.second.read(texts, self._bos, self.config.add_eos)
            return [_all_learned(ids)._replace(reading=reading) for ids, reading in read]
        encoded = self.tokenizer.encode_batch(texts, bos=self._bos, eos=self.config.add_eos)
        return [_all_learned(ids) for ids in encoded]

    def _encode_chats(self, chats: list[_Chats]) -> list[ChatTokens]:
        found = encode_rendered(self.tokenizer, [ours for ours, *_ in chats])
        if self.second is None:
            return found
        readings = self.second.read_answers([(ours, theirs) for ours, theirs in chats], [len(x.ids) for x in found])
        return [chat._replace(reading=reading) for chat, reading in zip(found, readings, strict=True)]

    def _render(self, record: str | Chat | np.ndarray, place: str) -> _Chats:
        """A conversation as the student's template writes it, and the teacher's where it has another tokenizer."""
        if not isinstance(record, Chat):
            raise DataError(place, "not a conversation, which kind='chat' needs")
        try:
            chats = [
                render_chat(tokenizer, template, record.messages, tools=record.tools)
                for tokenizer, template in self._templates
            ]
        except ValueError as error:  # also a TemplateError
            raise DataError(place, str(error)) from error
        if len({len(chat.answers) for chat in chats}) > 1:
            counts = ' and '.join(str(len(chat.answers)) for chat in chats)
            raise DataError(place, f'the templates of student and teacher mark {counts} answers: expected equally many')
        for chat in chats:
            check_unicode(chat.text, place)
        return chats

    def _length(self, document: ChatTokens, place: tuple[int, int], counts: collections.Counter[str]) -> int:
        """How many positions of the document are packed; 0 leaves it out."""
        length = len(document.ids) - 1
        if length < 1 or not document.loss[1:].any():
            counts['empty'] += 1
            return 0
        policy = self.config.long_policy
        if length <= self.seq_len:
            return length
        if policy == 'error':
            raise DataError(
                self.sources[place[0]].place(place[1]),
                f'{length + 1} tokens do not fit a row of seq_len={self.seq_len}; '
                "DataConfig.long_documents='truncate', 'drop' or 'split' would go on",
            )
        if policy == 'split':
            return length
        if policy == 'truncate' and document.loss[1 : self.seq_len + 1].any():
            counts['truncated'] += 1
            return self.seq_len
        counts['dropped'] += 1  # by policy, or because nothing that is learned would remain
        return 0


def _report(error: DataError) -> None:
    from absl import logging  # takes a while to import, and few need it

    logging.log_first_n(logging.WARNING, 'skipped: %s', 10, error)


def _all_learned(ids: Any) -> ChatTokens:
    ids = ids if isinstance(ids, np.ndarray) else np.array(ids, np.int32)  # a file's tokens stay where they are
    return ChatTokens(ids, np.broadcast_to(np.float32(1), ids.shape))
