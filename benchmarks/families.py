"""Tiny models of every family with experts, states or a layout of its own, beside transformers in the same run.

    python benchmarks/families.py [--only=mixtral,mamba2] [--repeats=8] [--json]

Four layers of width 256, random weights drawn by transformers and read from its files, float32, 4 x 256 tokens. The
logits are compared first (`logits`: the largest difference, of the largest logit); then `fwd` is the logits and `step`
the mean cross-entropy of random targets with the gradients of all weights, in milliseconds. Both libraries take turns;
the best call counts. transformers gets the faster of its ways to run experts (the last column; Llama 4 has one, all
experts in one batched product) and its own choice of attention. Needs `pip install -r benchmarks/requirements.txt`.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from timing import Timing, in_turn, machine

from jpt.checkpoint.hf_import import load_hf
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.token_losses import cross_entropy
from jpt.models.config import Compute, ModelConfig
from jpt.models.transformer import forward, head_kernel, unembed

Json = dict[str, Any]
ROWS, LENGTH = 4, 256
TOLERANCE = 1e-3  # of the largest logit; beyond it the two sides do not compute the same model
# In which transformers runs experts here; 'batched_mm' copies the kernels for every token, gigabytes at these sizes.
WAYS = ('eager', 'grouped_mm')

VOCAB = 2048
BASE: Json = {
    'vocab_size': VOCAB,
    'hidden_size': 256,
    'num_hidden_layers': 4,
    **dict.fromkeys(('pad_token_id', 'bos_token_id', 'eos_token_id')),
}
COMMON: Json = {**BASE, 'num_attention_heads': 8, 'max_position_embeddings': 512}
ATTENTION: Json = {**COMMON, 'num_key_value_heads': 4, 'head_dim': 32, 'intermediate_size': 704}
# (config class, model class, fields). Experts are narrower where there are more of them, as in the published models.
FAMILIES: dict[str, tuple[str, str, Json]] = {
    'qwen3_moe': (
        'Qwen3MoeConfig',
        'Qwen3MoeForCausalLM',
        {**ATTENTION, 'num_experts': 32, 'num_experts_per_tok': 4, 'moe_intermediate_size': 128},
    ),
    'mixtral': (
        'MixtralConfig',
        'MixtralForCausalLM',
        {**ATTENTION, 'num_local_experts': 8, 'num_experts_per_tok': 2, 'intermediate_size': 448},
    ),
    'deepseek_v3': (
        'DeepseekV3Config',
        'DeepseekV3ForCausalLM',
        {
            **COMMON,
            'num_key_value_heads': 8,
            'intermediate_size': 704,
            'moe_intermediate_size': 128,
            'n_routed_experts': 32,
            'num_experts_per_tok': 4,
            'n_group': 4,
            'topk_group': 2,
            'first_k_dense_replace': 1,
            'q_lora_rank': 96,
            'kv_lora_rank': 64,
            'qk_nope_head_dim': 32,
            'qk_rope_head_dim': 16,
            'v_head_dim': 32,
            'num_nextn_predict_layers': 0,
        },
    ),
    'gpt_oss': (
        'GptOssConfig',
        'GptOssForCausalLM',
        {**ATTENTION, 'num_local_experts': 16, 'num_experts_per_tok': 4, 'intermediate_size': 256}
        | {'sliding_window': 128, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0}},
    ),
    'llama4_text': (
        'Llama4TextConfig',
        'Llama4ForCausalLM',
        {**ATTENTION, 'num_local_experts': 8, 'num_experts_per_tok': 1, 'intermediate_size': 448}
        | {'intermediate_size_mlp': 704, 'interleave_moe_layer_step': 1, 'attention_chunk_size': 128}
        | {'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0}},
    ),
    'mamba2': (
        'Mamba2Config',
        'Mamba2ForCausalLM',
        {**BASE, 'num_heads': 8, 'head_dim': 64, 'state_size': 64, 'n_groups': 1},
    ),
    'nemotron_h': (
        'NemotronHConfig',
        'NemotronHForCausalLM',
        {**COMMON, 'mamba_num_heads': 8, 'mamba_head_dim': 64, 'ssm_state_size': 64, 'n_groups': 1}
        | {'hybrid_override_pattern': 'M-*E', 'num_key_value_heads': 4, 'head_dim': 32, 'intermediate_size': 1024}
        | {'n_routed_experts': 32, 'num_experts_per_tok': 4, 'n_group': 1, 'topk_group': 1}
        | {'moe_intermediate_size': 128, 'moe_shared_expert_intermediate_size': 256},
    ),
    'olmo2': ('Olmo2Config', 'Olmo2ForCausalLM', {k: v for k, v in ATTENTION.items() if k != 'head_dim'}),
    'bert': ('BertConfig', 'BertForMaskedLM', {**COMMON, 'intermediate_size': 1024, 'pad_token_id': 0}),
}


class Peer:
    """A model of transformers with random weights, and what is timed of it."""

    def __init__(self, family: str, ids: np.ndarray, targets: np.ndarray) -> None:
        config_class, model_class, fields = FAMILIES[family]
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**fields)
        self.network: Any = getattr(transformers, model_class)(config).float().eval()
        self._ids, self._targets = (torch.from_numpy(array.astype(np.int64)) for array in (ids, targets))
        self.way = self._fastest_way() if self.network._can_set_experts_implementation() else ''

    def logits(self) -> Any:
        with torch.inference_mode():
            return self._logits()

    def step(self) -> Any:
        """The loss and the gradients, which stay until the next call."""
        self.network.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(self._logits().flatten(0, 1), self._targets.flatten())
        loss.backward()
        return loss.item()

    def _logits(self) -> Any:
        cacheless = {} if self.network.config.model_type == 'bert' else {'use_cache': False}
        return self.network(self._ids, **cacheless).logits

    def _fastest_way(self) -> str:
        """The one of WAYS whose steps are fastest, from now on the model's."""
        times = in_turn({way: partial(self._stepped, way) for way in WAYS}, 2)
        best = min(times, key=lambda way: times[way].wall_ms)
        self.network.set_experts_implementation(best)
        return best

    def _stepped(self, way: str) -> Any:
        self.network.set_experts_implementation(way)
        return self.step()


