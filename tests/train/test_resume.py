"""A run that is stopped and resumed is the run that was never stopped, bit for bit."""

import json
from collections import Counter

import numpy as np
import pytest

from embedshard.data.order import row_digest
from embedshard.errors import ConfigError
from embedshard.train.checkpoint import newest_intact
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.stop import Notices
from embedshard.train.tracking import Reporter
from embedshard.world import open_world

_OF_THE_MACHINE = ("samples_per_second", "seconds", "bytes_read", "waterfall", "beside")


class Recorder(Reporter):
    """Keeps losses and measurements by step, and asks to stop after one."""

    def __init__(self):
        self.losses, self.measurements = {}, {}

    def stepped(self, step, epoch, loss, samples_per_second):
        self.losses[step] = loss

    def measured(self, step, values):
        kept = {name: value for name, value in values.items() if not any(word in name for word in _OF_THE_MACHINE)}
        self.measurements.setdefault(step, {}).update(kept)


def run_to_end(loaded, path, resume_from=None):
    recorder = Recorder()
    run = RunDirectory.open(path) if resume_from is not None else RunDirectory.create(path, loaded)
    with open_world("cpu") as world:
        result = train(loaded.config, world, run, recorder, resume_from)
    return recorder, result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": {"cache_bytes": 0, "window_steps": 3}},
        {"objective": {"kind": "sampled_softmax", "num_negatives": 16, "mixed": True}},
        {"objective": {"kind": "bpr", "num_negatives": 16}},
    ],
    ids=["cached, log-Q", "streamed", "sampled, mixed", "pairwise"],
)
def test_a_run_stopped_at_any_step_continues_bit_for_bit(make_config, tmp_path, changes, saved_tensors, assert_same_tensors):
    changes = changes | {"evaluate": {"metrics": ["recall@5"], "every_steps": 3}, "checkpoint": {"keep": 100}}
    whole_config = make_config(changes)
    whole, result = run_to_end(whole_config, tmp_path / "whole")
    assert result.step == 14, "203 rows, batches of 32: 7 steps an epoch, twice"
    for stop in range(1, result.step):
        # A run that ends at max_steps leaves the checkpoint that a stop there would.
        loaded = make_config(changes | {"train": {"max_steps": stop}})
        path = tmp_path / f"stopped-{stop}"
        assert loaded.config.optimizer.schedule.decay == "linear"
        first, _ = run_stopped(whole_config, path, stop)
        second, _ = run_to_end(whole_config, path, newest_intact(RunDirectory(path).checkpoints))
        assert first.losses == {step: whole.losses[step] for step in range(1, stop + 1)}
        assert second.losses == {step: whole.losses[step] for step in range(stop + 1, result.step + 1)}
        for step, values in second.measurements.items():
            assert values.items() <= whole.measurements[step].items()
        assert_same_tensors(saved_tensors(tmp_path / "whole"), saved_tensors(path))


class StopAt(Recorder):
    """Sends this process SIGTERM after a step, as a scheduler would."""

    def __init__(self, step):
        super().__init__()
        self._step = step

    def stepped(self, step, epoch, loss, samples_per_second):
        import os
        import signal

        super().stepped(step, epoch, loss, samples_per_second)
        if step == self._step - 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the next step agrees on it


def run_stopped(loaded, path, stop):
    recorder = StopAt(stop)
    if stop == 1:
        recorder.started = lambda first_step, num_steps: None
    run = RunDirectory.create(path, loaded)
    with open_world("cpu") as world:
        notices = None
        if stop == 1:  # there is no step before it: ask before the loop begins
            notices = Notices()
            notices.stop = "SIGTERM"
        result = train(loaded.config, world, run, recorder, notices=notices)
    assert result.stopped_by == "SIGTERM"
    assert result.step == stop
    return recorder, result


def test_a_run_that_is_not_checkpointed_yet_resumes_from_its_beginning(
    make_config, tmp_path, saved_tensors, assert_same_tensors
):
    loaded = make_config()
    whole, _ = run_to_end(loaded, tmp_path / "whole")
    RunDirectory.create(tmp_path / "killed", loaded)
    assert newest_intact(RunDirectory(tmp_path / "killed").checkpoints) is None
    with open_world("cpu") as world:
        recorder = Recorder()
        train(loaded.config, world, RunDirectory.open(tmp_path / "killed"), recorder, None)
    assert recorder.losses == whole.losses
    assert_same_tensors(saved_tensors(tmp_path / "whole"), saved_tensors(tmp_path / "killed"))


