"""What tests of exports share."""

import pytest

from embedshard.launch.export import export_here


@pytest.fixture
def exported(make_config, run_tree, tmp_path):
    """A function from changes of the config to the folders of its run and its export, and what was found."""

    def exported(changes, **options):
        tree = make_config({"train": {"epochs": 1}}).tree
        root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        run_tree(without_nothing(merged(tree, changes)), root / "run")
        return root / "run", root / "out", export_here(root / "run", root / "out", {}, **options)

    return exported


@pytest.fixture(scope="session")
def one_process():
    """A service of one replica, which answers each request by itself: made of the folder of an export, and settings."""
    from embedshard.serve.replica import Replica
    from embedshard.serve.settings import Settings

    class OneProcess:
        """A service of one replica, which answers each request by itself."""

        def __init__(self, out, **settings):
            self.replica = Replica(Settings(out=str(out), **settings), "only")

        async def ask(self, questions):
            return self.replica.answer([questions])[0]

        async def collect(self):
            return {"only": self.replica.collect()}

        async def reload(self):
            self.replica.live.look(at_once=True)

    return OneProcess


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
