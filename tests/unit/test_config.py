"""Configs: what is refused, and what the refusal says."""

import copy
import json

import pytest
import yaml

from embedshard.config import Config, build_config, differences, load_config, schema_json, table_specs
from embedshard.errors import ConfigError

TREE = {
    "seed": 7,
    "data": {"train": "data/*.parquet", "lanes": 64, "label": "rating"},
    "features": {
        "user_id": {"kind": "id", "table": "user"},
        "item_id": {"kind": "id", "table": "item"},
        "history": {"kind": "bag", "table": "item", "max_length": 50},
        "age": {"kind": "dense", "normalise": "log1p"},
    },
    "tables": {
        "user": {"rows": 1000, "dim": 32, "vocabulary": "identity"},
        "item": {"dim": 32, "vocabulary": {"kind": "hash", "rows": 5000}, "optimizer": {"lr": 0.1}},
    },
    "model": {
        "kind": "two_tower",
        "user": {"features": ["user_id", "history", "age"], "mlp": [64, 32]},
        "item": {"features": ["item_id"]},
    },
    "objective": {"kind": "mse"},
}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def refused(config_file, *overrides, environment=None):
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, environment or {}, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tables.item.dims=3", ["tables.item.dims: unknown key", "Did you mean 'dim'?"]),
        ("modle=3", ["modle: unknown key", "Did you mean 'model'?"]),
        ("model.user.featurs=[a]", ["model.user.featurs: unknown key", "Did you mean 'features'?"]),
        ("features.user_id.tabel=x", ["features.user_id.tabel: unknown key", "Did you mean 'table'?"]),
        ("features.x={kind: id}", ["features.x.table: is missing"]),
        ("tables.item.dim=6", ["tables.item.dim: 6", "multiple of 4", "4 or 8"]),
        ("tables.item.dim=-4", ["tables.item.dim: -4", "greater than 0"]),
        ("data.cache_bytes=2XB", ["data.cache_bytes: '2XB'", "2GB or 512MiB"]),
        ("data.cache_bytes=-1", ["data.cache_bytes: -1", "greater than or equal to 0"]),
        ("train.epochs=abc", ["train.epochs: 'abc'", "valid integer"]),
        ("features.history.pooling=men", ["features.history.pooling: 'men'", "Did you mean 'mean'?", "sum, mean"]),
        ("tables.item.vocabulary.kind=hsh", ["tables.item.vocabulary", "'hsh'", "Did you mean 'hash'?"]),
        ("evaluate.metrics=[recal@10]", ["evaluate.metrics: there is no metric 'recal@10'", "Did you mean 'recall@10'?"]),
        ("evaluate.metrics=[rmse, recall]", ["evaluate.metrics: metric 'recall' needs the length", "Write 'recall@20'"]),
        ("evaluate={metrics: [acu], bootstrap: 10}", ["there is no metric 'acu'", "Did you mean 'auc'?"]),
        ("objective.kind=inbatch_softmax", ["there is no kind 'inbatch_softmax'", "Did you mean 'in_batch_softmax'?"]),
        ("train.global_batch_size=300", ["global_batch_size=300", "64 lanes", "256 or 320", "lanes=60"]),
        ("features.user_id.table=usr", ["features.user_id.table", "no table 'usr'", "Did you mean 'user'?"]),
        ("model.user.features=[user_di]", ["model.user.features", "no feature 'user_di'", "Did you mean 'user_id'?"]),
        ("model.user.mlp=[16]", ["user tower ends in 16", "item tower in 32"]),
        ("data.label=null", ["objective 'mse' learns one label", "data.label"]),
        ("tables.spare={rows: 3, dim: 4}", ["tables.spare", "no feature looks it up"]),
        ("tables.user.rows=null", ["tables.user", "identity vocabulary needs 'rows'"]),
        ("data.partitions=[a]", ["either 'train'", "'partitions'"]),
        ("data.validation_fraction=1", ["data.validation_fraction: 1", "less than 1"]),
        ("data.validation_fraction=0.1", ["data.validation_fraction", "nothing looks at them", "evaluate.metrics"]),
        ("data={train: a, label: b, validation: c, validation_fraction: 0.1}", ["either 'validation'", "not both"]),
        ("evaluate={metrics: [recall@20], select: ndcg@20}", ["evaluate.select", "'ndcg@20'", "recall@20"]),
        ("train.early_stopping={patience: 2}", ["train.early_stopping", "data.validation"]),
        ("features.bad.name={kind: id}", ["features.bad"]),
        ("objective={kind: sampled_softmax, num_negatives: 100}", ["num_negatives=100", "64", "128"]),
        ("objective={kind: bpr, num_negatives: 100}", ["num_negatives=100", "64", "128"]),
        ("evaluate={metrics: [rmse], baselines: [baias]}", ["evaluate.baselines", "'baias'", "Did you mean 'bias'?"]),
        (
            "evaluate={metrics: [rmse], baselines: [{kind: bias, damp: 1}]}",
            ["evaluate.baselines.0.damp: unknown key", "damping"],
        ),
        (
            "evaluate={metrics: [rmse], baselines: [{kind: bias, damping: 0}]}",
            ["evaluate.baselines.0.damping: 0", "greater"],
        ),
        ("evaluate={metrics: [mrr], baselines: [{kind: ease, l2: 0}]}", ["evaluate.baselines.0.l2: 0", "greater than 0"]),
        ("evaluate={metrics: [mrr], baselines: [{kind: item_knn, neighbours: 0}]}", ["baselines.0.neighbours: 0", "1"]),
        ("evaluate={metrics: [mrr], baselines: [ease, {kind: ease, l2: 9}]}", ["evaluate.baselines: 'ease' is there twice"]),
        (
            "evaluate={metrics: [mrr], baselines: [mean]}",
            ["evaluate.baselines: 'mean' predicts labels", "add a metric", "rmse"],
        ),
        ("evaluate={metrics: [rmse], baselines: [ease]}", ["evaluate.baselines: 'ease' ranks items", "recall@20"]),
        ("evaluate={baselines: [popularity]}", ["evaluate.baselines: 'popularity' ranks items", "no metric"]),
        ("evaluate={metrics: [loss]}", ["evaluate.metrics: 'loss'", "only an item_embedding", "recall@20"]),
        ("evaluate={metrics: [rmse], baselines: bias}", ["evaluate.baselines", "'bias'", "auto"]),
        ("evaluate={metrics: [rmse], baseline_bytes: -1}", ["evaluate.baseline_bytes: -1"]),
        ("evaluate={metrics: [rmse], id_statistics_rows: -1}", ["evaluate.id_statistics_rows: -1"]),
        ("objective={kind: cosine_contrastive}", ["'cosine_contrastive'", "similarity is 'dot'", "'cosine'"]),
    ],
)
def test_a_mistake_is_refused_with_its_place_and_what_is_allowed(config_file, override, words):
    message = refused(config_file, override)
    for word in words:
        assert word in message, message
    assert "pydantic" not in message
    assert not any(line.endswith(("..", "?.")) for line in message.splitlines()), message


