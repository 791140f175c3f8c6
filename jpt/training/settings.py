"""Everything that a training job can be told: the dataclasses behind `python -m jpt.train --config=...`."""

import dataclasses
from typing import Literal

from jpt.config import ConfigError, require
from jpt.data.config import DataConfig
from jpt.distill.settings import DistillConfig, RecordConfig, TeacherMesh
from jpt.models.block import remat_policy
from jpt.quant.recipes import EVERYTHING, KEEP, Recipe, recipe_of
from jpt.quant.tensors import Gradients, refused_gradients
from jpt.sharding.mesh import MeshConfig
from jpt.sharding.multihost import MultihostConfig
from jpt.training.optimizer import OptimizerConfig
from jpt.training.schedule import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model to start from: a checkpoint's directory, or an architecture with random weights."""

    path: str | None = None  # a Hugging Face directory or a jpt checkpoint; 'quickstart' is the teacher that jpt ships
    architecture: dict[str, object] | None = None  # the fields of a Hugging Face config.json
    layers: tuple[
        int, ...
    ] = ()  # numbers of the layers of `path` that stay, ascending: a student from a teacher; (): all
    mtp: bool = True  # keep modules that predict further tokens, where there are any

    def __post_init__(self) -> None:
        one = (self.path is None) != (self.architecture is None)
        require(self, 'path', one, 'a directory, or None and the fields of an architecture')
        require(self, 'layers', not self.layers or self.path is not None, '() where there is no path')


@dataclasses.dataclass(frozen=True)
class TeacherSource(ModelSource):
    """One of several teachers."""

    weight: float = 1.0  # its share of every divergence is this over the sum of all weights

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 'weight', self.weight > 0, 'a positive number')


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How the routers of a model with experts are trained; without effect on others."""

    balance_loss: float = 0.0  # weight of the loss that spreads tokens evenly, summed over layers
    balance_over: Literal['text', 'batch'] = 'text'  # evenly within each text, or over the whole batch
    z_loss: float = 0.0  # weight of the mean of logsumexp(logits)^2
    correction_rate: float = 0.001  # step of the bias that evens out the load of a model that has one; 0 keeps it
    capacity: float | None = None  # an expert takes this multiple of an even share, the rest is dropped; None: all

    def __post_init__(self) -> None:
        for name in ('balance_loss', 'z_loss', 'correction_rate'):
            require(self, name, getattr(self, name) >= 0, 'a number of 0 or more')
        require(self, 'capacity', self.capacity is None or self.capacity > 0, 'a positive number or None')


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The batch of one optimizer step, over all devices."""

    size: int = 8  # rows
    length: int = 256  # tokens of a row
    microbatches: int = 1  # the step adds up gradients over so many parts; the result does not depend on it

    def __post_init__(self) -> None:
        for name in ('size', 'length', 'microbatches'):
            require(self, name, getattr(self, name) > 0, 'a positive integer')
        require(self, 'microbatches', self.size % self.microbatches == 0, f'a divisor of size={self.size}')


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the step is computed; nothing here changes what is computed, up to rounding."""

    dtype: Literal['float32', 'bfloat16', 'float64'] = 'float32'  # of activations and products
    param_dtype: Literal['float32', 'bfloat16', 'float64'] = 'float32'  # of the trained weights
    teacher_dtype: Literal['float32', 'bfloat16', 'float64'] | None = None  # of teachers, all of it; None: dtype
    remat: str = 'none'  # 'none', 'full', 'dots', 'save:names', 'offload:names'
    attention: Literal['auto', 'blockwise', 'dense', 'cudnn'] = 'auto'
    unroll: int = 1  # layers per iteration of the scan
    exchange: Literal['padded', 'ragged'] = 'padded'  # how tokens travel over mesh.expert; 'ragged' needs GPUs
    pipeline: Literal['1f1b', 'gpipe'] = '1f1b'
    chunks: int = 1  # virtual pipeline stages per device
    xla_flags: str | None = None  # a preset of GPU flags, see jpt.training.xla_flags

    def __post_init__(self) -> None:
        require(self, 'unroll', self.unroll > 0, 'a positive integer')
        require(self, 'chunks', self.chunks > 0, 'a positive integer')
        if self.remat != 'none':
            remat_policy(self.remat)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of full weights."""

    targets: tuple[str, ...] = ('layers/**/attn/{q,k,v,out}',)  # path patterns of linear layers
    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank

    def __post_init__(self) -> None:
        require(self, 'rank', self.rank > 0, 'a positive integer')


