"""The paper's tables as grids of runs, run once each."""
