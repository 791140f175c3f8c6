"""Writes tests/golden/encoders/<name>/: tiny random BERTs and what transformers computes for them.

Run by hand where torch (CPU) and transformers 5.x are installed:

    python tests/golden/make_encoders.py

As make_models.py, but for models that read in both directions: rows have padding, segments A and B, and masked tokens.
README.md here says what the files hold.
"""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import torch
import transformers
from make_models import TOLERANCE, T, build, check_stored, neutral, randomise, seed_of
from transformers.core_model_loading import revert_weight_conversion
from variant import DROP, Json, Variant

OUT = pathlib.Path(__file__).parent / 'encoders'
PADDED = 7  # tokens of padding at the end of the second row
IGNORED = -100
BERT: Json = {
    'vocab_size': 101,
    'hidden_size': 36,
    'num_hidden_layers': 2,
    'num_attention_heads': 6,
    'intermediate_size': 52,
    'max_position_embeddings': 40,
    'layer_norm_eps': 3e-3,
    'type_vocab_size': 2,
    'pad_token_id': 0,
}
EPS = {'layer_norm_eps': 1e-12}
# As the first files have it.
OLD_BERT: Json = {
    **dict.fromkeys(('dtype', 'tie_word_embeddings', 'classifier_dropout', 'add_cross_attention', 'is_decoder'), DROP),
    'torch_dtype': 'float32',
    'position_embedding_type': 'absolute',
    'gradient_checkpointing': False,
}
ENCODERS = (
    Variant('bert', 'BertForMaskedLM', BERT, (EPS, {'hidden_act': 'relu'}), OLD_BERT),
    Variant(
        'bert_pooled',
        'BertForPreTraining',
        {
            **BERT,
            'vocab_size': 107,
            'hidden_size': 28,
            'num_hidden_layers': 3,
            'num_attention_heads': 4,
            'intermediate_size': 38,
            'type_vocab_size': 3,
            'hidden_act': 'gelu_new',
        },
        (EPS, {'hidden_act': 'relu'}),
        OLD_BERT,
    ),
)


def batch_of(variant: Variant) -> dict[str, np.ndarray]:
    """tokens, token_types, mask (1 at tokens, 0 at padding), labels (-100 where nothing is asked), next_sentence."""
    random = np.random.default_rng(seed_of(variant.name))
    tokens = random.integers(1, variant.config['vocab_size'], (2, T))
    mask = np.ones((2, T), np.int64)
    mask[1, T - PADDED :] = 0
    types = np.stack([np.arange(T) >= 9, np.arange(T) >= 5]).astype(np.int64) * (variant.config['type_vocab_size'] - 1)
    asked = (random.random((2, T)) < 0.4) & (mask == 1)
    labels = np.where(asked, random.integers(1, variant.config['vocab_size'], (2, T)), IGNORED)
    batch = {'tokens': tokens * mask, 'token_types': types * mask, 'mask': mask, 'labels': labels}
    return batch | ({'next_sentence': np.array([1, 0])} if variant.model_class == 'BertForPreTraining' else {})


