"""Gives a child process the settings of tests/conftest.py: imported before anything of JAX."""

import pathlib
import runpy

runpy.run_path(str(pathlib.Path(__file__).resolve().parents[1] / 'conftest.py'))
