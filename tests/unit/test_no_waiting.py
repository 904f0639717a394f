"""What a step hands to a GPU, without one: pinned, and in ways that do not wait for it; and what makes it deterministic."""

import os

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedshard.data import batch as module
from embedshard.data.batch import Batch, on_device
from embedshard.sharding.lazy_adam import AdamSteps
from embedshard.train.step import _in_a_row
from embedshard.world import set_process_environment


class Told(torch.Tensor):
    """A tensor that remembers how it was asked to go to a device, and stays."""

    asked: list = []  # noqa: RUF012

    def pin_memory(self):
        self.asked.append("pinned")
        return self

    def to(self, device, non_blocking=False):
        self.asked.append((torch.device(device).type, non_blocking))
        return self


@pytest.fixture
def told():
    Told.asked.clear()
    return torch.arange(3).as_subclass(Told)


def test_to_cuda_it_goes_pinned_and_is_not_waited_for(told):
    on_device(told, torch.device("cuda", 0))
    assert told.asked == ["pinned", ("cuda", True)]


def test_what_is_there_stays(told):
    assert on_device(told, torch.device("cpu")) is told
    assert told.asked == []


def test_what_is_agreed_on_goes_so(monkeypatch):
    seen = []
    monkeypatch.setattr("embedshard.train.step.on_device", lambda tensor, device: seen.append(device.type) or tensor)
    row = _in_a_row([torch.tensor(2.0), 3, True], torch.device("cuda", 0))
    assert seen == ["cuda"]
    assert row.tolist() == [2.0, 3.0, 1.0]


def test_row_numbers_are_pinned_too_for_dropout(told):
    few = torch.ones(3).as_subclass(Told)
    batch = Batch(None, None, few, few, few, {}, told).pin_memory()
    assert batch.rows is told
    assert told.asked == ["pinned"] * 4
    assert module.on_device(batch.rows, torch.device("cpu")) is told


def test_how_many_ids_a_key_has_is_known_before_they_are_on_the_device(told, monkeypatch):
    monkeypatch.setattr(KeyedJaggedTensor, "pin_memory", lambda ids: ids)
    ids = KeyedJaggedTensor(keys=["a", "b"], values=torch.arange(5), lengths=torch.tensor([1, 1, 2, 1]))
    moved = Batch(ids, None, told, told, told, {}, told).pin_memory().sparse.to(torch.device("meta"))
    assert moved.length_per_key() == [2, 3], "of numbers that the device does not tell"
    assert moved.offset_per_key() == [0, 2, 5]


def test_fbgemms_adam_is_told_its_steps_by_filling():
    class Tables:
        iter, iter_cpu = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    steps = AdamSteps(torch.nn.Module(), ["item"])
    steps._fbgemm = [(Tables, steps.taken["item"])]
    for _ in range(3):
        steps.add()
    steps.tell()
    assert (int(Tables.iter), int(Tables.iter_cpu)) == (3, 3)


@pytest.mark.parametrize(("own", "kept"), [({}, ":4096:8"), ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ":16:8")])
def test_cublas_may_be_deterministic(monkeypatch, own, kept):
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")
    monkeypatch.setattr(os, "environ", dict.fromkeys(names, "1") | own)
    set_process_environment()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == kept