def outputs_of(model: Any, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """logits, hidden, loss, and of a model with a pooler pooled and next_sentence_logits."""
    ids = {name: torch.from_numpy(values) for name, values in batch.items()}
    inputs = {'attention_mask': ids['mask'], 'token_type_ids': ids['token_types']}
    body = model.bert(ids['tokens'], **inputs)
    out = model(ids['tokens'], **inputs)
    logits = out.logits if 'next_sentence' not in batch else out.prediction_logits
    entropy = torch.nn.functional.cross_entropy
    loss = entropy(logits.flatten(0, 1), ids['labels'].flatten(), ignore_index=IGNORED)
    found = {'logits': logits, 'hidden': body.last_hidden_state, 'masked_loss': loss, 'loss': loss}
    if 'next_sentence' in batch:
        found |= {'pooled': body.pooler_output, 'next_sentence_logits': out.seq_relationship_logits}
        found['loss'] = loss + entropy(out.seq_relationship_logits, ids['next_sentence'])
    return found


def with_weights(variant: Variant, state: dict[str, torch.Tensor], changes: Json | None = None) -> Any:
    model = build(variant, changes)
    model.load_state_dict(state)
    return model


def sensitivity(variant: Variant, state: dict[str, torch.Tensor], batch: dict[str, np.ndarray]) -> float:
    """The least change of logits or pooled outputs when a config field, a scale, a bias or an input is taken away."""

    def outputs(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            found = outputs_of(model, inputs)
        kept = inputs['mask'] == 1
        return np.concatenate([found['logits'].numpy()[kept].ravel(), found.get('pooled', torch.zeros(1)).flatten()])

    wanted = outputs(with_weights(variant, state), batch)
    others = {json.dumps(probe): (with_weights(variant, state, probe), batch) for probe in variant.probes}
    for name, weight in state.items():
        if weight.dim() == 1 and 'seq_relationship' not in name:
            tied = [other for other, values in state.items() if torch.equal(values, weight)]
            changed = dict.fromkeys(tied, torch.full_like(weight, neutral(variant, name)))
            others[name] = (with_weights(variant, {**state, **changed}), batch)
    others['token types'] = (with_weights(variant, state), {**batch, 'token_types': batch['token_types'] * 0})
    moved = {what: float(np.abs(outputs(*other) - wanted).max()) for what, other in others.items()}
    # A bias of keys moves all scores of a query alike.
    moved = {what: change for what, change in moved.items() if not what.endswith('key.bias')}
    weak = {what: change for what, change in moved.items() if change < 100 * TOLERANCE}
    if weak:
        raise RuntimeError(f'{variant.name}: these terms hardly show in the outputs: {weak}')
    return min(moved.values())


def write_legacy_config(variant: Variant, directory: pathlib.Path, batch: dict[str, np.ndarray], want: Any) -> None:
    """config_legacy.json: the older dialect; transformers must compute the same from it."""
    config = {**json.loads((directory / 'config.json').read_text()), **(variant.legacy or {})}
    config = {key: value for key, value in config.items() if value != DROP} | {'transformers_version': '4.44.0'}
    (directory / 'config_legacy.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
    model_class = getattr(transformers, variant.model_class)
    loaded = model_class.config_class.from_pretrained(directory, _configuration_file='config_legacy.json')
    model = model_class.from_pretrained(directory, config=loaded, attn_implementation='eager').eval()
    assert torch.equal(outputs_of(model, batch)['logits'], want)


def make(variant: Variant) -> str:
    """Writes one directory and returns its line of the table."""
    directory = OUT / variant.name
    shutil.rmtree(directory, ignore_errors=True)
    batch = batch_of(variant)
    model = build(variant)
    randomise(variant, model)
    state = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    outputs = outputs_of(model, batch)
    outputs['loss'].backward()
    stored = revert_weight_conversion(model, {name: weight.grad for name, weight in model.named_parameters()})
    gradients = {name: gradient.numpy().copy() for name, gradient in stored.items()}
    model.save_pretrained(directory)
    check_stored(model, directory, gradients)
    golden: dict[str, Any] = {name: values.astype(np.int32) for name, values in batch.items()}
    golden |= {name: values.detach().numpy() for name, values in outputs.items()}
    np.savez_compressed(directory / 'golden.npz', **golden, **{f'grad/{k}': v for k, v in gradients.items()})
    write_legacy_config(variant, directory, batch, outputs['logits'])
    with torch.no_grad():
        wide = outputs_of(with_weights(variant, state).double(), batch)['logits']
    size = sum(path.stat().st_size for path in directory.iterdir())
    error = float((wide - outputs['logits']).detach().abs().max())
    return (
        f'{variant.name:18} {sum(g.size for g in gradients.values()):>7} {size:>8} '
        f'{float(outputs["logits"].detach().abs().max()):>6.2f} {float(outputs["loss"].detach()):>6.3f} {error:>8.1e} '
        f'{sensitivity(variant, state, batch):>8.3f}'
    )


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for variant in ENCODERS:
        print(make(variant), flush=True)


if __name__ == '__main__':
    main()
