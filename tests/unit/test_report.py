"""Reports, parsed: what a reader of the page sees, of runs that were trained and of folders that are damaged or old."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embedshard.errors import ConfigError
from embedshard.quantities import duration, number, share, size
from embedshard.report import write_report
from embedshard.report.charts import Line, line_chart, smoothed, ticks
from embedshard.report.page import report_page
from embedshard.report.read import read_run
from embedshard.report.views import config_differences, headlines
from embedshard.train.checkpoint import newest_intact
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import JsonLinesReporter
from embedshard.world import open_world
from tests.commands import run_command

HOSTILE = "<script>alert('x')</script>"
EVERY_KEY = {
    "baselines": {"popularity": {"recall@5": 0.125, "ndcg@5": 0.5}, "ease": {"recall@5": 0.75, "ndcg@5": 0.0625}},
    "slices": {
        "head": {"recall@5": 0.8125, "queries": 31},
        "torso": {"recall@5": 0.4375, "queries": 17},
        "tail": {"recall@5": 0.1875, "queries": 5},
    },
    "ids": {
        "features": {
            "item_id": {
                "table": "item",
                "ids": 203,
                "oov_share": 0.0345,
                "distinct_rows": 29,
                "hottest": [[17, 14, "film-17"], [3, 11, HOSTILE]],
            }
        },
        "rows_counted": 203,
        "rows": 203,
    },
    "bad_rows": {
        "train": {
            "rows": 203,
            "quarantined": 9,
            "by_reason": {f"item_id: {HOSTILE}": 9},
            "oov": {"item_id": 7},
            "null": {"user_id": 3},
        },
        "test": {"rows": 60, "quarantined": 0, "by_reason": {}, "oov": {}, "null": {}},
    },
    "skipped_files": ["train/_SUCCESS"],
}


class Page(HTMLParser):
    """A page as its reader sees it: text, tables by rows of cells, what stands out, and what it would fetch or run."""

    def __init__(self, html):
        super().__init__()
        self.texts, self.tables, self.best, self.references, self.tags = [], [], [], [], []
        self._cell = None
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.references += [value for name, value in attributes.items() if name in ("src", "href", "xlink:href", "data")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell, self._is_best = [], "best" in (attributes.get("class") or "").split()

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            text = " ".join("".join(self._cell).split())
            self.tables[-1][-1].append(text)
            if self._is_best:
                self.best.append(text)
            self._cell = None

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.texts.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def row(self, name):
        """Returns the cells of each row that begins with a name."""
        found = [row for table in self.tables for row in table if row[0].rstrip(" ↑↓") == name]
        assert found, f"no row '{name}' in {self.tables}"
        return found


class Crash(Exception):
    pass


class Reporter(JsonLinesReporter):
    """Writes metrics.jsonl, and crashes after a step, before anything is saved."""

    def __init__(self, path, attempt, crash_after=None):
        super().__init__(path, attempt)
        self._crash_after, self.messages = crash_after, []

    def said(self, message):
        self.messages.append(message)

    def measured(self, step, values):
        super().measured(step, values)
        if step == self._crash_after:
            raise Crash


def start(loaded, path, attempt=1, crash_after=None):
    """Trains or goes on, as the command line does."""
    run = RunDirectory.create(path, loaded) if attempt == 1 else RunDirectory.open(path)
    reporter = Reporter(path / "metrics.jsonl", attempt, crash_after)
    with open_world("cpu") as world:
        try:
            train(loaded.config, world, run, reporter, newest_intact(run.checkpoints) if attempt > 1 else None)
        finally:
            reporter.finished()
    return reporter


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Keeps the runs that the tests of this module copy: each is trained once."""
    return {"folder": tmp_path_factory.mktemp("trained")}


@pytest.fixture
def finished(trained, make_config, tmp_path):
    """The folder of a run of 14 steps that came to its end undisturbed."""
    if "finished" not in trained:
        changes = {"train": {"log_every_steps": 1}, "evaluate": {"metrics": ["recall@5", "ndcg@5"]}, "name": HOSTILE}
        start(make_config(changes), trained["folder"] / "finished")
        trained["finished"] = trained["folder"] / "finished"
    return shutil.copytree(trained["finished"], tmp_path / "finished")


