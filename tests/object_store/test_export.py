"""A run in an object store, exported into another folder of it."""

from embedshard.export.manifest import open_export
from embedshard.export.recommend import recommend
from embedshard.launch.export import export_here
from embedshard.storage import locate
from embedshard.train.loop import train
from embedshard.train.run_directory import RunDirectory
from embedshard.train.tracking import Reporter
from embedshard.world import open_world


def test_an_export_in_a_bucket_is_that_of_a_disk(make_config, bucket, tmp_path):
    loaded = make_config({"train": {"epochs": 1}, "tables": {"user": {"rows": None, "vocabulary": {"kind": "auto"}}}})
    run = RunDirectory.create(f"{bucket}/run", loaded)
    with open_world("cpu") as world:
        train(loaded.config, world, run, Reporter())
    assert export_here(f"{bucket}/run", f"{bucket}/out", {}).verification.passed
    assert export_here(f"{bucket}/run", f"{bucket}/out", {}, index="hnsw").verification.passed  # over the earlier one
    assert export_here(f"{bucket}/run", tmp_path / "out", {}, index="hnsw").verification.passed
    there, here = open_export(f"{bucket}/out").manifest, open_export(tmp_path / "out").manifest
    same = there.files.keys() - {"items.faiss", "verification.json"}
    assert here.files.keys() == there.files.keys()
    assert {name: there.files[name].sha256 for name in same} == {name: here.files[name].sha256 for name in same}
    assert all(name.startswith(("tables", "vocabularies", "programs")) or "/" not in name for name in there.files)
    assert locate(f"{bucket}/out").join("manifest.json").is_file()
    assert recommend(f"{bucket}/out", "7", 5) == recommend(tmp_path / "out", "7", 5)
