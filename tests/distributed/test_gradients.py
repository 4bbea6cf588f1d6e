"""Loss and every gradient of a fixed global batch are the same for any ranks, micro-batch and ZeRO stage.

A loss comparison alone is blind to a gather without gradient: the loss is right and the gradient 1/R
too small. So gradients are compared, parameter by parameter, with one rank, one micro-batch, ZeRO 0:
{1, 2, 4 ranks} x {1, 2, 3 accumulation steps} x ZeRO {0, 1, 2, 3} for every method.
"""

import json
from pathlib import Path

import pytest

from tests.distributed.gradients import ACCUMULATIONS, METHODS, STAGES
from tests.ranks import run_ranks

PROGRAM = Path(__file__).with_name("gradients.py")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """ranks -> cell -> largest relative differences."""
    folder = tmp_path_factory.mktemp("gradients")
    found = {}
    for ranks in (1, 2, 4):  # one rank first: it writes the reference
        run_ranks(ranks, PROGRAM, folder, folder / f"{ranks}.json")
        found[ranks] = json.loads((folder / f"{ranks}.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_do_not_depend_on_the_split(matrix, ranks, method):
    cells = {name: cell for name, cell in matrix[ranks].items() if name.split()[0] == method}
    assert len(cells) == len(STAGES) * len(ACCUMULATIONS)
    for name, cell in cells.items():
        assert cell["parameters"] > 30
        assert cell["without_gradient"] == [], name
        assert cell["loss"][0] <= 1e-5, (name, cell)
        assert cell["grad"][0] <= 1e-5, (name, cell)
