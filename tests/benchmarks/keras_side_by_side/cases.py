"""What is trained, and by which optimizers at which rates. Both environments import it: plain Python only."""

from dataclasses import dataclass

TEXT_LENGTH, TEXT_DIM, TEXT_HIDDEN = 120, 16, 6
RATING_DIM = 32
SENTENCE_LENGTH, PAIR_WINDOW, PAIR_DIM, PAIR_NEGATIVES, NOISE_POWER = 20, 5, 16, 64, 0.75
TOWER_DIM, TOWER_SIZES, TOWER_TEMPERATURE = 32, (64, 32), 0.1
NOISE_POOL = 2**20  # ids drawn beforehand, from which Keras takes its negatives: its own samplers XLA does not compile
INIT_SCALE = 0.05  # half the width of the uniform range: Keras' own default
HELD_OUT_ROWS = 20_480
STEPS_AT_ONCE = 20  # Keras' steps_per_execution; embedshard tells of its speed as often
WARM_UP_STEPS = 40
TOLERANCE = 0.02  # a loss is reached at no more than so much above that of Keras with Adam


@dataclass(frozen=True)
class Optimizer:
    """How a model is trained.

    Attributes:
        kind: of the tables; Keras trains everything with it.
        lr: its learning rate.
        dense_lr: of embedshard's Adam for the dense layers.
        xla: whether Keras compiles its step with XLA.
    """

    kind: str
    lr: float
    dense_lr: float = 0.0
    xla: bool = True


@dataclass(frozen=True)
class Case:
    """A model, its data and its optimizers.

    Attributes:
        model: the name of `MODEL.yaml` and of the function that makes the Keras model.
        vocabulary: ids of each table.
        tables: embedshard's tables that have so many rows.
        steps: a multiple of STEPS_AT_ONCE.
        batch: rows of a step.
        keras: Keras' default optimizer, then others that may be faster.
        embedshard: its optimizers.
    """

    model: str
    vocabulary: int
    tables: tuple[str, ...]
    steps: int
    batch: int
    keras: tuple[Optimizer, ...]
    embedshard: tuple[Optimizer, ...]

    @property
    def name(self) -> str:
        """Names the case's folders."""
        return f"{self.model}-{self.vocabulary}"

    def rows(self, is_quick: bool) -> int:
        """Rows that are trained, once each."""
        return self.batch * (3 * STEPS_AT_ONCE if is_quick else self.steps)


def _case(model: str, vocabulary: int, steps: int, keras: tuple[Optimizer, ...], ours: tuple[Optimizer, ...]) -> Case:
    tables, batch = {
        "text_flatten": (("word",), 512),
        "user_item": (("user", "item"), 4_096),
        "nce": (("word",), 128),
        "two_tower": (("user", "item"), 1_024),
    }[model]
    return Case(model, vocabulary, tables, steps, batch, keras, ours)


CASES = (
    _case(
        "text_flatten",
        10_000,
        200,
        (Optimizer("adam", 0.01), Optimizer("sgd", 1.0), Optimizer("adagrad", 0.3)),
        (Optimizer("adam", 0.01, 0.01), Optimizer("rowwise_adagrad", 0.07, 0.01)),
    ),
    _case(
        "text_flatten",
        1_000_000,
        120,
        (Optimizer("adam", 0.01), Optimizer("sgd", 1.0)),
        (Optimizer("adam", 0.01, 0.01), Optimizer("rowwise_adagrad", 0.1, 0.01)),
    ),
    _case(
        "user_item",
        10_000,
        500,
        (Optimizer("adam", 0.01), Optimizer("sgd", 15.0), Optimizer("adagrad", 5.0)),
        (Optimizer("adam", 0.014), Optimizer("rowwise_adagrad", 0.15)),
    ),
    _case(
        "user_item",
        1_000_000,
        120,
        (Optimizer("adam", 0.01), Optimizer("sgd", 60.0)),
        (Optimizer("adam", 0.03), Optimizer("rowwise_adagrad", 0.1)),
    ),
    _case(
        "nce",
        10_000,
        400,
        (Optimizer("adam", 0.03), Optimizer("sgd", 5.0), Optimizer("adagrad", 1.0)),
        (Optimizer("sgd", 7.0), Optimizer("adam", 0.06)),
    ),
    _case(
        "nce",
        1_000_000,
        120,
        (Optimizer("adam", 0.03), Optimizer("sgd", 5.0)),
        (Optimizer("sgd", 5.0), Optimizer("rowwise_adagrad", 0.15)),
    ),
    _case(
        "two_tower",
        10_000,
        200,
        (Optimizer("adam", 0.01), Optimizer("adam", 0.01, xla=False), Optimizer("sgd", 1.0), Optimizer("adagrad", 0.3)),
        (Optimizer("adam", 0.02, 0.003), Optimizer("rowwise_adagrad", 0.1, 0.003)),
    ),
    _case(
        "two_tower",
        1_000_000,
        120,
        (Optimizer("adam", 0.01), Optimizer("sgd", 1.0)),
        (Optimizer("adam", 0.01, 0.003), Optimizer("rowwise_adagrad", 0.1, 0.003)),
    ),
)
