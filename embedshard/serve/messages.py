"""What is asked over HTTP, and what is answered: JSON, as the OpenAPI page shows it."""

from __future__ import annotations

__all__ = [
    "ErrorMessage",
    "Health",
    "RecommendRequest",
    "RecommendResponse",
    "ReloadResponse",
    "ScoreRequest",
    "ScoreResponse",
    "SimilarRequest",
    "SimilarResponse",
    "check_limits",
]

from collections.abc import Mapping, Sized
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from embedshard.serve.histories import History
from embedshard.serve.settings import Settings

_LONGEST_ID = 1024
_LONGEST_NAME = 256


def _as_id(given: Any) -> int | str:
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise ValueError("an id is an integer or a string")
    if isinstance(given, int) and not -(2**63) <= given < 2**63:
        raise ValueError("an integer id has at most 64 bits")
    if isinstance(given, str) and len(given) > _LONGEST_ID:
        raise ValueError(f"an id has at most {_LONGEST_ID:,} characters")
    return given


GivenId = Annotated[int | str, BeforeValidator(_as_id)]
"""An id as the data have it: a number where its column holds numbers, else a string."""


GivenHistory = Annotated[
    Annotated[list[GivenId], Tag("items")]
    | Annotated[dict[Annotated[str, Field(max_length=_LONGEST_NAME)], list[GivenId]], Tag("lists")],
    Discriminator(lambda given: "lists" if isinstance(given, dict) else "items"),
]
"""Ids of items; by the name of the list that they are, where the user's tower reads several."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class RecommendRequest(_Message):
    """Asks for the best items for a user, or for several: one of `user`, `users` and `history` is needed."""

    user: GivenId | None = None
    """One user: the answer is an error if it is not known."""
    users: Annotated[list[GivenId], Field(min_length=1)] | None = None
    """Several users, answered in this order: one that is not known has an `error` in the answer, and no items."""
    k: Annotated[int, Field(ge=1, strict=True)] = 10
    """How many items for each."""
    exclude: list[GivenId] = []
    """Items that no list may hold, beside those that the user has met."""
    history: GivenHistory = []
    """Items that the user has met, the oldest first. Of them the model's user tower makes the vector of one whom the export
    does not know. If it reads several lists of items, say which they are: `{"watched": [1, 5], "bought": [5]}`."""

    @model_validator(mode="after")
    def _says_who(self) -> RecommendRequest:
        if self.user is not None and self.users is not None:
            raise ValueError("both 'user' and 'users' were given; give one of them")
        if self.user is None and self.users is None and not _count(self.history):
            raise ValueError("neither 'user', 'users' nor 'history' was given; give one of them")
        if self.users is not None and self.history:
            raise ValueError("'history' was given with 'users'; it is that of one user: give 'user', or ask for each alone")
        return self

    @property
    def given_history(self) -> History:
        """As it was given."""
        if isinstance(self.history, dict):
            return {name: tuple(ids) for name, ids in self.history.items()}
        return tuple(self.history)


class SimilarRequest(_Message):
    """Asks for the items that are nearest to an item, or to each of several: one of `item` and `items` is needed."""

    item: GivenId | None = None
    """One item: the answer is an error if it is not known."""
    items: Annotated[list[GivenId], Field(min_length=1)] | None = None
    """Several items, answered in this order: one that is not known has an `error` in the answer, and no items."""
    k: Annotated[int, Field(ge=1, strict=True)] = 10
    """How many for each."""
    exclude: list[GivenId] = []
    """Items that no list may hold, beside the item itself."""

    @model_validator(mode="after")
    def _says_what(self) -> SimilarRequest:
        if (self.item is None) == (self.items is None):
            raise ValueError(f"{'neither' if self.item is None else 'both'} of 'item' and 'items'; give one of them")
        return self


class ScoreRequest(_Message):
    """Asks for the scores of given items for a user, whether the user has met them or not."""

    user: GivenId
    """Whose scores."""
    items: Annotated[list[GivenId], Field(min_length=1)]
    """Of which items."""


class ListedItem(_Message):
    """An item of a list."""

    id: int | str | None
    """As in the data; null where its vocabulary is a hash, which does not keep ids."""
    row: int
    """Of the item's table."""
    score: float
    """The model's score; a cosine where items are compared."""
    metadata: dict[str, Any] | None = None
    """What is known of it beside."""


class _OfExport(_Message):
    step: int
    """Of the checkpoint that was exported."""
    manifest: str
    """SHA-256 of the manifest of the export that answered."""


class RecommendedList(_Message):
    """A user's list."""

    user: int | str | None
    """As it was asked for."""
    by: str | None = None
    """`user`, or `history` where the export has no vector of the user, and made one of the items that were given."""
    seen: int = 0
    """Items that the user has met, which are left out."""
    items: list[ListedItem] = []
    """The best first."""
    unknown: list[int | str] = []
    """Of `exclude` and `history`, what is no item of the export."""
    error: str | None = None
    """Why there are none."""


class RecommendResponse(_OfExport):
    """Lists, in the order of the users."""

    results: list[RecommendedList]
    """One for each user."""


class SimilarList(_Message):
    """What is near an item."""

    item: int | str
    """As it was asked for."""
    items: list[ListedItem] = []
    """The nearest first; scores are cosines."""
    unknown: list[int | str] = []
    """Of `exclude`, what is no item of the export."""
    error: str | None = None
    """Why there are none."""


class SimilarResponse(_OfExport):
    """Lists, in the order of the items."""

    results: list[SimilarList]
    """One for each item."""


class ScoreResponse(_OfExport):
    """Scores, in the order of the items."""

    user: int | str
    """As it was asked for."""
    scores: list[float | None]
    """Null for an item that the export does not know."""


class Health(BaseModel):
    """What a replica serves. Where it is and what is wrong in detail is told with a token only."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    status: str
    """`ok`; or `ending`, with status 503: no more requests are taken."""
    replica: str
    """Which one answered."""
    step: int
    """Of the checkpoint that was exported."""
    manifest: str
    """SHA-256 of the served export's manifest."""
    written: str
    """When the export was written."""
    refused: dict[str, Any] | None
    """A newer export that cannot be served, if there is one."""


class ReloadResponse(_Message):
    """All replicas look for a newer export at once."""

    status: str
    """`looking`: `/healthz` tells what came of it."""


class ErrorMessage(_Message):
    """Why there is no answer."""

    error: str
    """What was met, what was needed, what to do."""


def _count(given: Sized | Mapping[str, Sized]) -> int:
    """Returns how many ids there are, in all lists where there are several."""
    return sum(map(len, given.values())) if isinstance(given, Mapping) else len(given)


_Request = TypeVar("_Request", RecommendRequest, SimilarRequest, ScoreRequest)


def check_limits(request: _Request, settings: Settings) -> _Request:
    """Returns a request that is within the service's limits.

    Raises:
        ValueError: if it is not; says what was met and what is allowed.
    """
    if not isinstance(request, ScoreRequest) and request.k > settings.max_k:
        raise ValueError(f"k is {request.k:,}, and at most {settings.max_k:,} are given")
    lists = {"exclude": settings.max_items, "history": settings.max_items, "users": settings.max_users}
    lists["items"] = settings.max_users if isinstance(request, SimilarRequest) else settings.max_items
    for name, most in lists.items():
        held = _count(getattr(request, name, None) or ())
        if held > most:
            raise ValueError(f"'{name}' holds {held:,}, and at most {most:,} are taken in one request")
    return request
