"""The forms in which people hold audio: each module reads one, its docstring says what it expects."""
