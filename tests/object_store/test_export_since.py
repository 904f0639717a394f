"""A delta in an object store, applied there: what is whole by a rename on a disk is whole by the manifest there."""

import pytest

from embedshard.errors import ExportError
from embedshard.export.delta_apply import apply_delta, roll_back
from embedshard.export.manifest import hash_files, open_export
from embedshard.launch.export import export_here
from embedshard.launch.export_since import export_since
from embedshard.storage import Location, locate
from embedshard.train.checkpoint import find_steps
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import Reporter
from embedshard.world import open_world


@pytest.fixture
def run(make_config, bucket):
    """The URI of a run in the bucket, with several steps."""
    loaded = make_config({"train": {"epochs": 2}, "checkpoint": {"every_steps": 3, "keep": 5}})
    directory = RunDirectory.create(f"{bucket}/run", loaded)
    with open_world("cpu") as world:
        train(loaded.config, world, directory, Reporter())
    return f"{bucket}/run"


def test_a_delta_is_written_applied_and_rolled_back_in_a_bucket(run, bucket, tmp_path, monkeypatch):
    before, after = find_steps(RunDirectory.open(run).checkpoints)[-2:]
    onto = f"{bucket}/onto"
    export_here(run, onto, {}, checkpoint_step=before)
    export_here(run, tmp_path / "onto", {}, checkpoint_step=before, verifies=False)  # as `onto`, but for its manifest
    first = hash_files(locate(onto))
    assert export_since(
        run, f"{bucket}/delta", f"{onto}/manifest.json", {}, checkpoint_step=after
    ).exported.verification.passed
    assert not locate(f"{bucket}/delta").join("result").exists()
    export_here(run, tmp_path / "whole", {}, checkpoint_step=after)
    whole = hash_files(locate(tmp_path / "whole"))

    replace, left = Location.replace_by, 3

    def dies(self, source):  # the copy is there, and the source not yet gone: an object store has no rename
        nonlocal left
        left -= 1
        if left == 0:
            self.filesystem.copy_file(source.path, self.path)
            raise KeyboardInterrupt
        replace(self, source)

    with monkeypatch.context() as patched:
        patched.setattr(Location, "replace_by", dies)
        with pytest.raises(KeyboardInterrupt):
            apply_delta(f"{bucket}/delta", onto)
    with pytest.raises(ExportError, match="is between two exports"):
        open_export(onto)
    assert apply_delta(f"{bucket}/delta", onto).finished
    assert hash_files(locate(onto)) == open_export(onto).manifest.files == whole
    assert not locate(onto).join("applying").exists()
    assert roll_back(onto).after.step == before
    assert hash_files(locate(onto)) == first
    with pytest.raises(ExportError, match="can be applied to nothing else"):  # of the same step, and another manifest
        apply_delta(f"{bucket}/delta", tmp_path / "onto")
