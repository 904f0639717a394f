"""`embedshard export` writes programs: joined with tables' files they score as the model does, without embedshard."""

import contextlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedshard.data.columns import Flat
from embedshard.errors import ConfigError, ExportError
from embedshard.export.join import join, table_vectors
from embedshard.export.manifest import open_export
from embedshard.export.program_file import check_archive, load_program
from embedshard.export.recommend import recommend
from embedshard.launch.export import export_here
from embedshard.models.output import LabelOutput, RetrievalOutput
from embedshard.storage import locate
from embedshard.train.assembly import assemble
from embedshard.train.checkpoint import newest_intact
from embedshard.train.run_directory import RunDirectory
from embedshard.train.snapshot import restore_model
from embedshard.world import open_world

SEQUENCE = {"kind": "sequence", "table": "item", "column": "history", "max_length": 4}
FEATURES = {
    "tags": {"kind": "weighted_bag", "table": "item", "column": "history", "weights": "history_weight", "pooling": "mean"},
    "root": {"kind": "bag", "table": "user", "column": "history", "pooling": "sqrtn"},
    "price": {"kind": "dense", "column": "rating", "normalise": "log1p"},
}
CLICKS = {"data": {"label": "clicked"}, "objective": {"kind": "bce"}, "evaluate": {"metrics": ["auc"]}}
CLASSES = {
    "data": {"label": "rating"}, "objective": {"kind": "cross_entropy", "classes": 6}, "evaluate": {"metrics": ["accuracy"]}
}  # fmt: skip
IN_TWO = {"kind": "quotient_remainder", "ids": 40}


def ranking(model, **changes):
    return CLICKS | {"features": {**FEATURES, "history": SEQUENCE}, "model": model, **changes}


def encoder(how, max_length=4):
    model = {"kind": "text_classifier", "text": "history", "encoder": how, "features": ["user_id", "age"], "mlp": [8]}
    return CLASSES | {"features": {"history": {**SEQUENCE, "max_length": max_length}}, "model": model}


DIN = {"history": {"kind": "target_attention", "target": "item_id", "mlp": [8]}}
CASES = {
    "two_tower": {},
    "two_tower biases": {
        "features": {**FEATURES, "history": SEQUENCE},
        "tables": {"user": {"rows": None, "vocabulary": IN_TWO}},
        "model": {
            "kind": "two_tower",
            "user": {
                "features": ["user_id", "tags", "history", "root"], "mlp": [8], "sequences": {"history": {"kind": "max"}}
            },
            "item": {"features": ["item_id", "price"], "mlp": [8]},
            "biases": ["global", "user"],
        },
        "data": {"label": "clicked"}, "objective": {"kind": "bce"}, "evaluate": {"metrics": ["auc"]},
    },
    "dlrm": ranking({"kind": "dlrm", "dense_mlp": [8], "mlp": [8], "sequences": DIN}),
    "dlrm without numbers": ranking({"kind": "dlrm", "features": ["user_id", "item_id", "tags"], "mlp": [8]}),
    "dcn_v2": ranking({"kind": "dcn_v2", "cross_layers": 2, "mlp": [8], "norm": "batch", "dropout": 0.5}),
    "dcn_v2 low rank": ranking({"kind": "dcn_v2", "low_rank": 4, "structure": "parallel", "mlp": [8], "norm": "layer"}),
    "deepfm": ranking({"kind": "deepfm", "mlp": [8]}, tables={"user": {"rows": None, "vocabulary": IN_TWO}}),
    "wide_and_deep": ranking({"kind": "wide_and_deep", "mlp": [8], "wide": ["age", "tags"]}),
    "mmoe": ranking(
        {"kind": "mmoe", "experts": 3, "expert_mlp": [8], "mlp": [4]},
        data={"labels": {"clicked": "clicked", "weighted": "clicked"}},
    ),
    "flatten": encoder({"kind": "flatten", "padding": "pre"}),
    "flatten post": encoder({"kind": "flatten", "padding": "post"}),
    "mean": encoder({"kind": "mean"}, None),
    "attention": encoder({"kind": "attention"}),
    "conv": encoder({"kind": "conv", "widths": [1, 3], "channels": 4}),
    "gru": encoder({"kind": "gru", "hidden": 4}),
    "lstm": encoder({"kind": "lstm", "hidden": 4, "layers": 2, "bidirectional": True}),
    "sasrec": {
        "features": {"history": SEQUENCE, "age": None},
        "model": {"kind": "sasrec", "sequence": "history", "item_id": "item_id", "user_id": "user_id", "heads": 2},
        "objective": {"kind": "sampled_softmax", "num_negatives": 20},
        "evaluate": {"metrics": ["recall@5"]},
    },
}  # fmt: skip


