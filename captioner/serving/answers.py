"""Answers of the server in JSON; errors have the form of OpenAI's: `{"error": {"message": ..., "type": ...}}`."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response

from captioner.images.names import escape_name


class SafeJSON(JSONResponse):
    """JSON of any text, also of half characters (surrogates), which need JSON's escapes."""

    def render(self, content: Any) -> bytes:
        """Write JSON."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", errors="backslashreplace")


class Fault(BaseModel):
    """The error, in one line."""

    message: str
    type: str


class Failure(BaseModel):
    """The answer to a request that cannot be served."""

    error: Fault


FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "The request cannot be read."},
    401: {"model": Failure, "description": "A user's name and password are needed."},
    404: {"model": Failure, "description": "There is no such page or model."},
    405: {"model": Failure, "description": "The page takes other methods."},
    408: {"model": Failure, "description": "The request took too long."},
    413: {"model": Failure, "description": "The request is too large."},
    415: {"model": Failure, "description": "The content type is not known here."},
    422: {"model": Failure, "description": "No image can be used, there are too many, or an option has a wrong value."},
    503: {"model": Failure, "description": "The server is busy, or closes."},
}
"""The answers of errors, as the API describes them."""


def fail(status: int, message: str, headers: Mapping[str, str] | None = None) -> SafeJSON:
    """Return the answer for an error."""
    kind = HTTPStatus(status).phrase.lower().replace(" ", "_")
    return SafeJSON({"error": {"message": message, "type": kind}}, status, headers)


def describe_fault(error: ValidationError | RequestValidationError) -> str:
    """Return the first fault of a request in one line: its place and the error; values are not repeated."""
    first = error.errors()[0]
    place = ".".join(escape_name(str(part))[:80] for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def add_handlers(app: FastAPI) -> None:
    """Let an application answer errors in this form."""

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        return fail(error.status_code, str(error.detail), error.headers)

    async def on_fault(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return fail(422, describe_fault(error))

    async def on_crash(request: Request, error: Exception) -> Response:
        return fail(500, "the server failed; its log has the reason")

    app.add_exception_handler(StarletteHTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_fault)
    app.add_exception_handler(Exception, on_crash)


def refuse(status: int, message: str) -> HTTPException:
    """Return an error that can be raised and becomes an answer."""
    headers = {"Retry-After": "1"} if status == 503 else None
    return HTTPException(status, message, headers)


def flat_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a model without references, which OpenAPI would resolve elsewhere."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def flatten(value: Any) -> Any:
        if isinstance(value, list):
            return [flatten(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return flatten(parts[value["$ref"].rpartition("/")[2]])
        return {key: flatten(item) for key, item in value.items() if key != "discriminator"}

    return flatten(schema)
