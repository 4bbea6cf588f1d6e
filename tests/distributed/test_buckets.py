"""Buckets of gradients, and whether their sums run beside the backward pass, change no bit."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks


@pytest.mark.slow
def test_buckets_and_overlap_change_no_bit(tmp_path):
    run_ranks(2, Path(__file__).with_name("buckets.py"), tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) == 8
    for cell, found in report.items():
        assert found["one"] == found["overlap"] == found["many"], cell
        assert found["one"][0] != found["one"][2]  # it trains
