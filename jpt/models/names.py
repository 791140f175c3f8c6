"""Which tensor of a Hugging Face checkpoint is which leaf of the parameter tree, in both directions."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from jpt.models.config import ModelConfig

TreePath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one layer of a leaf lies in a checkpoint: a tensor's name, and how to get from it to the leaf.

    `transposed`: stored (in, out), as GPT-2's Conv1D does. `part` of `parts`: a slice of the tensor's output dimension,
    as in GPT-2's fused projection of queries, keys and values.
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The leaf's values, from the tensor in the file."""
        out_first = tensor.T if self.transposed else tensor
        size = out_first.shape[0] // self.parts
        return out_first[self.part * size : (self.part + 1) * size]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor in the file, for a leaf (one layer of it) of this shape."""
        whole = (shape[0] * self.parts, *shape[1:])
        return whole[::-1] if self.transposed else whole


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter tree: its path, its logical shape, and the source of each of its layers.

    `shape` has a leading repeats axis where `stacked`; `role` says what the leaf is for, for sharding and decay.
    """

    path: TreePath
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    stacked: bool
    role: Literal['embedding', 'kernel', 'bias', 'norm']


LLAMA_LAYER = {
    'attn_norm': 'input_layernorm',
    'attn.q': 'self_attn.q_proj',
    'attn.k': 'self_attn.k_proj',
    'attn.v': 'self_attn.v_proj',
    'attn.out': 'self_attn.o_proj',
    'attn.q_norm': 'self_attn.q_norm',
    'attn.k_norm': 'self_attn.k_norm',
    'mlp_norm': 'post_attention_layernorm',
    'mlp.gate': 'mlp.gate_proj',
    'mlp.up': 'mlp.up_proj',
    'mlp.down': 'mlp.down_proj',
}
GEMMA_LAYER = LLAMA_LAYER | {
    'attn_post_norm': 'post_attention_layernorm',
    'mlp_norm': 'pre_feedforward_layernorm',
    'mlp_post_norm': 'post_feedforward_layernorm',
}
GPT2_LAYER = {
    'attn_norm': 'ln_1',
    'attn.q': 'attn.c_attn',
    'attn.k': 'attn.c_attn',
    'attn.v': 'attn.c_attn',
    'attn.out': 'attn.c_proj',
    'mlp_norm': 'ln_2',
    'mlp.up': 'mlp.c_fc',
    'mlp.down': 'mlp.c_proj',
}


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The names that a family gives its tensors."""

    embed: str
    layer_prefix: str  # before the layer's number
    layer: Mapping[str, str]
    final_norm: str
    positions: str = ''
    conv1d: bool = False
    fused: tuple[str, ...] = ()  # modules of ours that lie in one tensor there, in its order


LLAMA = Dialect('model.embed_tokens', 'model.layers', LLAMA_LAYER, 'model.norm')
GEMMA = dataclasses.replace(LLAMA, layer=GEMMA_LAYER)
GPT2 = Dialect(
    'transformer.wte',
    'transformer.h',
    GPT2_LAYER,
    'transformer.ln_f',
    positions='transformer.wpe',
    conv1d=True,
    fused=('attn.q', 'attn.k', 'attn.v'),
)
DIALECTS: dict[str, Dialect] = {
    'llama': LLAMA,
    'mistral': LLAMA,
    'qwen2': LLAMA,
    'qwen3': LLAMA,
    'gemma': LLAMA,
    'gemma2': GEMMA,
    'gemma3_text': GEMMA,
    'gpt2': GPT2,
}


def leaves(cfg: ModelConfig) -> list[Leaf]:
    """Every leaf of the model's parameter tree, in the order of the network."""
    dialect = DIALECTS[cfg.family]
    found = [_table(('embed', 'embedding'), dialect.embed, cfg.vocab_size, cfg.width)]
    if cfg.learned_positions:
        found.append(_table(('positions', 'embedding'), dialect.positions, cfg.max_length, cfg.width))
    for segment_index, segment in enumerate(cfg.segments):
        for kind_index, kind in enumerate(segment.kinds):
            for module, leaf, shape in _layer_shapes(cfg, kind.mlp_width):
                layers = [cfg.layer_index(segment_index, kind_index, r) for r in range(segment.repeats)]
                sources = tuple(_layer_source(dialect, layer, module, leaf) for layer in layers)
                path: TreePath = ('layers', segment_index, kind_index, *module.split('.'), leaf)
                found.append(Leaf(path, (segment.repeats, *shape), sources, True, _role(module, leaf)))
    for leaf in _norm_leaves(cfg):
        name = 'weight' if leaf == 'scale' else 'bias'
        source = Source(f'{dialect.final_norm}.{name}')
        found.append(Leaf(('final_norm', leaf), (cfg.width,), (source,), False, 'norm'))
    if not cfg.tied:
        head = Source('lm_head.weight')
        found.append(Leaf(('lm_head', 'kernel'), (cfg.vocab_size, cfg.width), (head,), False, 'kernel'))
    return found


