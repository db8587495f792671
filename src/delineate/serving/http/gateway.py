"""The gateway's process: what every request passes before an endpoint, and how connections must behave."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import h11
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from delineate.errors import Busy, DelineateError, Denied, ProtocolError
from delineate.serving.http.desk import Desk, Limits
from delineate.serving.http.endpoints import application
from delineate.serving.http.messages import Refused

if TYPE_CHECKING:
    from delineate.serving.settings import Settings

_LOG = logging.getLogger("delineate.serving")

_MOST_HEAD = 16 * 1024
_MOST_CONNECTIONS = 512

_CHANGING = ("send", "put", "delete")
_PROBES = ("livez", "readyz", "metrics")
"""Endpoints that something asks every few seconds."""

_FORWARDED = (b"forwarded", b"via", b"x-real-ip")
"""What proxies add to requests that they pass on, besides ``X-Forwarded-…``."""

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; sandbox"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class _Gate:
    """What every request passes, before the application: how many there may be, from where, and a line in the log."""

    def __init__(self, app: ASGIApp, desk: Desk) -> None:
        self._app, self._desk, self._now = app, desk, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        if scope["method"] == "HEAD":  # answered as GET is; uvicorn sends no body
            scope = {**scope, "method": "GET", "state": {**scope["state"], "head": True}}

        whole, kept_back = not _has_body(scope["headers"]), False

        async def receiving() -> Message:
            nonlocal whole
            event = await receive()
            whole = whole or not event.get("more_body", False)
            return event

        async def sending(event: Message) -> None:
            nonlocal status, kept_back
            if event["type"] == "http.response.start":
                status = event["status"]
                event["headers"] = [*event.get("headers", ()), *_HEADERS]
            elif not event.get("more_body", False) and not whole:
                event, kept_back = {**event, "more_body": True}, True
            async with asyncio.timeout(self._desk.limits.patience_s):
                await send(event)

        self._now += 1
        try:
            refused = self._refused(scope)
            await (self._app if refused is None else refused.response())(scope, receiving, sending)
        except (TimeoutError, ClientDisconnect):
            _LOG.info("an HTTP client has gone, or does not read")
        except (DelineateError, Refused) as error:
            _LOG.warning("an HTTP answer broke off: %s", error)
        except Exception:
            _LOG.exception("an HTTP request failed")
        finally:
            self._now -= 1
            self._note(scope, status, time.perf_counter() - began)
        if kept_back:
            # All of the answer has gone, but not that it has ended: hanging up on somebody who is still sending would
            # make TCP throw away what they have not read. nginx says "502 Bad Gateway" to that.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._desk.limits.idle_s):
                    while not whole:
                        await receiving()
                await send({"type": "http.response.body"})  # without it, uvicorn hangs up

    def _refused(self, scope: Scope) -> Refused | None:
        """Why a request does not reach the application."""
        most = self._desk.limits.requests
        if self._now > most and scope["path"] != "/livez":
            return Refused(Busy(f"{most} requests are being answered", fix="try again in some seconds"), 503)
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["query_string"]) > _MOST_HEAD:
            return Refused(ProtocolError(f"the request's head has more than {_MOST_HEAD:,} bytes", fix="say less"), 431)
        if self._desk.plain and not _is_from_here(scope["headers"]):
            message = "without keys, only this machine's own programs and pages are served"
            return Refused(Denied(message, fix="ask for http://127.0.0.1, or start the server with keys"))
        return None

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """Count it, and log it by its endpoint and its job's id: a path, or a query, may hold a name."""
        endpoint = getattr(scope.get("endpoint"), "__name__", "none")
        self._desk.requests.labels(endpoint, str(status)).inc()
        if (status >= 400 or endpoint in _CHANGING) and endpoint not in _PROBES:
            _LOG.info("HTTP %s %s: %d after %.3f s", endpoint, scope["state"].get("job", "-"), status, seconds)


def _has_body(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") and value != b"0" for name, value in headers)


def _is_from_here(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether a browser would send this only for a page of this very gateway, under a name that is surely its own.

    A page from elsewhere can make a browser ask 127.0.0.1, under a name of its own (DNS rebinding) or not. A proxy on
    this machine may ask for somebody elsewhere, who chooses the name; it says so.
    """
    if any(name in _FORWARDED or name.startswith(b"x-forwarded-") for name, _ in headers):
        return False
    hosts = [value.lower() for name, value in headers if name == b"host"]
    origins = [value.lower() for name, value in headers if name == b"origin"]
    if len(hosts) != 1 or not re.fullmatch(rb"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", hosts[0]):
        return False
    return all(origin in (b"http://" + hosts[0], b"https://" + hosts[0]) for origin in origins)


class _Connection(H11Protocol):
    """HTTP/1.1 that hangs up on those who are too many, who do not come to the point, or who do not stop."""

    limits = Limits()
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
        tcp = transport.get_extra_info("socket")
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # for one who reads no answer: closing would wait for that, too
            most_ms = int(1000 * self.limits.patience_s)
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, most_ms)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._due is not None:
            self._due.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or no longer: then whoever is answering the request is told that nobody listens."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        refused = Refused(ProtocolError("this is no HTTP request", fix="use an HTTP client")).response()
        headers = [*refused.raw_headers, *_HEADERS, (b"connection", b"close")]
        with suppress(h11.LocalProtocolError):  # half an answer is on its way
            events = (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(refused.body)),
                h11.EndOfMessage(),
            )
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """Close the connection in a while if a request's head has not come by then."""
        if self.conn.their_state is not h11.IDLE:
            if self._due is not None:
                self._due.cancel()
                self._due = None
        elif self._due is None:
            self._due = self.loop.call_later(self.limits.idle_s, self.transport.close)


class _Server(uvicorn.Server):
    """Leaves signals to :class:`Gateway`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    """Answers on a socket that listens; a client of the front door at ``settings.socket``."""

    def __init__(self, settings: Settings, listener: socket.socket, limits: Limits | None = None) -> None:
        self._listener, limits = listener, limits or Limits()
        desk = Desk(settings, limits)
        config = uvicorn.Config(
            _Gate(application(desk), desk),
            http=type("_Connection", (_Connection,), {"limits": limits}),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            log_level="critical",  # what it would say holds tracebacks; the gate logs what matters
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=limits.idle_s,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=_MOST_HEAD,
        )
        self._server = _Server(config)

    def run(self) -> None:
        """Answer until SIGTERM or :meth:`stop`."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: self.stop())
        self._server.run([self._listener])

    def stop(self) -> None:
        """End :meth:`run` soon, once what is being answered is."""
        self._server.should_exit = True
