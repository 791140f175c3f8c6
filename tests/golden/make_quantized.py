"""Writes tests/golden/quantized/: quantized weights and tiny checkpoints as other libraries make them.

Run by hand where torch (CPU) and the libraries are installed; none is a dependency of the project. llm-compressor pins
an older transformers than the others run with, so it has an environment of its own:

    python tests/golden/make_quantized.py sources modelopt transformers  # nvidia-modelopt, transformers, accelerate
    python tests/golden/make_quantized.py compressed_tensors             # llmcompressor, peft

README.md here says what the files hold.
"""

import argparse
import importlib
import warnings

import torch
import transformers
from quantized_cases import store

MAKERS = {
    'sources': 'quantized_models',
    'modelopt': 'quantized_modelopt',
    'transformers': 'quantized_transformers',
    'compressed_tensors': 'quantized_compressed',
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('peers', nargs='+', choices=list(MAKERS))
    parser.add_argument('--no-checkpoints', action='store_true', help='weights.npz alone')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter('ignore')
    for peer in arguments.peers:
        maker = importlib.import_module(MAKERS[peer])
        if hasattr(maker, 'weight_arrays'):
            store(peer, maker.weight_arrays())
        if not arguments.no_checkpoints:
            maker.checkpoints()


if __name__ == '__main__':
    main()
