"""What `embedshard plan` says of memory is what a large table takes: trained, saved piece by piece, and resumed."""

import importlib.util
from pathlib import Path

import pytest

ROWS = 12_000_000


def script():
    path = Path(__file__).parents[1] / "benchmarks" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_large_table_takes_no_more_than_the_plan_says(tmp_path, workers):
    """A second copy of the table anywhere, 430 MB, would be far beyond a tenth."""
    scale = script()
    data = scale.generate(tmp_path, ROWS, 40_000)
    config = scale.write_config(tmp_path, data, ROWS, 16, 8192)
    found = scale.measure(tmp_path, config, ROWS, workers, 4)
    for peak in (found["peak_bytes"], found["resumed_peak_bytes"]):
        assert abs(peak / found["plan_bytes"] - 1) < 0.1, found
