"""The command line as a person meets it."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.commands import run_command


def run(*arguments):
    return run_command(*arguments, COLUMNS="120")


def run_afresh(*arguments, **environment):
    """As a person starts it: with an interpreter of its own, which has nothing imported."""
    return subprocess.run(
        [sys.executable, "-m", "embedshard.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "120", **environment},
        check=False,
    )


@pytest.fixture
def config_file(make_config, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(make_config().tree))
    return path


def test_help_names_the_commands():
    shown = run_afresh("--help")
    assert shown.returncode == 0
    for word in ("train", "evaluate", "summary", "plan", "verify", "report", "audit", "doctor", "config", "Exit codes"):
        assert word in shown.stdout


def test_help_and_config_do_not_import_torch():
    code = "import sys, embedshard.cli, embedshard.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_train_then_evaluate_agree(config_file, tmp_path):
    trained = run_afresh("train", config_file, "--run-dir", tmp_path / "run", "--set", "train.epochs=1")
    assert trained.returncode == 0, trained.stderr
    assert f"Result: {tmp_path / 'run' / 'result.json'}" in trained.stdout
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in trained.stdout
    assert "step 7/7" in trained.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    evaluated = run_afresh("evaluate", tmp_path / "run", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads(evaluated.stdout)
    assert found["test"] == result["metrics"]
    assert found["step"] == result["selected_step"]
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["train"]["epochs"] == 1


def test_evaluate_shows_the_baselines_unless_it_is_told_not_to(make_config, tmp_path):
    path = tmp_path / "tiny.yaml"
    baselines = ["popularity", {"kind": "ease", "l2": 5}, {"kind": "item_knn", "neighbours": 5}]
    path.write_text(yaml.safe_dump(make_config({"evaluate": {"baselines": baselines}}).tree))
    trained = run("train", path, "--run-dir", tmp_path / "run", "--set", "train.max_steps=1")
    assert trained.returncode == 0, trained.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(result["baselines"]) == ["popularity", "ease", "item_knn"]
    for word in ("Test set", "model", *result["baselines"]):
        assert word in trained.stdout

    shown = run("evaluate", tmp_path / "run")
    assert shown.returncode == 0, shown.stderr
    heading = next(line for line in shown.stdout.splitlines() if "metric" in line)
    for name in ("validation", "test", *(f"{name}, test" for name in result["baselines"])):
        assert name in heading
    row = next(line for line in shown.stdout.splitlines() if "recall@5" in line)
    for values in (result["metrics"], *result["baselines"].values()):
        assert f"{values['recall@5']:.4f}" in row

    told = run("evaluate", tmp_path / "run", "--json")
    found = json.loads(told.stdout)
    assert (found["baselines"], found["slices"]) == (result["baselines"], result["slices"])

    plain = run("evaluate", tmp_path / "run", "--no-baselines")
    assert plain.returncode == 0, plain.stderr
    assert f"{result['metrics']['recall@5']:.4f}" in plain.stdout
    assert "popularity" not in plain.stdout
    assert json.loads(run("evaluate", tmp_path / "run", "--no-baselines", "--json").stdout).keys() == {
        "step", "validation", "test",
    }  # fmt: skip


def test_evaluate_says_which_baseline_is_left_out_and_keeps_json_clean(make_config, tmp_path):
    path = tmp_path / "tiny.yaml"
    changes = {"evaluate": {"baselines": ["popularity", "item_knn"], "baseline_bytes": 100}}
    path.write_text(yaml.safe_dump(make_config(changes, splits=("train", "validation")).tree))
    assert run("train", path, "--run-dir", tmp_path / "run", "--set", "train.max_steps=1").returncode == 0
    shown = run("evaluate", tmp_path / "run", "--json")
    assert shown.returncode == 0, shown.stderr
    assert "Baseline 'item_knn' is left out: it needs about" in shown.stderr
    assert list(json.loads(shown.stdout)["baselines"]) == ["popularity"]
    shown = run("evaluate", tmp_path / "run")
    assert "popularity, validation" in shown.stdout, "without a test set, the validation set is what is compared"


def test_the_default_folder_of_a_run_is_named_after_the_config(config_file, tmp_path):
    shown = run_command("train", config_file, "--set", "train.max_steps=1", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert [p.name.startswith("tiny-") for p in (tmp_path / "runs").iterdir()] == [True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "CONFIG", "--set", "tables.item.dims=3"], ["tables.item.dims", "Did you mean 'dim'?"]),
        (["train", "nothing.yaml"], ["nothing.yaml", "no such file"]),
        (["train"], ["embedshard train CONFIG", "--resume"]),
        (
            ["train", "CONFIG", "--set", "data.train=nowhere/*.parquet"],
            ["nowhere/*.parquet", "no file matches", "make the data"],
        ),
        (["train", "CONFIG", "--device", "cuda"], ["cuda", "doctor"]),
        (["train", "--resume", "nowhere"], ["nowhere", "is not there"]),
        (["evaluate", "nowhere"], ["nowhere", "is not there"]),
        (["train", "CONFIG", "--set", "evaluate.metrics=[recal@20]"], ["recal@20", "recall@20"]),
        (["summary", "nothing.yaml"], ["no such file"]),
        (["report", "nowhere"], ["nowhere", "is not there"]),
    ],
)
def test_a_mistake_is_shown_without_a_traceback_and_exits_2(config_file, tmp_path, arguments, words):
    arguments = [config_file if argument == "CONFIG" else argument for argument in arguments]
    if arguments[0] == "train" and "--resume" not in arguments and len(arguments) > 1:
        arguments += ["--run-dir", tmp_path / "run"]
    shown = run(*arguments)
    assert shown.returncode == 2, shown.stdout + shown.stderr
    assert "Traceback" not in shown.stderr
    for word in words:
        assert word in shown.stderr, shown.stderr


def test_a_run_is_not_written_over(config_file, tmp_path):
    assert run("train", config_file, "--run-dir", tmp_path / "run", "--set", "train.max_steps=1").returncode == 0
    shown = run("train", config_file, "--run-dir", tmp_path / "run")
    assert shown.returncode == 2
    assert "--resume" in shown.stderr


def test_summary_counts_every_table_and_layer(config_file):
    shown = run("summary", config_file)
    assert shown.returncode == 0, shown.stderr
    # user 41 x 8, item 31 x 8, item_id:bias 31 x 4, layers 17 x 16 + 16 + 16 x 8 + 8
    for word in ("41 x 8", "328", "31 x 4", "user_tower.mlp.0.weight", "16 x 17", f"{328 + 248 + 124 + 424:,}"):
        assert word in shown.stdout, shown.stdout
    assert "CUDA" in shown.stdout


def test_doctor_finds_this_environment_sound():
    shown = run_afresh("doctor")
    assert shown.returncode == 0, shown.stdout
    for word in ("Python", "release triple", "they match and load", "cores", "memory", "disk", "OpenMP", "Ray"):
        assert word in shown.stdout


def test_doctor_names_the_fix_for_spinning_threads():
    shown = run_command("doctor", OMP_WAIT_POLICY="ACTIVE")
    assert shown.returncode == 1
    assert "Unset OMP_WAIT_POLICY" in shown.stdout


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"torch": "2.15.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}, "torch 2.13 goes with"),
        ({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": "1.8.0"}, "break each other"),
        ({"torch": "2.13.0", "torchrec": "1.8.0"}, "not installed"),
        ({"torch": "2.13.0", "torchrec": "1.9.0", "fbgemm-gpu": "1.8.0"}, "goes with"),
    ],
)
def test_doctor_sees_a_triple_that_does_not_match(monkeypatch, versions, words):
    from embedshard.launch import doctor

    monkeypatch.setattr(doctor, "_version", versions.get)
    findings = list(doctor._triple())
    assert findings[-1].state == "wrong"
    assert words in findings[-1].found + findings[-1].fix
    assert findings[-1].fix


def test_config_schema_is_json():
    shown = run("config", "schema")
    assert json.loads(shown.stdout)["properties"]["data"]


@pytest.mark.slow
def test_verify_tells_what_law_one_covers(config_file):
    done = run("verify", config_file, "--steps", "3", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    by_case = {(case["sharding"], case["world_size"]): case for case in found["cases"]}
    assert len(by_case) == 24
    assert found["passed"]
    assert found["steps"] == 3
    assert by_case["column_wise", 2]["status"] == "pass", "user is cut, item with row-wise Adagrad stays whole"
    assert "item: column_wise keeps one statistic of row-wise Adagrad" in by_case["column_wise", 2]["why"]
    assert by_case["row_wise", 4]["loss_difference"] < 1e-5


def test_verify_refuses_a_mistake_with_exit_code_two(config_file):
    done = run("verify", config_file, "--set", "data.train=nothing/*.parquet")
    assert done.returncode == 2
    assert "no file matches" in done.stderr
    assert "Traceback" not in done.stderr
