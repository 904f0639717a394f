"""The audit proves runs in which each row was trained once an epoch, and names what was not."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embedshard import cli
from embedshard.data.reader import BatchReader
from embedshard.errors import CheckpointError, ConfigError, DataError
from embedshard.train.audit import audit_run
from embedshard.train.audit_report import StepRange
from embedshard.train.checkpoint import newest_intact
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import Reporter
from embedshard.world import open_world

EACH_FIVE = {"checkpoint": {"every_steps": 5, "keep": 100}, "evaluate": {"metrics": []}}


class Interrupt(Reporter):
    """Interrupts a run after a step, before it can save: what its ledger holds by then is written."""

    def __init__(self, step):
        self._step = step

    def stepped(self, step, epoch, loss, samples_per_second):
        if step == self._step:
            raise KeyboardInterrupt


class Stop(Reporter):
    """Asks for a stop, as SIGTERM does, so that a step is the last."""

    def __init__(self, step):
        self._step = step

    def stepped(self, step, epoch, loss, samples_per_second):
        import signal

        if step == self._step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def run(loaded, path, reporter=None):
    """Begins a run, or goes on with it; returns its folder."""
    has_begun = (path / "config.yaml").exists()
    directory = RunDirectory.open(path) if has_begun else RunDirectory.create(path, loaded)
    directory.save_config(loaded)
    checkpoint = newest_intact(directory.checkpoints) if has_begun else None
    try:
        with open_world("cpu") as world:
            train(loaded.config, world, directory, reporter or Reporter(), checkpoint)
    except KeyboardInterrupt:
        assert isinstance(reporter, Interrupt)
    return path


def audit(path):
    return audit_run(RunDirectory.open(path), {})


def proved(path, steps=14):
    """Asserts that an audit proves a run of so many steps, and returns it."""
    found = audit(path)
    assert found.failures == []
    assert found.is_proved
    assert found.steps == steps
    assert all(one.is_proved and one.rows_trained == one.rows_expected for one in found.passes)
    covered = [(one.steps.first_step, one.steps.last_step) for one in found.passes]
    assert [first for first, _ in covered] == [1, *(last + 1 for _, last in covered[:-1])]
    assert covered[-1][1] == steps
    return found


def refuted(path):
    """Asserts that an audit does not prove a run; returns its failures as (epoch, steps, what)."""
    found = audit(path)
    assert not found.is_proved
    return [(failure.epoch, failure.steps, failure.what) for failure in found.failures]


def edit(path, change):
    """Replaces the lines of a file by what a function makes of them."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


def ledger(path, attempt=1, rank=0):
    return path / "ledger" / f"{attempt:04d}-{rank:05d}.jsonl"


# ------------------------------------------------------------------------------------------------------ runs as they are
@pytest.mark.parametrize(
    ("changes", "epochs"),
    [
        ({}, 2),
        ({"train": {"epochs": 4}, "data": {"cache_bytes": 0, "window_steps": 3}}, 4),
        ({"train": {"epochs": 1}, "data": {"shuffle": False}}, 1),
    ],
    ids=["cached", "streamed, four epochs", "not shuffled"],
)
def test_an_undisturbed_run_is_proved(make_config, tmp_path, changes, epochs):
    found = proved(run(make_config({"evaluate": {"metrics": []}, **changes}), tmp_path / "run"), 7 * epochs)
    assert [(one.epoch, one.rows_expected, one.is_whole) for one in found.passes] == [
        (epoch, 203, True) for epoch in range(1, epochs + 1)
    ]
    assert found.is_finished
    (attempt,) = found.attempts
    assert (attempt.counted, attempt.rolled_back, attempt.unsaved) == (StepRange(1, 7 * epochs), None, None)


