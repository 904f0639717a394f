"""Which cores workers run on: equal parts, siblings together, and none where there are too few or nobody wants it."""

import os

import pytest

from embedshard.errors import ConfigError
from embedshard.launch import cores
from embedshard.launch.cores import shares


@pytest.fixture
def usable(monkeypatch):
    """Makes this process one that may run on the given cores."""
    return lambda *numbers: monkeypatch.setattr(cores, "usable_cores", lambda: list(numbers))


@pytest.fixture
def topology(tmp_path):
    """Describes logical cores as Linux does, given the socket, the die where there are several, and the physical core."""

    def describe(places):
        for number, (socket, *die, core) in places.items():
            folder = tmp_path / f"cpu{number}" / "topology"
            folder.mkdir(parents=True)
            (folder / "physical_package_id").write_text(f"{socket}\n")
            (folder / "core_id").write_text(f"{core}\n")
            for one in die:
                (folder / "die_id").write_text(f"{one}\n")
        return tmp_path

    return describe


@pytest.mark.parametrize(
    ("numbers", "workers", "expected"),
    [
        ((0, 1), 2, [{0}, {1}]),
        ((0, 1, 2, 3, 4, 5, 6), 3, [{0, 1, 2}, {3, 4}, {5, 6}]),
        ((2, 5, 9), 2, [{2, 5}, {9}]),
    ],
)
def test_usable_cores_are_shared_out_evenly(usable, tmp_path, numbers, workers, expected):
    usable(*numbers)
    assert shares(workers, {}, tmp_path / "nobody tells") == expected


def test_threads_of_a_physical_core_go_to_one_worker(usable, topology):
    """As Linux mostly numbers them: first one of each physical core, socket by socket, then their siblings."""
    usable(*range(8))
    folder = topology({number: (number % 4 // 2, number % 2) for number in range(8)})
    assert shares(2, {}, folder) == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert shares(4, {}, folder) == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]
    assert shares(3, {}, folder) == [{0, 4, 1, 5}, {2, 6}, {3, 7}], "three of four physical cores' worth, none cut"
    assert shares(5, {}, folder) == [{0, 4}, {1, 5}, {2, 6}, {3}, {7}], "more workers than physical cores"


def test_cores_of_one_number_in_two_dies_are_two(usable, topology):
    usable(*range(4))
    folder = topology({number: (0, number // 2, number % 2) for number in range(4)})
    assert shares(4, {}, folder) == [{0}, {1}, {2}, {3}]
    assert shares(2, {}, folder) == [{0, 1}, {2, 3}], "die by die"


@pytest.mark.parametrize(
    ("numbers", "workers", "environment"),
    [((0, 1), 3, {}), ((0, 1), 1, {}), ((0, 1), 2, {"EMBEDSHARD_BIND_CORES": "0"})],
)
def test_nobody_is_bound(usable, numbers, workers, environment):
    usable(*numbers)
    assert shares(workers, environment) is None


def test_a_wrong_wish_is_told():
    with pytest.raises(ConfigError, match="EMBEDSHARD_BIND_CORES is 'no'"):
        shares(2, {"EMBEDSHARD_BIND_CORES": "no"})


def test_the_cores_that_a_process_may_use_are_asked_of_the_system():
    assert cores.usable_cores() == sorted(os.sched_getaffinity(0))
