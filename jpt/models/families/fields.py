"""Reading a Hugging Face config.json so that no field is overlooked."""

from collections.abc import Mapping, Sequence
from typing import Any

ACTIVATION_NAMES = {
    'silu': 'silu',
    'swish': 'silu',
    'gelu': 'gelu',
    'gelu_python': 'gelu',
    'gelu_new': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'gelu_accurate': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_python_tanh': 'gelu_tanh',
    'relu': 'relu',
    'relu2': 'relu2',
    'tanh': 'tanh',
}
# Fields that say how a model was trained, stored or is served, not what it computes.
HARMLESS = frozenset(
    [
        'model_type',
        'architectures',
        'torch_dtype',
        'dtype',
        'transformers_version',
        '_name_or_path',
        'name_or_path',
        'use_cache',
        'initializer_range',
        'bos_token_id',
        'eos_token_id',
        'pad_token_id',
        'sep_token_id',
        'decoder_start_token_id',
        'unk_token_id',
        'attention_dropout',
        'return_dict',
        'return_dict_in_generate',
        'output_attentions',
        'output_hidden_states',
        'torchscript',
        'chunk_size_feed_forward',
        'id2label',
        'label2id',
        'num_labels',
        'problem_type',
        'task_specific_params',
        'tokenizer_class',
        'prefix',
        'finetuning_task',
        'gradient_checkpointing',
        'tie_encoder_decoder',
        'use_bfloat16',
        'pruned_heads',
        'is_encoder_decoder',
        'attn_implementation',
        '_attn_implementation_autoset',
        '_attn_implementation',
        'model_max_length',
        'max_sequence_length',
        'max_length',
        'min_length',
        'do_sample',
        'early_stopping',
        'num_beams',
        'num_beam_groups',
        'diversity_penalty',
        'temperature',
        'top_k',
        'top_p',
        'typical_p',
        'repetition_penalty',
        'length_penalty',
        'no_repeat_ngram_size',
        'encoder_no_repeat_ngram_size',
        'bad_words_ids',
        'num_return_sequences',
        'output_scores',
        'forced_bos_token_id',
        'forced_eos_token_id',
        'remove_invalid_values',
        'exponential_decay_length_penalty',
        'suppress_tokens',
        'begin_suppress_tokens',
        'tf_legacy_loss',
        '_num_labels',
        'is_llama_config',
        'transformers.js_config',
        'unsloth_fixed',
        'unsloth_version',
    ]
)


class Fields:
    """The fields of a config.json; remembers which were read, and refuses the ones that nobody knows."""

    def __init__(self, config: Mapping[str, Any], family: str):
        self.config = config
        self.family = family
        self._read: set[str] = set(HARMLESS)
        self.expect('is_decoder', (None, False, True))
        self.expect('cross_attention_hidden_size', (None,))
        for name in ('rope_interleaved', 'use_mrope'):  # published configs spell out that they are not used
            self.expect(name, (None, False))

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, or the default where it is absent."""
        self._read.add(name)
        return self.config.get(name, default)

    def has(self, name: str) -> bool:
        return self.config.get(name) is not None

    def ignore(self, *names: str) -> None:
        """Marks fields as known to leave the computation of this family alone."""
        self._read.update(names)

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer field; required where no default is given."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f'config.json: {name}={value!r}: expected an integer ({self.family})')
        return value

    def positive(self, name: str, default: int) -> int:
        """An integer of 1 or more."""
        value = self.integer(name, default)
        if value < 1:
            raise ValueError(f'config.json: {name}={value}: expected a positive integer ({self.family})')
        return value

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        """An integer field that may be null."""
        return None if self.get(name, default) is None else self.integer(name, default)

    def same_integer(self, name: str, other: str, default: int) -> int:
        """An integer that has two names; where both are given they must agree."""
        values = {self.integer(n) for n in (name, other) if self.has(n)}
        if len(values) > 1:
            raise ValueError(f'config.json: {name} and {other} differ: {sorted(values)} ({self.family})')
        self.ignore(name, other)
        return values.pop() if values else default

    def integers(self, name: str, default: Sequence[int]) -> Sequence[int]:
        """A list of integers; null counts as absent."""
        values = self.get(name)
        if values is None:
            return default
        if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
            raise ValueError(f'config.json: {name}={values!r}: expected a list of integers ({self.family})')
        return values

    def number(self, name: str, default: float) -> float:
        """A float field."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f'config.json: {name}={value!r}: expected a number ({self.family})')
        return float(value)

    def optional_number(self, name: str, default: float | None) -> float | None:
        """A float field that may be null."""
        value = self.get(name, default)
        return None if value is None else self.number(name, 0.0)

    def boolean(self, name: str, default: bool) -> bool:
        """A boolean field; null counts as absent."""
        value = self.get(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f'config.json: {name}={value!r}: expected true or false ({self.family})')
        return value

    def text(self, name: str, default: str | None) -> str | None:
        """A string field that may be null."""
        value = self.get(name, default)
        if value is not None and not isinstance(value, str):
            raise ValueError(f'config.json: {name}={value!r}: expected a string ({self.family})')
        return value

    def choice(self, name: str, allowed: Mapping[str, Any], default: str) -> Any:
        """The meaning of a string field, from a table of the known ones."""
        value = self.get(name, default)
        if value not in allowed:
            raise ValueError(f'config.json: {name}={value!r}: expected one of {", ".join(allowed)} ({self.family})')
        return allowed[value]

    def layer_types(
        self, default: Sequence[str], known: Sequence[str] = ('full_attention', 'sliding_attention')
    ) -> Sequence[str]:
        """The kind of attention of each layer."""
        types = self.get('layer_types') or default
        for index, name in enumerate(types):
            if name not in known:
                raise ValueError(f'config.json: layer_types[{index}]={name!r}: expected {" or ".join(known)}')
        return types

    def expect(self, name: str, allowed: Sequence[Any]) -> None:
        """Raises ValueError where the field is given with a value that this family does not compute here."""
        value = self.get(name, allowed[0])
        if not any(value is known or value == known for known in allowed):
            raise ValueError(f'config.json: {name}={value!r}: expected one of {list(allowed)} ({self.family})')

    def check_all_read(self) -> None:
        """Raises ValueError naming the fields that nobody read."""
        absent = {'quantization_config'} if not self.has('quantization_config') else set()
        unknown = sorted(set(self.config) - self._read - absent)
        if 'quantization_config' in unknown:
            raise ValueError(
                f'config.json: quantization_config={self.config["quantization_config"]!r}: jpt reads the weights of '
                f'{self.family} unquantized only: expected a checkpoint in bfloat16, float16 or float32'
            )
        if unknown:
            listed = ', '.join(f'{name}={self.config[name]!r}' for name in unknown)
            raise ValueError(
                f'config.json ({self.family}) has fields that jpt does not know and that may change the computation: '
                f'{listed}'
            )
