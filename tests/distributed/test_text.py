"""Two ranks over gloo look words up by one tokenizer, which rank 0 makes; a failure to make it stops both."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

OPEN = """
    import json, os, sys
    import torch, torch.distributed as dist
    from embedshard.config import load_config
    from embedshard.data.dataset import open_dataset
    from embedshard.world import World

    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, world_size, torch.device("cpu"), dist.group.WORLD)
    heard, found = [], {}
    try:
        config = load_config(f"{folder}/config.yaml", {}).config
        dataset = open_dataset(config, world, None, lambda *told: heard.append(told))
        words = dataset.train[0].read_row_group(0)["words"]
        found = {"resolved": dataset.resolved(), "values": words.values.tolist()}
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    with open(f"{folder}/rank-{rank}.json", "w") as file:
        json.dump({**found, "heard": heard}, file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # `world` holds the group: a thread of gloo that wants the interpreter while that ends would abort it
"""


@pytest.fixture(scope="module")
def launch():
    path = Path(__file__).with_name("test_two_ranks.py")
    spec = importlib.util.spec_from_file_location("two_ranks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.launch


def open_on_two_ranks(launch, folder, texts):
    pq.write_table(pa.table({"text": texts, "label": np.zeros(len(texts), np.int8)}), folder / "a.parquet", row_group_size=4)
    tree = {
        "data": {"train": str(folder / "a.parquet"), "label": "label", "lanes": 2},
        "features": {"words": {"kind": "text", "table": "words", "column": "text", "pooling": "mean"}},
        "tables": {"words": {"dim": 4, "vocabulary": "words"}},
        "model": {"kind": "two_tower", "user": {"features": ["words"]}, "item": {"features": ["words"]}},
        "objective": {"kind": "bce"},
        "train": {"global_batch_size": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    launch(OPEN, folder, 2)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_both_ranks_look_words_up_by_the_tokenizer_of_rank_zero(launch, tmp_path):
    first, second = open_on_two_ranks(launch, tmp_path, ["b a b", "c", "", "a b", "d d d d"])
    assert first.pop("heard")[-1] == ["tokenizer of table 'words'", 5, 5]
    assert second.pop("heard") == []
    assert first == second
    assert first["values"] == [1, 2, 1, 3, 2, 1], "d four times, b three, a two, c one"


def test_texts_without_words_stop_both_ranks(launch, tmp_path):
    first, second = open_on_two_ranks(launch, tmp_path, ["...", ""])
    assert first["error"].startswith("DataError: tables.words.vocabulary: no word is met")
    assert second["error"].startswith("PeerError: rank 0 failed in what it did for all: tables.words.vocabulary")