def of_the_model(run, interactions):
    """The rows of the test set as columns of rows and numbers, and by program and output what the model makes of them."""
    config = RunDirectory.open(run).load_config({}).config
    with open_world("cpu") as world:
        parts = assemble(config, world, initialises=False)
        restore_model(newest_intact(RunDirectory(run).checkpoints), parts.model, parts.managed)
        model = parts.model.eval().module
        columns = parts.dataset.read_held_out("test")
        size = len(columns["row"].values)
        batch = parts.collator.batch(columns, 0, size)
        if hasattr(model, "encode_queries"):
            with torch.no_grad():
                made = {"user.vector": model.encode_queries(batch), "item.vector": model.encode_candidates(batch)}
        else:
            with torch.no_grad():
                output = model(batch)
            logits = output.logits_BL if hasattr(output, "logits_BL") else output.logits_BC
            names = list(config.data.label_columns)
            made = (
                {f"model.{name}": logits[:, place] for place, name in enumerate(names)}
                if logits.shape[1] == len(names)
                else {f"model.{names[0]}": logits}
            )
    raw = pq.read_table(interactions / "test" / "part-0.parquet")
    for name, feature in config.features.items():
        if feature.kind == "dense":
            columns[name] = Flat(raw[feature.column or name].to_numpy())
    return columns, made


@pytest.mark.parametrize("case", CASES)
def test_programs_and_tables_score_as_the_model_does(exported, interactions, case):
    run, out, found = exported(CASES[case])
    assert found.programs.problems == []
    export = open_export(out)
    manifest = export.manifest
    columns, expected = of_the_model(run, interactions)
    vectors = table_vectors({name: export.file(table.file) for name, table in manifest.tables.items()})
    made = {}
    for name, program in manifest.programs.items():
        run_program = load_program(export.file(program.file))
        inputs = join(program.inputs, columns, vectors)
        assert {key: str(value.dtype).removeprefix("torch.") for key, value in inputs.items()} == {
            spec.name: spec.dtype for spec in program.inputs
        }
        outputs = run_program(**inputs)
        assert list(outputs) == [output.name for output in program.outputs]
        made |= {f"{name}.{key}": value for key, value in outputs.items()}
        one = {key: value[7:8] for key, value in reversed(inputs.items())}  # a batch of one; keywords in any order
        for key, value in run_program(**one).items():
            torch.testing.assert_close(value, outputs[key][7:8], rtol=1e-5, atol=1e-5)
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-5)
        assert value.std() > 1e-4, "they differ between rows"
    assert found.programs.error.keys() == expected.keys()


ALONE = """
import json, sys
for name in ("embedshard", "torchrec", "fbgemm_gpu", "fbgemm_gpu_experimental"):
    sys.modules[name] = None  # an import of it is an error
import numpy as np
import pyarrow.parquet as pq
import torch

def table(folder, manifest, name):
    content = pq.read_table(f"{folder}/{manifest['tables'][name]['file']}")
    vectors = content["vector"].combine_chunks().flatten().to_numpy().reshape(len(content), -1)
    return dict(zip(content["id"].to_pylist(), vectors))

def scored(folder, asked):
    manifest = json.load(open(f"{folder}/manifest.json"))
    tables = {name: table(folder, manifest, name) for name in manifest["tables"]}
    scores = {}
    for name, program in manifest["programs"].items():
        inputs = {}
        for spec in program["inputs"]:
            values = asked[spec["config"]["column"] or spec["feature"]]
            if spec["kind"] == "dense":
                inputs[spec["name"]] = torch.tensor(values, dtype=torch.float64)
                continue
            lists = [one if isinstance(one, list) else [one] for one in values]
            lists = [one[-(spec["config"].get("max_length") or len(one) or 1):] for one in lists]
            if spec["kind"] == "lengths":
                inputs[spec["name"]] = torch.tensor([len(one) for one in lists])
                continue
            found = [np.array([tables[spec["table"]][id_] for id_ in one]).reshape(-1, spec["dim"]) for one in lists]
            if spec["kind"] == "sequence":
                longest = max(map(len, found))
                given = np.stack([np.pad(one, ((0, longest - len(one)), (0, 0)), constant_values=9.0) for one in found])
            else:
                over = {"sum": 0.0, "mean": 1.0, "sqrtn": 0.5}[spec["pooling"]]
                given = np.stack([one.sum(0) / max(1, len(one)) ** over for one in found])
            assert given.shape[2:] == tuple(spec["shape"][2:])
            inputs[spec["name"]] = torch.from_numpy(given.astype(np.float32))
        with torch.no_grad():
            outputs = torch.export.load(f"{folder}/{program['file']}").module()(**inputs)
        scores |= {f"{name}.{key}": value.tolist() for key, value in outputs.items()}
    return scores

asked = json.load(sys.stdin)
scores = [scored(folder, asked) for folder in sys.argv[1:]]
assert not any(name.startswith(("embedshard.", "torchrec.", "fbgemm")) and sys.modules[name] for name in sys.modules)
print(json.dumps(scores))
"""