KILLED = """
    import os, sys
    from pathlib import Path
    from embedshard.config import load_config
    from embedshard.train.checkpoint import newest_intact
    from embedshard.train.loop import train
    from embedshard.train.run_directory import RunDirectory
    from embedshard.train.tracking import Reporter
    from embedshard.world import open_world

    folder, last = Path(sys.argv[1]), int(sys.argv[2])

    class Kill(Reporter):
        def stepped(self, step, epoch, loss, samples_per_second):
            if step == last:
                os._exit(9)  # nothing is written any more

    run = RunDirectory.open(folder)
    with open_world("cpu") as world:
        train(load_config(folder / "config.yaml", {}).config, world, run, Kill(), newest_intact(run.checkpoints))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_proved(make_config, tmp_path):
    changes = {**EACH_FIVE, "checkpoint": {"every_steps": 3, "keep": 2, "mode": "blocking"}}
    path, loaded = tmp_path / "run", make_config(changes)
    RunDirectory.create(path, loaded)
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(KILLED))
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    for last in (2, 8, 11):
        command = [sys.executable, str(program), str(path), str(last)]
        killed = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
        assert killed.returncode == 9, killed.stderr
    unfinished = proved(path, 9)
    assert not unfinished.is_finished
    assert [attempt.counted for attempt in unfinished.attempts] == [None, StepRange(1, 6), StepRange(7, 9)]
    run(loaded, path)
    found = proved(path)
    assert found.is_finished
    assert [attempt.resumed_after for attempt in found.attempts] == [0, 0, 6, 9]
    assert [attempt.counted for attempt in found.attempts] == [None, StepRange(1, 6), StepRange(7, 9), StepRange(10, 14)]


def test_a_run_that_is_stopped_and_resumed_is_proved(make_config, tmp_path):
    path, loaded = tmp_path / "run", make_config({"evaluate": {"metrics": []}})
    for number, stop in enumerate((2, 5, 7, 12), start=1):
        run(loaded, path, Stop(stop))
        found = proved(path, stop)
        assert len(found.attempts) == number
        assert not found.is_finished
    assert found.passes[-1].rows_expected == 5 * 32, "five steps of 7"
    assert not found.passes[-1].is_whole
    run(loaded, path)
    found = proved(path)
    assert [attempt.resumed_after for attempt in found.attempts] == [0, 2, 5, 7, 12]
    run(loaded, path)  # a finished run that is started again
    again = proved(path)
    assert again.is_finished
    assert again.attempts[-1].counted is None


def test_work_that_was_rolled_back_is_listed_apart(make_config, tmp_path):
    path, loaded = tmp_path / "run", make_config(EACH_FIVE)
    run(loaded, path, Interrupt(8))
    found = proved(path, 5)
    assert (found.attempts[0].counted, found.attempts[0].unsaved) == (StepRange(1, 5), StepRange(6, 8))
    run(loaded, path, Interrupt(9))
    found = proved(path, 5)
    assert found.attempts[0].rolled_back == StepRange(6, 8)
    assert found.attempts[0].rows_discarded == 32 + 11 + 32
    assert (found.attempts[1].counted, found.attempts[1].unsaved) == (None, StepRange(6, 9))
    run(loaded, path)
    found = proved(path)
    assert [attempt.rolled_back for attempt in found.attempts] == [StepRange(6, 8), StepRange(6, 9), None]
    assert [attempt.counted for attempt in found.attempts] == [StepRange(1, 5), None, StepRange(6, 14)]


def test_the_line_leads_over_an_attempt_that_went_back_further(make_config, tmp_path):
    path, loaded = tmp_path / "run", make_config({**EACH_FIVE, "checkpoint": {"every_steps": 3, "keep": 100}})
    run(loaded, path, Interrupt(8))
    newest = path / "checkpoints" / "step-00000006"
    newest.rename(tmp_path / "elsewhere")
    run(loaded, path, Stop(5))
    proved(path, 5)
    (tmp_path / "elsewhere").rename(newest)  # restored from a backup, say
    run(loaded, path)
    found = proved(path)
    assert [attempt.resumed_attempt for attempt in found.attempts] == [None, 1, 1]
    assert [attempt.counted for attempt in found.attempts] == [StepRange(1, 6), None, StepRange(7, 14)]
    assert found.attempts[1].rolled_back == StepRange(4, 5)


@pytest.mark.parametrize("window_steps", [0, 3])
def test_partitions_and_an_early_end_are_proved(make_config, interactions, tmp_path, window_steps):
    parts = [str(interactions / "train" / f"part-{i}.parquet") for i in (0, 1)]
    windows = {"cache_bytes": 0, "window_steps": window_steps} if window_steps else {}
    changes = {"data": {"train": None, "partitions": parts, **windows}, "evaluate": {"metrics": []}}
    path = tmp_path / "run"
    run(make_config({**changes, "train": {"max_steps": 6}}), path)
    found = proved(path, 6)
    assert found.is_finished
    assert [(one.partition, one.rows_expected, one.is_whole) for one in found.passes] == [(1, 101, True), (2, 64, False)]
    run(make_config(changes), path, Stop(10))
    run(make_config(changes), path)
    found = proved(path, 16)
    assert [(one.epoch, one.partition, one.rows_expected) for one in found.passes] == [
        (1, 1, 101), (1, 2, 102), (2, 1, 101), (2, 2, 102)
    ]  # fmt: skip


def test_rows_that_are_set_aside_are_counted(make_config, interactions, tmp_path):
    shutil.copytree(interactions / "train", tmp_path / "data")
    for part in (tmp_path / "data").iterdir():
        table = pq.read_table(part)
        users = [99 if row in (3, 50, 51) else user for row, user in enumerate(table["user_id"].to_pylist())]
        pq.write_table(table.set_column(0, "user_id", pa.array(users, pa.int32())), part)
    data = {"train": str(tmp_path / "data"), "on_bad_row": "quarantine", "max_bad_fraction": 0.1}
    changes = {"data": data, "evaluate": {"metrics": []}}
    found = proved(run(make_config(changes, splits=("train",)), tmp_path / "run"))
    assert [one.weightless_rows for one in found.passes] == [6, 6]
    assert [one.rows_trained for one in found.passes] == [203, 203]


def test_a_run_whose_checkpoints_were_deleted_is_proved_by_its_result(make_config, tmp_path):
    path = run(make_config(EACH_FIVE), tmp_path / "run")
    shutil.rmtree(path / "checkpoints")
    found = proved(path)
    assert any("not there any more" in note for note in found.notes)


# ------------------------------------------------------------------------------------------------------------ faulty loops
def change_batches(monkeypatch, change):
    """Makes the reader hand on what a function makes of its batches; one more than asked for is there to take."""
    original = BatchReader._produce
    monkeypatch.setattr(BatchReader, "_produce", lambda self, start, stop: change(original(self, start, stop + 1)))


def test_a_dropped_batch_is_named(make_config, tmp_path, monkeypatch):
    change_batches(monkeypatch, lambda batches: (batch for batch in batches if batch.position.step != 3))
    path = run(make_config(EACH_FIVE), tmp_path / "run")
    failures = refuted(path)
    assert failures[0] == (1, StepRange(4, 4), "were not trained")
    assert [one.is_proved for one in audit(path).passes] == [False, True]


def test_a_repeated_batch_is_named(make_config, tmp_path, monkeypatch):
    def repeat(batches):
        for batch in batches:
            yield from [batch] * (2 if batch.position.step == 9 else 1)

    change_batches(monkeypatch, repeat)
    failures = refuted(run(make_config(EACH_FIVE), tmp_path / "run"))
    assert (2, StepRange(10, 10), "were trained more than once") in failures
    assert (2, StepRange(14, 14), "were not trained") in failures
    assert [epoch for epoch, _, _ in failures if epoch is not None] == [2, 2]


@pytest.mark.parametrize("every_steps", [2, 7])
def test_other_rows_in_the_place_of_those_of_a_step_are_named_as_closely_as_the_ledger_can(
    make_config, tmp_path, monkeypatch, every_steps
):
    def stale(batches):
        former = None
        for batch in batches:
            yield replace(former, position=batch.position) if batch.position.step == 3 else batch
            former = batch

    change_batches(monkeypatch, stale)
    path = run(make_config({**EACH_FIVE, "checkpoint": {"every_steps": every_steps}}), tmp_path / "run")
    ((epoch, steps, what),) = refuted(path)
    assert (epoch, steps) == (1, StepRange(3, 4) if every_steps == 2 else StepRange(1, 7))
    assert "as many rows as expected, but others" in what
    assert [one.is_proved for one in audit(path).passes] == [False, True]


def test_other_rows_are_found_in_a_pass_that_is_not_whole(make_config, tmp_path, monkeypatch):
    """A whole epoch would hold the same rows: those of steps 5 and 6 change places, and the run ends after 5."""

    def swap(batches):
        taken = list(batches)
        first, second = taken[4], taken[5]
        taken[4], taken[5] = replace(second, position=first.position), replace(first, position=second.position)
        yield from taken

    change_batches(monkeypatch, swap)
    changes = {**EACH_FIVE, "checkpoint": {"every_steps": 4}, "train": {"max_steps": 5}}
    ((epoch, steps, _),) = refuted(run(make_config(changes), tmp_path / "run"))
    assert (epoch, steps) == (1, StepRange(5, 5))


# ------------------------------------------------------------------------------------------------------- damaged ledgers
@pytest.fixture
def resumed(make_config, tmp_path):
    """A run whose first attempt did 8 steps, of which 5 count, and whose second did the rest."""
    path = tmp_path / "run"
    run(make_config(EACH_FIVE), path, Interrupt(8))
    run(make_config(EACH_FIVE), path)
    proved(path)
    return path


FIRST = "ledger/0001-00000.jsonl"
ALL = StepRange(1, 5)
"""The steps of the first attempt that count."""


def altered(**changes):
    return lambda lines: [json.dumps({**json.loads(lines[0]), **changes}) + "\n", *lines[1:]]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (altered(digest="0" * 32), (1, ALL, "hold as many rows as expected, but others: 160 counted, 160 expected")),
        (altered(rows=159), (1, ALL, "hold not the rows that were expected: 159 counted, 160 expected")),
        (altered(first_step=1), (1, StepRange(1, 1), "were not trained")),
        (altered(last_step=3), (1, StepRange(5, 5), "were not trained")),
        (
            altered(last_step=6),
            (None, None, f"{FIRST}: a line holds steps 1 to 7, from before and after the checkpoint of step 5"),
        ),
        (altered(epoch=1), (1, ALL, "stand in a line that says epoch 2, partition 1, which they are not of")),
        (altered(partition=4), (1, ALL, "stand in a line that says epoch 1, partition 5, which they are not of")),
        (lambda lines: [lines[0], *lines], (1, ALL, "were trained more than once")),
        (lambda lines: [], (1, ALL, "were not trained")),
        (lambda lines: [lines[0][:40]], (1, ALL, f"were not trained: line 1 of {FIRST} is cut off")),
        (lambda lines: ["{}\n", *lines], (None, None, f"line 1 of {FIRST} cannot be read (epoch: Field required)")),
    ],
    ids=[
        "digest", "rows", "first step", "last step", "straddles", "epoch", "partition", "twice", "empty", "cut off",
        "unreadable",
    ],
)  # fmt: skip
def test_a_ledger_that_was_tampered_with_is_named(resumed, change, expected):
    edit(ledger(resumed), change)
    assert expected in refuted(resumed)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:-1], lines[-1][:30]],
        lambda lines: [lines[0], "not JSON\n", *lines[1:]],
        lambda lines: lines[:1],
    ],
    ids=["cut off", "unreadable", "lost"],
)
def test_damage_to_what_was_rolled_back_is_told_and_proves_nothing(resumed, change):
    edit(ledger(resumed), change)
    found = proved(resumed)
    lost = len(ledger(resumed).read_text().splitlines()) == 1
    assert any("does not count" in note for note in found.notes) != lost


def test_files_that_are_missing_or_too_many_are_named(resumed):
    shutil.copy(ledger(resumed), resumed / "ledger" / "0003-00000.jsonl")
    shutil.copy(ledger(resumed), resumed / "ledger" / "0001-00001.jsonl")
    shutil.copy(ledger(resumed), resumed / "ledger" / "copy.jsonl")
    ledger(resumed, 2).unlink()
    failures = refuted(resumed)
    missing = "cannot be judged: ledger/0002-00000.jsonl is not there, and attempt 2 had 1 rank"
    assert (1, StepRange(6, 7), missing) in failures
    assert (2, StepRange(8, 14), missing) in failures
    told = [what for _, _, what in failures]
    assert "ledger/0003-00000.jsonl is there, and attempts.jsonl tells of 2 attempts" in told
    assert "ledger/0001-00001.jsonl is there, and attempt 1 had 1 rank" in told
    assert "ledger/copy.jsonl is not named ATTEMPT-RANK.jsonl, so nobody knows whose it is" in told


def test_attempts_that_cannot_be_traced_are_named(resumed):
    edit(resumed / "attempts.jsonl", lambda lines: ["{\n", lines[1]])
    told = [what for _, _, what in refuted(resumed)]
    assert any("attempts.jsonl, line 1 cannot be read" in what for what in told)
    assert any("steps 1 to 5 cannot be traced" in what for what in told)
    assert audit(resumed).passes[0].is_proved is False


def test_another_step_to_resume_from_than_there_was_is_found(resumed):
    def earlier(lines):
        second = json.loads(lines[1])
        return [lines[0], json.dumps({**second, "resumed_from": {"step": 3, "attempt": 1}}) + "\n"]

    edit(resumed / "attempts.jsonl", earlier)
    failures = refuted(resumed)
    assert (1, StepRange(4, 5), "were not trained") in failures


def test_an_inventory_of_other_data_is_found(resumed):
    inventory = json.loads((resumed / "inventory.json").read_text())
    inventory["partitions"][0][0]["row_groups"][0] += 1
    (resumed / "inventory.json").write_text(json.dumps(inventory))
    told = [what for _, _, what in refuted(resumed)]
    assert "inventory.json tells of other training data than the checkpoint of step 14" in told


# ----------------------------------------------------------------------------------------------------- as a person meets it
def command(monkeypatch, capsys, *arguments):
    """Runs the command line in this process; returns the exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["embedshard", "audit", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "120")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out, printed.err


