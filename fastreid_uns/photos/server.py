"""The review page and `identify` over HTTP, for this computer only.

It listens on 127.0.0.1. Every address begins with a random token, and what changes something must also carry it in the
header `X-Token`, which no page of another origin can send. There are no cookies. Requests that name another host are
refused, so that no foreign name can be pointed at this server. The page loads nothing from elsewhere.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fastreid_uns.errors import InvalidState, InvalidValue, MissingPackage, UnknownName, UserError
from fastreid_uns.photos.decisions import Contradiction
from fastreid_uns.photos.review import Json, Review, Stale

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.requests import Request
    from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise MissingPackage(
        f"server: {error.name} is not installed; the review page needs it. pip install 'fastreid_uns[review]'"
    ) from error

WEB = Path(__file__).parent / "web"
HOST = "127.0.0.1"
OWN_NAMES = {HOST, "localhost", "::1"}
LARGEST_IMAGE = 64 * 2**20  # bytes
PATIENCE = 2  # seconds for requests that are being answered when the server is told to end
LARGEST_ANSWER = 4 * 2**20
SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
Identify = Callable[[bytes], Json]


def create_app(review: Review, token: str, identify: Identify | None = None) -> ASGIApp:
    """The application; every request needs the token.

    Args:
        identify: bytes of an image file -> what is to be said of it, as JSON can; it may raise `UserError`.
    """
    pages = _Pages(review, identify)
    routes = [
        Route("/", pages.index),
        Route("/api/state", pages.state),
        Route("/api/questions", pages.questions),
        Route("/api/groups", pages.groups),
        Route("/api/groups/{number:int}", pages.group),
        Route("/api/answers", pages.answers),
        Route("/api/answer", pages.answer, methods=["POST"]),
        Route("/api/merge", pages.merge, methods=["POST"]),
        Route("/api/split", pages.split, methods=["POST"]),
        Route("/api/undo", pages.undo, methods=["POST"]),
        Route("/thumbnail/{name}", pages.thumbnail),
        Route("/photo/{name}", pages.photo),
        Route("/identify", pages.identify, methods=["POST"]),
        Mount("/web", StaticFiles(directory=WEB)),
    ]
    return _Guard(Starlette(routes=routes, exception_handlers={UserError: _user_error}), token)


class Server:
    """A server on a port of this computer.

    Args:
        port: 0 takes a free one.

    Attributes:
        address: to open in a browser; it holds the token.

    Raises:
        InvalidState: the port is taken.
    """

    def __init__(self, review: Review, identify: Identify | None = None, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(24)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((HOST, port))
            self._socket.listen(128)  # a browser that is opened before `run` waits
        except (OSError, OverflowError) as error:
            self._socket.close()
            reason = getattr(error, "strerror", None) or "ports are 0 to 65535"
            raise InvalidState(f"server: port {port} cannot be used ({reason}). Choose another one.") from error
        self.address = f"http://{HOST}:{self._socket.getsockname()[1]}/{self.token}/"
        app = create_app(review, self.token, identify)
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=PATIENCE,
        )
        self._server = uvicorn.Server(settings)

    def run(self) -> None:
        """Answer requests until `stop` or Ctrl-C."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Make `run` return soon; from any thread."""
        self._server.should_exit = True


