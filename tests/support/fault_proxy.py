"""A TCP proxy that breaks connections on purpose, between a client and a server on loopback.

Each connection that is accepted draws its fault from a seeded generator. Only bodies are changed, never headers:
where headers are changed without TLS, a client cannot know whom it talks to.
"""

import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter

KINDS = ("reset", "slow_down", "truncated", "flipped_download", "flipped_upload", "slow")
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_ANSWER = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
    % (len(_SLOW_DOWN), _SLOW_DOWN)
)
_CHUNK = 2**16


class FaultProxy:
    """Listens on a port of its own and passes connections on, one request each.

    Args:
        port: where the server listens.
        seed: of the generator that draws faults and where they strike.
        share: probability that a connection has a fault.
        kinds: which faults are drawn.
    """

    def __init__(self, port: int, *, seed: int = 0, share: float = 0.0, kinds: tuple[str, ...] = KINDS) -> None:
        self.share = share
        self.kinds = kinds
        self.injected: Counter[str] = Counter()
        # Faults of the next connections, in place of drawn ones.
        self.planned: list[str] = []
        self._target = port
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._port = 0

    def __enter__(self) -> "FaultProxy":
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Accepts connections, on the port it had before if it had one."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(64)
        self._listener, self._port = listener, listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        """Refuses connections until it is opened again."""
        if self._listener is not None:
            # Wakes the thread that accepts, which a close alone does not.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def refuse_for(self, seconds: float) -> threading.Thread:
        """Refuses connections for a while, and returns the thread that opens the port again."""
        self.close()
        self.injected["refused"] += 1

        def reopen() -> None:
            time.sleep(seconds)
            self.open()

        thread = threading.Thread(target=reopen, daemon=True)
        thread.start()
        return thread

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            is_hit = self._random.random() < self.share
            kind = self._random.choice(self.kinds) if is_hit else ""
            if self.planned:
                kind = self.planned.pop()
            where = self._random.random()
        with client, contextlib.suppress(OSError):
            request = _read_message(client, is_answer=False)
            if request is None:
                return
            if kind == "slow_down":
                self._count(kind)
                client.sendall(_ANSWER)
                return
            if kind == "flipped_upload" and request.body:
                self._count(kind)
                request.flip(where)
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                server.sendall(request.head_with_close() + request.body)
                answer = _read_message(server, is_answer=True, has_body=not request.head.startswith(b"HEAD "))
            if answer is not None:
                self._answer(client, answer, kind, where)

    def _answer(self, client: socket.socket, answer: "_Message", kind: str, where: float) -> None:
        head = answer.head_with_close()
        cut = int(where * len(answer.body))
        if kind == "flipped_download" and answer.body:
            self._count(kind)
            answer.flip(where)
        if kind == "reset":
            self._count(kind)
            client.sendall(head + answer.body[:cut] if answer.body else b"")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif kind == "truncated" and answer.body:
            self._count(kind)
            client.sendall(head + answer.body[:cut])
        elif kind == "slow":
            self._count(kind)
            client.sendall(head)
            for start in range(0, len(answer.body), max(1, len(answer.body) // 5)):
                time.sleep(0.1)
                client.sendall(answer.body[start : start + max(1, len(answer.body) // 5)])
        else:
            client.sendall(head + answer.body)

    def _count(self, kind: str) -> None:
        with self._lock:
            self.injected[kind] += 1


class _Message:
    """The head of an HTTP message, with its empty line, and its body."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self.head = head
        self.body = body

    def head_with_close(self) -> bytes:
        """The head of a message after which the connection ends."""
        lines = [line for line in self.head.split(b"\r\n") if line and not line.lower().startswith(b"connection:")]
        return b"\r\n".join([*lines, b"Connection: close", b"", b""])

    def flip(self, where: float) -> None:
        """Changes one bit of the body, at a share of its length."""
        at = int(where * len(self.body))
        self.body = self.body[:at] + bytes([self.body[at] ^ 1]) + self.body[at + 1 :]


def _read_message(connection: socket.socket, *, is_answer: bool, has_body: bool = True) -> _Message | None:
    """A whole message, None where the connection ends before."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(_CHUNK)
        if not chunk:
            return None
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    head += b"\r\n\r\n"
    fields = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:] if line)
    }
    if not is_answer and fields.get(b"expect", b"").lower() == b"100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
    expected = int(fields[b"content-length"]) if b"content-length" in fields else None
    if not has_body or (expected is None and not is_answer):
        return _Message(head, b"")
    received = bytearray(body)
    while expected is None or len(received) < expected:
        chunk = connection.recv(_CHUNK)
        if not chunk:
            break
        received += chunk
    return _Message(head, bytes(received))
