"""Writes tests/golden/models/<name>/: tiny random models and what transformers computes for them.

Run by hand where torch (CPU) and transformers 5.x are installed; neither is a dependency of the project:

    python tests/golden/make_models.py            # all
    python tests/golden/make_models.py llama qwen3

Each directory is a Hugging Face directory in miniature, with golden.npz beside it; README.md here says what it holds.
The weights are larger than any initialiser's, and every norm and bias is random, so that each term of the model shows
in the logits: `sensitivity` asserts it by removing the terms one at a time.
"""

import argparse
import json
import pathlib
import shutil
import zlib
from typing import Any

import numpy as np
import torch
import transformers
from routing import LEAST_GAP, arrays_of, least_gap, routings_of
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion
from variant import DROP, Json, Variant
from variants import VARIANTS

OUT = pathlib.Path(__file__).parent / 'models'
T = 24
NEW_TOKENS = 12
PROMPT_LENGTHS = (3, 11)
TOLERANCE = 1e-4  # of the tests; a term that is left out must move the logits by a hundred of these


def seed_of(name: str, attempt: int = 0) -> int:
    return zlib.crc32((f'{name} {attempt}' if attempt else name).encode())


def build(variant: Variant, changes: Json | None = None) -> Any:
    """A float32 model in evaluation mode with eager attention and a plain loop over experts, weights not yet set."""
    model_class = getattr(transformers, variant.model_class)
    config = model_class.config_class(**json.loads(json.dumps({**variant.config, **(changes or {})})))
    config._attn_implementation = 'eager'
    config._experts_implementation = 'eager'
    return model_class(config).float().eval()


def is_norm(name: str) -> bool:
    return name.endswith('weight') and ('norm' in name.lower() or '.ln_' in name)


def neutral(variant: Variant, name: str) -> float:
    """The value of a one-dimensional weight that leaves the computation unchanged (of a state: decay and skip of 1)."""
    if name.endswith('sinks'):
        return -30.0
    return 1.0 if (is_norm(name) or name.endswith('.D')) and 'Gemma' not in variant.model_class else 0.0


def spread(variant: Variant, name: str) -> float:
    """The standard deviation of a weight of more than one dimension."""
    if any(part in name for part in ('embed_tokens', 'wte', 'wpe')):
        return 0.15 if 'Gemma' in variant.model_class else 0.6
    if 'embeddings' in name:
        return 0.3
    if name.endswith(('.gate.weight', 'router.weight', 'conv1d.weight')):
        return 0.4
    # GPT-2 without rotary positions needs the larger weights, or its tied head repeats one token for ever.
    return 0.4 if 'GPT2' in variant.model_class else 0.2


def randomise(variant: Variant, model: Any, attempt: int = 0) -> None:
    """Every weight normal: norms and biases far from neutral, matrices to activations of order one."""
    random = torch.Generator().manual_seed(seed_of(variant.name, attempt))
    stored = {**dict(model.named_parameters()), **buffers_of(model)}
    with torch.no_grad():
        for name, weight in stored.items():
            noise = torch.randn(weight.shape, generator=random)
            if name.endswith('sinks'):
                weight.copy_(noise)
            elif weight.dim() == 1:
                weight.copy_(neutral(variant, name) + 0.3 * noise)
            else:
                weight.copy_(spread(variant, name) * noise)


def model_without_ties(variant: Variant, tokens: np.ndarray) -> Any:
    """A model in which no choice of experts is near a tie and every expert is chosen by some token."""
    for attempt in range(300):
        model = build(variant)
        randomise(variant, model, attempt)
        routings = routings_of(model, tokens)
        if least_gap(routings) > LEAST_GAP and all(routing.uses_every_expert for routing in routings):
            return model
    raise RuntimeError(f'{variant.name}: every choice of weights brings some token near a tie between experts')


def tokens_of(variant: Variant) -> np.ndarray:
    """int64 [2, T]: both ends of the vocabulary, repeats, and never the padding token.

    torch gives no gradient to the embedding row of pad_token_id; that is a habit of its Embedding, not of the model.
    """
    vocab = variant.config['vocab_size']
    random = np.random.default_rng(seed_of(variant.name))
    tokens = random.integers(1, vocab, (2, T))
    tokens[0, :4] = (1, vocab - 1, vocab - 1, vocab - 1)
    tokens[1, 10:16] = tokens[1, 4:10]
    return tokens


