"""`captioner serve`: captions over HTTP."""

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.errors import SettingError, check_positive
from captioner.images.names import escape_name

if TYPE_CHECKING:
    from captioner.serving.settings import Credentials

PASSWORD = "CAPTIONER_PASSWORD"
"""Environment variable that contains the password."""


@dataclass(frozen=True)
class ServeConfig:
    """Serve captions over HTTP; `/docs` shows the API. Without a user, anyone who reaches the address may use it."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine only; 0.0.0.0 is reached from the network."""
    port: int = 8000
    """Port to listen on."""
    model: str | None = None
    """Folder or hub id of the captioner; `None` or `shipped` for the one that comes with this package."""
    device: str | None = None
    """Device to run on, such as cuda, cuda:1, mps or cpu; `None` for the best one here."""
    batch_size: int = 16
    """Images per batch; those of several requests are captioned together."""
    wait_ms: float = 5.0
    """Milliseconds that a batch waits for more images."""
    queue: int = 256
    """Images that may wait; further requests are answered 503."""
    requests: int = 64
    """Requests that are handled at the same time; others are answered 503."""
    max_upload_mib: float = 20.0
    """Size of a request in MiB, above which it is answered 413."""
    max_images: int = 16
    """Images of a request, above which it is answered 422."""
    max_megapixels: float = 50.0
    """Size of an image in millions of pixels, above which it is refused."""
    timeout: float = 60.0
    """Seconds that a request may take."""
    user: str | None = None
    """Name of the user who may use the server. The password is in the environment variable CAPTIONER_PASSWORD or in a
    file."""
    password_file: Path | None = None
    """File whose first line is the password."""

    def __post_init__(self) -> None:
        check_positive(
            self, "batch_size", "queue", "requests", "max_upload_mib", "max_images", "max_megapixels", "timeout"
        )
        if not 0 <= self.port <= 65535:
            raise SettingError(f"port must be between 0 and 65535, not {self.port}", "port")
        if not 0 <= self.wait_ms <= 10_000:
            raise SettingError(f"wait_ms must be between 0 and 10000, not {self.wait_ms}", "wait_ms")
        if self.max_images > self.queue:
            raise SettingError(
                f"the queue has {self.queue} places, and a request may have {self.max_images} images",
                "queue",
                "max_images",
            )
        if self.user is not None and (not self.user or ":" in self.user):
            raise SettingError("a user's name is not empty and has no colon", "user")

    def unused(self) -> dict[str, str]:
        """Map the settings that have no effect beside the others to the reason."""
        return {} if self.user is not None else {"password_file": "there is no user"}


SETTINGS = ServeConfig


def run(config: ServeConfig) -> int:
    """Serve until the process is stopped.

    Raises:
        ValueError: a package is missing, the address cannot be used, there is no password, or there is no such model.
    """
    try:
        import uvicorn

        from captioner.serving.app import create_app
        from captioner.serving.settings import Limits
    except ModuleNotFoundError as error:
        raise ValueError(f"serving needs the package {error.name}: pip install 'captioner[serve]'") from None
    from captioner.inference import load

    credentials = read_credentials(config)
    limits = Limits(
        upload=int(config.max_upload_mib * 2**20),
        images=config.max_images,
        pixels=int(config.max_megapixels * 1e6),
        requests=config.requests,
        seconds=config.timeout,
    )
    with listen(config.host, config.port) as listener:
        captioner = load(config.model, config.device)
        app = create_app(captioner, limits, credentials, config.batch_size, config.queue, config.wait_ms / 1000)
        host, port = listener.getsockname()[:2]
        print(f"captioner serve: http://{f'[{host}]' if ':' in host else host}:{port}/docs", file=sys.stderr)
        if credentials is None and not host.startswith("127.") and host != "::1":
            print("captioner serve: anyone who reaches this address may use the server", file=sys.stderr)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(config.timeout) or 1)
        )
        server.run(sockets=[listener])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Raises:
        SettingError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0  # below 0 if the name has no address
        reason = os.strerror(number) if number > 0 else "there is no such address"
        raise SettingError(f"cannot listen on {escape_name(host)}, port {port}: {reason}", "host", "port") from None


def read_credentials(config: ServeConfig) -> "Credentials | None":
    """Return the user and password that are required; `None` if everyone may use the server.

    Raises:
        SettingError: there is a user but no password.
    """
    from captioner.serving.settings import Credentials

    if config.user is None:
        return None
    password = os.environ.get(PASSWORD, "")
    if config.password_file is not None:
        try:
            password = (config.password_file.read_text("utf-8").splitlines() or [""])[0]
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            name = escape_name(str(config.password_file))
            raise SettingError(f"cannot read '{name}': {reason}", "password_file") from None
    if not password:
        raise SettingError(f"there is no password: set {PASSWORD} in the environment, or name a file", "password_file")
    return Credentials(config.user, password)