@pytest.fixture
def crashed_and_resumed(trained, make_config, tmp_path):
    """A run that saved at step 7, crashed after step 11 and came to its end from step 7."""
    if "resumed" not in trained:
        loaded, path = make_config({"train": {"log_every_steps": 1}}), trained["folder"] / "resumed"
        with pytest.raises(Crash):
            start(loaded, path, crash_after=11)
        shutil.copytree(path, trained["folder"] / "crashed")
        start(loaded, path, attempt=2)
        trained["resumed"] = path
    return shutil.copytree(trained["resumed"], tmp_path / "resumed")


def change_result(folder, **changes):
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | changes))
    return result


def page_of(folder):
    return Page(write_report([folder]).read_text())


def read(folder, now=None):
    return read_run(folder, now or datetime.now(UTC))


# ------------------------------------------------------------------------------------------------------ a finished run
def test_a_run_leaves_a_report_with_the_numbers_of_its_result(finished):
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    result = json.loads((finished / "result.json").read_text())
    assert "finished" in page.texts
    for metric, value in result["metrics"].items():
        [row] = page.row(metric)
        assert row[1] == number(value)
    for value in (result["steps"], result["samples_seen"], result["samples_per_second"]):
        assert number(value) in page.text
    assert size(result["peak_memory_bytes"]) in page.text
    assert page.row("user")[0][1:3] == ["41", "8"], "40 ids, and a row for unknown ones"
    assert page.row("item_id:bias")[0][1:3] == ["31", "4"]
    assert "min_delta" not in page.text
    assert yaml.safe_load((finished / "config.yaml").read_text())["data"]["train"] in page.text
    # loss, two validation metrics, samples a second, seconds by stage, the waterfall of a step
    assert page.tags.count("svg") == 6
    for metric, value in result["baselines"]["popularity"].items():
        assert number(value) in page.row(metric)[0]
    for name in ("head", "torso", "tail"):
        assert str(result["slices"][name]["queries"]) in page.row(name)[0]


def test_without_a_validation_set_nothing_is_said_to_be_selected(finished):
    tree = yaml.safe_load((finished / "config.yaml").read_text())
    del tree["data"]["validation"]
    (finished / "config.yaml").write_text(yaml.safe_dump(tree))
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    (finished / "metrics.jsonl").write_text("\n".join(line for line in lines if "validation/" not in line) + "\n")
    page = page_of(finished)
    assert "the last: there is no validation set to select by" in page.text
    assert "model, validation" not in page.text


def test_it_needs_nothing_from_elsewhere_and_runs_nothing(finished):
    change_result(finished, **EVERY_KEY)
    html = write_report([finished]).read_text()
    page = Page(html)
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html


def test_hostile_words_are_shown_and_not_obeyed(finished):
    change_result(finished, **EVERY_KEY)
    (finished / "quarantine").mkdir()
    columns = {"file": HOSTILE, "row_group": 2, "row": 33, "column": HOSTILE, "value": HOSTILE, "reason": HOSTILE, "step": 4}
    pq.write_table(pa.table({name: [value] for name, value in columns.items()}), finished / "quarantine" / "a.parquet")
    html = write_report([finished]).read_text()
    page = Page(html)
    assert "<script" not in html
    assert page.text.count(HOSTILE) >= 7, "name, config, reason of the result, id, and the record's columns"
    assert "<script" not in write_report([finished, finished], finished / "two.html").read_text()


def test_managed_vocabularies_are_shown(finished):
    held = {"rows": 40, "used": 29, "buckets": [[10, 10], [4, 10], [8, 10], [7, 10]]}
    change_result(finished, vocabularies={"item": held})
    told = {f"train/vocabulary/item/{name}": value for name, value in (("admitted", 30), ("evicted", 1.5))}
    with (finished / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "attempt": 1} | told | {"train/vocabulary/item/unknown_share": 0.25}) + "\n")
    row = next(row for row in page_of(finished).row("item") if "40" in row)
    assert row == ["item", "40", "29", "0 %", "10,000", "500.0", "25.00 %", "40.00 %", "100.00 %"]