def loss_and_gradients(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Logits, the mean next-token cross-entropy over all rows, and its gradient by name of the stored tensor.

    Tensors that the loss moves through a choice only (the correction bias of a router) have a gradient of zero.
    """
    ids = torch.from_numpy(tokens)
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    gradients |= {name: torch.zeros_like(weight) for name, weight in buffers_of(model).items()}
    named = {name: gradient.numpy().copy() for name, gradient in revert_weight_conversion(model, gradients).items()}
    return logits.detach().numpy(), loss.detach().numpy(), named


def buffers_of(model: Any) -> dict[str, torch.Tensor]:
    """The stored tensors that are no parameters."""
    kept = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def check_stored(model: Any, directory: pathlib.Path, gradients: dict[str, np.ndarray]) -> None:
    """The conversion that named the gradients gives, applied to the weights, the tensors of the files."""
    weights = revert_weight_conversion(model, {**dict(model.named_parameters()), **buffers_of(model)})
    stored = {name: tensor for file in directory.glob('*.safetensors') for name, tensor in load_file(file).items()}
    assert weights.keys() == stored.keys() == gradients.keys(), weights.keys() ^ stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(weights[name], tensor), name
        assert gradients[name].shape == tensor.shape, name


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


def with_weights(variant: Variant, state: dict[str, torch.Tensor], changes: Json | None = None) -> Any:
    """A fresh model (rotary tables with dynamic scaling remember earlier inputs) with the given weights."""
    model = build(variant, changes)
    model.load_state_dict(state)
    return model


def greedy(variant: Variant, state: dict[str, torch.Tensor], prompt: np.ndarray, eos: list[int] | None) -> np.ndarray:
    """transformers' greedy continuation of one prompt, ids of the new tokens only."""
    model = with_weights(variant, state)
    model.generation_config.eos_token_id = eos
    ids = torch.from_numpy(prompt)[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        use_cache=variant.cached,
    )
    return out[0, len(prompt) :].numpy()


def prompts_and_continuations(
    variant: Variant, state: dict[str, torch.Tensor]
) -> tuple[dict[str, np.ndarray], list[int] | None]:
    """Two prompts whose greedy continuations have no near tie and are not one token for ever; and the end tokens.

    Nor is any choice of experts on the way near one. The continuation is that of the full forward pass, too.

    The first continuation meets the first end token, the second neither.
    """
    vocab = variant.config['vocab_size']
    random = np.random.default_rng(seed_of(variant.name) + 1)
    out: dict[str, np.ndarray] = {}
    eos: list[int] | None = None
    for index, length in enumerate(PROMPT_LENGTHS):
        for _ in range(200):
            prompt = random.integers(3, vocab, length)
            new = greedy(variant, state, prompt, None)
            model, whole = with_weights(variant, state), np.concatenate([prompt, new])[None]
            full = logits_of(model, whole)[0]
            top = np.sort(full[length - 1 : -1], axis=-1)
            first = [*new[: variant.eos].tolist(), vocab - 1]
            ends_well = index > 0 or variant.eos is None or new[variant.eos] not in first
            ends_well &= index == 0 or eos is None or not set(eos) & set(new.tolist())
            if not variant.alone and not np.array_equal(full[length - 1 : -1].argmax(-1), new):
                raise RuntimeError(f'{variant.name}: greedy text with a cache is not that of the full forward pass')
            ends_well &= least_gap(routings_of(model, whole)) > LEAST_GAP
            if (top[:, -1] - top[:, -2]).min() > 50 * TOLERANCE and len(set(new.tolist())) > 4 and ends_well:
                break
        else:
            raise RuntimeError(f'{variant.name}: no prompt of length {length} has a clear greedy continuation')
        if index == 0 and variant.eos is not None:
            eos = [int(new[variant.eos]), vocab - 1]  # a list, as Llama 3 has it
        out[f'prompt_{index}'] = prompt
    for index in range(len(PROMPT_LENGTHS)):
        out[f'greedy_{index}'] = greedy(variant, state, out[f'prompt_{index}'], eos)
    return out, eos


def sensitivity(variant: Variant, state: dict[str, torch.Tensor], tokens: np.ndarray, logits: np.ndarray) -> float:
    """The least change of the logits (max abs) when one term is taken away: a config field, a norm's scale, a bias."""
    moved: dict[str, float] = {}
    for probe in variant.probes:
        other = logits_of(with_weights(variant, state, probe), tokens)
        moved[json.dumps(probe)] = float(np.abs(other - logits).max())
    for name, weight in state.items():
        if weight.dim() == 1 or name.endswith('bias'):
            without = {**state, name: torch.full_like(weight, neutral(variant, name))}
            moved[name] = float(np.abs(logits_of(with_weights(variant, without), tokens) - logits).max())
    weak = {what: change for what, change in moved.items() if change < 100 * TOLERANCE}
    for probe in variant.close_probes:
        change = float(np.abs(logits_of(with_weights(variant, state, probe), tokens) - logits).max())
        if change < 5 * TOLERANCE:
            weak[json.dumps(probe)] = change
    if weak:
        raise RuntimeError(f'{variant.name}: these terms hardly show in the logits: {weak}')
    return min(moved.values())


def write_legacy_config(variant: Variant, directory: pathlib.Path, tokens: np.ndarray, logits: np.ndarray) -> None:
    """config_legacy.json: the older dialect; transformers must compute the same from it."""
    if variant.legacy is None:
        return
    config = json.loads((directory / 'config.json').read_text())
    config.update(variant.legacy)
    config = {key: value for key, value in config.items() if value != DROP}
    config['transformers_version'] = '4.44.0'
    (directory / 'config_legacy.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
    model_class = getattr(transformers, variant.model_class)
    loaded = model_class.config_class.from_pretrained(directory, _configuration_file='config_legacy.json')
    loaded._experts_implementation = 'eager'
    model = model_class.from_pretrained(directory, config=loaded, attn_implementation='eager').eval()
    np.testing.assert_array_equal(logits_of(model, tokens), logits)


def make(variant: Variant) -> str:
    """Writes one directory and returns its line of the table."""
    directory = OUT / variant.name
    shutil.rmtree(directory, ignore_errors=True)
    tokens = tokens_of(variant)
    model = model_without_ties(variant, tokens)
    state = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    logits, loss, gradients = loss_and_gradients(model, tokens)
    wide = logits_of(with_weights(variant, state).double(), tokens)
    golden: dict[str, Any] = {'tokens': tokens.astype(np.int32), 'logits': logits, 'loss': loss}
    golden |= {f'grad/{name}': gradient for name, gradient in gradients.items()}
    golden |= arrays_of(model, tokens)
    for index, length in enumerate(variant.alone):
        row = tokens[index % 2, :length]
        golden[f'alone_tokens_{index}'] = row.astype(np.int32)
        golden[f'alone_logits_{index}'] = logits_of(with_weights(variant, state), row[None])[0]
    ids, eos = prompts_and_continuations(variant, state)
    golden |= {name: value.astype(np.int32) for name, value in ids.items()}

    model.generation_config.eos_token_id = eos
    model.save_pretrained(directory, max_shard_size=variant.max_shard_size)
    check_stored(model, directory, gradients)
    np.savez_compressed(directory / 'golden.npz', **golden)
    write_legacy_config(variant, directory, tokens, logits)
    least = sensitivity(variant, state, tokens, logits)
    size = sum(path.stat().st_size for path in directory.iterdir())
    moved = [np.linalg.norm(g.astype(np.float64)) for name, g in gradients.items() if 'correction_bias' not in name]
    faintest = min(moved) / np.linalg.norm(moved)
    whole = [np.concatenate([ids[f'prompt_{i}'], ids[f'greedy_{i}']])[None] for i in range(len(PROMPT_LENGTHS))]
    gap = min(least_gap(routings_of(model, batch)) for batch in (tokens, *whole))
    return (
        f'{variant.name:18} {sum(g.size for g in gradients.values()):>7} {size:>8} {np.abs(logits).max():>6.2f} '
        f'{float(loss):>6.3f} {np.abs(wide - logits).max():>8.1e} {least:>8.3f} {faintest:>8.1e} '
        f'{gap:>7.1e}'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='variants to write (default: all)')
    names = parser.parse_args().names
    unknown = set(names) - {variant.name for variant in VARIANTS}
    if unknown:
        parser.error(f'{sorted(unknown)}: expected some of {[variant.name for variant in VARIANTS]}')
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    print(f'torch {torch.__version__}, transformers {transformers.__version__}')
    print('name                params    bytes  |max|   loss  float64     least gradient     gap')
    for variant in VARIANTS:
        if not names or variant.name in names:
            print(make(variant), flush=True)


if __name__ == '__main__':
    main()