def runs_of(cfg: ModelConfig, params: Any, ids: np.ndarray, targets: np.ndarray) -> dict[str, Callable[[], Any]]:
    """What is timed of jpt: the logits, and the loss with its gradients as a training step computes them."""
    compute = Compute(unroll=cfg.num_layers)
    tokens, wanted = jnp.asarray(ids), jnp.asarray(targets)
    weights = jnp.full(ids.shape, 1 / ids.size, jnp.float32)

    def logits(params: Any) -> jax.Array:
        return unembed(cfg, params, forward(cfg, params, tokens, compute=compute).hidden_BTD)

    def loss(params: Any) -> jax.Array:
        if cfg.encoder is not None:  # its head is not one product
            logp_BTV = jax.nn.log_softmax(logits(params))
            return -jnp.mean(jnp.take_along_axis(logp_BTV, wanted[..., None], axis=-1))
        hidden_BTD = forward(cfg, params, tokens, compute=compute).hidden_BTD
        args = {'targets': wanted}
        kernel_VD = head_kernel(cfg, params)
        return linear_loss(hidden_BTD, kernel_VD, weights, args, cross_entropy(), vocab_size=cfg.vocab_size)[0]

    fwd, step = jax.jit(logits), jax.jit(jax.value_and_grad(loss))
    return {'fwd': lambda: fwd(params), 'step': lambda: step(params)}


def measured(family: str, repeats: int) -> Json:
    """One line of the table.

    Raises:
        ValueError: the logits or losses of the two sides differ.
    """
    random = np.random.default_rng(0)
    ids, targets = random.integers(1, VOCAB, (2, ROWS, LENGTH)).astype(np.int32)
    peer = Peer(family, ids, targets)
    with tempfile.TemporaryDirectory() as directory:
        peer.network.save_pretrained(directory)
        cfg, params = load_hf(directory)
    ours = runs_of(cfg, jax.device_put(params), ids, targets)
    wanted = peer.logits().numpy()
    difference = float(np.abs(np.asarray(ours['fwd']()) - wanted).max() / np.abs(wanted).max())
    losses = float(ours['step']()[0]), peer.step()
    if not (difference < TOLERANCE and abs(losses[0] - losses[1]) < TOLERANCE):
        raise ValueError(f'{family}: logits differ by {difference:.1e} of the largest, losses are {losses}')
    times: dict[str, Timing] = in_turn(
        {'jpt fwd': ours['fwd'], 'peer fwd': peer.logits, 'jpt step': ours['step'], 'peer step': peer.step}, repeats
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    about = {'family': family, 'parameters': count, 'difference': difference, 'experts': peer.way}
    return about | {name.replace(' ', '_'): timing._asdict() for name, timing in times.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default=','.join(FAMILIES), help='families, with commas between them')
    parser.add_argument('--repeats', type=int, default=8)
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    options = parser.parse_args()
    chosen = options.only.split(',')
    for family in chosen:
        if family not in FAMILIES:
            parser.error(f'--only: {family!r}: expected some of {", ".join(FAMILIES)}')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes
    about = machine() | {'torch': torch.__version__, 'transformers': transformers.__version__}
    about['threads'] = str(torch.get_num_threads())
    print(', '.join(f'{name} {value}' for name, value in about.items()))
    print('milliseconds, the best call; ratio: how many times faster jpt is')
    sides = f'{"peer":>7}{"ratio":>7}'
    print(f'{"":12}{"parameters":>11}{"logits":>9}{"jpt fwd":>9}{sides}{"jpt step":>10}{sides}')
    rows = []
    for family in chosen:
        row = measured(family, options.repeats)
        rows.append(row)
        shown = f'{family:12}{row["parameters"]:11,}{row["difference"]:9.0e}'
        for what, width in (('fwd', 9), ('step', 10)):
            own, other = (row[f'{side}_{what}']['wall_ms'] for side in ('jpt', 'peer'))
            shown += f'{own:{width}.0f}{other:7.0f}{other / own:7.2f}'
        print(f'{shown}  {row["experts"]}', flush=True)
    if options.json:
        print(json.dumps({'benchmark': 'families', 'machine': about, 'rows': rows}))


if __name__ == '__main__':
    main()
