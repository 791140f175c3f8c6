"""Caches, sampling, and the decode program."""
