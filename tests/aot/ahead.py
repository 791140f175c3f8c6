"""Compiles a function for one H100 that is not here, and reads what its kernels became."""

import re

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.sharding.topology import topology_devices


def compiled(function, *shapes, **options):
    """`function` compiled for arrays of these (shape, dtype); options are XLA's, such as xla_dump_to."""
    mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,), devices=topology_devices(1))
    operands = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, P())) for shape in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*operands).lower().compile(compiler_options=options or None)


class Dump:
    """What Mosaic writes about the kernels that it compiles from now on; one compiled before is not written again."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        monkeypatch.setenv('MOSAIC_GPU_DUMP_TO', str(folder))
        monkeypatch.setenv('MOSAIC_GPU_DUMP_PTX', '1')
        monkeypatch.setenv('MOSAIC_GPU_DUMP_PTXAS', '1')

    def code(self):
        """The PTX of every kernel, after a look at what the assembler said: nothing spilled, nothing waited in vain."""
        texts = [path.read_text() for path in sorted(self.folder.glob('*.ptx'))]
        reports = ''.join(path.read_text() for path in self.folder.glob('*.ptxas'))
        assert re.findall(r'(\d+) bytes spill', reports) == ['0'] * (2 * len(texts))
        assert 'Potential Performance Loss' not in reports, reports  # wgmma that the assembler made sequential
        return texts


def opcodes(code):
    """The instructions of PTX, each once."""
    return set(re.findall(r'(?<![\w.%$])[a-z]\w*(?:(?:\.|::)\w+)+', code))
