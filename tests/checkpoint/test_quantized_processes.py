"""A quantized model in two real processes, each with half of every matrix: what they save and export is all of it."""

import processes
from quantized_models import BLOCKS, LLAMA, assert_same, quantized_model

import jpt


def test_two_processes_save_and_export_what_they_load(tmp_path):
    _, model = quantized_model(LLAMA, BLOCKS)  # 20 rows of 40 in a process, in blocks of 16
    model.save(tmp_path / 'model')
    job = processes.start_task(tmp_path, 'quantized')
    try:
        for index in range(2):
            code, _, errors = job.result(index)
            assert code == 0, errors
    finally:
        job.kill()
    assert_same(jpt.load(tmp_path / 'saved').params, model.params)
    assert_same(jpt.load(tmp_path / 'exported').params, model.params)
