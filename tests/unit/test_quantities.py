"""How quantities are written and read."""

import pytest

from embedshard.config.parts import CheckpointConfig
from embedshard.quantities import parse_size, size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("17", 17),
        ("2GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        ("512MiB", 512 * 2**20),
        ("512 MiB", 512 * 2**20),
        ("1.5K", 1500),
        ("3Ti", 3 * 2**40),
        ("1_000_000", 10**6),
        ("1 B", 1),
    ],
)
def test_sizes_are_read(text, count):
    assert parse_size(text) == count
    assert CheckpointConfig(memory_bytes=text).memory_bytes == count


@pytest.mark.parametrize("text", ["", "B", "GB", "-1", "1e9", "2XB", "2 GB x", "1.5.2", "IB", "1I"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="such as 2GB or 512MiB"):
        parse_size(text)


@pytest.mark.parametrize("count", [0, 999, 1024, 3 * 2**20, 5 * 2**30, 7 * 2**40])
def test_a_size_that_is_written_is_read_back(count):
    assert parse_size(size(count)) == count
