"""Trains one model with Keras in this process, on one thread, and prints what it measured as one line of JSON.

What helps Keras is done: arrays in memory that are cut into batches beforehand, a prefetching tf.data pipeline, many steps
in one call, and XLA (`--no-xla` leaves it out).
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from cases import STEPS_AT_ONCE, WARM_UP_STEPS
from keras_models import MODELS

OPTIMIZERS = {"adam": keras.optimizers.Adam, "adagrad": keras.optimizers.Adagrad, "sgd": keras.optimizers.SGD}
LABELS = ("label", "rating")


class Clock(keras.callbacks.Callback):
    """Notes when steps were done."""

    def __init__(self):
        super().__init__()
        self.seconds = {}

    def on_train_batch_end(self, batch, logs=None):
        self.seconds[batch + 1] = time.perf_counter()


def batches(folder, steps):
    """Returns a data set whose elements are batches, in the order of the rows."""
    columns = {}
    for path in sorted(folder.glob("*.npy")):
        values = np.load(path)
        columns[path.stem] = values.reshape(steps, len(values) // steps, *(values.shape[1:] or (1,)))
    labels = [columns.pop(name) for name in LABELS if name in columns]
    inputs = columns if len(columns) > 1 else next(iter(columns.values()))
    return tf.data.Dataset.from_tensor_slices((inputs, *labels)).prefetch(4)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("vocabulary", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("optimizer")
    parser.add_argument("lr", type=float)
    parser.add_argument("folder", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-xla", action="store_true")
    arguments = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(arguments.seed)
    model, loss, read = MODELS[arguments.model](arguments.vocabulary, arguments.folder)
    model.compile(
        optimizer=OPTIMIZERS[arguments.optimizer](arguments.lr),
        loss=loss,
        jit_compile=not arguments.no_xla,
        steps_per_execution=STEPS_AT_ONCE,
    )
    clock = Clock()
    history = model.fit(batches(arguments.folder / "train", arguments.steps), epochs=1, verbose=0, callbacks=[clock])
    last = max(clock.seconds)
    seconds = clock.seconds[last] - clock.seconds[WARM_UP_STEPS]
    np.savez(arguments.weights, **read(model))
    print(json.dumps({"steps_per_second": (last - WARM_UP_STEPS) / seconds, "train_loss": history.history["loss"][0]}))


if __name__ == "__main__":
    main()
