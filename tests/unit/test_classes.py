"""Accuracy, F1 and log loss beside torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_auroc, multiclass_f1_score

from embedshard.errors import DataError, TrainingError
from embedshard.evaluate.classes import ClassSums
from embedshard.evaluate.pointwise import PointwiseSums


@pytest.mark.parametrize("classes", [2, 5])
def test_several_classes_are_measured_as_torchmetrics_does(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(300, classes, generator=generator)
    labels = torch.randint(classes, (300,), generator=generator).float()
    ones = torch.ones(300)
    parts = [ClassSums(["accuracy", "f1", "log_loss"], classes) for _ in range(3)]
    for part, sums in enumerate(parts):
        for first in range(part * 100, part * 100 + 100, 25):
            sums.update(logits[first : first + 25], labels[first : first + 25], ones[:25])
    for other in parts[1:]:
        parts[0].add(other)
    found, wanted = parts[0].result(), labels.long()
    assert found["rows"] == 300
    assert found["accuracy"] == pytest.approx(multiclass_accuracy(logits, wanted, classes, average="micro").item())
    each = multiclass_f1_score(logits, wanted, classes, average="none")
    assert found["f1"] == pytest.approx(each.mean().item())
    assert [found[f"f1:{number}"] for number in range(classes)] == pytest.approx(each.tolist())
    assert found["log_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, wanted).item())


@pytest.mark.parametrize("classes", [2, 5])
def test_auc_is_macro_of_one_versus_rest(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(300, classes, generator=generator)
    labels = (logits + 2 * torch.randn(300, classes, generator=generator)).argmax(dim=1)
    parts = [ClassSums(["auc", "accuracy"], classes) for _ in range(2)]
    for part, sums in enumerate(parts):
        sums.update(logits[part::2], labels[part::2].float().unsqueeze(1), torch.ones(150))
    parts[0].add(parts[1])
    found = parts[0].result()
    assert found["auc"] == pytest.approx(multiclass_auroc(logits, labels, classes, average="macro").item(), abs=1e-6)
    each = multiclass_auroc(logits, labels, classes, average="none").tolist()
    assert [found[name] for name in found if name.startswith("auc:")] == pytest.approx(each if classes > 2 else [], abs=1e-6)


def test_auc_of_classes_goes_by_weight_and_leaves_out_what_has_none():
    sums = ClassSums(["auc"], 3)
    assert np.isnan(sums.result()["auc"])
    logits = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 1.0, 9.0]])
    sums.update(logits, torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 1.0, 0.0]))
    found = sums.result()
    assert found["auc:0"] == found["auc:1"] == found["auc"] == 0.75
    assert np.isnan(found["auc:2"])


def test_two_classes_by_one_logit_are_the_same_as_by_two():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(200, generator=generator), torch.randint(2, (200,), generator=generator).float()
    weights = torch.rand(200, generator=generator)
    one, two = (
        PointwiseSums(["accuracy", "f1", "log_loss", "auc"], "sigmoid"),
        ClassSums(["accuracy", "f1", "log_loss", "auc"], 2),
    )
    one.update(logits, labels, weights)
    two.update(torch.stack([torch.zeros(200), logits], dim=1), labels, weights)
    assert one.result() == pytest.approx(two.result(), rel=1e-6)


def test_rows_without_weight_are_not_looked_at():
    sums = ClassSums(["accuracy"], 3)
    logits = torch.tensor([[0.0, 1.0, 0.0], [np.nan, 0.0, 0.0]])
    sums.update(logits, torch.tensor([1.0, 99.0]), torch.tensor([1.0, 0.0]))
    assert sums.result() == {"accuracy": 1.0, "rows": 1}


def test_a_class_that_is_nowhere_has_no_f1_and_counts_in_no_mean():
    sums = ClassSums(["f1"], 3)
    sums.update(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0.0, 1.0]), torch.ones(2))
    found = sums.result()
    assert (found["f1"], found["f1:0"], found["f1:1"]) == (1.0, 1.0, 1.0)
    assert np.isnan(found["f1:2"])


def test_what_is_no_class_and_what_is_no_number_are_refused():
    sums = ClassSums(["accuracy"], 3)
    for label in (3.0, -1.0, 0.5):
        with pytest.raises(DataError, match=rf"label is {label:g}; .*whole numbers from 0 to 2"):
            sums.update(torch.zeros(1, 3), torch.tensor([label]), torch.ones(1))
    with pytest.raises(TrainingError, match="diverged"):
        sums.update(torch.full((1, 3), torch.nan), torch.zeros(1), torch.ones(1))
