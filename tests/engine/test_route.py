"""The route of a training step is as short as docs/design.md says, traced while it runs."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks

STEP = ["pipeline/engine/loop.py train", "pipeline/engine/step.py accumulate"]
MASKED = [*STEP, "pipeline/tasks.py forward", "pipeline/objectives/masked_patch.py masked_patch_loss"]
CONTRAST = ["pipeline/objectives/contrastive.py swacl_loss", "pipeline/objectives/contrastive.py forward"]


@pytest.mark.slow
@pytest.mark.parametrize(("micro", "before"), [(4, "pipeline/tasks.py forward"),
                                               (2, "pipeline/engine/step.py _cache_contrast")])  # fmt: skip
def test_four_frames_to_the_masked_patches_and_five_to_the_contrast(shards, tmp_path, micro, before):
    run_ranks(1, Path(__file__).with_name("route.py"), shards, tmp_path / "run", tmp_path / "out.json", micro)
    routes = json.loads((tmp_path / "out.json").read_text())
    assert routes == {"masked patches": MASKED, "contrast": [*STEP, before, *CONTRAST]}
