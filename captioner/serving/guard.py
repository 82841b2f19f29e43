"""Check every request before the application gets it: user, size, number of requests at a time; and count it."""

import asyncio
import time
from collections.abc import Mapping

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from captioner.serving.answers import fail
from captioner.serving.monitoring import Monitor
from captioner.serving.settings import Credentials, Limits

OPEN = ("/health",)
"""Paths without a password, for load balancers."""

WORK = "/v1/"
"""Start of the paths that need the model."""


class Guard:
    """A layer around an application.

    Args:
        app: the application.
        limits: limits of requests.
        credentials: the user who may use the server; `None` for everyone.
        monitor: counts the requests.
    """

    def __init__(self, app: ASGIApp, limits: Limits, credentials: Credentials | None, monitor: Monitor):
        self.app, self.limits, self.credentials, self.monitor = app, limits, credentials, monitor
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it to the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.admit(scope, receive, watch)
        finally:
            self.monitor.count(scope["path"], status, time.perf_counter() - start)

    async def admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or run it within the limits."""
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        path: str = scope["path"]
        if self.credentials and path not in OPEN and not self.credentials.allow(headers.get(b"authorization", b"")):
            challenge = {"WWW-Authenticate": 'Basic realm="captioner", charset="UTF-8"'}
            await fail(401, "a user's name and password are needed", challenge)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self.limits.upload:
            await fail(413, too_large(self.limits.upload))(scope, receive, send)
            return
        if not path.startswith(WORK):
            await self.app(scope, receive, send)
            return
        if self.running >= self.limits.requests:
            await fail(503, "too many requests at a time; try again", {"Retry-After": "1"})(scope, receive, send)
            return
        self.running += 1
        body = Body(receive, self.limits.upload)
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(self.limits.seconds):
                await self.app(scope, body.receive, watch)
        except TimeoutError:
            if started:
                raise
            status, what = (503, "no answer") if body.complete else (408, "the request did not arrive")
            await fail(status, f"{what} within {self.limits.seconds:g} seconds; try again")(scope, receive, send)
        finally:
            self.running -= 1


class Body:
    """The body of a request. More bytes than the limit are refused, whatever length the request declares.

    Args:
        source: returns the parts of the body.
        limit: most bytes of the body.
    """

    def __init__(self, source: Receive, limit: int):
        self.source, self.limit, self.size, self.complete = source, limit, 0, False

    async def receive(self) -> Message:
        """Return the next part.

        Raises:
            HTTPException: there are too many bytes.
        """
        message = await self.source()
        self.size += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self.size > self.limit:
            raise HTTPException(413, too_large(self.limit))
        return message


def too_large(limit: int) -> str:
    """Return the message of a request that is too large."""
    return f"a request may have {limit / 2**20:g} MiB"