def test_private_ids_are_hashed(finished):
    hottest = [[None, 14, "#0123456789ab"], [None, 11, "#ba9876543210"]]
    feature = EVERY_KEY["ids"]["features"]["item_id"] | {"hottest": hottest}
    change_result(finished, ids=EVERY_KEY["ids"] | {"features": {"item_id": feature}})
    text = page_of(finished).text
    assert "#0123456789ab" in text
    assert "row None" not in text


def test_every_key_of_a_result_is_shown(finished):
    metrics = change_result(finished, **EVERY_KEY)["metrics"]
    change_result(finished, metrics={"recall@5": 0.5, "ndcg@5": 0.25})
    page = page_of(finished)
    header = next(row for table in page.tables for row in table if "ease" in row)
    assert header == ["metric", "model", "popularity", "ease", "model, validation"]
    assert page.row("recall@5")[0][1:4] == ["0.5000", "0.1250", "0.7500"]
    assert page.best == ["0.7500", "0.5000"], "the best of each metric over the model and its baselines"
    assert "\N{MINUS SIGN}0.2500" in page.text, "beside ease, the best baseline of recall@5"
    assert page.row("head")[0] == ["head", "31", "0.8125"]
    assert page.row("tail")[0] == ["tail", "5", "0.1875"]
    assert page.row("item_id")[0] == ["item_id", "item", "203", "3.45 %", "29", "93.55 %"]
    assert "row 17 (film-17) 14 6.90 %" in page.text
    assert ["train", "203", "9", "4.43 %"] in page.row("train")
    assert ["train", "item_id", "unknown id, looked up the row for them", "7"] in page.row("train")
    assert ["train", "user_id", "null id, looked nothing up", "3"] in page.row("train")
    assert "train/_SUCCESS" in page.text
    assert metrics.keys() == {"recall@5", "ndcg@5"}


def test_smaller_is_better_where_it_is(finished):
    baselines = {"bias": {"rmse": 0.93, "auc": 0.7}, "mean": {"rmse": 1.1, "auc": 0.5}}
    change_result(finished, metrics={"rmse": 0.9, "auc": 0.6, "made_up": 1.0}, baselines=baselines)
    first, second, third = headlines(read(finished))
    assert (first.baseline, first.is_better) == ("bias", True)
    assert (second.baseline, second.is_better) == ("bias", False)
    assert third.baseline is None
    assert page_of(finished).best == ["0.9000", "0.7000"]


def test_a_folder_that_lacks_files_says_what_is_missing(finished):
    change_result(finished, metrics={}, baselines={}, slices={}, ids={}, bad_rows=None)
    for name in ("inventory.json", "attempts.jsonl", "metrics.jsonl"):
        (finished / name).unlink()
    shutil.rmtree(finished / "ledger")
    text = page_of(finished).text
    for words in (
        "No metric was measured", "Ids were not counted", "Bad rows were not counted", "no inventory",
        "Nothing was logged", "records no start", "Head, torso and tail were not measured",
    ):  # fmt: skip
        assert words in text


def test_unset_variables_stay_as_they_are_written(finished, monkeypatch):
    monkeypatch.setenv("SECRET_FOLDER", "s3://key:secret@bucket")
    tree = yaml.safe_load((finished / "config.yaml").read_text())
    tree["data"]["train"] = "${SECRET_FOLDER}/${DAY:-monday}/*.parquet"
    (finished / "config.yaml").write_text(yaml.safe_dump(tree))
    page = page_of(finished)
    assert "${SECRET_FOLDER}/${DAY:-monday}/*.parquet" in page.text
    assert "secret@bucket" not in page.text
    assert page.row("user"), "tables are told all the same"