@dataclasses.dataclass(frozen=True)
class FakeQuantConfig:
    """Training through rounded weights (QAT; with a teacher, QAD), or in FP8."""

    # Pairs of a pattern over weights and a format (jpt/quant/formats.py) or 'none'; the last one that covers holds.
    recipe: tuple[tuple[str, str], ...] = ((EVERYTHING, 'nvfp4_weights'),)
    # In place of a recipe: a quantized model (python -m jpt.quantize), whose formats and static scales of inputs it is.
    calibrated: str | None = None
    clipped: bool = False  # with calibrated: what is beyond a static scale passes no gradient, else all does
    # 'block' (with fp8_block), 'tensor' or 'te' (with fp8_tensor): by products in FP8 too, see docs/fp8_training.md.
    gradients: Gradients = 'as_they_are'
    result: Literal['quantized', 'weights'] = 'quantized'  # what the run ends with and exports: codes, or the masters

    def __post_init__(self) -> None:
        try:
            found = self.choices()
        except ValueError as error:
            raise ConfigError(type(self).__name__, 'recipe', self.recipe, str(error)) from error
        if self.calibrated is not None:
            require(self, 'recipe', self.recipe == type(self).recipe, 'its default where calibrated is given')
            require(self, 'gradients', self.gradients == 'as_they_are', "'as_they_are' where calibrated is given")
            return
        require(self, 'clipped', not self.clipped, 'False without calibrated: no input is beyond a scale of its own')
        formats = [choice.format for choice in found if choice.format is not None]
        current = self.gradients in ('tensor', 'te')
        static = not current and any(form.inputs == 'tensor' for form in formats)
        ways = "formats whose inputs need no calibration (fp8_tensor: gradients='tensor'), or calibrated in its place"
        require(self, 'recipe', not static, ways)
        refused = next(filter(None, (refused_gradients(self.gradients, form) for form in formats)), None)
        require(self, 'gradients', refused is None, f"'as_they_are', or another recipe: {refused}")
        ends = not current or self.result == 'weights'
        require(self, 'result', ends, f"'weights' with gradients={self.gradients!r}: inputs have no static scale")

    def choices(self) -> Recipe:
        """The recipe."""
        return recipe_of([(pattern, None if name == KEEP else name) for pattern, name in self.recipe])


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out text and how often it is looked at."""

    data: DataConfig | None = None  # without paths it is None too, so that a config can say how paths will be read
    every: int = 0  # steps; 0: at the end only
    batches: int = 0  # 0: all of the data

    def __post_init__(self) -> None:
        if self.data is not None and not self.data.paths:
            object.__setattr__(self, 'data', None)
        for name in ('every', 'batches'):
            require(self, name, getattr(self, name) >= 0, 'an integer of 0 or more')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and which saves are kept."""

    every: int = 500  # steps
    keep: int = 2  # the newest so many, and the best by held-out loss where there is evaluation
    export: bool = True  # write a Hugging Face directory at the end

    def __post_init__(self) -> None:
        for name in ('every', 'keep'):
            require(self, name, getattr(self, name) > 0, 'a positive integer')


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics go. JSON lines are always written to workdir/metrics.jsonl."""

    every: int = 10  # steps
    tensorboard: bool = False
    wandb: str | None = None  # name of the project
    profile: tuple[int, int] | None = None  # first and last step of a profiler trace, under workdir/profile

    def __post_init__(self) -> None:
        require(self, 'every', self.every > 0, 'a positive integer')
        steps = self.profile or (1, 1)
        require(self, 'profile', 1 <= steps[0] <= steps[1], 'the first and the last step of a trace, counted from 1')


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """After a distillation: train the same student without its teacher on the same tokens, and compare all three."""

    prompts: tuple[str, ...] = ()  # a sample of each model's text is shown for each
    sample_tokens: int = 64
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training job."""

    task: Literal['pretrain', 'sft', 'distill']
    model: ModelSource
    data: DataConfig
    teacher: ModelSource | None = None
    teachers: dict[str, TeacherSource] = dataclasses.field(default_factory=dict)  # several, by name, and no `teacher`
    teacher_mesh: TeacherMesh | None = None  # None: the teacher runs in the student's program, on its mesh
    tokenizer: str | None = None  # a directory; None: the model's own, or else the teacher's
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    record: RecordConfig = dataclasses.field(default_factory=RecordConfig)
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    mtp_loss: float = (
        0.0  # weight of the losses of modules that predict further tokens; 0 keeps such modules as they are
    )
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    steps: int = 1000
    seed: int = 0
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    freeze: tuple[str, ...] = ()  # path patterns, see jpt.quant.paths
    lora: LoraConfig | None = None
    quantize: FakeQuantConfig | None = None  # train through rounded weights
    ema: float | None = None  # decay of a moving average of the weights
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    multihost: MultihostConfig = dataclasses.field(default_factory=MultihostConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    compare: CompareConfig | None = None

    def __post_init__(self) -> None:
        require(self, 'steps', self.steps > 0, 'a positive integer')
        require(self, 'mtp_loss', self.mtp_loss >= 0, 'a number of 0 or more')
        trains_mtp = self.lora is None or not self.mtp_loss
        require(self, 'mtp_loss', trains_mtp, '0 where lora is given: no adapter reaches modules for further tokens')
        require(self, 'ema', self.ema is None or 0 < self.ema < 1, 'a number between 0 and 1, or None')
        given, recorded = bool(self.teachers) + (self.teacher is not None), self.distill.targets is not None
        learns = self.task == 'distill'
        require(self, 'teacher', learns or not given, "None, and no teachers, unless task is 'distill'")
        allowed = 'a model, or else teachers, or distill.targets a directory'
        require(self, 'teacher', not learns or given == 1 or (recorded and not given), allowed)
        require(self, 'teachers', not (self.teachers and recorded), 'none where distill.targets is given')
        self._check_likely_words()
        require(
            self, 'distill', learns or self.distill == DistillConfig(), "as it is by default, unless task is 'distill'"
        )
        end = self.distill.schedule.end if self.distill.schedule else 0
        require(self, 'steps', end <= self.steps, f'at least {end}, the end of distill.schedule')
        named = all(name.isidentifier() and name not in ('model', 'student') for name in self.teachers)
        require(self, 'teachers', named, "names of letters, digits and underscores other than 'model' and 'student'")
        self._check_routes()
        compares = self.compare is None or self.teacher is not None
        require(self, 'compare', compares, 'None where there is no single teacher to compare with')
        has_text = self.compare is None or self.eval.data is not None
        require(self, 'compare', has_text, 'None, unless eval.data.paths names held-out text to compare on')
        traced = self.log.profile[1] if self.log.profile else 1
        require(self, 'steps', traced <= self.steps, f'at least {traced}, the last step of log.profile')
        if self.distill.alignment is not None:
            require(self, 'teachers', not self.teachers, 'one teacher where distill.alignment is given')
            require(self, 'compare', self.compare is None, 'None where distill.alignment is given: no common tokens')
        require(self, 'quantize', self.quantize is None or self.lora is None, 'None where lora is given')
        require(self, 'lora', self.lora is None or not self.freeze, 'None where freeze is given: LoRA freezes the rest')

    def _check_likely_words(self) -> None:
        """Of a teacher that is not in the student's program: settings that need it there, or are for such a one."""
        distill, apart = self.distill, self.teacher_mesh is not None
        runs = self.teacher is not None and distill.targets is None and not distill.pairs and distill.alignment is None
        allowed = 'None, unless there is one teacher, without distill.targets, distill.pairs and distill.alignment'
        require(self, 'teacher_mesh', runs or not apart, allowed)
        if distill.form != 'tail' and not apart and distill.targets is None:
            allowed = "'tail' where neither distill.targets nor teacher_mesh is given: no words are left out"
            raise ConfigError(type(self).__name__, 'distill.form', distill.form, allowed)

    def _check_routes(self) -> None:
        """Raises ConfigError, by the setting, where records name teachers and others do not go with that."""
        key, held_out = self.data.route_key, self.eval.data
        if key and len(self.teachers) < 2:
            raise ConfigError('TrainConfig', 'data.route_key', key, "'', unless teachers names two or more of them")
        for name, teacher in self.teachers.items() if key else ():
            if teacher.weight != 1:
                allowed = '1 where data.route_key is set: a record has one teacher'
                raise ConfigError('TrainConfig', f'teachers.{name}.weight', teacher.weight, allowed)
        if held_out is not None and bool(held_out.route_key) != bool(key):
            allowed = f'a key, as data.route_key is {key!r}' if key else "'', as data.route_key is"
            raise ConfigError('TrainConfig', 'eval.data.route_key', held_out.route_key, allowed)

    def routes(self) -> tuple[str, ...]:
        """What the field data.route_key of a record may hold: the names of the teachers; () without that."""
        return tuple(self.teachers) if self.data.route_key else ()

    def named_teachers(self) -> dict[str, ModelSource]:
        """All teachers by name; a single one is called 'teacher'."""
        single = {} if self.teacher is None else {'teacher': self.teacher}
        return {**single, **self.teachers}

    def teachers_beside(self) -> dict[str, ModelSource]:
        """Those that run in the student's program: not one that was recorded, or has a mesh of its own."""
        elsewhere = self.distill.targets is not None or self.teacher_mesh is not None
        return {} if elsewhere else self.named_teachers()

    def without_teacher(self) -> 'TrainConfig':
        """The same student on the same data, learning from the text alone."""
        return dataclasses.replace(
            self, task='pretrain', teacher=None, teacher_mesh=None, compare=None, distill=DistillConfig()
        )

    def teacher_shares(self) -> tuple[float, ...]:
        """The share of each of `named_teachers` in every divergence, in all 1."""
        weights = [getattr(teacher, 'weight', 1.0) for teacher in self.named_teachers().values()]
        return tuple(weight / sum(weights) for weight in weights)


def teacher_alone(config: TrainConfig, mesh: MeshConfig, microbatches: int) -> TrainConfig:
    """The job of a distillation's teacher alone, which trains nothing, on a mesh without a pipeline.

    Raises:
        ValueError: the job has no single teacher, or one with another tokenizer, or the mesh a pipeline.
    """
    if config.teacher is None:
        raise ValueError('config.teacher=None: expected the model whose words are asked for')
    if config.distill.alignment is not None:
        raise ValueError(
            f'config.distill.alignment={config.distill.alignment}: what a teacher says is recorded of its own tokens: '
            'expected None, and a student with its tokenizer'
        )
    if mesh.pipe != 1:
        raise ValueError(
            f'config.mesh.pipe={mesh.pipe}: a teacher is recorded without a pipeline: expected 1 '
            '(--config.mesh.pipe=1), and the devices in data, fsdp, expert, context or tensor'
        )
    dtype = config.compute.teacher_dtype or config.compute.dtype
    return dataclasses.replace(
        config,
        task='pretrain',
        model=dataclasses.replace(config.teacher, mtp=False),
        teacher=None,
        teacher_mesh=None,
        distill=DistillConfig(),
        compare=None,
        lora=None,
        quantize=None,
        freeze=(),
        ema=None,
        mtp_loss=0.0,
        router=RouterConfig(),
        batch=dataclasses.replace(config.batch, microbatches=microbatches),
        compute=dataclasses.replace(config.compute, dtype=dtype, param_dtype=dtype, teacher_dtype=None, chunks=1),
        mesh=MeshConfig(**mesh.sizes()),
    )
