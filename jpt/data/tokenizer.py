"""Text to token ids and back: the `tokenizers` package on the files of a Hugging Face model folder.

Read: tokenizer.json, or GPT-2's vocab.json and merges.txt; tokenizer_config.json, special_tokens_map.json and
chat_template.jinja where they are. Left out: SentencePiece models without a tokenizer.json.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jpt.data.template import ChatTemplate

# Every file of a model folder that says how its text becomes tokens.
TOKENIZER_FILES = (
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'vocab.json',
    'merges.txt',
    'tokenizer.model',
    'chat_template.jinja',
    'chat_template.json',
)
_NAMED = ('bos_token', 'eos_token', 'unk_token', 'pad_token', 'sep_token', 'cls_token', 'mask_token')


class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    Ids are plain ints. Nothing is added that is not asked for: bos and eos only where the flags say so.
    """

    def __init__(self, backend: Any, config: Mapping[str, Any], fingerprint: str, source: str, adds_bos: bool):
        """Use `Tokenizer.load`. backend: a tokenizers.Tokenizer; source: the folder, for messages."""
        self.backend, self.config, self.source, self.adds_bos = backend, config, source, adds_bos
        self._fingerprint = fingerprint
        self.special_tokens = {name: _content(config[name]) for name in _NAMED if config.get(name) is not None}
        self.bos_id = self.role_id('bos_token')
        self.eos_id = self.role_id('eos_token')
        self.pad_id = self.role_id('pad_token')

    @classmethod
    def load(cls, folder: str | Path) -> 'Tokenizer':
        """Opens the tokenizer of a model folder.

        Raises FileNotFoundError where the folder holds no tokenizer that can be read, and says what it holds;
        ValueError for a broken file or a special token that is not in the vocabulary.
        """
        folder = Path(folder)
        config = read_config(folder)
        backend, fingerprint = _open_backend(folder)
        # Truncation and padding of the file would change texts silently.
        backend.no_truncation()
        backend.no_padding()
        _add_listed_tokens(backend, config.get('added_tokens_decoder', {}), folder)
        if not (folder / 'tokenizer.json').is_file() and backend.token_to_id('<|endoftext|>') is not None:
            config = {'bos_token': '<|endoftext|>', 'eos_token': '<|endoftext|>'} | config  # GPT-2's own convention
        adds_bos = config.get('add_bos_token')
        if adds_bos is None:
            bos = config.get('bos_token')
            adds_bos = bos is not None and backend.encode('').ids[:1] == [backend.token_to_id(_content(bos))]
        # Without the post-processor offsets are exact: ByteLevel's would cut white space off them.
        backend.post_processor = None
        return cls(backend, config, fingerprint, str(folder), bool(adds_bos))

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest id plus one: what an embedding table must hold at least."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all added tokens: bos, eos, ends of turns, marks of roles, whether flagged special or not."""
        return frozenset(self.backend.get_added_tokens_decoder())

    @functools.cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The added tokens as text."""
        return tuple(token.content for token in self.backend.get_added_tokens_decoder().values())

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the canonical JSON of the vocabulary: equal where ids mean the same."""
        return self._fingerprint

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text; special tokens written out in it are recognized. bos, eos: add the token at that end."""
        return self.encode_batch([text], bos=bos, eos=eos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        """`encode` for many texts, on all cores (the environment's TOKENIZERS_PARALLELISM=0 turns that off)."""
        before = [self.required_id('bos_token')] if bos else []
        after = [self.required_id('eos_token')] if eos else []
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [before + encoding.ids + after for encoding in encodings]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """For each text its ids, and for each id the characters [start, end) that it stands for."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; skip_special leaves out tokens such as bos and ends of turns.

        An id past the vocabulary stands for no text: models have rows for such where the table was padded.
        Raises ValueError for a negative id.
        """
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise ValueError(f'decode: id {min(ids)}: the vocabulary of {self.source} begins with id 0')
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def required_id(self, name: str) -> int:
        """The id of 'bos_token', 'eos_token' or 'pad_token'. Raises ValueError where the tokenizer has none."""
        found = self.role_id(name)
        if found is None:
            raise ValueError(f'the tokenizer of {self.source} names no {name} in tokenizer_config.json')
        return found

    def chat_template(self, name: str = 'default', now: Any = None) -> ChatTemplate:
        """The chat template of that name. now: a datetime for templates that write the date; default the clock's.

        Raises ValueError where the tokenizer has no such template.
        """
        templates = self.config.get('chat_template') or {}
        if isinstance(templates, str):
            templates = {'default': templates}
        elif isinstance(templates, list):  # the older form: [{'name': ..., 'template': ...}]
            templates = {entry['name']: entry['template'] for entry in templates}
        if name not in templates:
            have = f'it has {", ".join(sorted(templates))}' if templates else 'it has none (a base model?)'
            raise ValueError(f'the tokenizer of {self.source} has no chat template {name!r}: {have}')
        return ChatTemplate(templates[name], self.source, self.special_tokens, now)

    def role_id(self, name: str) -> int | None:
        """The id of 'bos_token', 'eos_token', ...; None where the tokenizer names none.

        Raises ValueError for a token that is not in the vocabulary.
        """
        token = self.special_tokens.get(name)
        if token is None:
            return None
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f'{name} {token!r} of {self.source} is not in its vocabulary')
        return found


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed by special_tokens_map.json and chat_template.jinja; {} where there is none."""
    config: dict[str, Any] = {}
    for name in ('special_tokens_map.json', 'chat_template.json', 'tokenizer_config.json'):  # the last one wins
        if (folder / name).is_file():
            config |= _read_json(folder / name)
    if (folder / 'chat_template.jinja').is_file():
        config['chat_template'] = (folder / 'chat_template.jinja').read_text(encoding='utf-8')
    return config


def copy_tokenizer_files(src: str | Path, dst: str | Path) -> list[str]:
    """Copies whatever tokenizer files `src` holds into the folder `dst`, byte for byte; returns their names.

    Raises FileNotFoundError where there is none.
    """
    src, dst = Path(src), Path(dst)
    names = [name for name in TOKENIZER_FILES if (src / name).is_file()]
    if not names:
        raise FileNotFoundError(f'no tokenizer files in {src}: looked for {", ".join(TOKENIZER_FILES)}')
    dst.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (src / name).resolve() != (dst / name).resolve():
            shutil.copyfile(src / name, dst / name)
    return names


def _open_backend(folder: Path) -> tuple[Any, str]:
    import tokenizers

    if (folder / 'tokenizer.json').is_file():
        path = folder / 'tokenizer.json'
        content = _read_json(path)
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding='utf-8'))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f'{path} is not a file of the tokenizers package: {error}') from error
        return backend, _canonical_hash(content)
    if (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
        return _open_gpt2(folder)
    found = sorted(path.name for path in folder.glob('*')) if folder.is_dir() else None
    sentencepiece = [name for name in found or () if name.endswith(('.model', '.spm', '.vocab'))]
    if sentencepiece:
        raise FileNotFoundError(
            f'{folder / sentencepiece[0]} is a SentencePiece model, which is not read here: the folder needs the same '
            "model's tokenizer.json (transformers writes it: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    holds = 'which is not a folder' if found is None else f'which holds {", ".join(found[:20]) or "nothing"}'
    raise FileNotFoundError(f'no tokenizer in {folder}, {holds}: expected tokenizer.json, or vocab.json and merges.txt')


def _open_gpt2(folder: Path) -> tuple[Any, str]:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocab = _read_json(folder / 'vocab.json')
    lines = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')
    merges = [line.split(' ') for line in lines if line and not line.startswith('#version')]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(a, b) for a, b in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token in ('<|endoftext|>',) if token in vocab])
    return backend, _canonical_hash({'vocab': vocab, 'merges': merges})


def _add_listed_tokens(backend: Any, listed: Mapping[str, Any], folder: Path) -> None:
    """Adds the tokens that only tokenizer_config.json knows, and checks that every listed one has its listed id."""
    from tokenizers import AddedToken

    for index, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        content = entry['content']
        if backend.token_to_id(content) is None:
            flags = {key: entry[key] for key in ('lstrip', 'rstrip', 'single_word', 'normalized') if key in entry}
            token = AddedToken(content, special=entry.get('special', False), **flags)
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(content) != int(index):
            raise ValueError(
                f'{folder / "tokenizer_config.json"}: added token {content!r} should have id {index}, '
                f'but the vocabulary gives it {backend.token_to_id(content)}'
            )


def _canonical_hash(content: dict[str, Any]) -> str:
    content = {key: value for key, value in content.items() if key not in ('truncation', 'padding')}
    model = content.get('model')
    if isinstance(model, dict) and 'merges' in model:  # older files write a merge as 'a b', newer ones as ['a', 'b']
        merges = [m.split(' ') if isinstance(m, str) else m for m in model['merges']]
        content['model'] = model | {'merges': merges}
    text = json.dumps(content, sort_keys=True, separators=(',', ':'), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(token: Any) -> str:
    return token['content'] if isinstance(token, Mapping) else token


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:  # also a UnicodeDecodeError
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected a JSON object, found {type(content).__name__}')
    return content
