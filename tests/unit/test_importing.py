"""What a run's start waits for, and what it must not."""

import gc
import subprocess
import sys

import pytest

from embedshard.launch.importing import long_imports


def test_the_collector_rests_while_modules_are_imported_and_never_looks_at_them_again():
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    try:
        with long_imports():
            assert not gc.isenabled()
            kept = [[] for _ in range(100)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + len(kept)
    finally:
        if not frozen:
            gc.unfreeze()


def test_the_collector_works_again_after_an_import_that_fails():
    with pytest.raises(ModuleNotFoundError), long_imports():
        import embedshard.no_such_module  # noqa: F401
    assert gc.isenabled()
    gc.unfreeze()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with long_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_training_does_not_wait_for_what_it_needs_later_or_never():
    late = ["jinja2", "torch.distributed.optim", "torchmetrics", "tensorboard", "pandas", "ray"]
    code = f"import sys, embedshard.train.loop; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
