"""The limits of a server, and the user who may use it."""

import secrets
from base64 import b64decode
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Attributes:
        upload: bytes of a request.
        images: images of a request.
        pixels: pixels of an image.
        requests: requests that are handled at the same time; others are refused.
        seconds: longest time of a request.
    """

    upload: int = 20 * 2**20
    images: int = 16
    pixels: int = 50_000_000
    requests: int = 64
    seconds: float = 60.0


@dataclass(frozen=True)
class Credentials:
    """A user's name and password; the password alone also serves as the key (`Bearer`) of OpenAI's clients."""

    user: str
    password: str

    def allow(self, header: bytes) -> bool:
        """Return whether an `Authorization` header is right, in a time that does not depend on the password."""
        scheme, _, value = header.partition(b" ")
        if scheme.lower() == b"bearer":
            return secrets.compare_digest(value.strip(), self.password.encode())
        if scheme.lower() != b"basic":
            return False
        try:
            given = b64decode(value.strip(), validate=True)
        except ValueError:
            return False
        return secrets.compare_digest(given, f"{self.user}:{self.password}".encode())
