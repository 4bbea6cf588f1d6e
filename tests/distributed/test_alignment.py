"""Matrices start at multiples of 16 bytes, which the fast kernels of a matrix product need."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks


@pytest.mark.slow
def test_every_matrix_is_aligned_at_every_stage_and_precision(tmp_path):
    out = tmp_path / "report.json"
    run_ranks(2, Path(__file__).with_name("alignment.py"), out)
    report = json.loads(out.read_text())
    assert len(report) == 14
    for cell, found in report.items():
        assert found["misplaced"] == [], cell
        assert found["unseen"] == [], cell
        # Filters of an odd number of samples: their own rows are not aligned, wherever they start.
        assert all(".msae." in name for name in found["odd"]), cell
        assert len(found["odd"]) == 3
        assert len(found["seen"]) > 12