def _table(path: TreePath, name: str, rows: int, width: int) -> Leaf:
    return Leaf(path, (rows, width), (Source(f'{name}.weight'),), False, 'embedding')


def _norm_leaves(cfg: ModelConfig) -> tuple[str, ...]:
    return ('scale', 'bias') if cfg.norm == 'layer' else ('scale',)


def _role(module: str, leaf: str) -> Literal['kernel', 'bias', 'norm']:
    if module.endswith('norm'):
        return 'norm'
    return 'kernel' if leaf == 'kernel' else 'bias'


def _layer_shapes(cfg: ModelConfig, mlp_width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Module, leaf and shape of everything in one layer."""
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    linears = [
        ('attn.q', queries, cfg.width, cfg.qkv_bias),
        ('attn.k', keys, cfg.width, cfg.qkv_bias),
        ('attn.v', keys, cfg.width, cfg.qkv_bias),
        ('attn.out', cfg.width, queries, cfg.attention_out_bias),
        ('mlp.gate', mlp_width, cfg.width, cfg.mlp_bias),
        ('mlp.up', mlp_width, cfg.width, cfg.mlp_bias),
        ('mlp.down', cfg.width, mlp_width, cfg.mlp_bias),
    ]
    norms = ['attn_norm', 'mlp_norm'] + (['attn_post_norm', 'mlp_post_norm'] if cfg.post_norms else [])
    for module, out, into, has_bias in linears:
        if module == 'mlp.gate' and not cfg.gated_mlp:
            continue
        yield module, 'kernel', (out, into)
        if has_bias:
            yield module, 'bias', (out,)
    for module in norms:
        for leaf in _norm_leaves(cfg):
            yield module, leaf, (cfg.width,)
    if cfg.qk_norm:
        yield 'attn.q_norm', 'scale', (cfg.head_dim,)
        yield 'attn.k_norm', 'scale', (cfg.head_dim,)


def _layer_source(dialect: Dialect, layer: int, module: str, leaf: str) -> Source:
    stored = 'bias' if leaf == 'bias' else 'weight'
    name = f'{dialect.layer_prefix}.{layer}.{dialect.layer[module]}.{stored}'
    transposed = dialect.conv1d and leaf == 'kernel'
    if module in dialect.fused:
        return Source(name, transposed, dialect.fused.index(module), len(dialect.fused))
    return Source(name, transposed)


def get(tree: Any, path: TreePath) -> Any:
    """The leaf at a path of a parameter tree."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: dict[str, Any], path: TreePath, leaf: Any) -> None:
    """Sets the leaf at a path, making the dicts and lists on the way."""
    node: Any = tree
    for key, following in itertools.pairwise(path):
        if isinstance(node, list):
            while len(node) <= int(key):
                node.append(None)
            if node[int(key)] is None:
                node[int(key)] = [] if isinstance(following, int) else {}
            node = node[int(key)]
        else:
            node = node.setdefault(key, [] if isinstance(following, int) else {})
    node[path[-1]] = leaf


def to_hf(cfg: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint under their Hugging Face names, from a tree of the parameters' structure."""
    parts: dict[str, list[np.ndarray]] = {}
    first: dict[str, Source] = {}
    for leaf in leaves(cfg):
        values = np.asarray(get(params, leaf.path))
        for index, source in enumerate(leaf.sources):
            first.setdefault(source.name, source)
            parts.setdefault(source.name, []).append(values[index] if leaf.stacked else values)
    tensors = {}
    for name, pieces in parts.items():
        whole = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        tensors[name] = np.ascontiguousarray(whole.T if first[name].transposed else whole)
    return tensors


def from_hf(cfg: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameter tree (numpy leaves), from tensors under their Hugging Face names."""
    params: dict[str, Any] = {}
    for leaf in leaves(cfg):
        layers = [source.read(tensors[source.name]) for source in leaf.sources]
        put(params, leaf.path, np.stack(layers) if leaf.stacked else np.ascontiguousarray(layers[0]))
    return params
