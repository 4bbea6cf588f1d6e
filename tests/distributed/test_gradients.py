"""Loss and every gradient of a fixed global batch are the same for any ranks, micro-batch and ZeRO stage.

A loss comparison alone is blind to a gather without gradient: the loss is right and the gradient 1/R
too small. So gradients are compared, parameter by parameter, with one rank, one micro-batch, ZeRO 0:
{1, 2, 4 ranks} x {1, 2, 3 accumulation steps} x ZeRO {0, 1, 2, 3} x every method, a third of them: any three of
these four in every combination.
"""

import itertools
import json
from pathlib import Path

import pytest

from tests.distributed.gradients import ACCUMULATIONS, METHODS, STAGES, cells
from tests.ranks import run_ranks

PROGRAM = Path(__file__).with_name("gradients.py")
RANKS = (1, 2, 4)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """ranks -> cell -> largest relative differences."""
    folder = tmp_path_factory.mktemp("gradients")
    found = {}
    for ranks in RANKS:  # one rank first: it writes the reference
        run_ranks(ranks, PROGRAM, folder, folder / f"{ranks}.json")
        found[ranks] = json.loads((folder / f"{ranks}.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", RANKS)
def test_gradients_do_not_depend_on_the_split(matrix, ranks, method):
    found = {name: cell for name, cell in matrix[ranks].items() if name.split()[0] == method}
    assert {name.split()[1] for name in found} == {f"zero{stage}" for stage in STAGES}
    assert {name.split()[2] for name in found} == {f"x{accumulation}" for accumulation in ACCUMULATIONS}
    for name, cell in found.items():
        assert cell["parameters"] > 30
        assert cell["without_gradient"] == [], name
        assert cell["loss"][0] <= 1e-5, (name, cell)
        assert cell["grad"][0] <= 1e-5, (name, cell)


def test_any_three_of_the_four_meet_in_every_combination():
    chosen = [(ranks, *cell) for ranks in RANKS for cell in cells(ranks)]
    for kept in itertools.combinations(range(4), 3):
        choices = [(RANKS, METHODS, STAGES, ACCUMULATIONS)[i] for i in kept]
        assert {tuple(cell[i] for i in kept) for cell in chosen} == set(itertools.product(*choices))
