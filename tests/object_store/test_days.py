"""Days, runs and checkpoints in an object store: a run continues another there, and its checkpoints are looked into."""

import os
import signal

import pyarrow.parquet as pq
import yaml

from embedshard.launch.checkpoint_diff import diff_here
from embedshard.launch.checkpoints import list_here, show_here
from embedshard.launch.extract import extract_here
from embedshard.launch.local import train_in
from embedshard.launch.request import TrainRequest
from embedshard.storage import expand_each, locate
from embedshard.train.audit import audit_run
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import Reporter
from embedshard.world import open_world


def put_day(bucket, number, table):
    place = locate(f"{bucket}/days/day={number}/part.parquet")
    with place.filesystem.open_output_stream(place.path) as stream:
        pq.write_table(table, stream)


def test_a_run_in_a_store_continues_another_and_waits_for_days(bucket, make_config, interactions, tmp_path):
    whole = pq.read_table(interactions / "train")
    for number in (1, 2, 10):
        put_day(bucket, number, whole.slice(number * 10, 60))
    assert [name for name, _ in expand_each(f"{bucket}/days/day=*")] == ["day=1", "day=2", "day=10"]
    tree = {
        "data": {"train": None, "partitions": {"each": f"{bucket}/days/day=*"}, "validation": None, "test": None},
        "evaluate": {"metrics": []}, "train": {"epochs": 1}, "optimizer": {"schedule": {"decay": "none"}},
    }  # fmt: skip
    config = tmp_path / "days.yaml"
    config.write_text(yaml.safe_dump(make_config(tree, splits=()).tree))

    class Told(Reporter):
        def said(self, message):
            if message == "Waits for the partition after day=11.":
                put_day(bucket, 12, whole.slice(100, 60))
            if message == "Waits for the partition after day=12.":
                os.kill(os.getpid(), signal.SIGTERM)

    def train(folder, **options):
        request = TrainRequest(config=config, run_dir=f"{bucket}/{folder}", **options).resolved()
        with open_world("cpu") as world:
            return train_in(world, request, {}, Told())

    assert train("runs/first").step == 6
    put_day(bucket, 11, whole.slice(80, 60))
    second = f"{bucket}/runs/second"
    assert train("runs/second", continues=f"{bucket}/runs/first", poll_s=0.2).stopped_by == "SIGTERM"
    audit = audit_run(RunDirectory(second), {})
    assert audit.is_proved
    assert [one.rows_trained for one in audit.passes] == [60, 60]

    found = list_here(second, verify=True)
    assert [(one.step, one.damage) for one in found] == [(2, None), (4, None)]
    assert found[0].time.startswith("20")
    assert show_here(second, 2)["state"]["partitions"] == 1
    assert any(table.moved for table in diff_here(second, 2, 4, {}).tables)
    written = extract_here(second, f"{bucket}/vectors/item.parquet", {}, table="item")
    place = locate(f"{bucket}/vectors/item.parquet")
    with place.open_input() as file:
        assert pq.read_table(file).num_rows == written.written == 30