def test_programs_load_where_embedshard_is_not_installed(exported, interactions, tmp_path):
    by_name = ranking(
        {
            "kind": "deepfm",
            "features": ["user_id", "item_id", "history", "root", "age", "price"],
            "mlp": [8],
            "sequences": DIN,
        }
    )
    made = [exported(changes) for changes in (CASES["two_tower"], by_name, CASES["sasrec"])]
    asked = pq.read_table(interactions / "test" / "part-0.parquet").to_pydict()
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, *(str(out) for _, out, _ in made)], input=json.dumps(asked), capture_output=True,
        text=True, timeout=240, cwd=tmp_path, check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    for (run, _, _), scores in zip(made, json.loads(alone.stdout), strict=True):
        _, expected = of_the_model(run, interactions)
        assert scores.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(scores[name]), value, rtol=1e-5, atol=1e-5)


def test_a_programs_file_is_read_without_unpickling_or_evaluating_anything(exported, tmp_path):
    _, out, _ = exported(CASES["sasrec"])
    export = open_export(out)
    file = out / export.manifest.programs["user"].file
    content = file.read_bytes()
    check_archive(content, "it")
    ran = tmp_path / "ran"

    def changed(name, change, compression=zipfile.ZIP_STORED):
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(stream, "w", compression) as after:
            for info in before.infolist():
                whole = before.read(info.filename)
                after.writestr(info.filename, change(whole) if info.filename.endswith(name) else whole)
        return stream.getvalue()

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    def as_text(change):
        return lambda whole: json.dumps(change(json.loads(whole))).encode()

    def pickled(tree):
        next(iter(tree["config"].values()))["use_pickle"] = True
        return tree

    def with_guard(tree):
        return tree | {"guards_code": [f"__import__('os').mkdir({str(ran)!r}) or True"]}

    def with_size(tree):
        text = json.dumps(tree)
        size = json.dumps(re.search(r'"expr_str": "([^"]*)"', text).group(1))
        return json.loads(text.replace(size, json.dumps(f"exec('import os; os.mkdir({str(ran)!r})')"), 1))

    def with_call(tree):
        tree["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"
        return tree

    stream = io.BytesIO()
    torch.save(Runs(), stream, pickle_module=pickle)
    cases = {
        "pickled example inputs": changed("sample_inputs/model.pt", lambda _: stream.getvalue()),
        "pickled": changed("model_weights_config.json", as_text(pickled)),
        "evaluates": changed("models/model.json", as_text(with_guard)),
        "evaluates 'exec": changed("models/model.json", as_text(with_size)),
        "calls 'torch.hub.load'": changed("models/model.json", as_text(with_call)),
        "compressed": changed("models/model.json", lambda whole: whole, zipfile.ZIP_DEFLATED),
        "is no program": b"PK" + content[:100],
    }
    for problem, tampered in cases.items():
        with pytest.raises(ExportError, match=problem):
            check_archive(tampered, "it")
        file.write_bytes(tampered)
        with pytest.raises(ExportError, match=r"user\.pt2"):  # its hash tells first
            open_export(out).file(export.manifest.programs["user"].file)
    with contextlib.suppress(Exception):  # torch itself would have run it
        torch.export.load(io.BytesIO(cases["pickled example inputs"]))
    assert ran.exists()


def forged(for_torch, for_python):
    """One file that is two archives of the same names: the directory before its end is of one, the one it tells of not."""
    found = []
    for members in (for_torch, for_python):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name), content)
        whole = stream.getvalue()
        size, offset = struct.unpack("<2L", whole[-10:-2])
        found.append((whole[:offset], whole[offset : offset + size], whole[-22:]))
    (first, its_directory, _), (second, directory, end) = found
    assert len(its_directory) == len(directory)
    shift = len(first) - len(second)  # what zipfile takes for the start of the archive is as far from where it is
    moved, place = bytearray(directory), 0
    while place < len(moved):
        lengths = struct.unpack_from("<3H", moved, place + 28)
        struct.pack_into("<L", moved, place + 42, struct.unpack_from("<L", moved, place + 42)[0] + shift)
        place += 46 + sum(lengths)
    end = bytearray(end)
    struct.pack_into("<L", end, 16, len(first))
    return first + its_directory + second + bytes(moved) + bytes(end)