def test_the_command_tells_what_is_proved_and_what_is_not(resumed, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, resumed)
    assert code == 0
    assert "each row once" in out
    assert "steps 6 to 8 (75 rows) were rolled back" in out
    assert out.endswith("Proved: each row was trained exactly once an epoch, in all 14 steps.\n")
    code, out, _ = command(monkeypatch, capsys, resumed, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["proved"] is True
    assert [one["rows_trained"] for one in found["passes"]] == [203, 203]
    ledger(resumed, 2).unlink()
    code, out, _ = command(monkeypatch, capsys, resumed)
    assert code == 1
    assert "epoch 2, partition 1, attempt 2, rank 0: steps 8 to 14 cannot be judged: ledger/0002-00000.jsonl" in out
    assert "Not proved" in out
    code, out, _ = command(monkeypatch, capsys, resumed, "--json")
    assert (code, json.loads(out)["proved"]) == (1, False)


def test_what_cannot_be_audited_is_a_mistake_of_the_user(make_config, tmp_path, monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, tmp_path / "nothing")
    assert code == 2
    assert "is not there" in err
    path = tmp_path / "run"
    RunDirectory.create(path, make_config(EACH_FIVE))
    with pytest.raises(ConfigError, match="no training has begun there"):
        audit(path)
    run(make_config(EACH_FIVE), path, Interrupt(3))
    with pytest.raises(CheckpointError, match="none of its steps counts"):
        audit(path)
    (path / "inventory.json").write_text("{}")
    with pytest.raises(DataError, match=r"inventory.json cannot be used \(KeyError: 'partitions'\)"):
        audit(path)
    (path / "inventory.json").unlink()
    with pytest.raises(DataError, match=r"inventory.json is not there"):
        audit(path)


def test_no_environment_is_needed(make_config, tmp_path):
    path = run(make_config({**EACH_FIVE, "train": {"epochs": 1}}), tmp_path / "run")
    tree = yaml.safe_load((path / "config.yaml").read_text())
    tree["data"]["train"] = "${SOMEWHERE_ELSE}/train/*.parquet"
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    proved(path, 7)
