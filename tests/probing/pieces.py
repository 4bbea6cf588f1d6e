"""A rank of test_probe.py: features of the training clips in pieces of one batch.

python tests/probing/pieces.py RUN SHARDS FOLDER POOL
"""

import sys
from pathlib import Path

from pipeline import distributed
from pipeline.config import DataConfig
from pipeline.data.corpus import load_corpus
from pipeline.data.spec import DataSpec
from pipeline.probing import features
from pipeline.probing.frozen import open_frozen

if __name__ == "__main__":
    run, shards, folder, pool = sys.argv[1:]
    features.MOST_BATCHES = 1
    with distributed.session(300.0, 0) as world:
        frozen = open_frozen(run, DataSpec.of(load_corpus(DataConfig(shards=shards)), DataConfig(shards=shards)))
        features.compute(frozen, shards, "train", [2, 4], pool, Path(folder), world, workers=0)  # type: ignore[arg-type]
