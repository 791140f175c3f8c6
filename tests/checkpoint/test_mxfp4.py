"""MXFP4: the arithmetic against a loop over codes, the golden gpt-oss, and what is refused by name."""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpt.checkpoint import mxfp4
from jpt.checkpoint.hf_export import export_hf, write_hf
from jpt.checkpoint.hf_import import HuggingFaceSource, load_hf
from jpt.checkpoint.mxfp4 import unpack
from jpt.checkpoint.source import whole
from jpt.models.families import config_from_hf
from jpt.models.names import leaves, to_hf
from jpt.models.transformer import forward, unembed

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
PACKED = GOLDEN / 'mxfp4' / 'gpt_oss'
DOWN = 'model.layers.1.mlp.experts.down_proj'
BOTH = 'model.layers.0.mlp.experts.gate_up_proj'


def element(code: int) -> float:
    """E2M1: a sign, two bits of exponent with bias 1, one bit of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def test_every_byte_under_every_scale_is_exact_in_bfloat16() -> None:
    """Powers from 2^-127 to 2^125; a float64 holds each of these products, and the sign of zero shows too."""
    scales = np.repeat(np.arange(253, dtype=np.uint8), 16)[:, None]  # a byte each, 16 bytes to a block
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 1, 16), (253, 1, 1))
    found = unpack(blocks, scales)
    assert found.dtype == ml_dtypes.bfloat16
    assert found.shape == (253 * 16, 32)
    codes = [element(byte >> 4 * half & 15) for byte in range(256) for half in (0, 1)]
    expected = np.array([[code * 2.0 ** (scale - 127) for code in codes] for scale in range(253)])
    np.testing.assert_array_equal(found.astype(np.float64).reshape(253, 512), expected)
    np.testing.assert_array_equal(found.astype(np.float32).reshape(253, 512), expected.astype(np.float32))
    assert np.array_equal(np.signbit(found.astype(np.float64).reshape(253, 512)), np.signbit(expected))


def test_leading_axes_and_several_blocks_of_a_row() -> None:
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2, 3, 4, 16), dtype=np.uint8)
    scales = random.integers(100, 140, (2, 3, 4), dtype=np.uint8)
    found = unpack(blocks, scales)
    assert found.shape == (2, 3, 128)
    for (i, j, column), value in np.ndenumerate(found):
        byte = int(blocks[i, j, column // 32, column % 32 // 2])
        assert value == element(byte >> 4 * (column % 2) & 15) * 2.0 ** (int(scales[i, j, column // 32]) - 127)
    assert unpack(blocks[:, :0], scales[:, :0]).shape == (2, 0, 128)


@pytest.mark.parametrize(('scale', 'byte', 'fine'), [(255, 0, False), (254, 0x77, False), (253, 0x25, True)])
def test_a_scale_that_makes_no_finite_number_is_refused(scale: int, byte: int, fine: bool) -> None:
    """255 is no number; 6 * 2^127 is too much, and 3 * 2^126 and 2^126 are not."""
    blocks, scales = np.full((1, 16), byte, np.uint8), np.full(1, scale, np.uint8)
    if fine:
        assert unpack(blocks, scales).tolist() == [3 * 2.0**126, 2.0**126] * 16
        return
    with pytest.raises(ValueError, match=f'a scale of {scale}: expected at most 252'):
        unpack(blocks, scales)


def test_the_golden_model_has_the_matrices_and_logits_of_transformers() -> None:
    golden = np.load(PACKED / 'golden.npz')
    cfg, params = load_hf(PACKED, dtype='float32')
    found = to_hf(cfg, params)
    dense = [name for name in golden.files if name not in ('tokens', 'logits')]
    assert len(dense) == 4
    for name in dense:
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], golden[name], err_msg=name)
    with jax.default_matmul_precision('highest'):
        logits = jax.jit(lambda p, t: unembed(cfg, p, forward(cfg, p, t).hidden_BTD))(params, golden['tokens'])
    np.testing.assert_allclose(logits, golden['logits'], rtol=0, atol=1e-4)


def test_packed_matrices_are_bfloat16_unless_another_dtype_is_asked_for() -> None:
    source = HuggingFaceSource(PACKED)
    golden = np.load(PACKED / 'golden.npz')
    kernels = [leaf for leaf in leaves(source.cfg) if 'experts' in leaf.path and leaf.role == 'kernel']
    assert len(kernels) == 6
    assert {source.dtype(leaf) for leaf in kernels} == {np.dtype(ml_dtypes.bfloat16)}
    (down,) = (leaf for leaf in kernels if leaf.sources[0].name == DOWN)
    assert source.read(down, whole(down)).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(source.read(down, whole(down))[0].swapaxes(-1, -2).astype(np.float32), golden[DOWN])
    assert {source.dtype(leaf) for leaf in leaves(source.cfg) if leaf not in kernels} == {np.dtype(np.float32)}
    half = HuggingFaceSource(PACKED, 'float16').read(down, whole(down))
    np.testing.assert_array_equal(half[0].swapaxes(-1, -2), golden[DOWN].astype(np.float16))


def test_a_part_is_that_part_of_the_whole_and_unpacks_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    source = HuggingFaceSource(PACKED)
    asked: list[tuple[int, ...]] = []

    def counted(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
        asked.append(scales.shape)
        return unpack(blocks, scales)

    for leaf in leaves(source.cfg):
        if 'experts' not in leaf.path or leaf.role != 'kernel':
            continue
        all_of_it = source.read(leaf, whole(leaf))
        _, _, rows, columns = leaf.shape
        for cut in (slice(0, columns), slice(5, 29), slice(31, 32), slice(7, 7), slice(columns - 3, columns)):
            index = (slice(0, 1), slice(1, 3), slice(rows // 3, rows // 2), cut)
            monkeypatch.setattr(mxfp4, 'unpack', counted)
            part = source.read(leaf, index)
            monkeypatch.undo()
            np.testing.assert_array_equal(part, all_of_it[index])
        assert max(asked) <= (rows // 2 - rows // 3, columns // 32)
        assert len(asked) == 5 * 2
        asked.clear()


def copy_with(to: pathlib.Path, tensors: dict[str, np.ndarray], **config: object) -> pathlib.Path:
    """The golden directory with tensors replaced, or left out where None, and config fields likewise."""
    shutil.copytree(PACKED, to)
    merged = load_file(PACKED / 'model.safetensors') | tensors
    save_file({name: array for name, array in merged.items() if array is not None}, to / 'model.safetensors')
    fields = json.loads((PACKED / 'config.json').read_text()) | config
    (to / 'config.json').write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return to


@pytest.mark.parametrize(
    ('tensors', 'words'),
    [
        ({f'{DOWN}_scales': None}, [f'{DOWN}_scales: missing beside {DOWN}_blocks']),
        ({f'{DOWN}_blocks': None}, [f'{DOWN}_blocks: missing beside {DOWN}_scales']),
        ({f'{DOWN}_blocks': None, f'{DOWN}_scales': None}, [f'{DOWN}: missing, expected [4, 32, 64]']),
        (
            {f'{DOWN}_scales': np.zeros((4, 63, 1), np.uint8)},
            [f'{DOWN}_scales: has shape [4, 63, 1], expected [4, 64, 1]'],
        ),
        (
            {f'{DOWN}_blocks': np.zeros((4, 64, 16), np.uint8), f'{DOWN}_scales': np.zeros((4, 64, 1), np.int8)},
            [f'{DOWN}_blocks: has shape [4, 64, 16], expected [experts, out,', f'{DOWN}_scales: is int8, expected'],
        ),
        (
            {f'{DOWN}_blocks': np.zeros((4, 64, 2, 16), np.uint8), f'{DOWN}_scales': np.zeros((4, 64, 2), np.uint8)},
            [f'{DOWN}: has shape [4, 64, 64], expected [4, 32, 64]'],
        ),
        ({DOWN: np.zeros((4, 32, 64), np.float32)}, [f'{DOWN}: stored packed and as it is']),
        (
            {
                'model.layers.0.self_attn.q_proj.weight': None,
                'model.layers.0.self_attn.q_proj.weight_blocks': np.zeros((1, 64, 2, 16), np.uint8),
                'model.layers.0.self_attn.q_proj.weight_scales': np.zeros((1, 64, 2), np.uint8),
            },
            ['self_attn.q_proj.weight: has shape [1, 64, 64], expected [64, 64]'],
        ),
    ],
    ids=['scales', 'blocks', 'neither', 'scales-shape', 'not-blocks', 'shape', 'both', 'attention'],
)
def test_what_does_not_belong_together_is_named(tmp_path: pathlib.Path, tensors: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        HuggingFaceSource(copy_with(tmp_path / 'bad', tensors))
    for word in ['bad', *words]:
        assert word in str(caught.value)


def test_a_damaged_scale_is_named_when_it_is_read(tmp_path: pathlib.Path) -> None:
    scales = load_file(PACKED / 'model.safetensors')[f'{BOTH}_scales']
    scales[2, 5, 1] = 255  # of expert 2; row 5 is a row of up
    source = HuggingFaceSource(copy_with(tmp_path / 'bad', {f'{BOTH}_scales': scales}))
    of_both = {leaf.path[-2]: leaf for leaf in leaves(source.cfg) if leaf.sources[0].name == BOTH}
    gate, up = of_both['gate'], of_both['up']
    with pytest.raises(ValueError, match=rf'bad: {BOTH}_scales, expert 2: a scale of 255'):
        source.read(up, whole(up))
    assert np.isfinite(source.read(gate, whole(gate)).astype(np.float32)).all()


@pytest.mark.parametrize(
    ('family', 'given', 'words'),
    [
        ('gpt_oss', {'quant_method': 'awq'}, "quantization_config.quant_method='awq': expected 'mxfp4' (gpt_oss)"),
        ('gpt_oss', {'modules_to_not_convert': []}, "quant_method=None: expected 'mxfp4'"),
        ('gpt_oss', 'mxfp4', "quantization_config='mxfp4': expected an object (gpt_oss)"),
        ('gpt_oss', {'quant_method': 'mxfp4', 'bits': 3}, 'quantization_config has unknown fields: bits (gpt_oss)'),
        ('llama', {'quant_method': 'mxfp4'}, 'quantization_config='),
        ('llama4_text', {'quant_method': 'mxfp4'}, 'quantization_config='),
    ],
)
def test_other_quantization_is_refused_by_name(family: str, given: object, words: str) -> None:
    config = json.loads((GOLDEN / 'models' / family / 'config.json').read_text())
    assert config_from_hf(config).family == family
    with pytest.raises(ValueError) as caught:
        config_from_hf(config | {'quantization_config': given})
    assert words in str(caught.value)


def test_packed_tensors_without_the_config_that_says_so_look_quantized(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=rf'(?s)it looks quantized, which is not read.*{BOTH}: missing'):
        HuggingFaceSource(copy_with(tmp_path / 'silent', {}, quantization_config=None))


def test_an_export_is_plain(tmp_path: pathlib.Path) -> None:
    """Streamed or from memory: experts in bfloat16, no quantization_config, and it reads back equal."""
    cfg, params = load_hf(PACKED)
    export_hf(tmp_path / 'memory', cfg, params, source_dir=PACKED)
    write_hf(HuggingFaceSource(PACKED), tmp_path / 'streamed', source_dir=PACKED)
    golden = np.load(PACKED / 'golden.npz')
    stored = load_file(PACKED / 'model.safetensors')
    for directory in (tmp_path / 'memory', tmp_path / 'streamed'):
        written = load_file(directory / 'model.safetensors')
        assert not [name for name in written if name.endswith(('_blocks', '_scales'))]
        assert written[DOWN].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(written[DOWN].astype(np.float32), golden[DOWN])
        np.testing.assert_array_equal(written[BOTH].astype(np.float32), golden[BOTH])
        np.testing.assert_array_equal(written[f'{DOWN}_bias'], stored[f'{DOWN}_bias'])
        config = json.loads((directory / 'config.json').read_text())
        assert 'quantization_config' not in config
        assert 'initializer_range' in config  # travels along with what else leaves the computation alone
        again, same = load_hf(directory)
        assert again == cfg
        assert all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(params)))
