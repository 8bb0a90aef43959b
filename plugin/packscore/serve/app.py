"""The apps: every client's endpoint over one or several scorers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from packscore import __version__
from packscore.errors import InputTypeError
from packscore.scoring import MultiItemScorer
from packscore.serve.docs_page import docs_page
from packscore.serve.endpoints import Endpoint, refused
from packscore.serve.gate import Gate, path_of
from packscore.serve.limits import Limits
from packscore.serve.models import Models
from packscore.serve.openapi import describe
from packscore.serve.refusals import RefusedError
from packscore.serve.state import State
from packscore.serve.wire.cohere_jina import RERANK, RERANK_V2
from packscore.serve.wire.decisions import DECISIONS
from packscore.serve.wire.decisions import FAMILY as OPENAI
from packscore.serve.wire.sglang import SCORING
from packscore.serve.wire.systemone import SYSTEM_ONE
from packscore.serve.wire.tei import RANKS
from packscore.serve.wire.vllm import PAIRS

Scorers = MultiItemScorer | Mapping[str, MultiItemScorer]

DECIDING = (
    Endpoint("/v1/systemone", (SYSTEM_ONE,), "Answer typed questions about a state."),
    Endpoint("/v1/decisions", (DECISIONS,), "The same in OpenAI's shape."),
)
SCORERS = (
    Endpoint("/v1/score", (SCORING, *PAIRS), "Probabilities of labels, or scores of pairs."),
    Endpoint("/score", (*PAIRS, SCORING), "The same; what is neither is told as vLLM does."),
    Endpoint("/rerank", (RERANK, RANKS), "Put documents, or texts, in order."),
    Endpoint("/v1/rerank", (RERANK,), "Put documents in order."),
    Endpoint("/v2/rerank", (RERANK_V2,), "Put documents in order."),
)
# the page is one file that asks nobody but this server
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    scorers: Scorers,
    *,
    limits: Limits | None = None,
    api_keys: Iterable[str] = (),
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """An ASGI app with the endpoints of SGLang, vLLM, Cohere, Jina, TEI, System One and OpenAI.

    Args:
      scorers: one, or several by name; the first answers requests that name none.
      limits: of a request.
      api_keys: one of which every request has to carry, except for /health and /ready, the page
        and the documentation; none: no key is asked for.
      cors_origins: of pages elsewhere that may ask from a browser; none: none may.

    Raises:
      InputError, InputTypeError: an argument cannot be served.
    """
    return _app(scorers, (*SCORERS, *DECIDING), limits, api_keys, cors_origins, page=True)


def decision_app(
    scorers: Scorers,
    *,
    limits: Limits | None = None,
    api_keys: Iterable[str] = (),
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The same with the two endpoints of decisions, the list of models, and no page."""
    return _app(scorers, DECIDING, limits, api_keys, cors_origins, page=False)


def _app(
    scorers: Scorers,
    endpoints: Sequence[Endpoint],
    limits: Limits | None,
    api_keys: Iterable[str],
    cors_origins: Sequence[str],
    *,
    page: bool,
) -> FastAPI:
    for name, value in (("api_keys", api_keys), ("cors_origins", cors_origins)):
        if isinstance(value, str):
            raise InputTypeError(f"{name} is one string; pass a list of them")
    state = State(Models(scorers), limits or Limits(), tuple(api_keys))
    by_path = {endpoint.path: endpoint for endpoint in endpoints}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        state.start()
        yield
        state.draining = True

    app = FastAPI(
        title="packscore", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.packscore = state
    for endpoint in endpoints:
        _add(app, state, endpoint)
    _add_others(app, state, page=page)
    describe(app, endpoints)

    def refuse(path: str, refusal: RefusedError, request_id: str) -> Response:
        family = by_path[path].kinds[0].family if path in by_path else OPENAI
        return refused(family, refusal, request_id)

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refusal = RefusedError(str(error.detail), error.status_code, headers=error.headers or {})
        return refuse(path_of(request.scope), refusal, request.scope["packscore"].id)

    app.add_exception_handler(HTTPException, of_http)
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(Gate, state=state, paths=paths, refuse=refuse)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _add(app: FastAPI, state: State, endpoint: Endpoint) -> None:
    async def answer(request: Request) -> Response:
        state.start()
        return await endpoint(state, request)

    app.add_api_route(endpoint.path, answer, methods=["POST"], summary=endpoint.summary)


def _add_others(app: FastAPI, state: State, *, page: bool) -> None:
    @app.get("/v1/models", summary="The models that are served.")
    async def models() -> JSONResponse:
        return JSONResponse(state.models.listed())

    @app.get("/health", summary="The server is there.")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get(
        "/ready", summary="200 when requests are answered at once; 503 before and while it stops."
    )
    async def ready() -> JSONResponse:
        state.start()
        told = "stopping" if state.draining else "ready" if state.warm else "warming up"
        return JSONResponse({"status": told}, 200 if told == "ready" else 503)

    @app.get("/metrics", summary="Counters for Prometheus.")
    async def metrics() -> Response:
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        address = str(request.url.replace(query="")).removesuffix("/docs")
        return _page(docs_page(app.openapi(), address))

    html = files("packscore.serve") / "page.html"
    if page and html.is_file():

        @app.get("/", include_in_schema=False)
        async def index() -> Response:
            return _page(html.read_bytes())


def _page(html: str | bytes) -> Response:
    headers = {"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"}
    return Response(html, headers=headers, media_type="text/html")
