"""`embedshard export` and `recommend`: what is written is what the model makes, and is checked before it is believed."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from embedshard.errors import CheckpointError, ConfigError, DataError, ExportError
from embedshard.export.delta import prepare_delta_folder
from embedshard.export.delta_apply import apply_delta
from embedshard.export.manifest import open_export
from embedshard.export.recommend import recommend
from embedshard.launch.export import export_here
from embedshard.launch.export_since import export_since
from embedshard.launch.local import evaluate_here
from embedshard.serve.live import candidates
from embedshard.storage import locate
from embedshard.train.assembly import assemble
from embedshard.train.checkpoint import newest_intact
from embedshard.train.run_directory import RunDirectory
from embedshard.train.snapshot import restore_model
from embedshard.world import open_world
from tests.commands import run_command


@pytest.fixture
def trained(make_config, run_tree, tmp_path):
    """A function from changes of the config to the folder of its run."""

    def trained(changes=None, splits=("train", "validation", "test")):
        run_tree(make_config({"train": {"epochs": 1}, **(changes or {})}, splits).tree, tmp_path / "run")
        return tmp_path / "run"

    return trained


def rows_of(interactions, *splits):
    return [
        row
        for split in splits
        for path in sorted((interactions / split).iterdir())
        for row in pq.read_table(path).to_pylist()
    ]


def manifest_of(out):
    return json.loads((out / "manifest.json").read_text())


def cli(*arguments):
    return run_command(*arguments, COLUMNS="160")


def test_an_export_holds_what_the_checkpoint_and_the_model_hold(trained, interactions, tmp_path, saved_tensors):
    run, out = trained(), tmp_path / "out"
    found = export_here(run, out, {})
    assert found.verification.passed
    manifest, (step, tensors) = manifest_of(out), saved_tensors(run)
    result = json.loads((run / "result.json").read_text())
    assert manifest["step"] == step
    for table, entry in manifest["tables"].items():
        content = pq.read_table(out / entry["file"])
        assert np.array_equal(np.array(content["vector"].to_pylist(), np.float32), tensors[f"tables/{table}/weight"].numpy())
        assert content["row"].to_pylist() == list(range(len(content)))
        assert content["id"].to_pylist() == [*range(len(content) - 1), None]
    dense = load_file(out / manifest["dense"])
    assert {f"dense/{name}" for name in dense} == {name for name in tensors if name.startswith("dense/")}
    assert all(tensor.equal(tensors[f"dense/{name}"]) for name, tensor in dense.items())
    assert set(manifest["tables"]) == {"user", "item", "item_id:bias"}
    assert manifest["metrics"] == result["metrics"]
    assert manifest["step"] == manifest["data"]["step"] == result["selected_step"]
    assert manifest["data"]["fingerprint"] == json.loads((run / "inventory.json").read_text())["fingerprint"]
    assert manifest["config"]["model"]["kind"] == "two_tower"
    users = pq.read_table(out / "users.parquet")
    met = {row["user_id"] for row in rows_of(interactions, "train", "validation", "test")}
    assert sorted(users["id"].to_pylist()) == sorted(met)
    assert pq.read_table(out / "items.parquet")["id"].to_pylist() == list(range(30))
    items = np.array(pq.read_table(out / "items.parquet")["vector"].to_pylist(), np.float32)
    halves = pq.read_table(out / "items-fp16.parquet")
    assert halves["vector"].type.value_type == pa.float16()
    assert np.array_equal(np.array(halves["vector"].to_pylist(), np.float16), items.astype(np.float16))
    in_bytes = pq.read_table(out / "items-int8.parquet")
    assert in_bytes["vector"].type.value_type == pa.uint8()
    scale, bias = (in_bytes[name].to_numpy()[:, None] for name in ("scale", "bias"))
    given_back = np.array(in_bytes["vector"].to_pylist()) * scale + bias
    assert (np.abs(given_back - items) <= 0.51 * scale + 1e-6).all()
    assert np.abs(given_back - items).max() > 0
    assert found.verification.quantised.keys() == {"fp16 items", "int8 items"}
    assert all(0.8 < one["recall"] <= 1 for one in found.verification.quantised.values())
    listed = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == listed - {"manifest.json", "EMBEDSHARD_EXPORT"}


def test_a_user_is_the_first_row_of_the_test_set_else_of_the_validation_set_else_the_last_of_training(
    trained, interactions, tmp_path
):
    run, out = trained(), tmp_path / "out"
    export_here(run, out, {})
    vectors = {row["id"]: row["vector"] for row in pq.read_table(out / "users.parquet").to_pylist()}
    expected = {row["user_id"]: ("train", place) for place, row in enumerate(rows_of(interactions, "train"))}
    for split in ("validation", "test"):
        for place, row in reversed(list(enumerate(rows_of(interactions, split)))):
            expected[row["user_id"]] = split, place
    assert {split for split, _ in expected.values()} == {"train", "validation", "test"}
    config = RunDirectory.open(run).load_config({}).config
    with open_world("cpu") as world:
        parts = assemble(config, world)
        checkpoint = newest_intact(RunDirectory(run).checkpoints)
        assert checkpoint.step == manifest_of(out)["step"]
        restore_model(checkpoint, parts.model)
        parts.model.eval()
        (source,) = parts.dataset.train
        groups = [source.read_row_group(number) for number in range(len(source.inventory.row_groups))]
        sizes = [len(group["user_id"].values) for group in groups]
        for user, (split, place) in expected.items():
            columns = parts.dataset.read_held_out(split) if split != "train" else None
            if columns is None:
                number = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
                columns, place = groups[number], place - sum(sizes[:number])
            batch = parts.collator.batch(columns, place, place + 1)
            assert vectors[user] == pytest.approx(parts.model.module.encode_queries(batch)[0].detach().tolist(), abs=1e-6)


def test_recommendations_are_the_best_items_that_the_user_has_not_met(trained, interactions, tmp_path):
    out = tmp_path / "out"
    export_here(trained(), out, {})
    items = np.array(pq.read_table(out / "items.parquet")["vector"].to_pylist())
    pq.write_table(
        pa.table({"item_id": list(range(30)), "title": [f"title {i}" for i in range(30)]}), tmp_path / "m.parquet"
    )
    for row in pq.read_table(out / "users.parquet").to_pylist()[:12]:
        seen = {one["item_id"] for one in rows_of(interactions, "train", "validation") if one["user_id"] == row["id"]}
        scores = items @ np.array(row["vector"])
        expected = sorted(set(range(30)) - seen, key=lambda item: -scores[item])[:10]
        found = recommend(out, str(row["id"]), 10, str(tmp_path / "m.parquet"))
        assert found.num_seen == len(seen)
        assert [item.id for item in found.items] == expected
        assert [item.score for item in found.items] == pytest.approx(scores[expected].tolist(), abs=1e-5)
        assert [item.metadata for item in found.items] == [{"title": f"title {item}"} for item in expected]


@pytest.mark.parametrize("file", ["users.parquet", "items.parquet", "items.faiss", "seen.parquet"])
def test_a_tampered_file_is_named(trained, tmp_path, file):
    run, out = trained(), tmp_path / "out"
    export_here(run, out, {})
    content = bytearray((out / file).read_bytes())
    content[len(content) // 2] ^= 1
    (out / file).write_bytes(content)
    with pytest.raises(ExportError, match=file):
        recommend(out, "3", 5)
    (out / file).unlink()
    with pytest.raises(ExportError, match=f"{file} is missing"):
        recommend(out, "3", 5)
    manifest = manifest_of(out)
    manifest["files"]["../../secret"] = manifest["files"]["users.parquet"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"manifest\.json is damaged"):
        recommend(out, "3", 5)


def test_an_unseen_user_is_told(trained, tmp_path):
    out = tmp_path / "out"
    changes = {"tables": {"user": {"rows": 100}}}
    export_here(trained(changes), out, {})
    with pytest.raises(DataError, match=r"no vector of user '4000'.*ids from 0 to 99"):
        recommend(out, "4000", 5)
    with pytest.raises(DataError, match="no vector of user 'anna'"):
        recommend(out, "anna", 5)
    with pytest.raises(DataError, match="user '77' was not in the data"):
        recommend(out, "77", 5)


def test_users_without_a_row_are_replayed_as_one_and_recommended_nothing(trained, tmp_path):
    out = tmp_path / "out"
    changes = {
        "tables": {"user": {"rows": 30}},
        "features": {"user_id": {"kind": "id", "table": "user", "unknown": "oov"}},
    }
    assert export_here(trained(changes), out, {}).verification.passed
    assert pq.read_table(out / "users.parquet")["id"].null_count == 1
    with pytest.raises(DataError, match="no vector of user '35'"):
        recommend(out, "35", 5)


def test_hashed_ids_have_rows_and_users_are_found_by_their_hash(trained, interactions, tmp_path):
    out = tmp_path / "out"
    vocabulary = {"kind": "hash", "rows": 5000, "seed": 3}
    changes = {
        "tables": {"user": {"rows": None, "vocabulary": vocabulary}, "item": {"rows": None, "vocabulary": vocabulary}}
    }
    assert export_here(trained(changes), out, {}).verification.passed
    manifest = manifest_of(out)
    assert manifest["tables"]["item"]["has_ids"] is False
    assert pq.read_table(out / manifest["tables"]["item"]["file"])["id"].null_count == 5001
    found = recommend(out, "7", 5)
    assert len(found.items) == 5
    assert all(item.id is None and 0 <= item.row < 5000 for item in found.items)
    rows = rows_of(interactions, "train", "validation")
    assert found.num_seen == len({row["item_id"] for row in rows if row["user_id"] == 7})
    with pytest.raises(DataError, match="was not in the data"):
        recommend(out, "123456", 5)


def test_a_vocabulary_goes_with_the_export(trained, interactions, tmp_path):
    out = tmp_path / "out"
    changes = {"tables": {"user": {"rows": None, "vocabulary": {"kind": "auto"}}}}
    run = trained(changes)
    export_here(run, out, {})
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    (run / "vocabularies").rename(tmp_path / "gone")
    assert len(recommend(moved, "7", 5).items) == 5
    file = moved / "vocabularies" / "user.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ExportError, match=r"vocabularies/user\.parquet"):
        recommend(moved, "7", 5)


def test_what_fails_verification_is_no_export(trained, tmp_path):
    run, out = trained(), tmp_path / "out"
    assert cli("export", run, out).returncode == 0
    result = json.loads((run / "result.json").read_text())
    result["metrics"]["recall@5"] += 0.01  # as if the run had been of another model
    (run / "result.json").write_text(json.dumps(result))
    failed = cli("export", run, out)
    assert failed.returncode == 1, failed.stderr
    assert "Out of tolerance: recall@5" in failed.stdout
    assert not (out / "manifest.json").exists()
    assert json.loads((out / "verification.json").read_text())["passed"] is False
    refused = cli("recommend", out, "--user", 3)
    assert refused.returncode == 2
    assert "did not pass verification" in refused.stderr
    assert cli("export", run, out, "--tolerance", 0.02).returncode == 0
    shown = cli("recommend", out, "--user", 3, "-k", 2, "--json")
    assert len(json.loads(shown.stdout)["items"]) == 2
    all_of_them = cli("recommend", out, "--user", 3, "-k", 10**9)
    assert all_of_them.returncode == 0, all_of_them.stderr
    assert "1,000,000,000 items were asked for, of 30 that the export has, without" in all_of_them.stdout


def test_vectors_that_are_not_the_models_are_found(trained, tmp_path, monkeypatch):
    import embedshard.launch.export_towers as module

    write = module.write_items

    def faulty(parts, model, place):
        written = write(parts, model, place)
        content = pq.read_table(place.path)
        order = pa.array(np.roll(np.arange(len(content)), 1))
        pq.write_table(content.set_column(2, "vector", content["vector"].take(order)), place.path)
        return written

    monkeypatch.setattr(module, "write_items", faulty)
    found = export_here(trained(), tmp_path / "out", {})
    assert found.manifest is None
    assert any("a score is off" in problem for problem in found.verification.problems)
    assert found.verification.index["recall_lost"] == 0  # each by itself: the index is of the vectors that were written


def test_an_index_that_misses_is_told_by_itself(trained, tmp_path, monkeypatch):
    import embedshard.launch.export_towers as module

    build = module.build_index

    def faulty(kind, blocks, *rest):
        return build(kind, lambda: (np.roll(block, 7, axis=0) for block in blocks()), *rest)

    monkeypatch.setattr(module, "build_index", faulty)
    run, out = trained(), tmp_path / "out"
    found = export_here(run, out, {})
    assert found.manifest is None
    (problem,) = found.verification.problems
    assert problem.startswith("the flat index misses")
    assert found.verification.score_error < 1e-6
    assert not (out / "manifest.json").exists()
    assert export_here(run, out, {}, index_tolerance=1.0).manifest is not None
    unverified = export_here(run, out, {}, verifies=False)
    assert unverified.verification is None
    assert "verification.json" not in unverified.manifest.files


def test_only_a_new_folder_or_an_export_is_written_over(trained, tmp_path):
    run, out = trained(), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"holds thesis\.tex and is no earlier export"):
        export_here(run, out, {})
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(ExportError, match="no earlier export"):
        export_here(run, run, {})
    with pytest.raises(ConfigError, match="--index flatt"):
        export_here(run, tmp_path / "new", {}, index="flatt")
    assert not (tmp_path / "new").exists()
    (out / "thesis.tex").unlink()
    export_here(run, out, {})
    export_here(run, out, {}, index="ivf")
    assert manifest_of(out)["index"]["kind"] == "ivf"


@pytest.mark.parametrize("has_towers", [True, False])
def test_an_earlier_export_goes_when_all_that_is_given_was_looked_at(trained, interactions, tmp_path, has_towers):
    shutil.copytree(interactions / "train", tmp_path / "train")
    moved = {"data": {"train": str(tmp_path / "train" / "*.parquet")}}
    plain = {
        "data": {"label": "clicked"}, "model": {"kind": "wide_and_deep", "mlp": [8]}, "objective": {"kind": "bce"},
        "evaluate": {"metrics": ["auc"]},
    }  # fmt: skip
    run, out = trained(moved if has_towers else plain), tmp_path / "out"
    export_here(run, out, {})

    def content():
        return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refused(error, message, **options):
        with pytest.raises(error, match=message):
            export_here(run, out, {}, **options)
        assert content() == was, message

    was, step = content(), manifest_of(out)["step"]
    refused(ConfigError, "--index flatt", index="flatt")
    refused(ConfigError, "--quantise int9", quantise="int9")
    refused(CheckpointError, "step-00000999", checkpoint_step=999)
    if has_towers:
        refused(ConfigError, "tpu", device="tpu")
        (tmp_path / "train").rename(tmp_path / "away")
        refused(DataError, "train")
        (tmp_path / "away").rename(tmp_path / "train")
    file = next((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    text = bytearray(file.read_bytes())
    text[len(text) // 2] ^= 1
    file.write_bytes(text)
    refused(CheckpointError, f"step-{step:08d}")


def test_what_is_taken_for_an_export_or_a_delta_is_told_what_it_is(trained, tmp_path):
    run, out, delta = trained(), tmp_path / "out", tmp_path / "delta"
    is_run = r"run is the folder of a run, not an export\. Export it first: embedshard export .*run OUT"
    for opening in (lambda: recommend(run, "3", 5), lambda: candidates(run), lambda: open_export(run)):
        with pytest.raises(ExportError, match=is_run):
            opening()
    with pytest.raises(ExportError, match=r"run is the folder of a run, not a delta\. .*export .*run DELTA --since EXPORT"):
        apply_delta(run, out)
    step = next((run / "checkpoints").glob("step-*"))
    number = int(step.name.removeprefix("step-"))
    with pytest.raises(ExportError, match=rf"is a checkpoint of a run.*export RUN_DIR OUT --checkpoint {number}$"):
        open_export(step)
    with pytest.raises(ExportError, match=r"is a file; an export is a folder\. .*manifest\.json"):
        recommend(run / "result.json", "3", 5)
    with pytest.raises(ExportError, match=r"--since .*result\.json is no manifest\.json\. Name that of an earlier export"):
        export_since(run, delta, run / "result.json", {})
    with pytest.raises(ExportError, match=is_run):
        export_since(run, delta, run, {})
    assert not delta.exists()
    delta.mkdir()
    prepare_delta_folder(locate(delta))
    unfinished = r"delta is a delta without a manifest.*export RUN_DIR .*delta --since EXPORT"
    with pytest.raises(ExportError, match=unfinished):
        recommend(delta, "3", 5)
    with pytest.raises(ExportError, match=r"holds no export\. Name the folder of one, or make one: .*RUN_DIR OUT"):
        open_export(tmp_path)
    out.mkdir()
    with pytest.raises(ExportError, match=r"out is empty\. Export a run to it: embedshard export RUN_DIR .*out"):
        candidates(out)


def test_a_run_without_a_step_has_nothing_to_export(trained, tmp_path):
    run = trained({"train": {"max_steps": 0}})
    told = r"run has no checkpoint: it ended before its first step\. Train on: embedshard train --resume .*max_steps=null"
    for reading in (lambda: export_here(run, tmp_path / "out", {}), lambda: evaluate_here(run, None, "cpu", {})):
        with pytest.raises(CheckpointError, match=told):
            reading()
    assert not (tmp_path / "out").exists()


def test_managed_items_of_whom_none_was_admitted_are_told_so(trained, tmp_path):
    managed = {"kind": "managed", "rows": 64, "admission": {"min_count": 30000}}
    changes = {"tables": {"item": {"rows": None, "vocabulary": managed}}, "evaluate": {"metrics": []}}
    out = tmp_path / "out"
    export_here(trained(changes), out, {})
    none = "There are no vectors of items: no id holds a row of table 'item' at this step: its vocabulary has admitted none"
    assert any(note.startswith(none) for note in manifest_of(out)["notes"])
    with pytest.raises(ExportError, match="has admitted none"):
        recommend(out, "3", 5)


def test_one_folder_is_written_by_one_export_at_a_time(trained, tmp_path):
    run, out = trained(), tmp_path / "out"
    met = []

    def say(part):
        if part in ("tables, dense part, vocabularies", "verification"):
            with pytest.raises(ExportError, match="is being changed by another apply, rollback or export"):
                export_here(run, out, {}, verifies=False)
            met.append(part)

    assert export_here(run, out, {}, say=say).manifest is not None
    assert len(met) == 2
    assert open_export(out).manifest.verification["passed"]


def test_given_candidates_and_several_rows_a_user_are_replayed_by_one_row_each(trained, interactions, tmp_path):
    table = pq.read_table(interactions / "test" / "part-0.parquet")
    negatives = np.random.default_rng(5).integers(0, 30, (60, 9)).tolist()
    pq.write_table(table.append_column("negatives", pa.array(negatives, pa.list_(pa.int16()))), tmp_path / "test.parquet")
    changes = {
        "data": {"test": str(tmp_path / "test.parquet"), "label": "clicked"},
        "objective": {"kind": "bce"},
        "evaluate": {"metrics": ["hit_rate@3", "auc"], "candidates": "negatives"},
    }
    found = export_here(trained(changes, ("train", "test")), tmp_path / "out", {}).verification
    assert found.passed
    assert found.against == "the model"
    assert found.queries == len(set(table["user_id"].to_pylist()))
    assert list(found.metrics) == ["hit_rate@3"]


def test_where_rows_change_hands_the_ids_that_hold_one_are_exported(trained, tmp_path):
    managed = {"kind": "managed", "rows": 64}
    changes = {
        "tables": {"user": {"rows": None, "vocabulary": managed}},
        "evaluate": {"metrics": []},
    }
    found = export_here(trained(changes), tmp_path / "out", {})
    manifest = manifest_of(tmp_path / "out")
    assert found.verification is None
    assert manifest["user"] is manifest["seen"] is None
    assert "change hands" in manifest["notes"][0]
    assert "There are no vectors of users: their tower reads history, age" in manifest["notes"][1]
    ids = pq.read_table(tmp_path / "out" / manifest["tables"]["user"]["file"])["id"].to_pylist()
    assert ids[-1] is None
    assert set(ids[:-1]) <= set(range(40))
    assert ids[:-1]
    assert pq.read_table(tmp_path / "out" / "items.parquet")["id"].to_pylist() == list(range(30))
    with pytest.raises(ExportError, match=r"can recommend nothing.*change hands"):
        recommend(tmp_path / "out", "3", 5)


def test_what_has_no_towers_is_exported_without_them(trained, tmp_path):
    changes = {
        "data": {"label": "clicked"},
        "model": {"kind": "wide_and_deep", "mlp": [8]},
        "objective": {"kind": "bce"},
        "evaluate": {"metrics": ["auc"]},
    }
    found = export_here(trained(changes), tmp_path / "out", {})
    manifest = manifest_of(tmp_path / "out")
    assert found.verification is None
    assert manifest["user"] is manifest["item"] is manifest["index"] is None
    assert manifest["programs"].keys() == {"model"}
    with pytest.raises(ExportError, match=r"can recommend nothing.*this is a wide_and_deep"):
        recommend(tmp_path / "out", "3", 5)
