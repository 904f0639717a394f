"""`embedshard export --since`, `apply` and `rollback` of real runs: the result is the whole export, file by file."""

import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from embedshard.errors import CheckpointError, ConfigError, EmbedshardError, ExportError
from embedshard.export.delta_apply import apply_delta, roll_back
from embedshard.export.manifest import hash_file, open_export
from embedshard.export.recommend import recommend
from embedshard.launch.export import export_here
from embedshard.launch.export_since import export_since, show_delta
from embedshard.storage import locate
from embedshard.train.checkpoint import find_steps
from embedshard.train.run_directory import RunDirectory
from tests.commands import run_command

PLAIN = {
    "model": {"kind": "two_tower", "user": {"features": ["user_id"]}, "item": {"features": ["item_id"]}},
    "tables": {"user": {"rows": 4000, "dim": 8}, "item": {"rows": 3000, "dim": 8}},
}
"""Rows change by themselves: no tower lies over them. Most rows are met by nobody."""
SPARSE = {"objective": {"kind": "bce"}, "data": {"label": "clicked"}, "evaluate": {"metrics": ["recall@5"]}}


@pytest.fixture
def trained(make_config, run_tree, tmp_path):
    """A function from changes of the config to the folder of its run and two steps of it."""

    def trained(changes=None, name="run"):
        every = {"train": {"epochs": 2}, "checkpoint": {"every_steps": 1, "keep": 20}}
        run_tree(make_config({**every, **(changes or {})}).tree, tmp_path / name)
        steps = find_steps(RunDirectory(tmp_path / name).checkpoints)
        return tmp_path / name, steps[-2], steps[-1]

    return trained


