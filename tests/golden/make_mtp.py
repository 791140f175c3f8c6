"""Writes tests/golden/mtp/deepseek_v3/: a tiny model with two modules that predict further tokens.

Run by hand where torch (CPU) and transformers 5.x are installed:

    python tests/golden/make_mtp.py

transformers loads these modules for drafting only; here each is run over whole rows, as in training: depth k sees the
hidden state that stands for positions up to t with token t + k, and its logits are for token t + k + 1.
"""

import functools
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import torch
import transformers
from make_models import build, randomise, seed_of, spread, tokens_of
from routing import LEAST_GAP, Routing, arrays_of, least_gap, routings_during
from safetensors.torch import load_file, save_file
from shared_expert_variants import DEEPSEEK
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import MtpModel
from variant import Variant, rope

OUT = pathlib.Path(__file__).parent / 'mtp' / 'deepseek_v3'
LAYERS, DEPTH = 2, 2
VARIANT = Variant(
    'mtp_deepseek_v3',
    'DeepseekV3ForCausalLM',
    {
        **DEEPSEEK,
        'vocab_size': 79,
        'hidden_size': 28,
        'num_hidden_layers': LAYERS,
        'num_attention_heads': 3,
        'num_key_value_heads': 3,
        'intermediate_size': 18,
        'n_routed_experts': 4,
        'num_experts_per_tok': 2,
        'n_group': 1,
        'topk_group': 1,
        'q_lora_rank': None,
        'rope_parameters': rope(200.0),
        'num_nextn_predict_layers': DEPTH,
    },
)


def modules_of(model: Any, attempt: int) -> Any:
    """The prediction modules with random weights; embedding and head are those of the model."""
    modules = MtpModel(model, DEPTH).float().eval()
    random = torch.Generator().manual_seed(seed_of('mtp modules', attempt))
    with torch.no_grad():
        for name, weight in own_tensors(modules).items():
            noise = torch.randn(weight.shape, generator=random)
            centre = 1.0 if 'norm' in name else 0.0
            weight.copy_(centre + 0.3 * noise if weight.dim() == 1 else spread(VARIANT, name) * noise)
    return modules


def own_tensors(modules: Any) -> dict[str, torch.Tensor]:
    """Weights and correction biases of the modules, without what they share with the model."""
    return {name: tensor for name, tensor in modules.state_dict(keep_vars=True).items() if name.startswith('layers.')}


def stored_names(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of published files: layers from num_hidden_layers on, the last norm beside the head, experts apart."""
    renamed = {}
    for name, tensor in tensors.items():
        _, depth, rest = name.split('.', 2)
        rest = rest.removeprefix('mtp_block.').replace('post_norm', 'shared_head.norm')
        renamed[f'model.layers.{LAYERS + int(depth)}.{rest}'] = tensor
    return revert_weight_conversion(model, renamed)


def predictions(model: Any, modules: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits of the model [B, T, V] and of each depth k [B, T - k, V]."""
    out = model(ids, use_cache=False, output_hidden_states=True)
    hidden, logits = out.hidden_states[-1], [out.logits]  # after the last norm
    for depth in range(DEPTH):
        later = ids[:, depth + 1 :]
        positions = torch.arange(depth + 1, ids.shape[1])[None]
        hidden = modules.forward_layer(depth, hidden[:, :-1], positions, None, input_ids=later)
        logits.append(modules._project_to_logits(hidden))
    return logits


def loss_of(logits: torch.Tensor, ids: torch.Tensor, depth: int) -> torch.Tensor:
    """Mean cross-entropy of depth k: its logits at t against token t + k + 1."""
    wanted = ids[:, depth + 1 :]
    return torch.nn.functional.cross_entropy(logits[:, : wanted.shape[1]].flatten(0, 1), wanted.flatten())


def without_ties(ids: torch.Tensor) -> tuple[Any, Any, list[Routing]]:
    """Model and modules, of which no choice of experts is near a tie and every expert is chosen."""
    for attempt in range(300):
        model = build(VARIANT)
        randomise(VARIANT, model, attempt)
        modules = modules_of(model, attempt)
        routings = routings_during((model, modules), functools.partial(predictions, model, modules, ids))
        if least_gap(routings) > LEAST_GAP and all(routing.uses_every_expert for routing in routings):
            return model, modules, routings
    raise RuntimeError('every choice of weights brings some token near a tie between experts')


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    tokens = tokens_of(VARIANT)
    ids = torch.from_numpy(tokens)
    model, modules, routings = without_ties(ids)

    logits = predictions(model, modules, ids)
    losses = [loss_of(values, ids, depth) for depth, values in enumerate(logits)]
    (losses[0] + sum(losses[1:]) / DEPTH).backward()
    golden: dict[str, Any] = {'tokens': tokens.astype(np.int32), **arrays_of(model, tokens)}
    for depth, (values, loss) in enumerate(zip(logits, losses, strict=True)):
        golden['logits' if depth == 0 else f'logits_{depth}'] = values.detach().numpy()
        golden['loss' if depth == 0 else f'loss_{depth}'] = loss.detach().numpy()

    def both(of_model: dict[str, torch.Tensor], of_modules: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return revert_weight_conversion(model, of_model) | stored_names(model, of_modules)

    def gradients(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in tensors.items()}

    ours, own = dict(model.state_dict(keep_vars=True)), own_tensors(modules)
    golden |= {f'grad/{name}': grad.numpy() for name, grad in both(gradients(ours), gradients(own)).items()}
    model.save_pretrained(OUT)
    stored = {name: tensor.detach().clone().contiguous() for name, tensor in both(ours, own).items()}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in load_file(OUT / 'model.safetensors').items())
    # Published files hold the shared embedding and head once more in every module.
    for layer in range(LAYERS, LAYERS + DEPTH):
        stored[f'model.layers.{layer}.embed_tokens.weight'] = stored['model.embed_tokens.weight'].clone()
        stored[f'model.layers.{layer}.shared_head.head.weight'] = stored['lm_head.weight'].clone()
    save_file(stored, OUT / 'model.safetensors', metadata={'format': 'pt'})
    np.savez_compressed(OUT / 'golden.npz', **golden)
    size = sum(path.stat().st_size for path in OUT.iterdir())
    assert json.loads((OUT / 'config.json').read_text())['num_nextn_predict_layers'] == DEPTH
    print(f'{size} bytes, losses {[round(float(loss.detach()), 3) for loss in losses]}, gap {least_gap(routings):.1e}')


if __name__ == '__main__':
    main()