def test_a_config_of_another_version_still_gives_a_report(finished):
    tree = yaml.safe_load((finished / "config.yaml").read_text())
    tree["train"]["from_the_future"] = 1
    (finished / "config.yaml").write_text(yaml.safe_dump(tree))
    page = page_of(finished)
    assert "train.from_the_future: unknown key" in page.text
    assert "The config does not tell of tables" in page.text
    assert "finished" in page.texts


def test_rows_of_a_vocabulary_file_are_those_that_the_run_counted(finished):
    tree = yaml.safe_load((finished / "config.yaml").read_text())
    tree["tables"]["item"] = {"dim": 8, "vocabulary": {"kind": "file", "path": "gone.parquet"}}
    (finished / "config.yaml").write_text(yaml.safe_dump(tree))
    assert page_of(finished).row("item")[0][1] == "31"
    inventory = json.loads((finished / "inventory.json").read_text())
    del inventory["table_rows"]
    (finished / "inventory.json").write_text(json.dumps(inventory))
    page = page_of(finished)
    assert page.row("item")[0][1] == "unknown"
    assert page.row("together, as far as known")


def test_where_an_attempt_went_on_is_read_from_the_attempts_themselves(crashed_and_resumed):
    shutil.rmtree(crashed_and_resumed / "ledger")
    lines = (crashed_and_resumed / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"attempt": 2' not in line or '"step": 8,' not in line]
    assert len(kept) < len(lines)
    (crashed_and_resumed / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert [attempt.resumed_after for attempt in read(crashed_and_resumed).attempts] == [0, 7]


# ----------------------------------------------------------------------------------------------- stopped, killed, resumed
def test_steps_that_were_rolled_back_are_not_drawn_but_told(crashed_and_resumed):
    run = read(crashed_and_resumed)
    lines = [json.loads(line) for line in (crashed_and_resumed / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/loss" in line]
    first, second = ({line["step"]: line["train/loss"] for line in lines if line["attempt"] == n} for n in (1, 2))
    assert (max(first), min(second)) == (11, 8)
    expected = {step: loss for step, loss in first.items() if step <= 7} | second
    assert dict(run.curves["train/loss"]) == expected
    assert [attempt.rolled_back for attempt in run.attempts] == [4, 0]
    page = page_of(crashed_and_resumed)
    assert [row[-3:] for row in page.tables[[t[0][0] for t in page.tables].index("attempt")][1:]] == [
        ["0", "11", "at least 4"], ["7", "14", "0"],
    ]  # fmt: skip
    assert "attempt 2: went on after step 7" in page.text


def test_a_line_beyond_the_restart_does_not_count_even_where_no_later_one_has_its_step(crashed_and_resumed):
    path = crashed_and_resumed / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line for line in lines if line["attempt"] == 1 or line["step"] != 9]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert 9 not in dict(read(crashed_and_resumed).curves["train/loss"])
    shutil.rmtree(crashed_and_resumed / "ledger")  # without it, the first step that was logged again tells as much
    run = read(crashed_and_resumed)
    assert 9 not in dict(run.curves["train/loss"])
    assert [attempt.resumed_after for attempt in run.attempts] == [0, 7], "as attempts.jsonl tells"


def test_a_crashed_run_has_a_report_without_a_result(crashed_and_resumed, trained, tmp_path):
    folder = shutil.copytree(trained["folder"] / "crashed", tmp_path / "crashed")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "attempt": 1, "tra')
    now = datetime.now(UTC)
    run = read(folder, now)
    assert (run.state.word, run.state.step, run.state.planned) == ("running", 11, 14), "it was heard of a moment ago"
    assert read(folder, now + timedelta(hours=1)).state.word == "stopped"
    assert read_run(folder, now, is_over=True).state.word == "stopped"
    page = Page(report_page(read(folder, now + timedelta(hours=1)), now))
    assert "stopped at step 11 of 14" in page.text
    assert "newest checkpoint is of step 7" in page.text
    assert "embedshard train --resume crashed" in page.text
    assert "1 line was cut off by a kill" in page.text
    assert page.row("recall@5")[0][-1] == number(dict(run.curves["validation/recall@5"])[7])
    assert "The test set has not been measured" in page.text


def test_a_run_that_has_only_begun_has_a_report(finished, tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()
    shutil.copy(finished / "config.yaml", folder)
    text = page_of(folder).text
    assert "stopped at step 0" in text
    assert "It has no checkpoint yet" in text


def test_a_run_that_is_extended_and_dies_is_not_finished(finished):
    line = {"step": 15, "attempt": 2, "time": "2026-01-01T00:00:00+00:00", "train/loss": 1.0}
    with (finished / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert read(finished, datetime.now(UTC) + timedelta(days=1)).state.word == "stopped"


def test_quarantined_rows_of_a_run_without_totals_are_counted_by_reason(finished):
    change_result(finished, bad_rows=None)
    (finished / "quarantine").mkdir()
    for part, count in enumerate((7, 8)):
        columns = {"file": "a.parquet", "row_group": 0, "row": 5, "column": "item_id", "value": "99", "reason": "unknown id"}
        pq.write_table(
            pa.table({name: [value] * count for name, value in columns.items()}),
            finished / "quarantine" / f"{part}.parquet",
        )
    (finished / "quarantine" / "2.parquet").write_bytes(b"PAR1 cut off")
    page = page_of(finished)
    assert ["item_id", "unknown id", "15"] in page.row("item_id")
    assert len(page.row("a.parquet")) == 10, "the first ten are shown"
    assert "quarantine/2.parquet cannot be read" in page.text


def test_a_report_that_cannot_be_written_fails_no_run(make_config, tmp_path):
    loaded = make_config({"train": {"max_steps": 1}})
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    reporter = start(loaded, tmp_path / "run")
    assert (tmp_path / "run" / "result.json").exists()
    [message] = [message for message in reporter.messages if "report" in message]
    assert "The run itself is whole" in message
    assert f"embedshard report {tmp_path / 'run'}" in message


# --------------------------------------------------------------------------------------------------------- several runs
def test_a_comparison_picks_the_best_of_each_metric_and_tells_what_differs(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    third = shutil.copytree(finished, tmp_path / "third")
    (third / "result.json").unlink()
    change_result(finished, metrics={"recall@5": 0.31, "rmse": 0.85, "log_loss": 0.6, "auc": 0.75})
    change_result(other, metrics={"recall@5": 0.32, "rmse": 0.95, "log_loss": 0.5, "auc": 0.75})
    tree = yaml.safe_load((other / "config.yaml").read_text())
    tree["tables"]["user"]["dim"] = 16
    tree["optimizer"]["tables"] = {"lr": 0.05}  # the default, written out
    (other / "config.yaml").write_text(yaml.safe_dump(tree))
    page = Page(write_report([finished, other, third], tmp_path / "c.html").read_text())
    first, second, unfinished = (page.row(name)[0] for name in ("finished", "other", "third"))
    assert first[1:] == ["0.3100", "0.8500", "0.6000", "0.7500"]
    assert second[1:] == ["0.3200", "0.9500", "0.5000", "0.7500"]
    assert unfinished[1:] == ["—"] * 4
    assert page.best[:5] == ["0.8500", "0.7500", "0.3200", "0.5000", "0.7500"], "a tie has two winners"
    assert page.row("tables.user.dim")[0][1:] == ["8", "16", "8"]
    assert config_differences([read(finished), read(other)]) == [("tables.user.dim", ["8", "16"])]
    assert page.tags.count("svg") == 4
    assert "different data" not in page.text


def test_a_comparison_says_that_the_data_differ(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "elsewhere" / "finished")
    inventory = json.loads((other / "inventory.json").read_text())
    (other / "inventory.json").write_text(json.dumps(inventory | {"fingerprint": "another"}))
    page = Page(write_report([finished, other], tmp_path / "c.html").read_text())
    assert "trained on different data" in page.text
    assert page.row(str(other)), "folders of one name are told apart by their paths"
    assert "the configs are the same" in page.text


# ------------------------------------------------------------------------------------------------------ the command line
def embedshard(*arguments, cwd=None):
    return run_command(*arguments, cwd=cwd)


def test_the_command_line_writes_where_it_says(finished, tmp_path):
    (finished / "report.html").unlink()
    shown = embedshard("report", finished)
    assert shown.stdout == f"Report: {finished / 'report.html'}\n", shown.stderr
    assert Page((finished / "report.html").read_text(encoding="utf-8")).tables
    shown = embedshard("report", finished, finished, cwd=tmp_path)
    assert shown.stdout == "Comparison: comparison.html\n", shown.stderr
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_mistakes_are_told(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    shown = embedshard("report", tmp_path / "empty")
    assert shown.returncode == 2
    assert "has no config.yaml, so it holds no run" in shown.stderr
    with pytest.raises(ConfigError, match="is not there"):
        write_report([finished, tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="--out, in a folder that exists"):
        write_report([finished], tmp_path / "nowhere" / "a.html")
    (tmp_path / "empty" / "config.yaml").write_text("- a list")
    with pytest.raises(ConfigError, match="no mapping"):
        write_report([tmp_path / "empty"])


def test_a_report_needs_no_torch():
    code = "import sys, embedshard.cli, embedshard.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ charts and quantities
@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 600, [0, 100, 200, 300, 400, 500, 600]),
        (0.26, 0.4, [0.26, 0.28, 0.3, 0.32, 0.34, 0.36, 0.38, 0.4]),
        (-3, 3, [-3, -2, -1, 0, 1, 2, 3]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    assert ticks(low, high, 6) == pytest.approx(expected)


def test_a_long_curve_keeps_its_spikes_and_stays_small():
    points = [(step, 1.0) for step in range(1, 100_001)]
    points[54_321] = (54_322, 9.0)
    chart = str(line_chart("loss", [Line("loss", points)]))
    top = min(float(point.split(",")[1]) for point in chart.partition('points="')[2].partition('"')[0].split())
    flat = max(float(point.split(",")[1]) for point in chart.partition('points="')[2].partition('"')[0].split())
    assert top < flat - 100
    assert len(chart) < 40_000


def test_curves_of_one_point_and_of_one_value_can_be_drawn():
    for points in ([(1, 0.0)], [(1, 2.0), (2, 2.0)], [(7, -1e-9), (8, 1e-9)], [(1, 1e12), (2, 3e12)]):
        chart = str(line_chart("t", [Line("a", points)]))
        assert "nan" not in chart
        assert chart.count("<circle") == len(points)


def test_smoothing_is_a_weighted_mean_of_what_came_before():
    points = [(1, 4.0), (2, 8.0), (3, 2.0)]
    weight = 1 - 2 / (3 + 1)
    naive = []
    for place, (step, _) in enumerate(points):
        weights = [weight ** (place - earlier) for earlier in range(place + 1)]
        naive.append((step, sum(w * v for w, (_, v) in zip(weights, points, strict=False)) / sum(weights)))
    assert smoothed(points, 3) == [(step, pytest.approx(value)) for step, value in naive]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.70561), "0.7056"), (number(0.0123456), "0.01235"), (number(12345.6), "12,346"),
        (number(1234567), "1,234,567"), (number(0.0), "0"), (number(1.0), "1.000"), (number(1e-9), "1.000e-09"),
        (number(None), "—"), (number(float("nan")), "—"),
        (share(0.0345), "3.45 %"), (share(0), "0 %"), (share(1.5e-5), "0.0015 %"), (share(1), "100.00 %"),
        (share(None), "—"),
        (size(12), "12 B"), (size(2048), "2.0 KiB"), (size(3 * 2**40), "3.0 TiB"), (size(None), "—"),
        (duration(59.7), "1:00"), (duration(3661), "1:01:01"), (duration(None), "—"),
    ],
)  # fmt: skip
def test_quantities_are_written_for_people(shown, expected):
    assert shown == expected
