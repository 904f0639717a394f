"""What is said of a pass over the training data in which nothing had a loss, so that nothing was learnt."""

from __future__ import annotations

__all__ = ["check_learnt"]

from collections.abc import Callable

from embedshard.config import Config
from embedshard.config.parts import ItemEmbeddingConfig, SASRecConfig
from embedshard.data.order import Position
from embedshard.errors import DataError
from embedshard.train.state import TrainState


def check_learnt(
    config: Config, state: TrainState, position: Position, epoch_steps: int, is_end: bool, say: Callable[[str], None]
) -> None:
    """Looks at the end of an epoch, or of the run, whether a step since its beginning had a loss. Not collective.

    A later epoch without any is said: lists are sub-sampled, and a day may bring none.

    Args:
        config: the run's.
        state: of the run, with its last step counted.
        position: of that step.
        epoch_steps: steps of an epoch.
        is_end: whether the run ends with it.
        say: told in one sentence.

    Raises:
        DataError: if no step of the run had one.
    """
    idle = state.steps_without_loss
    if not (position.is_epoch_end or is_end) or idle < min(epoch_steps, state.step):
        return
    passed = f"epoch {position.epoch + 1} of the training data" if idle >= epoch_steps else "the training data of the run"
    met = f"{passed}, up to step {state.step}, has {_missing(config)}"
    if idle < state.step:
        say(f"Nothing was learnt in {idle} steps: {met}.")
        return
    raise DataError(f"{met} So no step had a loss, and nothing was learnt. {_to_do(config)}")


def _missing(config: Config) -> str:
    model = config.model
    if isinstance(model, ItemEmbeddingConfig):
        return f"no list with two places of which one is the other's context: {_of(config, model.sequence)}."
    if isinstance(model, SASRecConfig):
        return f"no list with a place from which the next item could be learnt: {_of(config, model.sequence)}."
    weight = "" if config.data.weight is None else f" (data.weight: column '{config.data.weight}')"
    return f"no row of a weight above 0{weight}."


def _of(config: Config, sequence: str) -> str:
    column = getattr(config.features[sequence], "column", None) or sequence
    return f"the lists of feature '{sequence}' (column '{column}') are empty, too short or of weight 0"


def _to_do(config: Config) -> str:
    model = config.model
    if isinstance(model, ItemEmbeddingConfig):
        return (
            f"A list needs two ids at least. Group the rows into lists, by user or session, or see what empties them: "
            f"model.subsample ({model.subsample}), the feature's max_length, null, unknown and mask_zero, data.weight."
        )
    if isinstance(model, SASRecConfig):
        return (
            "A list needs one id at least, that which came before the row's item. Give each row the list of earlier items, "
            "or see what empties it: the feature's null, unknown and mask_zero, data.weight."
        )
    return "Correct the weights, or see what was set aside: quarantine/ in the run's folder."