class _Guard:
    """Lets nothing through to the application that does not come from its own page or holder of the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer = self._refusal(scope)
        if answer is None:
            scope, answer = {**scope, "path": self._inner_path(scope), "root_path": ""}, self.app
        await answer(scope, receive, send_safely)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        """The answer to a request that is not let in."""
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if _name(f"//{headers.get('host', '')}") not in OWN_NAMES or (origin and _name(origin) not in OWN_NAMES):
            return _text(403, "Only pages of this computer are answered: open the address that the command printed.")
        in_query = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if self._is(in_query if scope["path"] == "/" else scope["path"][1:]):
            return RedirectResponse(f"/{self.token}/", 303)
        in_header = self._is(headers.get("x-token", ""))
        if not in_header and (scope["method"] not in ("GET", "HEAD") or not self._in_path(scope)):
            return _text(403, "The token is missing or wrong: open the address that the command printed.")
        return None

    def _in_path(self, scope: Scope) -> bool:
        return self._is(scope["path"].split("/")[1]) if scope["path"].startswith("/") else False

    def _inner_path(self, scope: Scope) -> str:
        return scope["path"][len(self.token) + 1 :] if self._in_path(scope) else scope["path"]

    def _is(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self.token.encode())


class _Pages:
    """One method an address. Reading and writing happens in threads, so that a slow picture stops nobody."""

    def __init__(self, review: Review, identify: Identify | None) -> None:
        self.review, self._identify = review, identify
        self._one_image = threading.Lock()  # a network needs the memory and the cores for itself

    def index(self, request: Request) -> Response:
        return FileResponse(WEB / "review.html", headers={"Cache-Control": "no-store"})

    def state(self, request: Request) -> Response:
        return _json(self.review.summary())

    def questions(self, request: Request) -> Response:
        return _json({"questions": self.review.questions(min(_number(request, "count", 3), 20)), **self._state()})

    def groups(self, request: Request) -> Response:
        order, least = request.query_params.get("order", "doubt"), _number(request, "least", 1)
        return _json({**self.review.groups_page(_number(request, "page", 1), order, least), **self._state()})

    def group(self, request: Request) -> Response:
        return _json({**self.review.group(request.path_params["number"]), **self._state()})

    def answers(self, request: Request) -> Response:
        return _json({"answers": self.review.answers(), **self._state()})

    def thumbnail(self, request: Request) -> Response:
        file = self.review.thumbnail(request.path_params["name"])
        return FileResponse(file, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def photo(self, request: Request) -> Response:
        content = self.review.zoomed(request.path_params["name"])
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})

    async def answer(self, request: Request) -> Response:
        fields = await _fields(request, first=str, second=str, answer=str)
        return await self._decided(self.review.answer, **fields)

    async def merge(self, request: Request) -> Response:
        fields = await _fields(request, first=int, first_mark=str, second=int, second_mark=str)
        pairs = [(fields["first"], fields["first_mark"]), (fields["second"], fields["second_mark"])]
        return await self._decided(self.review.merge, groups=pairs)

    async def split(self, request: Request) -> Response:
        fields = await _fields(request, number=int, mark=str, photos=list, together=bool)
        if not all(isinstance(name, str) for name in fields["photos"]):
            raise InvalidValue("server: photos is no list of ids.")
        return await self._decided(self.review.split, **fields)

    async def undo(self, request: Request) -> Response:
        return await self._decided(self.review.undo, **await _fields(request, row=int))

    async def identify(self, request: Request) -> Response:
        if self._identify is None:
            raise InvalidState("server: it was started without an index, so that it cannot identify.")
        content = await _body(request, LARGEST_IMAGE)
        if not content:
            raise InvalidValue("server: the body of the request is empty; the bytes of an image file are accepted.")
        return _json(await run_in_threadpool(self._identified, content))

    def _identified(self, content: bytes) -> Json:
        with self._one_image:
            return self._identify(content) if self._identify else {}

    async def _decided(self, decide: Callable[..., Json | list[int] | int | None], **arguments: Any) -> Response:
        done = await run_in_threadpool(decide, **arguments)
        return _json({"done": done, **await run_in_threadpool(self._state)})

    def _state(self) -> Json:
        return {"state": self.review.summary()}


def _user_error(request: Request, error: Exception) -> Response:
    """What a user can mend, as JSON; `row` is the decision to take back for it."""
    status = 409 if isinstance(error, (Contradiction, Stale)) else 404 if isinstance(error, UnknownName) else 400
    row = error.earlier.row if isinstance(error, Contradiction) else None
    return _json({"error": str(error), "stale": isinstance(error, Stale), "row": row}, status)


def _json(content: Json, status: int = 200) -> Response:
    """JSON in ASCII, which can hold a file name of any bytes."""
    return Response(json.dumps(content), status, media_type="application/json")


def _text(status: int, text: str) -> Response:
    return PlainTextResponse(f"{text}\n", status)


def _name(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise InvalidValue(f"server: {name} is no number.")
    return int(text)


async def _body(request: Request, largest: int) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > largest:
            raise InvalidValue(f"server: the request is larger than {largest // 2**20} MiB. Send a smaller image.")
    return bytes(content)


async def _fields(request: Request, **kinds: type) -> Json:
    """Fields of the JSON in a request.

    Raises:
        InvalidValue: one is missing or of another kind.
    """
    try:
        content = json.loads(await _body(request, LARGEST_ANSWER))
        fields = {name: content[name] for name in kinds}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidValue(f"server: the request is not understood ({error!r}); {list(kinds)} are needed.") from error
    for name, kind in kinds.items():
        if type(fields[name]) is not kind:
            raise InvalidValue(f"server: {name} is of another type than {kind.__name__}.")
    return fields
