"""What data a job reads and how it becomes rows."""

import dataclasses
import datetime

from jpt.config import require
from jpt.data.packing import PACKINGS
from jpt.data.records import Fields

KINDS = ('text', 'chat')
LONG = ('split', 'truncate', 'drop', 'error')
MALFORMED = ('error', 'skip')


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a job. Raises ValueError, naming the field, its value and what is allowed, when constructed."""

    paths: tuple[str, ...] = ()
    """Files, glob patterns, or stdlib:train; by suffix .txt .md .jsonl .ndjson (also .gz .xz), .parquet, .bin/.idx."""
    kind: str = 'text'
    """'text': documents, loss on every token. 'chat': conversations, loss on what the assistant says."""
    weights: tuple[float, ...] = ()
    """One per path: how often a document comes from it. Empty: every document once an epoch."""

    text_key: str = 'text'
    messages_key: str = 'messages'
    prompt_key: str = ''
    completion_key: str = ''
    """With kind 'chat', both given: a conversation of one question and answer, instead of messages_key."""
    separator: str = ''
    """Cuts plain text files into documents, such as '<|endoftext|>'. Empty: a file is a document."""
    route_key: str = ''
    """A field of every record that names one of config.teachers: that one alone teaches this record."""
    add_bos: bool | None = None
    """Of a text: a token in front. None: as the tokenizer does."""
    add_eos: bool = True
    """Of a text: a token at the end, with loss. Indexed tokens and conversations are taken as they are."""
    chat_date: str = '2024-07-26'
    """The day that chat templates show which write the date (Llama 3): a run must not depend on when it is resumed."""

    packing: str = 'best_fit'
    """'best_fit': whole documents side by side. 'concat': end to end, cut where a row ends. 'none': one to a row."""
    least_fill: float = 0.995
    """Of best_fit, for texts: where whole documents fill less of the rows than this, as few as needed are cut. 0: none.
    Conversations are never cut for it, nor texts where long_documents says that none is to be split."""
    long_documents: str = ''
    """What is longer than a row: 'split', 'truncate', 'drop' (all counted) or 'error'. Empty: split texts only."""
    malformed: str = 'error'
    """Records that cannot be used: 'error', or 'skip', which counts and reports them."""
    shuffle: bool = True
    window_rows: int = 512
    """About how many rows are packed together: more fill better, and take longer to begin with."""
    prefetch: int = 2
    """How many batches are made ahead in the background; 0 does everything when asked."""

    def __post_init__(self) -> None:
        def require(field: str, holds: bool, allowed: str) -> None:
            if not holds:
                raise ValueError(f'DataConfig.{field}={getattr(self, field)!r}: expected {allowed}')

        require('paths', all(isinstance(p, str) and p for p in self.paths), 'names of files or patterns')
        for field, values in (('kind', KINDS), ('packing', tuple(PACKINGS)), ('malformed', MALFORMED)):
            require(field, getattr(self, field) in values, f'one of {", ".join(values)}')
        require('long_documents', self.long_documents in ('', *LONG), f'one of {", ".join(LONG)}, or empty')
        positive = all(0 < weight < float('inf') for weight in self.weights)
        right = positive and (not self.weights or not self.paths or len(self.weights) == len(self.paths))
        require('weights', right, f'a positive number for each of the {len(self.paths)} paths, or none')
        pair = bool(self.prompt_key) == bool(self.completion_key)
        require('completion_key', pair, f'a key where prompt_key is given, and only there (it is {self.prompt_key!r})')
        require('packing', self.kind == 'text' or self.packing != 'concat', "best_fit or none with kind='chat'")
        splits = self.long_documents in ('', 'split') or self.packing != 'concat'
        require('long_documents', splits, "split, or empty, with packing='concat', which cuts every document")
        require('least_fill', 0 <= self.least_fill <= 1, 'a number from 0 to 1')
        require('window_rows', self.window_rows >= 1, 'at least 1')
        require('prefetch', self.prefetch >= 0, 'at least 0')
        try:
            datetime.date.fromisoformat(self.chat_date)
        except ValueError:
            require('chat_date', False, 'a day as YYYY-MM-DD')

    @property
    def is_chat(self) -> bool:
        """Whether records are conversations."""
        return self.kind == 'chat'

    @property
    def cut_until(self) -> float:
        """The share of the rows that must be filled; 0 where no document that fits a row may be cut."""
        may_cut = self.packing == 'best_fit' and not self.is_chat and self.long_policy == 'split'
        return self.least_fill if may_cut else 0.0

    @property
    def fields(self) -> Fields:
        """The keys of a record."""
        return Fields(self.text_key, self.messages_key, self.prompt_key, self.completion_key, self.route_key)

    @property
    def long_policy(self) -> str:
        """long_documents, with its default filled in."""
        return self.long_documents or ('error' if self.is_chat else 'split')


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """What calibrates a model and measures it, read as training reads its data. Raises ConfigError when constructed."""

    calibration: DataConfig = DataConfig(paths=('stdlib:train',))
    held_out: DataConfig = DataConfig(paths=('stdlib:held_out',))
    """For the loss and what is computed beside it."""
    rows: int = 128
    """How many of each, or all where there are fewer."""
    length: int = 0
    """Tokens of a row; 0: the model's own length, 1024 at most."""
    batch_size: int = 8
    """Rows at a time."""
    seed: int = 0
    """Of the order of the records."""

    def __post_init__(self) -> None:
        for name, least in (('rows', 1), ('batch_size', 1), ('length', 0), ('seed', 0)):
            require(self, name, getattr(self, name) >= least, f'{least} or more')
        for name in ('calibration', 'held_out'):
            require(self, name, not getattr(self, name).route_key, 'no route_key, since no teacher is asked')

    @classmethod
    def of_files(cls, calibration: str, held_out: str, **settings: int) -> 'TextConfig':
        """Texts of two files, or patterns; `settings`: the other fields."""
        return cls(DataConfig(paths=(calibration,)), DataConfig(paths=(held_out,)), **settings)
