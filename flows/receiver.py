"""What a bucket says of new objects in, one event for each new checkpoint out: the push beside `watch_checkpoints`.

A small HTTP service. Who may talk to it holds the token of `PTQ_RECEIVER_TOKEN`; encryption is a proxy's business.
"""

import contextlib
import hmac
import os
import threading
from collections.abc import AsyncIterator, Mapping

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ptq.errors import UsageError
from tasks.service.watching import Inbox

TOKEN_VARIABLE = "PTQ_RECEIVER_TOKEN"
_SHORTEST_TOKEN = 16
_LARGEST_BODY = 2**20
# How long a receiver that is told to stop may finish what it is at. What it does not finish, the next one finds.
_STOPPED_WITHIN_S = 10.0
_CONNECTIONS = 100


def receiver_token(environment: Mapping[str, str] = os.environ) -> str:
    """Returns the token that requests must carry.

    Raises:
        UsageError: the environment holds none, or a short one.
    """
    token = environment.get(TOKEN_VARIABLE, "")
    if len(token) < _SHORTEST_TOKEN:
        found = f"has {len(token)} characters" if token else "is not set"
        raise UsageError(
            f"{TOKEN_VARIABLE} {found}; expected a secret of at least {_SHORTEST_TOKEN}, which the bucket's "
            "notifications carry as a bearer token. `openssl rand -hex 32` makes one."
        )
    return token


def receiver_app(inbox: Inbox, *, token: str) -> Starlette:
    """Returns the service: POST /notifications, with the token, and GET /health.

    Args:
        inbox: takes notifications; a thread announces what is in it while the service runs.
        token: the bearer token of whoever may send notifications.
    """
    worker = threading.Thread(target=inbox.work, name="inbox", daemon=True)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        inbox.stop()
        worker.join(_STOPPED_WITHIN_S)

    async def notifications(request: Request) -> JSONResponse:
        if not _is_allowed(request.headers.get("authorization", ""), token):
            return JSONResponse({"error": "no valid token"}, 401, {"WWW-Authenticate": "Bearer"})
        body = await _body(request)
        if body is None:
            return JSONResponse({"error": f"the body is larger than {_LARGEST_BODY} bytes"}, 413)
        try:
            accepted, ignored = inbox.put(body)
        except UsageError as error:
            return JSONResponse({"error": str(error)}, 400)
        except BufferError as error:
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": "60"})
        return JSONResponse({"accepted": accepted, "ignored": ignored}, 202)

    async def health(request: Request) -> JSONResponse:
        if not worker.is_alive():
            return JSONResponse({"status": "the thread that announces checkpoints has ended"}, 503)
        return JSONResponse({"status": "ok", "waiting": inbox.waiting})

    routes = [Route("/notifications", notifications, methods=["POST"]), Route("/health", health, methods=["GET"])]
    return Starlette(routes=routes, lifespan=lifespan)


def receive(prefix: str, store: str, *, host: str, port: int) -> None:
    """Serves until interrupted.

    Raises:
        UsageError: the token is missing or short, the prefix is not in S3, or there is no Prefect server.
    """
    token = receiver_token()
    app = receiver_app(Inbox(prefix, store), token=token)
    uvicorn.run(app, host=host, port=port, limit_concurrency=_CONNECTIONS, ws="none", server_header=False)


def _is_allowed(header: str, token: str) -> bool:
    scheme, _, given = header.partition(" ")
    # As bytes: compare_digest takes no other than ASCII in strings.
    is_same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), token.encode())
    return scheme.lower() == "bearer" and is_same


async def _body(request: Request) -> bytes | None:
    """The request's body, None where it is too large; no more than that is ever in memory."""
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > _LARGEST_BODY:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_BODY:
            return None
    return bytes(body)