def hashes(folder):
    """Of the files that lie there now, not of those that the manifest tells of."""
    return {name: hash_file(locate(folder / name)) for name in open_export(folder).manifest.files}


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(file):
    text = bytearray(file.read_bytes())
    text[len(text) // 2] ^= 1
    file.write_bytes(text)


def test_tables_in_fewer_bits_are_of_a_delta_as_of_a_whole_export(trained, tmp_path):
    run, before, after = trained({**PLAIN, **SPARSE})
    onto, delta = tmp_path / "onto", tmp_path / "delta"
    export_here(run, onto, {}, checkpoint_step=before, quantise="int8")
    export_here(run, tmp_path / "whole", {}, checkpoint_step=after, quantise="fp16,int8")
    of_delta = ("export", run, delta, "--since", onto, "--checkpoint", after, "--quantise")
    written = cli(*of_delta, "int8", "--quantise", "fp16")
    assert written.returncode == 0, written.stderr
    refused = cli(*of_delta, "int9")
    assert refused.returncode == 2
    assert "--quantise int9: there is no such format" in refused.stderr
    with pytest.raises(ConfigError, match="'none' was given with others"):
        export_since(run, delta, onto, {}, checkpoint_step=after, quantise="int8,none")
    assert (delta / "manifest.json").exists(), "the earlier delta is gone for an option that is none"
    apply_delta(delta, onto)
    assert hashes(onto) == hashes(tmp_path / "whole")
    assert {"tables/user.int8.parquet", "tables/user.fp16.parquet"} <= hashes(onto).keys()


def cli(*arguments):
    return run_command(*arguments, COLUMNS="160")


@pytest.mark.parametrize("changes", [{**PLAIN, **SPARSE}, {}], ids=["tables alone", "towers over them"])
def test_a_delta_makes_the_whole_export_and_leads_back(trained, tmp_path, changes):
    run, before, after = trained(changes)
    export_here(run, tmp_path / "onto", {}, checkpoint_step=before)
    first = hashes(tmp_path / "onto")
    manifest = (tmp_path / "onto" / "manifest.json").read_bytes()
    found = export_since(run, tmp_path / "delta", tmp_path / "onto" / "manifest.json", {}, checkpoint_step=after)
    assert found.exported.verification.passed
    assert not (tmp_path / "delta" / "result").exists()
    export_here(run, tmp_path / "whole", {}, checkpoint_step=after)
    apply_delta(tmp_path / "delta", tmp_path / "onto")
    assert hashes(tmp_path / "onto") == open_export(tmp_path / "onto").manifest.files == hashes(tmp_path / "whole")
    assert open_export(tmp_path / "onto").manifest.step == after
    assert recommend(tmp_path / "onto", "7", 5) == recommend(tmp_path / "whole", "7", 5)
    roll_back(tmp_path / "onto")
    assert hashes(tmp_path / "onto") == first
    assert (tmp_path / "onto" / "manifest.json").read_bytes() == manifest


def test_the_rows_of_a_delta_are_those_that_the_checkpoints_differ_in(trained, tmp_path):
    run, before, after = trained({**PLAIN, **SPARSE})
    export_here(run, tmp_path / "onto", {}, checkpoint_step=before)
    found = export_since(run, tmp_path / "delta", tmp_path / "onto", {}, checkpoint_step=after)
    export_here(run, tmp_path / "whole", {}, checkpoint_step=after)
    for name in ("tables/user.parquet", "tables/item.parquet", "users.parquet", "items.parquet"):
        old, new = (pq.read_table(tmp_path / folder / name) for folder in ("onto", "whole"))
        assert old["row"] == new["row"]
        vectors = [np.array(table["vector"].to_pylist(), np.float32) for table in (old, new)]
        others = np.flatnonzero((vectors[0].view(np.uint32) != vectors[1].view(np.uint32)).any(axis=1))
        assert 0 < len(others) < len(new)
        change = found.manifest.changes[name]
        assert (change.kind, change.changed, change.added, change.gone) == ("rows", len(others), 0, 0)
        told = pq.read_table(tmp_path / "delta" / change.rows)
        assert told["row"].to_pylist() == new["row"].take(others).to_pylist()
        assert told["vector"].to_pylist() == new["vector"].take(others).to_pylist()
    assert found.bytes < found.whole / 3
    assert "seen.parquet" not in found.manifest.changes
    for name, change in found.manifest.changes.items():
        if change.kind == "whole":
            assert (tmp_path / "delta" / change.file).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ids_that_come_and_go_are_rows_that_are_added_and_gone(trained, tmp_path):
    managed = {"kind": "managed", "rows": 24}
    few = {"global_batch_size": 4, "epochs": 1}
    tables = {"user": {"rows": None, "dim": 64, "vocabulary": managed}}
    model = {"kind": "two_tower", "user": {"features": ["user_id"], "mlp": [8]}, "item": {"features": ["item_id"]}}
    run, _, after = trained({"tables": tables, "train": few, "model": model, "evaluate": {"metrics": []}})
    before = after - 4
    export_here(run, tmp_path / "onto", {}, checkpoint_step=before)
    found = export_since(run, tmp_path / "delta", tmp_path / "onto", {}, checkpoint_step=after)
    export_here(run, tmp_path / "whole", {}, checkpoint_step=after)
    ids = []
    for folder in ("onto", "whole"):
        table = pq.read_table(tmp_path / folder / "tables" / "user.parquet")
        ids.append(dict(zip(table["row"].to_pylist(), table["id"].to_pylist(), strict=True)))
    assert any(ids[0].get(row) not in (None, id_) for row, id_ in ids[1].items()), "no row changed hands in this run"
    change = found.manifest.changes["tables/user.parquet"]
    assert change.kind == "rows"
    assert change.added == len(ids[1].keys() - ids[0].keys())
    assert change.gone == len(ids[0].keys() - ids[1].keys())
    apply_delta(tmp_path / "delta", tmp_path / "onto")
    assert hashes(tmp_path / "onto") == hashes(tmp_path / "whole")


def test_an_export_of_which_nothing_could_be_left_is_refused(trained, tmp_path):
    run, before, after = trained({**PLAIN, **SPARSE})
    onto, delta = tmp_path / "onto", tmp_path / "delta"
    export_here(run, onto, {}, checkpoint_step=before)
    export_since(run, delta, onto, {}, checkpoint_step=after)
    was = content(delta)
    tables = {"user": {"rows": 4000, "dim": 16}, "item": {"rows": 3000, "dim": 16}}
    wide, _, _ = trained({**PLAIN, **SPARSE, "tables": tables}, "wide")
    whole = r"Export whole: embedshard export .*{} OUT; or name an export of this run with --since"
    told = r"of run 'run' with tables of dim item 8, user 8; .*wide has item 16, user 16\. No row could be kept\. "
    with pytest.raises(ExportError, match=told + whole.format("wide")):
        export_since(wide, delta, onto, {})
    deep, _, _ = trained({**SPARSE, "model": {"kind": "dlrm"}, "evaluate": {"metrics": ["auc"]}}, "deep")
    told = r"of run 'run', whose model is a two_tower; that of .*deep is a dlrm\. "
    with pytest.raises(ExportError, match=told + "There is nothing to compare. " + whole.format("deep")):
        export_since(deep, delta, onto, {})
    assert content(delta) == was


def test_an_earlier_export_that_is_none_of_an_earlier_step_is_told_so(trained, tmp_path):
    run, before, after = trained({**PLAIN, **SPARSE})
    other, _, _ = trained({**PLAIN, **SPARSE, "seed": 12}, "other")
    onto, delta = tmp_path / "onto", tmp_path / "delta"
    export_here(run, onto, {}, checkpoint_step=after)

    def told(whose, step):
        console = Console(width=300, file=io.StringIO())
        found = export_since(whose, delta, onto, {}, checkpoint_step=step, verifies=False)
        show_delta(found, console)
        assert found.to_json()["relation"] == list(found.relation)
        assert all(sentence in console.file.getvalue() for sentence in found.relation)
        assert ("Hardly a row is as it was" in console.file.getvalue()) == found.keeps_nothing
        return found

    back = told(run, before)
    assert back.relation == (f"The earlier export is of a later step: this delta goes back, from {after} to {before}.",)
    assert not back.keeps_nothing
    same = told(run, after)
    assert same.relation == (f"The earlier export is of the same checkpoint, step {after}.",)
    assert not same.keeps_nothing
    of_other = told(other, after)
    [sentence] = of_other.relation
    assert sentence == "The earlier export is of run 'run', and this is run 'other'; their configs differ in seed."
    assert of_other.keeps_nothing, "every row is drawn by the seed"
    first = hashes(onto)
    apply_delta(delta, onto)
    export_here(other, tmp_path / "whole", {}, checkpoint_step=after, verifies=False)
    assert hashes(onto) == hashes(tmp_path / "whole")
    roll_back(onto)
    assert hashes(onto) == first


def test_what_is_no_earlier_export_is_refused(trained, tmp_path):
    run, before, after = trained({**PLAIN, **SPARSE})
    onto, delta = tmp_path / "onto", tmp_path / "delta"
    export_here(run, onto, {}, checkpoint_step=before)
    for out in (onto, onto / "below", tmp_path):
        with pytest.raises(ExportError, match="are one, or one in the other"):
            export_since(run, out, onto, {}, checkpoint_step=after)
    with pytest.raises(ExportError, match="is no earlier delta"):
        export_since(run, run, onto, {}, checkpoint_step=after)
    with pytest.raises(ExportError, match="is the folder of a run, not an export"):
        export_since(run, delta, run, {})
    export_since(run, delta, onto, {}, checkpoint_step=after)
    with pytest.raises(ExportError, match="is a delta: it has only what changed"):
        export_since(run, tmp_path / "next", delta, {})
    shutil.copytree(onto, tmp_path / "damaged")
    file = tmp_path / "damaged" / "seen.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ExportError, match=r"seen\.parquet"):
        export_since(run, tmp_path / "next", tmp_path / "damaged", {}, checkpoint_step=after)
    assert not (tmp_path / "next").exists()


def test_an_earlier_delta_goes_when_all_that_is_given_was_looked_at(trained, interactions, tmp_path):
    run, before, after = trained({**PLAIN, **SPARSE})
    onto, delta = tmp_path / "onto", tmp_path / "delta"
    export_here(run, onto, {}, checkpoint_step=before)
    export_since(run, delta, onto, {}, checkpoint_step=after)
    was = content(delta)
    for options, message in (
        ({"index": "foo"}, "--index foo"),
        ({"quantise": "int9"}, "--quantise int9"),
        ({"checkpoint_step": 999}, "step-00000999 is not there"),
        ({"device": "tpu"}, "tpu"),
    ):
        with pytest.raises(EmbedshardError, match=message):
            export_since(run, delta, onto, {}, **options)
        assert content(delta) == was, message
    damage(next((run / "checkpoints" / f"step-{after:08d}").glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=f"step-{after:08d}"):
        export_since(run, delta, onto, {}, checkpoint_step=after)
    assert content(delta) == was


def test_a_model_without_towers_is_verified_by_its_programs_and_what_fails_says_why(trained, tmp_path, monkeypatch):
    changes = {
        "data": {"label": "clicked"}, "model": {"kind": "wide_and_deep", "mlp": [8]}, "objective": {"kind": "bce"},
        "evaluate": {"metrics": ["auc"]},
    }  # fmt: skip
    run, before, after = trained(changes)
    onto, delta = tmp_path / "onto", tmp_path / "delta"
    export_here(run, onto, {}, checkpoint_step=before)
    console = Console(width=300, file=io.StringIO())
    show_delta(export_since(run, delta, onto, {}, checkpoint_step=after), console)
    assert f"Step {before} -> {after}, nothing was replayed, programs were run" in console.file.getvalue()
    show_delta(export_since(run, delta, onto, {}, checkpoint_step=after, verifies=False), console)
    assert f"Step {before} -> {after}, not verified" in console.file.getvalue()
    monkeypatch.setattr("embedshard.export.program_checks._TOLERANCE", -1.0)
    failed = export_since(run, delta, onto, {}, checkpoint_step=after)
    show_delta(failed, console)
    assert failed.manifest is None
    assert "Out of tolerance: program 'model.clicked' is off by" in console.file.getvalue()
    assert failed.to_json()["verification"]["problems"][0].startswith("program 'model.clicked'")
    assert failed.to_json()["verification"]["passed"] is False


def test_from_the_command_line(trained, tmp_path):
    run, before, after = trained({**PLAIN, **SPARSE})
    onto, delta = tmp_path / "onto", tmp_path / "delta"
    export_here(run, onto, {}, checkpoint_step=before)
    first = hashes(onto)
    written = cli("export", run, delta, "--since", onto / "manifest.json", "--checkpoint", after, "--json")
    assert written.returncode == 0, written.stderr
    told = json.loads(written.stdout)
    assert told["exported"]
    assert told["changes"]["tables/user.parquet"]["changed"] > 0
    assert 0 < told["bytes"] < told["whole_bytes"]
    refused = cli("recommend", delta, "--user", 3)
    assert refused.returncode == 2
    assert "is a delta" in refused.stderr
    applied = cli("apply", delta, onto)
    assert applied.returncode == 0, applied.stderr
    assert f"step {before} -> {after}" in applied.stdout
    assert f"Back to step {before}: embedshard rollback" in applied.stdout
    assert cli("rollback", onto).returncode == 0
    assert hashes(onto) == first
    nothing = cli("rollback", onto)
    assert nothing.returncode == 2
    assert "nothing is kept that leads back" in nothing.stderr
    result = json.loads((run / "result.json").read_text())
    result["metrics"]["recall@5"] += 0.01  # as if the run had been of another model
    result["selected_step"] = after
    (run / "result.json").write_text(json.dumps(result))
    failed = cli("export", run, delta, "--since", onto, "--checkpoint", after)
    assert failed.returncode == 1, failed.stderr
    assert "Out of tolerance: recall@5" in failed.stdout
    assert not (delta / "manifest.json").exists()
    assert json.loads((delta / "verification.json").read_text())["passed"] is False
    torn = cli("apply", delta, onto)
    assert torn.returncode == 2
    assert "did not pass verification" in torn.stderr
    assert hashes(onto) == first
