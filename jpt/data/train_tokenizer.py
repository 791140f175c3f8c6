"""Trains the quickstart's byte-level BPE tokenizer: python -m jpt.data.train_tokenizer --output=DIR

The text is the training split of the standard library. Digits stand alone, a word takes one leading space or sign
(so that `.append` and `(self` are tokens), and a line end goes with the indentation after it: a prompt that ends with
"\\n    " is cut as the training text was.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jpt.data.stdlib_corpus import read_stdlib

SPECIAL_TOKENS = ('<|endoftext|>', '<|pad|>', '<|im_start|>', '<|im_end|>')  # ids 0, 1, 2, 3
PIECES = r'[^\s\p{L}\p{N}]?\p{L}+| \p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+ *| +|\s'
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most vocab_size entries; any text is encoded and decoded exactly.

    vocab_size: at least 260: the 256 bytes and four special tokens.
    """
    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise ValueError(f'vocab_size={vocab_size}: expected at least {least}, the bytes and the special tokens')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_config(context: int) -> dict[str, object]:
    """The content of tokenizer_config.json: which special token has which part, and the ChatML template."""
    return {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': '<|endoftext|>',
        'eos_token': '<|endoftext|>',
        'pad_token': '<|pad|>',
        'add_bos_token': False,
        'add_eos_token': False,
        'clean_up_tokenization_spaces': False,
        'model_max_length': context,
        'chat_template': CHAT_TEMPLATE,
    }


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes over tokens, of all texts together."""
    texts = list(texts)
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    return sum(len(text.encode()) for text in texts) / tokens


def main() -> None:
    """Trains, writes tokenizer.json and tokenizer_config.json, and prints bytes per token of both splits."""
    parser = argparse.ArgumentParser(description='Train a byte-level BPE tokenizer on the standard library.')
    parser.add_argument('--output', type=Path, required=True, help='folder for the two files')
    parser.add_argument('--vocab', type=int, default=4096)
    parser.add_argument('--context', type=int, default=256, help='model_max_length of tokenizer_config.json')
    options = parser.parse_args()
    train = read_stdlib('train')
    print(train.describe())
    tokenizer = train_tokenizer(train.texts, options.vocab)
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.output / 'tokenizer.json'), pretty=False)
    config = json.dumps(tokenizer_config(options.context), indent=1) + '\n'
    (options.output / 'tokenizer_config.json').write_text(config)
    for corpus in (train, read_stdlib('held_out')):
        print(f'{corpus.split}: {bytes_per_token(tokenizer, corpus.texts):.3f} bytes per token')


if __name__ == '__main__':
    main()
