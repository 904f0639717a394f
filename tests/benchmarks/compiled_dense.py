"""What `train.compile` gives on a CPU: steps of equal models, one compiled and one not, in turns, from batches in memory.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/compiled_dense.py --data /tmp/compiled [--only dlrm]
Ratios are of the wall time, plain by compiled, the median of the turns and their quartiles: above 1, compiling helps.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from data import criteo_tree, towers_tree, write

from embedshard.config import build_config
from embedshard.train.assembly import assemble
from embedshard.world import open_world

BATCH, DIM, IN_TURN, WARM = 4096, 16, 5, 8


def trees(folder: Path) -> dict[str, dict]:
    criteo = write(folder, "ids", 64 * BATCH, 65_536)
    towers = write(folder, "towers", 64 * BATCH, 65_536)
    dlrm = criteo_tree(criteo, False, BATCH, DIM)
    return {
        "dlrm": dlrm,
        "dlrm, layer norm": {**dlrm, "model": {**dlrm["model"], "norm": "layer"}},
        "dlrm, dropout 0.1": {**dlrm, "model": {**dlrm["model"], "dropout": 0.1}},
        "dcn_v2": {**dlrm, "model": {"kind": "dcn_v2", "cross_layers": 3, "mlp": [128, 64]}},
        "deepfm": {**dlrm, "model": {"kind": "deepfm", "mlp": [128, 64]}},
        "two towers, repeats mapped once": towers_tree(towers, BATCH, 64, "adagrad"),
    }


def measure(name: str, tree: dict, turns: int) -> None:
    steps, seconds = WARM + turns * IN_TURN, {False: [], True: []}
    with open_world("cpu") as world:
        both = {}
        for compiles in (False, True):
            config = build_config({**tree, "train": {**tree["train"], "compile": compiles, "epochs": 9}}, {}, "bench")
            both[compiles] = assemble(config, world)
        with both[False].reader().batches(0, min(steps, 64)) as read:
            batches = list(read)

        def take(compiles: bool, first: int, number: int) -> float:
            begin = time.perf_counter()
            for step in range(first, first + number):
                both[compiles].stepper.take(batches[step % len(batches)], stop_asked=False)
            return time.perf_counter() - begin

        for compiles in (False, True):
            both[compiles].optimizers.set_learning_rates(0, 100)
            begin = time.process_time()
            take(compiles, 0, WARM)
            warm = time.process_time() - begin
        for turn in range(turns):
            for compiles in (False, True) if turn % 2 else (True, False):
                seconds[compiles].append(take(compiles, WARM + turn * IN_TURN, IN_TURN))
    plain, compiled = np.array(seconds[False]) * 1000 / IN_TURN, np.array(seconds[True]) * 1000 / IN_TURN
    low, middle, high = np.quantile(plain / compiled, (0.25, 0.5, 0.75))
    print(
        f"{name} | {np.median(plain):.1f} | {np.median(compiled):.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) | "
        f"{warm:.0f} CPU s for the first {WARM} steps, compiling among them",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--turns", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("model | plain, ms a step | compiled, ms a step | plain by compiled (quartiles) |", flush=True)
    for name, tree in trees(arguments.data).items():
        if not arguments.only or name == arguments.only:
            measure(name, tree, arguments.turns)


if __name__ == "__main__":
    main()
