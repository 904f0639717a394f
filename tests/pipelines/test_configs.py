"""Every config of the pipelines is one that can be trained: it loads, its model can be made, and a README tells of it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedshard.config import load_config
from embedshard.config.parts import FileVocabulary
from embedshard.launch.local import summarise_config

ROOT = Path(__file__).parents[2] / "pipelines"
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*.yaml"))
MEASURED = {
    "criteo/dcn_v2.yaml": {"auc", "log_loss"},
    "criteo/deepfm.yaml": {"auc", "log_loss"},
    "criteo/dlrm.yaml": {"auc", "log_loss"},
    "imdb/conv.yaml": {"accuracy"},
    "imdb/flatten.yaml": {"accuracy"},
    "imdb/lstm.yaml": {"accuracy"},
    "imdb/nbsvm.yaml": {"accuracy"},
    "imdb/ngram_bag.yaml": {"accuracy"},
    "movielens/ctr.yaml": {"auc", "log_loss"},
    "movielens/ratings.yaml": {"rmse", "mae"},
    "movielens/sasrec.yaml": {"hit_rate@10", "ndcg@10"},
}
"""What their READMEs tell of, which `result.json` then has."""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_a_pipeline_builds(tmp_path, name):
    environment = {"EMBEDSHARD_DATA": str(tmp_path)}
    config = load_config(ROOT / name, environment).config
    for table in config.tables.values():
        if isinstance(table.vocabulary, FileVocabulary):
            path = Path(table.vocabulary.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({str(table.vocabulary.column): ["one", "two", "three"]}), path)
    summary = summarise_config(ROOT / name, (), environment)
    described = {row.name for row in summary.tables}
    assert set(config.tables) <= described
    assert MEASURED.get(name, set()) <= set(config.evaluate.metrics)
    assert config.data.test or config.data.has_validation or not config.evaluate.metrics, "metrics of nothing"
    readme = (ROOT / name).parent / "README.md"
    assert Path(name).name in readme.read_text() or Path(name).stem in readme.read_text()


def test_each_pipeline_has_a_config():
    folders = {path.name for path in ROOT.iterdir() if (path / "README.md").exists()}
    assert {name.partition("/")[0] for name in CONFIGS} == folders
    assert set(MEASURED) <= set(CONFIGS)
