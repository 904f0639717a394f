"""The four models as Keras 3 writes them. Dense layers begin as torch's do, embeddings as Keras' own do.

A function of the model's name, given how many ids there are and the data's folder, returns the model, its loss (None: the
model adds its own), and what reads its weights by the names that embedshard's checkpoints give them.
"""

import keras
import numpy as np
import tensorflow as tf
from cases import (
    INIT_SCALE,
    PAIR_DIM,
    PAIR_NEGATIVES,
    RATING_DIM,
    TEXT_DIM,
    TEXT_HIDDEN,
    TEXT_LENGTH,
    TOWER_DIM,
    TOWER_SIZES,
    TOWER_TEMPERATURE,
)
from keras import layers, ops


def embedding(vocabulary, dim, name):
    uniform = keras.initializers.RandomUniform(-INIT_SCALE, INIT_SCALE)
    return layers.Embedding(vocabulary, dim, embeddings_initializer=uniform, name=name)


def dense(fan_in, units, name, activation=None):
    uniform = keras.initializers.RandomUniform(-(fan_in**-0.5), fan_in**-0.5)
    return layers.Dense(units, activation, kernel_initializer=uniform, bias_initializer=uniform, name=name)


def of_layers(names):
    """Returns what reads the weights of layers, given embedshard's name of each; torch's matrices are transposed."""

    def read(model):
        weights = {}
        for layer, name in names.items():
            values = [variable.numpy() for variable in model.get_layer(layer).weights]
            if len(values) == 1:
                weights[f"tables/{name}/weight"] = values[0]
            else:
                weights[f"dense/{name}.weight"], weights[f"dense/{name}.bias"] = values[0].T, values[1]
        return weights

    return read


def text_flatten(vocabulary, folder):
    words = keras.Input((TEXT_LENGTH,), dtype="int32", name="words")
    vectors = layers.Flatten()(embedding(vocabulary, TEXT_DIM, "word")(words))
    hidden = dense(TEXT_LENGTH * TEXT_DIM, TEXT_HIDDEN, "hidden", "relu")(vectors)
    model = keras.Model(words, dense(TEXT_HIDDEN, 1, "logit")(hidden))
    names = {"word": "word", "hidden": "head.0", "logit": "head.2"}
    return model, keras.losses.BinaryCrossentropy(from_logits=True), of_layers(names)


def user_item(vocabulary, folder):
    user, item = (keras.Input((1,), dtype="int32", name=name) for name in ("user_id", "item_id"))
    user_vector = layers.Flatten()(embedding(vocabulary, RATING_DIM, "user")(user))
    item_vector = layers.Flatten()(embedding(vocabulary, RATING_DIM, "item")(item))
    model = keras.Model([user, item], layers.Dot(axes=1)([user_vector, item_vector]))
    return model, "mse", of_layers({"user": "user", "item": "item"})


class NCE(layers.Layer):
    """tf.nn.nce_loss of pairs, with negatives from a pool that was drawn beforehand: the cheapest way that XLA compiles."""

    def __init__(self, noise, pool):
        super().__init__(name="nce")
        self.vocabulary, self.pool = len(noise), pool
        self.log_noise = np.log(np.maximum(noise, 1e-30))

    def build(self, shapes):
        self.context = self.add_weight(shape=(self.vocabulary, PAIR_DIM), initializer="zeros", name="context")
        self.bias = self.add_weight(shape=(self.vocabulary,), initializer="zeros", name="bias")

    def call(self, inputs):
        centre, context = inputs
        log_noise = tf.constant(self.log_noise, tf.float32)
        places = tf.random.uniform((PAIR_NEGATIVES,), maxval=len(self.pool), dtype=tf.int32)
        drawn = tf.cast(tf.gather(tf.constant(self.pool), places), tf.int64)
        expected = [PAIR_NEGATIVES * tf.exp(tf.gather(log_noise, ids)) for ids in (context, drawn)]
        losses = tf.nn.nce_loss(
            self.context.value,
            self.bias.value,
            tf.cast(context, tf.int64),
            centre,
            PAIR_NEGATIVES,
            self.vocabulary,
            sampled_values=(drawn, *expected),
        )
        self.add_loss(ops.mean(losses))
        return losses


def nce(vocabulary, folder):
    centre, context = (keras.Input((1,), dtype="int32", name=name) for name in ("centre", "context"))
    vectors = layers.Flatten()(embedding(vocabulary, PAIR_DIM, "word")(centre))
    losses = NCE(np.load(folder / "noise.npy"), np.load(folder / "drawn.npy"))([vectors, context])
    model = keras.Model([centre, context], losses)

    def read(model):
        layer = model.get_layer("nce")
        return {
            **of_layers({"word": "word"})(model),
            "tables/words:context/weight": layer.context.numpy(),
            "tables/words:context:bias/weight": layer.bias.numpy()[:, None],
        }

    return model, None, read


class InBatchSoftmax(layers.Layer):
    """The cross entropy of each user's own item among the items of the batch."""

    def call(self, inputs):
        user, item = inputs
        logits = ops.matmul(user, ops.transpose(item)) / TOWER_TEMPERATURE
        own = ops.arange(ops.shape(logits)[0])
        losses = keras.losses.sparse_categorical_crossentropy(own, logits, from_logits=True)
        self.add_loss(ops.mean(losses))
        return losses


def two_tower(vocabulary, folder):
    inputs, vectors, names = [], [], {}
    for side in ("user", "item"):
        inputs.append(keras.Input((1,), dtype="int32", name=f"{side}_id"))
        vector = layers.Flatten()(embedding(vocabulary, TOWER_DIM, side)(inputs[-1]))
        hidden = dense(TOWER_DIM, TOWER_SIZES[0], f"{side}_0", "relu")(vector)
        vectors.append(dense(TOWER_SIZES[0], TOWER_SIZES[1], f"{side}_2")(hidden))
        names |= {side: side, f"{side}_0": f"{side}_tower.mlp.0", f"{side}_2": f"{side}_tower.mlp.2"}
    return keras.Model(inputs, InBatchSoftmax(name="softmax")(vectors)), None, of_layers(names)


MODELS = {make.__name__: make for make in (text_flatten, user_item, nce, two_tower)}
