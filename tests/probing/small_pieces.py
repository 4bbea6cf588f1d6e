"""A rank of test_embed.py: launchers/embed.py with pieces of one batch, or of two files."""

import runpy

from pipeline.serving import embed

if __name__ == "__main__":
    embed.MOST_BATCHES, embed.FILES = 1, 2
    runpy.run_path("launchers/embed.py", run_name="__main__")
