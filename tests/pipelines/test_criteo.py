"""The Criteo pipeline: the official files' form, in pieces; the sample; the configs and baselines over real rows."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.commands import run_command, run_python

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "pipelines" / "criteo"


@pytest.fixture
def prepare():
    spec = importlib.util.spec_from_file_location("criteo_prepare", FOLDER / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(number, integers=None, strings=None):
    integers = integers or [number + place if place % 3 else "" for place in range(13)]
    strings = strings or [f"{number * 26 + place:08x}" if place % 5 else "" for place in range(26)]
    return "\t".join(map(str, [number % 2, *integers, *strings])) + "\n"


def row(number):
    integers = {f"i{place + 1}": number + place if place % 3 else None for place in range(13)}
    strings = {f"c{place + 1}": number * 26 + place if place % 5 else None for place in range(26)}
    return {"label": number % 2, **integers, **strings}


def test_the_official_files_are_read_in_pieces(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 2000)  # a few lines
    monkeypatch.setattr(prepare, "ROW_GROUP_ROWS", 16)
    with gzip.open(tmp_path / "day_0.gz", "wt") as file:
        file.writelines(line(number) for number in range(50))
    (tmp_path / "day_1").write_text("".join(line(number) for number in range(50, 60)))
    last = "".join(line(number) for number in range(100, 121)).removesuffix("\n")
    (tmp_path / "day_2.tsv").write_text(last)
    files = ["day_0.gz", "day_1", "day_2.tsv"]
    counts = prepare.from_text([tmp_path / name for name in files], tmp_path / "out")
    assert counts == {"train": 60, "validation": 10, "test": 11}
    written = pq.ParquetFile(tmp_path / "out" / "train" / "day_0.parquet")
    sizes = [written.metadata.row_group(group).num_rows for group in range(written.num_row_groups)]
    assert sizes == [16, 16, 16, 2]
    assert pq.read_table(tmp_path / "out" / "train").to_pylist() == [row(number) for number in range(60)]
    assert pq.read_table(tmp_path / "out" / "validation").to_pylist() == [row(number) for number in range(100, 110)]
    assert pq.read_table(tmp_path / "out" / "test").to_pylist() == [row(number) for number in range(110, 121)]


def test_digits_are_read_whatever_their_case(prepare, tmp_path):
    strings = ["ffffffff", "FFFFFFFF", "0000000a", "89abcdef", *[""] * 22]
    for name in ("a", "b"):
        (tmp_path / name).write_text(line(1, [-2, *[""] * 12], strings))
    prepare.from_text([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    (found,) = pq.read_table(tmp_path / "out" / "train").to_pylist()
    assert [found[f"c{place}"] for place in range(1, 6)] == [2**32 - 1, 2**32 - 1, 10, 0x89ABCDEF, None]
    assert (found["i1"], found["i2"]) == (-2, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (line(1, strings=["0123456g", *[""] * 25]), r"column c1: '0123456g' is not 8 hexadecimal digits"),
        (line(1, strings=["", "01234567", "0123", *[""] * 23]), r"column c3: '0123' is not 8 hexadecimal digits"),
        ("1\t2\t3\n", "Expected 40 columns, got 3"),
        (line(1, ["x"] * 13), "conversion error to int32"),
    ],
)
def test_what_is_no_row_is_refused_and_nothing_is_left(prepare, tmp_path, monkeypatch, text, words):
    for name in ("a.tsv", "b.tsv"):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("a.tsv", "b.tsv")]
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--tsv", *files, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=words) as stop:
        prepare.main()
    assert "a.tsv" in str(stop.value)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_one_file_has_nothing_to_hold_out(prepare, tmp_path):
    with pytest.raises(ValueError, match="--tsv names 1 file; the last of at least two is held out"):
        prepare.from_text([tmp_path / "a"], tmp_path / "out")


@pytest.fixture(scope="module")
def sample(data_set_once, tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    done = run_python(FOLDER / "prepare.py", "--source", data_set_once, "--out", out / "criteo")
    assert "train 70,000 rows, test 10,000 rows" in done.stdout, done.stderr
    return out


@pytest.fixture(scope="module")
def data_set_once():
    for root in (os.environ.get("EMBEDSHARD_DATA"), ROOT.parent / "shared" / "data"):
        if root and (Path(root) / "criteo-1tb-80k").is_dir():
            return Path(root) / "criteo-1tb-80k"
    return pytest.skip("the data set criteo-1tb-80k is not here")


@pytest.mark.parametrize(("name", "steps"), [("dlrm", 240), ("dcn_v2", 40), ("deepfm", 40)])
def test_a_config_trains_on_the_sample(sample, tmp_path, name, steps):
    done = run_command(
        "train", FOLDER / f"{name}.yaml", "--run-dir", tmp_path / "run", "--set", f"train.max_steps={steps}",
        "--set", "evaluate.bootstrap=20", EMBEDSHARD_DATA=str(sample),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["auc"] > 0.55, "20,000 to 30,000 rows tell something"
    assert result["intervals"]["auc"][1] - result["intervals"]["auc"][0] > 0.03, "345 clicks leave that much open"


@pytest.mark.slow
def test_the_baselines_are_measured_on_the_same_rows(sample):
    command = [sys.executable, str(FOLDER / "baselines.py"), "--data", str(sample / "criteo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = {name: float(rest.split()[1]) for name, _, rest in (one.partition(": ") for one in done.stdout.splitlines())}
    assert 0.7 < found["logistic"] < 0.75
    assert 0.7 < found["trees"] < 0.76
