"""Writes tests/golden/peft/<name>/: adapters as PEFT saves them, and what PEFT computes with them.

Run by hand where torch (CPU), transformers 5.x, peft and accelerate are installed; none is a dependency of the project:

    python tests/golden/make_peft.py                          # writes the files
    python tests/golden/make_peft.py --check NAME DIRECTORY   # loads an adapter that jpt wrote over the same base model

The base models are those of make_models.py. golden.npz holds `tokens` int32 [2, T], `logits` float32 [2, T, V] with the
adapter, and under 'merged/NAME' the weights that `merge_and_unload` gives. All factors are random, B included.
"""

import argparse
import importlib
import pathlib
import shutil
from typing import Any

import numpy as np
import torch
import transformers

peft: Any = importlib.import_module('peft')  # the folder beside this file has the same name

HERE = pathlib.Path(__file__).parent
OUT = HERE / 'peft'

ADAPTERS: dict[str, dict[str, Any]] = {
    # Ranks and alphas that differ between modules and between layers of one module, and a layer left out.
    'llama': {
        'r': 4,
        'lora_alpha': 6,
        'use_rslora': True,
        'target_modules': ['q_proj', 'v_proj', 'down_proj'],
        'rank_pattern': {'v_proj': 2, 'layers.1.self_attn.q_proj': 3},
        'alpha_pattern': {'down_proj': 5, 'layers.0.self_attn.q_proj': 12},
        'layers_to_transform': [0, 1],
    },
    # Queries, keys and values are one module here.
    'gpt2': {'r': 3, 'lora_alpha': 4, 'target_modules': ['c_attn', 'mlp.c_proj'], 'fan_in_fan_out': True},
}


def base_model(name: str) -> Any:
    """The tiny base model, with exact attention."""
    directory = HERE / 'models' / name
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation='eager', dtype=torch.float32
    ).eval()


def make(name: str) -> None:
    """One adapter directory and its golden.npz."""
    config = peft.LoraConfig(task_type='CAUSAL_LM', lora_dropout=0.1, **ADAPTERS[name])
    model = peft.get_peft_model(base_model(name), config).eval()
    random = torch.Generator().manual_seed(len(name))
    adapted = set()
    with torch.no_grad():
        for parameter_name, weight in model.named_parameters():
            if 'lora_' in parameter_name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=random))
                adapted.add(parameter_name.split('.lora_')[0].removeprefix('base_model.model.') + '.weight')
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    model.peft_config['default'].base_model_name_or_path = f'tests/golden/models/{name}'
    model.save_pretrained(str(directory))
    (directory / 'README.md').unlink()
    (directory / 'adapter_model.safetensors').chmod(0o644)
    tokens = np.load(HERE / 'models' / name / 'golden.npz')['tokens']
    arrays = {'tokens': tokens, 'logits': logits_of(model, tokens)}
    merged = model.merge_and_unload().state_dict()
    arrays |= {f'merged/{weight}': merged[weight].numpy() for weight in sorted(adapted)}
    np.savez_compressed(directory / 'golden.npz', **arrays)
    print(name, len(adapted), 'modules', sum(file.stat().st_size for file in directory.iterdir()), 'bytes')


def check(name: str, directory: str) -> None:
    """Compares the logits of PEFT, with an adapter that jpt wrote, with the golden ones."""
    golden = np.load(OUT / name / 'golden.npz')
    model = peft.PeftModel.from_pretrained(base_model(name), directory).eval()
    difference = np.abs(logits_of(model, golden['tokens']) - golden['logits']).max()
    print(f'{name}: PEFT with the adapter of {directory}: largest difference of the logits {difference:.2e}')
    assert difference < 1e-4


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens, dtype=torch.long)).logits.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', nargs=2, metavar=('NAME', 'DIRECTORY'))
    arguments = parser.parse_args()
    if arguments.check:
        check(*arguments.check)
    else:
        for name in ADAPTERS:
            make(name)


if __name__ == '__main__':
    main()