@pytest.mark.parametrize(
    ("metrics", "kinds"),
    [
        ([], []),
        (["recall@5", "mrr"], ["popularity"]),
        (["rmse"], ["mean", "bias"]),
        (["auc", "mrr"], ["popularity", "mean", "bias"]),
    ],
)
def test_the_baselines_that_cost_little_are_measured_where_none_are_named(config_file, metrics, kinds):
    config = load_config(config_file, {}, [f"evaluate.metrics={json.dumps(metrics)}"]).config
    assert [baseline.kind for baseline in config.baselines()] == kinds
    assert load_config(config_file, {}, ["evaluate.baselines=[]"]).config.baselines() == []


def test_a_baseline_is_named_alone_or_with_its_options(config_file):
    override = "evaluate={metrics: [mrr], baselines: [item_knn, {kind: ease, l2: 3}]}"
    knn, ease = load_config(config_file, {}, [override]).config.baselines()
    assert (knn.kind, knn.neighbours, ease.kind, ease.l2) == ("item_knn", 200, "ease", 3.0)


def test_a_bias_of_users_and_items_needs_to_know_them(config_file):
    overrides = ["model={kind: custom, factory: 'a:b', user_id: user_id}", "evaluate.metrics=[rmse]"]
    message = refused(config_file, *overrides, "evaluate.baselines=[bias]")
    assert "evaluate.baselines: 'bias' needs to know the user and the item" in message
    assert "model.item_id" in message
    config = load_config(config_file, {}, overrides).config
    assert [baseline.kind for baseline in config.baselines()] == ["mean"]


def test_all_mistakes_are_told_at_once(config_file):
    message = refused(config_file, "seeed=3", "data.laness=3")
    assert "2 things to change" in message
    assert "Did you mean 'seed'?" in message
    assert "Did you mean 'lanes'?" in message


