"""The HTTP API: routes, what they check, and how answers become JSON. It knows an answerer, not Ray.

The annotations of routes are read by FastAPI when they are made, so this file does not defer them.
"""

__all__ = ["Service", "build_app"]

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client.metrics_core import Metric
from pydantic import AfterValidator
from pydantic_core import to_json
from starlette.exceptions import HTTPException as AnyHTTPException

from embedshard import __version__
from embedshard.serve.engine import ItemList, Lacking, Question, Recommend, Score, Scores, Similar, Unknown
from embedshard.serve.guard import Guard
from embedshard.serve.messages import (
    ErrorMessage,
    Health,
    RecommendRequest,
    RecommendResponse,
    ReloadResponse,
    ScoreRequest,
    ScoreResponse,
    SimilarRequest,
    SimilarResponse,
    check_limits,
)
from embedshard.serve.metrics import CONTENT_TYPE, page
from embedshard.serve.replica import Answered, Replica

_MAX_SHOWN = 100


class Service(Protocol):
    """What the app is made over.

    Attributes:
        replica: in whose process the app is.
    """

    replica: Replica

    async def ask(self, questions: Sequence[Question]) -> Answered:
        """Returns the answers to a request, batched with others."""
        ...

    async def collect(self) -> dict[str, list[Metric]]:
        """Returns the metrics of all replicas, by their names."""
        ...

    async def reload(self) -> None:
        """Has all replicas look for a newer export at once."""
        ...


def build_app(service: Service) -> FastAPI:
    """Returns the API of a service."""
    settings = service.replica.settings
    app = FastAPI(
        title="embedshard",
        version=__version__,
        description=(
            "Lists and scores from an export. In one request: lists of at most "
            f"{settings.max_k:,}, {settings.max_users:,} users (of `/similar`: items), {settings.max_items:,} items to "
            f"score, to exclude or as a history, {settings.max_body_bytes:,} bytes. Answers tell the step and the manifest "
            "of the export that they are from, in the body and as `X-Embedshard-Step` and `X-Embedshard-Manifest`."
        ),
        redoc_url=None,
    )
    app.add_middleware(Guard, replica=service.replica)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(AnyHTTPException, _tell_refused)
    limited = AfterValidator(partial(check_limits, settings=settings))
    token = [Security(HTTPBearer(auto_error=False))] if settings.token_digests else []  # for the page: the guard checks it
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorMessage} for status in (401, 404, 413, 422, 503) if status != 401 or token
    }

    @app.post("/recommend", response_model=RecommendResponse, responses=errors, dependencies=token)
    async def recommend(asked: Annotated[RecommendRequest, limited]) -> Response:
        """The best items for users, without those that they have met."""
        users = [asked.user] if asked.users is None else asked.users
        given = tuple(asked.exclude), asked.given_history
        answered = await service.ask([Recommend(user, asked.k, *given) for user in users])
        results = []
        for user, answer in zip(users, answered.answers, strict=True):
            if isinstance(answer, Unknown):
                _refuse_alone(answer, asked.users)
                results.append({"user": user, "error": answer.message})
                continue
            if isinstance(answer, Lacking):  # a history is that of one user, and no users are nobody's
                raise HTTPException(422, answer.message)
            assert isinstance(answer, ItemList), "it was asked for"
            results.append({"user": user, "by": answer.by, "seen": answer.num_seen, **_listed(answer)})
        return _json(answered, {"results": results})

    @app.post("/similar", response_model=SimilarResponse, responses=errors, dependencies=token)
    async def similar(asked: Annotated[SimilarRequest, limited]) -> Response:
        """The items whose vectors have the greatest cosine with an item's."""
        items = [asked.item] if asked.items is None else asked.items
        wanted = [item for item in items if item is not None]
        answered = await service.ask([Similar(item, asked.k, tuple(asked.exclude)) for item in wanted])
        results = []
        for item, answer in zip(wanted, answered.answers, strict=True):
            if isinstance(answer, Unknown):
                _refuse_alone(answer, asked.items)
                results.append({"item": item, "error": answer.message})
                continue
            assert isinstance(answer, ItemList), "it was asked for"
            results.append({"item": item, **_listed(answer)})
        return _json(answered, {"results": results})

    @app.post("/score", response_model=ScoreResponse, responses=errors, dependencies=token)
    async def score(asked: Annotated[ScoreRequest, limited]) -> Response:
        """The scores of given items for a user, whether the user has met them or not."""
        answered = await service.ask([Score(asked.user, tuple(asked.items))])
        [answer] = answered.answers
        if isinstance(answer, Unknown):
            raise HTTPException(404, answer.message)
        if isinstance(answer, Lacking):
            raise HTTPException(422, answer.message)
        assert isinstance(answer, Scores), "it was asked for"
        return _json(answered, {"user": asked.user, "scores": answer.scores})

    @app.get("/healthz", response_model=Health)
    async def healthz(request: Request) -> Response:
        """What is served. Without a token it tells less."""
        health = service.replica.health(shows_all=request.scope.get("is_let_in", False))
        return JSONResponse(health, 503 if service.replica.is_ending else 200)

    @app.get("/metrics", response_class=Response, dependencies=token)
    async def metrics() -> Response:
        """All replicas' metrics, as Prometheus reads them."""
        return Response(page(await service.collect()), media_type=CONTENT_TYPE)

    @app.post("/reload", status_code=202, response_model=ReloadResponse, dependencies=token)
    async def reload() -> Response:
        """Has all replicas look for a newer export at once, also at one that was refused."""
        await service.reload()
        return JSONResponse({"status": "looking"}, 202)

    return app


def _refuse_alone(answer: Unknown, several: Sequence[Any] | None) -> None:
    """Refuses a request for the one thing that is not known."""
    if several is None:
        raise HTTPException(404, answer.message)


def _listed(answer: ItemList) -> dict[str, Any]:
    columns = zip(answer.ids, answer.rows, answer.scores, strict=True)
    items: list[dict[str, Any]] = [{"id": id_, "row": row, "score": score} for id_, row, score in columns]
    for item, metadata in zip(items, answer.metadata or (), strict=False):
        if metadata:
            item["metadata"] = metadata
    return {"items": items, **({"unknown": answer.unknown} if answer.unknown else {})}


def _json(answered: Answered, body: dict[str, Any]) -> Response:
    """Returns an answer, which is what its route's model says: validating it would take longer than making it."""
    headers = {"X-Embedshard-Step": str(answered.step), "X-Embedshard-Manifest": answered.digest}
    content = to_json({"step": answered.step, "manifest": answered.digest, **body}, inf_nan_mode="null")
    return Response(content, media_type="application/json", headers=headers)


async def _tell_invalid(request: Request, error: Exception) -> Response:
    """Says of each mistake where it is, what was met and what was needed."""
    assert isinstance(error, RequestValidationError), "that is what it is registered for"
    told = []
    for mistake in error.errors():
        if mistake["type"] == "json_invalid":
            told.append(f"the body is no JSON: {mistake['ctx']['error']} at character {mistake['loc'][-1]}")
            continue
        where = ".".join(str(part) for part in mistake["loc"] if part != "body")
        met = repr(mistake.get("input"))
        met = met if len(met) <= _MAX_SHOWN else f"{met[:_MAX_SHOWN]}..."
        reason = mistake["msg"].removeprefix("Value error, ")
        told.append((f"{where}: " if where else "") + reason + (f"; it was {met}" if where else ""))
    return JSONResponse({"error": ". ".join(told[:10]) + ". See /docs."}, 422)


async def _tell_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException), "that is what it is registered for"
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
