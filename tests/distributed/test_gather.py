"""Rows of all ranks come into one tensor, of any type, on gloo as on nccl."""

import json
from pathlib import Path

from tests.ranks import run_ranks


def test_rows_come_in_rank_order_through_one_flat_collective(tmp_path):
    out = tmp_path / "report.json"
    run_ranks(2, Path(__file__).with_name("gather.py"), out)
    report = json.loads(out.read_text())
    assert len(report) == 6
    for kind, found in report.items():
        assert found["rows"] == [[0, 2, 4], [1, 3, 5], [10, 12, 14], [11, 13, 15]], kind
        assert found["kept"], kind
        assert found["used"] == ["_allgather_base_"], kind  # and no list of outputs