def test_a_missing_file_offers_the_nearest(config_file):
    message = refused(config_file.with_name("confg.yaml"))
    assert "no such file" in message
    assert "Did you mean 'config.yaml'?" in message


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [1", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"is not YAML|a config is a mapping"):
        load_config(path, {})


def test_a_policy_for_nulls_is_written_as_the_documentation_has_it(config_file):
    plain = config_file.read_text().replace("kind: id\n    table: user", "kind: id\n    table: user\n    null: empty")
    config_file.write_text(plain)
    loaded = load_config(config_file, {}, ["features.item_id={kind: id, table: item, null: empty}"])
    assert [loaded.config.features[name].null for name in ("user_id", "item_id")] == ["empty", "empty"]


@pytest.mark.parametrize("text", ["a: {b: 1}\nc: 2\na: 3\n", "c: {x: 1, 'x': 2}\n"])
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"'[ax]' is in line 1 already; a key stands once in a mapping.*line [13]"):
        load_config(path, {})


def test_variables_are_expanded_in_the_config_and_kept_in_the_tree(config_file):
    override = "data.train=${ROOT}/x/${DAY:-monday}/*.parquet"
    loaded = load_config(config_file, {"ROOT": "/somewhere"}, [override])
    assert loaded.config.data.train == ["/somewhere/x/monday/*.parquet"]
    assert loaded.tree["data"]["train"] == "${ROOT}/x/${DAY:-monday}/*.parquet"


def test_a_variable_that_is_not_set_is_refused_by_name_and_place(config_file):
    message = refused(config_file, "data.train=${ROOT}/x")
    assert "data.train" in message
    assert "ROOT" in message
    assert ":-" in message


def test_overrides_reach_lists_and_short_forms(config_file):
    loaded = load_config(config_file, {}, ["model.user.features.2=history", "tables.user.vocabulary.kind=identity"])
    assert loaded.config.model.user.features == ["user_id", "history", "history"]


@pytest.mark.parametrize("override", ["train.epochs", "=3", "seed.x=3", "model.user.features.9=a", "train.epochs=[1"])
def test_an_override_that_makes_no_sense_is_refused(config_file, override):
    assert "--set" in refused(config_file, override)


def test_the_schema_is_json_and_describes_every_field(config_file):
    schema = json.loads(schema_json())
    assert set(schema["properties"]) == set(Config.model_fields)
    undescribed = [
        f"{name}.{field}"
        for name, part in {**schema["$defs"], "Config": schema}.items()
        for field, spec in part.get("properties", {}).items()
        if not {"description", "$ref"} & set(spec)
    ]
    assert undescribed == []


def test_differences_name_paths():
    other = copy.deepcopy(TREE)
    other["tables"]["user"]["dim"] = 64
    other["train"] = {"epochs": 3}
    assert differences(TREE, other) == [("tables.user.dim", 32, 64), ("train", None, {"epochs": 3})]


def test_tables_know_their_keys_poolings_and_optimizers():
    tree = copy.deepcopy(TREE)
    tree["features"]["other"] = {"kind": "bag", "table": "item", "pooling": "sum"}
    tree["model"]["biases"] = ["global", "user", "item"]
    tree["objective"] = {"kind": "sampled_softmax", "num_negatives": 128}
    tree["train"] = {"global_batch_size": 64}
    specs = {spec.name: spec for spec in table_specs(build_config(tree, {}, "test"), {"user": 1000, "item": 5000})}
    assert specs["user"].num_embeddings == 1001
    assert not specs["user"].weighted
    item = specs["item"]
    assert item.weighted, "two poolings over one table are done by weights"
    assert [lookup.key for lookup in item.lookups] == [
        "item_id", "item_id:negative0", "item_id:negative1", "history", "other",
    ]  # fmt: skip
    assert item.optimizer.lr == 0.1
    assert specs["user"].optimizer.lr == 0.05
    assert [lookup.key for lookup in specs["item_id:bias"].lookups] == [
        "item_id:bias", "item_id:bias:negative0", "item_id:bias:negative1",
    ]  # fmt: skip
    assert specs["user_id:bias"].dim == 4


@pytest.mark.parametrize(
    ("partitions", "says"),
    [
        ({"eech": "days/*"}, "data.partitions.eech: unknown key. Did you mean 'each'?"),
        ({"each": "days/*", "marker": "a/b"}, "data.partitions.marker: 'a/b' does not fit"),
        ({"each": "days/**"}, "data.partitions.each: 'days/**': '**' stands for folders at any depth"),
        ("days/*", "data.partitions: 'days/*' does not fit. Input should be a valid list"),
    ],
)
def test_each_form_of_partitions_is_told_of_by_itself(make_config, partitions, says):
    with pytest.raises(ConfigError) as caught:
        make_config({"data": {"train": None, "partitions": partitions}}, splits=())
    assert says in str(caught.value)
    assert "EachPartition" not in str(caught.value)
