"""The HTTP API: captions, an interface like OpenAI's, health and counts, in one FastAPI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, RedirectResponse
from pydantic import BaseModel, Field

from captioner.data.caption_formats import LOW_CONFIDENCE
from captioner.inference import Caption, Captioner
from captioner.serving.answers import FAILURES, SafeJSON, add_handlers, fail, flat_schema, refuse
from captioner.serving.chat import add_chat
from captioner.serving.engine import Engine
from captioner.serving.guard import Guard
from captioner.serving.monitoring import Monitor
from captioner.serving.service import Service
from captioner.serving.settings import Credentials, Limits
from captioner.serving.uploads import CaptionRequest, Options, read_request

FORM = {
    "type": "object",
    "required": ["images"],
    "properties": {
        "images": {"type": "array", "items": {"type": "string", "contentMediaType": "application/octet-stream"}},
        **flat_schema(Options)["properties"],
    },
}
"""The form that may be sent in place of JSON, as OpenAPI describes it."""

DESCRIPTION = """Captions images. `/v1/caption` takes one or several images with options; `/v1/chat/completions` takes
one image as OpenAI's clients send it. Images are sent as bytes or base64: no file of the server and no other address
is opened."""


class Candidate(BaseModel):
    """One caption of an image."""

    caption: str
    logprob: float | None = Field(description="Log-probability of the caption, summed over its tokens.")
    confidence: float | None = Field(description="Geometric mean of its tokens' probabilities, from 0 to 1.")


class Tag(BaseModel):
    """An object in an image."""

    tag: str
    probability: float


class Result(BaseModel):
    """The captions of one image, or its error."""

    name: str
    caption: str | None = Field(description="The best caption.")
    captions: list[Candidate] = Field(description="All captions, best first.")
    tags: list[Tag] = Field(description="Objects in the image, the most probable first; none for a model without tags.")
    error: str | None = Field(description="Why there is no caption.")


class Results(BaseModel):
    """The captions of the images of a request, in their order."""

    model: str
    results: list[Result]


class Health(BaseModel):
    """State of the server."""

    status: str
    model: str
    waiting: int = Field(description="Images that wait for the model.")


def create_app(
    captioner: Captioner,
    limits: Limits | None = None,
    credentials: Credentials | None = None,
    batch_size: int = 16,
    queue: int = 256,
    wait: float = 0.005,
) -> FastAPI:
    """Build the application; its engine runs from now until the application shuts down.

    Args:
        captioner: the captioner.
        limits: limits of requests.
        credentials: the user who may use the server; `None` for everyone.
        batch_size: images per batch, at most.
        queue: images that may wait, at most.
        wait: seconds that a batch waits for more images.

    Returns:
        The application; its `app.state.service` captions for applications that are mounted on it.
    """
    limits, monitor = limits or Limits(), Monitor()
    engine = Engine(captioner, batch_size, queue, wait, monitor.batches.observe)
    monitor.watch_queue(engine.__len__)
    service = Service(captioner, engine, limits, monitor)
    name = captioner.name or "captioner"

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(
        title="captioner",
        version=version("captioner"),
        description=DESCRIPTION,
        lifespan=lifespan,
        default_response_class=SafeJSON,
    )
    app.state.service = service
    app.add_middleware(Guard, limits=limits, credentials=credentials, monitor=monitor)
    add_handlers(app)
    body = {"application/json": {"schema": flat_schema(CaptionRequest)}, "multipart/form-data": {"schema": FORM}}

    @app.post(
        "/v1/caption",
        summary="Caption images",
        response_model=Results,
        responses={code: FAILURES[code] for code in (400, 401, 408, 413, 415, 422, 503)},
        openapi_extra={"requestBody": {"required": True, "content": body}},
    )
    async def caption(request: Request) -> Any:
        """Caption images. One that cannot be used has an `error`; if none of them can be used, the answer is 422."""
        uploads, options = await read_request(request, limits)
        results = await service.caption(uploads, options)
        unusable = [result for result in results if result.error is not None and result.reason != LOW_CONFIDENCE]
        if len(unusable) == len(results):
            raise refuse(422, str(unusable[0].error))
        return SafeJSON({"model": name, "results": [describe(result) for result in results]})

    add_chat(app, service, name)

    @app.get("/health", summary="Health", response_model=Health, responses={503: FAILURES[503]})
    async def health() -> Any:
        """Return whether the server captions images."""
        if not engine.alive:
            return fail(503, "the engine has stopped")
        return {"status": "ok", "model": name, "waiting": len(engine)}

    @app.get(
        "/metrics", summary="Counts for Prometheus", response_class=PlainTextResponse, responses={401: FAILURES[401]}
    )
    async def metrics() -> Any:
        """Return counts of requests, images and batches in Prometheus's text format."""
        return PlainTextResponse(monitor.write(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def root() -> Any:
        return RedirectResponse("/docs")

    return app


def describe(result: Caption) -> dict[str, Any]:
    """Return the captions of an image for an answer."""
    captions = [asdict(one) for one in result.best_first()]
    tags = [asdict(tag) for tag in result.tags]
    return {"name": result.path, "caption": result.caption, "captions": captions, "tags": tags, "error": result.error}