def test_a_file_that_is_another_archive_to_torch_than_to_the_check_runs_nothing(exported, tmp_path):
    _, out, _ = exported({})
    file, ran = out / open_export(out).manifest.programs["item"].file, tmp_path / "ran"
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    stream = io.BytesIO()
    torch.save(Runs(), stream, pickle_module=pickle)
    [examples] = [name for name in members if name.endswith("sample_inputs/model.pt")]
    both = forged(members | {examples: stream.getvalue()}, members)
    with zipfile.ZipFile(io.BytesIO(both)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == members
    inputs = open_export(out).manifest.programs["item"].inputs
    given = {spec.name: torch.ones([2 if size == "batch" else size for size in spec.shape]) for spec in inputs}
    expected = load_program(locate(file))(**given)
    file.write_bytes(both)
    torch.testing.assert_close(load_program(locate(file))(**given), expected)
    assert not ran.exists()
    with contextlib.suppress(Exception):  # torch itself reads the other one
        torch.export.load(io.BytesIO(both))
    assert ran.exists()


def test_a_program_that_is_not_the_models_is_no_export(exported, tmp_path, monkeypatch):
    import embedshard.launch.export_programs as module

    save = module.save_program

    def faulty(traced, program, folder):
        with torch.no_grad():
            weight = next(traced.model.parameters())
            kept = weight.clone()
            weight.mul_(1.5)
            save(traced, program, folder)
            weight.copy_(kept)

    monkeypatch.setattr(module, "save_program", faulty)
    _, out, found = exported(CASES["dcn_v2"])
    assert found.manifest is None
    (problem,) = found.programs.problems
    assert problem.startswith("program 'model.clicked' is off by")
    assert not (out / "manifest.json").exists()
    assert json.loads((out / "verification.json").read_text())["problems"] == [problem]


def test_tables_in_fewer_bits_stand_beside_the_exact_ones_and_what_they_cost_is_told(exported):
    run, out, found = exported(CASES["two_tower"], quantise="int8")
    manifest = open_export(out).manifest
    assert list(manifest.quantised_tables) == ["int8"]
    files = manifest.quantised_tables["int8"]
    assert files.keys() == manifest.tables.keys()
    for table, exact in manifest.tables.items():
        wide, narrow = (pq.read_table(out / file) for file in (exact.file, files[table]))
        assert narrow["id"].equals(wide["id"])
        assert narrow["vector"].type.value_type == pa.uint8()
        given_back = np.array(narrow["vector"].to_pylist()) * narrow["scale"].to_numpy()[:, None]
        given_back += narrow["bias"].to_numpy()[:, None]
        error = np.abs(given_back - np.array(wide["vector"].to_pylist()))
        assert (error <= 0.51 * narrow["scale"].to_numpy()[:, None] + 1e-6).all()
    told = found.verification.quantised["int8 tables"]
    assert 0 < told["score_error"] < 0.1
    assert 0.5 < told["recall"] <= 1
    assert 0 < found.programs.quantised["int8 tables"]["score"] < 0.1
    assert found.programs.quantised["int8 tables"].keys() == {"user.vector", "item.vector", "score"}
    halves = export_here(run, out, {}, quantise="fp16").programs.quantised["fp16 tables"]
    assert 0 < halves["score"] < found.programs.quantised["int8 tables"]["score"]
    assert not (out / files["item"]).exists(), "an earlier export's files go"
    with pytest.raises(ConfigError, match="--quantise int9"):
        export_here(run, out, {}, quantise="int9")
    assert (out / "manifest.json").exists()


class Own(torch.nn.Module):
    def __init__(self, context):
        super().__init__()
        self.tables = context.lookup()
        self.age = context.dense_column("age")
        self.asks = context.options["asks"]
        self.layer = torch.nn.Linear(17, 1)

    def forward(self, batch):
        found = self.tables(batch)
        joined = torch.cat([found["user_id"], found["history"], batch.dense[:, self.age : self.age + 1]], dim=1)
        joined = joined * 2 if self.asks and bool(joined.sum() > 0) else joined
        return LabelOutput(self.layer(joined), found)


class OwnTowers(torch.nn.Module):
    def __init__(self, context):
        super().__init__()
        self.tables = context.lookup()
        self.age = context.dense_column("age")
        self.layer = torch.nn.Linear(17, 8)
        self.asks = context.options.get("asks", False)

    def query(self, found, batch):
        joined = torch.cat([found["user_id"], found["history"], batch.dense[:, self.age : self.age + 1]], dim=1)
        return self.layer(joined * 2 if self.asks and bool(joined.sum() > 0) else joined)

    def forward(self, batch):
        found = self.tables(batch)
        return RetrievalOutput(self.query(found, batch), found["item_id"], lookups=found)

    def encode_queries(self, batch):
        return self.query(self.tables(batch), batch)

    def encode_candidates(self, batch):
        return self.tables(batch)["item_id"]


@pytest.mark.parametrize("asks", [False, True])
def test_a_model_of_ones_own_with_towers_is_exported_as_a_two_tower_is(exported, asks, monkeypatch):
    module = types.ModuleType("own_models")
    module.Own = OwnTowers
    monkeypatch.setitem(sys.modules, "own_models", module)
    own = {"kind": "custom", "factory": "own_models:Own", "user_id": "user_id", "item_id": "item_id"}
    user = {"kind": "id", "table": "user", "unknown": "oov"}
    age = {"kind": "dense", "normalise": "standardise", "missing": "zero"}
    changes = {"model": own | {"options": {"asks": asks}}, "features": {"user_id": user, "age": age}}
    _, out, found = exported(changes, quantise="int8")
    assert found.verification.passed
    assert found.verification.score_error < 1e-5
    assert found.verification.against == "result.json"
    manifest = found.manifest
    assert (manifest.item.vectors, manifest.item.features) == (30, ["item_id"])
    assert manifest.user.features == ["user_id", "history", "age"]
    assert manifest.index.kind == "flat"
    assert len(recommend(out, "7", 5).items) == 5
    monkeypatch.delitem(sys.modules, "own_models")
    if asks:
        assert manifest.programs.keys() == {"item"}
        assert any("There is no program 'user': torch.export cannot trace the model" in note for note in manifest.notes)
        return
    assert manifest.notes == []
    assert manifest.programs.keys() == {"user", "item"}
    assert [spec.name for spec in manifest.programs["user"].inputs] == ["user_id", "history", "age"]
    assert [spec.name for spec in manifest.programs["item"].inputs] == ["item_id"]
    assert manifest.programs["user"].outputs[0].shape == ["batch", 8]
    assert "int8 tables" in found.verification.quantised
    assert len(recommend(out, None, 5, history="3,5,7").items) == 5


def test_a_model_of_ones_own_with_half_its_towers_is_told_what_it_lacks(exported, monkeypatch):
    module = types.ModuleType("own_models")
    module.Own = type("Half", (Own,), {"encode_queries": lambda model, batch: None})
    monkeypatch.setitem(sys.modules, "own_models", module)
    model = {"kind": "custom", "factory": "own_models:Own", "options": {"asks": False}}
    _, out, _ = exported(CLICKS | {"model": model})
    [note] = open_export(out).manifest.notes
    assert "own_models:Own returns has not both methods encode_queries(batch) and encode_candidates(batch)" in note


@pytest.mark.parametrize("asks", [False, True])
def test_a_model_of_ones_own_is_a_program_where_it_can_be_traced(exported, interactions, asks, monkeypatch):
    module = types.ModuleType("own_models")
    module.Own = Own
    monkeypatch.setitem(sys.modules, "own_models", module)
    model = {"kind": "custom", "factory": "own_models:Own", "options": {"asks": asks}}
    run, out, _ = exported(CLICKS | {"model": model})
    manifest = open_export(out).manifest
    if asks:
        assert manifest.programs == {}
        assert "There is no program 'model': torch.export cannot trace the model" in manifest.notes[-1]
        assert not (out / "programs").exists()
        return
    columns, expected = of_the_model(run, interactions)
    vectors = table_vectors({name: open_export(out).file(table.file) for name, table in manifest.tables.items()})
    program = manifest.programs["model"]
    assert [spec.name for spec in program.inputs] == ["user_id", "item_id", "history", "age"]
    made = load_program(open_export(out).file(program.file))(**join(program.inputs, columns, vectors))
    torch.testing.assert_close(made["clicked"], expected["model.clicked"], rtol=1e-5, atol=1e-5)
