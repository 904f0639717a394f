"""`embedshard export` writes programs: joined with tables' files they score as the model does, without embedshard."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch

from embedshard.data.columns import Flat
from embedshard.export.join import join, table_vectors
from embedshard.export.manifest import open_export
from embedshard.export.program_file import load_program
from embedshard.launch.export import export_here
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


@pytest.fixture
def exported(make_config, run_tree, tmp_path):
    """A function from changes of the config to the folders of its run and its export, and what was found."""

    def exported(changes, **options):
        tree = make_config({"train": {"epochs": 1}}).tree
        tree = without_nothing(merged(tree, changes))
        run_tree(tree, tmp_path / "run")
        return tmp_path / "run", tmp_path / "out", export_here(tmp_path / "run", tmp_path / "out", {}, **options)

    return exported


def merged(tree, changes):
    result = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict) and "kind" not in value
        result[key] = merged(result[key], value) if both else value
    return result


def without_nothing(tree):
    """Leaves out what is None, but of `rows` and `max_length`."""
    kept = {k: v for k, v in tree.items() if v is not None or k in ("rows", "max_length")}
    return {k: without_nothing(v) if isinstance(v, dict) else v for k, v in kept.items()}


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

folder, asked = sys.argv[1], json.load(sys.stdin)
manifest = json.load(open(f"{folder}/manifest.json"))

def table(name):
    content = pq.read_table(f"{folder}/{manifest['tables'][name]['file']}")
    vectors = content["vector"].combine_chunks().flatten().to_numpy().reshape(len(content), -1)
    return dict(zip(content["id"].to_pylist(), vectors))

tables = {name: table(name) for name in manifest["tables"]}
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
assert not any(name.startswith(("embedshard.", "torchrec.", "fbgemm")) and sys.modules[name] for name in sys.modules)
print(json.dumps(scores))
"""


@pytest.mark.parametrize("case", ["two_tower", "deepfm by name", "sasrec"])
def test_programs_load_where_embedshard_is_not_installed(exported, interactions, case):
    of_ids = ranking(
        {
            "kind": "deepfm",
            "features": ["user_id", "item_id", "history", "root", "age", "price"],
            "mlp": [8],
            "sequences": DIN,
        }
    )
    run, out, _ = exported(CASES.get(case, of_ids))
    _, expected = of_the_model(run, interactions)
    asked = pq.read_table(interactions / "test" / "part-0.parquet").to_pydict()
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, str(out)], input=json.dumps(asked), capture_output=True, text=True, timeout=120,
        cwd=out, env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    made = json.loads(alone.stdout)
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(made[name]), value, rtol=1e-5, atol=1e-5)