def test_a_resumed_run_does_not_draw_the_first_values_that_the_checkpoint_replaces(make_config, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("embedshard.sharding.shard.initialise_tables", lambda *about: drawn.append(about))
    run_stopped(make_config(), tmp_path / "run", 2)
    assert len(drawn) == 1
    run_to_end(make_config(), tmp_path / "run", newest_intact(RunDirectory(tmp_path / "run").checkpoints))
    assert len(drawn) == 1


def test_a_finished_run_that_is_started_again_ends_cleanly_with_the_same_result(make_config, tmp_path):
    loaded = make_config()
    _, result = run_to_end(loaded, tmp_path / "run")
    again, second = run_to_end(loaded, tmp_path / "run", newest_intact(RunDirectory(tmp_path / "run").checkpoints))
    assert again.losses == {}
    assert second.metrics == result.metrics


def test_early_stopping_stops_and_a_resumed_run_stays_stopped(make_config, tmp_path):
    changes = {
        "train": {"epochs": 40, "early_stopping": {"patience": 2}},
        "optimizer": {"tables": {"lr": 5.0}},
        "checkpoint": {"keep": 1},
    }
    loaded = make_config(changes)
    recorder, result = run_to_end(loaded, tmp_path / "run")
    assert result.step < 40 * 7
    values = {step: m["validation/recall@5"] for step, m in recorder.measurements.items() if "validation/recall@5" in m}
    best = max(values, key=lambda step: (values[step], -step))
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["selected_step"] == best
    assert result.step == sorted(values)[sorted(values).index(best) + 2]
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted({f"step-{best:08d}", f"step-{result.step:08d}"}), "the newest one and the best"
    again, second = run_to_end(loaded, tmp_path / "run", newest_intact(RunDirectory(tmp_path / "run").checkpoints))
    assert again.losses == {}
    assert second.metrics == result.metrics


def test_the_ledger_proves_that_each_row_was_trained_once_an_epoch(make_config, tmp_path):
    loaded = make_config({"data": {"weight": "weight"}})
    run_stopped(loaded, tmp_path / "run", 5)
    run_to_end(loaded, tmp_path / "run", newest_intact(RunDirectory(tmp_path / "run").checkpoints))
    lines = [
        json.loads(line)
        for path in sorted((tmp_path / "run" / "ledger").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert len(list((tmp_path / "run" / "ledger").iterdir())) == 2, "one file an attempt"
    steps = Counter(step for line in lines for step in range(line["first_step"], line["last_step"] + 1))
    assert steps == Counter(range(14))
    for epoch in (0, 1):
        of_epoch = [line for line in lines if line["epoch"] == epoch]
        assert sum(line["rows"] for line in of_epoch) == 203
        words = [[int(line["digest"][i : i + 16], 16) for i in (0, 16)] for line in of_epoch]
        total = tuple(sum(column) % 2**64 for column in zip(*words, strict=True))
        assert total == row_digest(epoch, 0, np.arange(203, dtype=np.int64))


def test_partitions_are_trained_in_order_and_resume_anywhere(
    make_config, interactions, tmp_path, saved_tensors, assert_same_tensors
):
    parts = [str(interactions / "train" / f"part-{i}.parquet") for i in (0, 1)]
    changes = {"data": {"train": None, "partitions": parts}}
    whole, result = run_to_end(make_config(changes), tmp_path / "whole")
    assert result.step == 16, "101 and 102 rows, batches of 32: 4 steps each, twice"
    for stop in (2, 4, 6, 8, 11):
        run_stopped(make_config(changes), tmp_path / f"{stop}", stop)
        checkpoint = newest_intact(RunDirectory(tmp_path / f"{stop}").checkpoints)
        second, _ = run_to_end(make_config(changes), tmp_path / f"{stop}", checkpoint)
        assert second.losses == {step: whole.losses[step] for step in range(stop + 1, 17)}
        assert_same_tensors(saved_tensors(tmp_path / "whole"), saved_tensors(tmp_path / f"{stop}"))


def test_the_command_that_goes_on_can_be_pasted_where_the_folder_has_a_space(make_config, tmp_path):
    place, loaded = tmp_path / "my run", make_config({})
    RunDirectory.create(place, loaded).attempts_file.write_bytes_atomically(b"{}\n")
    with pytest.raises(ConfigError, match=f"Continue it with --resume '{place}',"):
        RunDirectory.create(place, loaded)
