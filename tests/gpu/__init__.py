"""Checks of a machine with GPUs: `python -m tests.gpu`; see `__main__`."""
