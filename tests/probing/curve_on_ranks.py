"""A rank of test_curve.py: the probes of a model of random weights.

python tests/probing/curve_on_ranks.py SHARDS PROBE_SHARDS OUT
"""

import json
import sys
from pathlib import Path

from pipeline import distributed
from pipeline.config import PretrainRecipe
from pipeline.data.corpus import load_corpus
from pipeline.data.spec import DataSpec
from pipeline.methods import PRETRAIN
from pipeline.probing.curve import Curve
from pipeline.recipes import load_recipe
from pipeline.tasks import PretrainTask

if __name__ == "__main__":
    shards, probe, out = sys.argv[1:]
    words = [f"data.shards={shards}", f"eval.probe={probe}", "model.size=micro", "data.workers=1"]
    recipe = load_recipe(PretrainRecipe, [], words)
    spec = DataSpec.of(load_corpus(recipe.data), recipe.data)
    with distributed.session(300.0, 0) as world:
        task = PretrainTask(recipe, spec.mel_bins, spec.frames).eval()
        curve = Curve(recipe, spec, PRETRAIN["pswacl"], world)
        found = curve.measure(task, {"spec": task.model.grid, "wav": task.model.wav_grid})
        Path(f"{out}-{world.rank}").write_text(json.dumps(found))
