"""A small student of a small teacher, for benchmarks: cut out of it, then trained by the settings of the quickstart."""

import argparse
import dataclasses
import os
import platform
import runpy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import jpt
from jpt.checkpoint.hf_export import write_hf
from jpt.checkpoint.opening import model_directory
from jpt.checkpoint.source import TreeSource
from jpt.config import from_config_dict
from jpt.data.batch import Batch
from jpt.data.config import TextConfig
from jpt.distill.settings import DistillConfig
from jpt.evaluation.text import batches_from
from jpt.model import Model
from jpt.models.calibration import calibrate
from jpt.models.config import ModelConfig
from jpt.pruning.importance import Importance, importance
from jpt.pruning.target import Target, steps
from jpt.training.run import train_model
from jpt.training.settings import EvalConfig, ModelSource, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 256


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is said of every such run: the teacher, the texts, and how much of them is used."""
    parser.add_argument('--teacher', default='quickstart')
    parser.add_argument('--train', default='stdlib:train')
    parser.add_argument('--held_out', default='stdlib:held_out')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--rows', type=int, default=64, help='windows to calibrate on, and to take losses of')
    parser.add_argument('--json', action='store_true')


def on_cpu(workdir: Path) -> None:
    """No other device is asked for unless JAX_PLATFORMS says so, and what is compiled once serves all later runs."""
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    jax.config.update('jax_compilation_cache_dir', str((workdir / 'compilation_cache').absolute()))


def machine() -> str:
    """What the numbers were measured on."""
    packages = ', '.join(f'{name} {version(name)}' for name in ('jax', 'flax'))
    return f'{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {packages}'


def target_of(cfg: ModelConfig) -> Target:
    """The sizes of the students of a teacher."""
    return Target(
        num_hidden_layers=cfg.num_layers - 1,
        intermediate_size=next(cfg.layer_kinds()).mlp_width // 2,
        num_attention_heads=cfg.num_kv_heads,
        hidden_size=cfg.width * 3 // 4,
    )


def importance_of(model: Model, options: argparse.Namespace, seed: int) -> Importance:
    """What matters in a teacher, by rows of the training text that the seed draws."""
    text = TextConfig.of_files(options.train, options.train, rows=options.rows, length=LENGTH, seed=seed)
    calibration, _ = batches_from(model, text)
    return importance(model.config, calibrate(model.config, model.params, calibration))


def pruned(model: Model, scores: Importance, path: Path) -> Path:
    """Writes the student that keeps what has the highest scores, unless it is there."""
    last = list(steps(TreeSource(model.config, model.params), scores, target_of(model.config)))[-1]
    if not path.exists():
        write_hf(last.source, path, source_dir=model.assets, origin=model.origin)
    return path


def quickstart() -> TrainConfig:
    """The settings of configs/quickstart.py, from full logits alone."""
    given = runpy.run_path(str(ROOT / 'configs' / 'quickstart.py'))['get_config']()
    config = from_config_dict(TrainConfig, given, 'config')
    return dataclasses.replace(config, distill=DistillConfig())


def trained(
    source: ModelSource, seed: int, rate: float, options: argparse.Namespace, workdir: Path, **changes: Any
) -> Model:
    """The student after all steps, in float32; `changes`: other fields of the settings."""
    base = quickstart()
    given = {
        'model': source,
        'teacher': ModelSource(options.teacher),
        'tokenizer': str(model_directory(options.teacher)),
        'data': dataclasses.replace(base.data, paths=(options.train,)),
        'seed': seed,
        'steps': options.steps,
        'compare': None,
        'eval': EvalConfig(),
        'schedule': dataclasses.replace(base.schedule, lr=rate),
        'checkpoint': dataclasses.replace(base.checkpoint, every=options.steps),
    }
    if not (workdir / 'model').exists():
        train_model(dataclasses.replace(base, **(given | changes)), workdir)
    return jpt.load(workdir / 'model', dtype='float32')


def held_out_of(options: argparse.Namespace) -> tuple[Model, list[Batch]]:
    """The teacher, and what losses are taken of: the same for all."""
    teacher = jpt.load(options.teacher, dtype='float32')
    text = TextConfig.of_files(options.held_out, options.held_out, rows=options.rows, length=LENGTH)
    return teacher, batches_from(teacher, text)[0]
