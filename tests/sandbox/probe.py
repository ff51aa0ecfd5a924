"""Knocks at a door as one chosen client, and tells how far it got: a program and its caller.

`ask` runs this file inside a network namespace and sends it the requests; it writes nothing to any
disk, and nothing secret stands in its arguments. It sends exactly what it is told (no path is made
tidy), one request for each connection.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

# How far a request got that was not answered with a status.
SILENCE = "no answer"
OPEN = "open"

_BODY_BYTES = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Client:
    """Who knocks: the certificate and key (PEM) that it shows, its password or token, whom it
    trusts."""

    certificate: str = ""
    key: str = field(default="", repr=False)
    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    ca: str = field(default="", repr=False)

    def but(self, **changes: str) -> Client:
        """The same client with something else."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where to knock. `name` is in the certificate that must be shown; without it, plain http."""

    address: str
    port: int
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request. `tls` pins a version (1.2 or 1.3); with `connect` no byte is sent at all.

    `body` is JSON. `raw` is sent as it is, in place of all that would make a request of it, and
    `patience` is how many seconds of silence end the wait for its answer. `after` is how many
    seconds it waits before it knocks.
    """

    door: Door
    client: Client = field(default_factory=Client)
    path: str = "/"
    method: str = "GET"
    tls: str = ""
    connect: bool = False
    body: str = ""
    raw: str = field(default="", repr=False)
    patience: float = 1.0
    after: float = 0.0
    timeout: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`status` of HTTP, or 0 and in `why` what happened before there was one.

    `seconds` are from the request, on a new connection that stands, to the last byte of its answer.
    """

    status: int = 0
    why: str = ""
    body: str = field(default="", repr=False)
    seconds: float = 0.0

    @property
    def short(self) -> int | str:
        """The status, or why there is none."""
        return self.status or self.why


def ask(
    namespace: str | None,
    requests: Sequence[Request],
    *,
    at_once: int = 1,
    pause: float = 0.0,
) -> list[Answer]:
    """Sends requests from a network namespace (None: from this machine), in order."""
    where = ["nsenter", f"--net=/run/netns/{namespace}"] if namespace else []
    prefix = (
        namespace.partition("-")[0] if namespace else f"pf{os.environ.get('SANDBOX_TEST_SLOT', 1)}"
    )
    work = {"at_once": at_once, "pause": pause, "requests": [asdict(r) for r in requests]}
    done = subprocess.run(
        [*_among_strangers(prefix), *where, sys.executable, __file__],
        input=json.dumps(work),
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    return [Answer(**answer) for answer in json.loads(done.stdout)]


def _among_strangers(prefix: str) -> list[str]:
    """Runs a program as of those who come in a sandbox from outside: computers of their own, as
    its machines are, and as little slowed by what this one does beside."""
    # Not above: this file is run as a program, too, with what Python has itself.
    from sandbox.host import cgroups

    group = cgroups().limits["cpu"] / prefix / "strangers"
    if not group.parent.exists():
        return []
    group.mkdir(exist_ok=True)
    return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(group / "cgroup.procs")]


def knock(
    namespace: str | None, doors: Sequence[tuple[str, int]], *, seconds: float = 2.0
) -> dict[tuple[str, int], str]:
    """Of each address and port: `OPEN`, `SILENCE`, or what the network said."""
    requests = [
        Request(door=Door(address=address, port=port), connect=True, timeout=seconds)
        for address, port in doors
    ]
    answers = ask(namespace, requests, at_once=len(requests))
    return {door: answer.why for door, answer in zip(doors, answers, strict=True)}


def _send(request: dict[str, Any]) -> Answer:
    door, client = request["door"], request["client"]
    where = (door["address"], door["port"])
    try:
        with socket.create_connection(where, timeout=request["timeout"]) as plain:
            if request["connect"]:
                return Answer(why=OPEN)
            if not door["name"]:
                return _exchange(plain, request)
            context = _context(client, request["tls"])
            with context.wrap_socket(plain, server_hostname=door["name"]) as stream:
                _hear_out(stream)
                return _exchange(stream, request)
    except TimeoutError:
        return Answer(why=SILENCE)
    except ssl.SSLError as error:
        return Answer(why=f"TLS: {error.reason or error}")
    except http.client.HTTPException as error:
        return Answer(why=type(error).__name__)
    except OSError as error:
        return Answer(why=os.strerror(error.errno) if error.errno else str(error))


def _context(client: dict[str, str], version: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=client["ca"])
    if version:
        only = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[version]
        context.minimum_version = context.maximum_version = only
    if client["certificate"]:
        # The ssl module takes files only; these have no name on any disk.
        files = [os.memfd_create(part) for part in ("certificate", "key")]
        try:
            for file, part in zip(files, ("certificate", "key"), strict=True):
                os.write(file, client[part].encode())
            context.load_cert_chain(*(f"/proc/self/fd/{file}" for file in files))
        finally:
            for file in files:
                os.close(file)
    return context


def _hear_out(stream: ssl.SSLSocket) -> None:
    """Waits for what the server makes of our certificate: an alert, or a session ticket.

    In TLS 1.3 it looks at it when the handshake has ended for us already. Whoever writes at once
    may learn no more than that the connection is gone.
    """
    seconds = stream.gettimeout()
    if stream.version() == "TLSv1.3" and select.select([stream], [], [], 1)[0]:
        stream.setblocking(False)
        with contextlib.suppress(ssl.SSLWantReadError):
            stream.recv(1)
        stream.settimeout(seconds)


def _exchange(stream: socket.socket, request: dict[str, Any]) -> Answer:
    client = request["client"]
    connection = http.client.HTTPConnection(request["door"]["name"] or request["door"]["address"])
    connection.sock = stream
    headers = {"Connection": "close"}
    if client["user"]:
        pair = f"{client['user']}:{client['password']}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    elif client["token"]:
        headers["Authorization"] = f"Bearer {client['token']}"
    if request["raw"]:
        return _exchange_raw(stream, request["raw"], request["patience"])
    if request["body"]:
        headers["Content-Type"] = "application/json"
    began = time.monotonic()
    connection.request(request["method"], request["path"], request["body"] or None, headers)
    answer = connection.getresponse()
    body = answer.read(_BODY_BYTES).decode(errors="replace")
    return Answer(status=answer.status, body=body, seconds=time.monotonic() - began)


def _exchange_raw(stream: socket.socket, raw: str, patience: float) -> Answer:
    """The first answer's status; the body is all that came, answers to anything smuggled too."""
    stream.sendall(raw.encode("latin-1"))
    stream.settimeout(patience)
    came = bytearray()
    with contextlib.suppress(TimeoutError, ConnectionError, ssl.SSLError):
        while part := stream.recv(65536):
            came += part
    text = came.decode("latin-1")
    words = text.split(" ", 2)
    if not text.startswith("HTTP/1.1 ") or len(words) < 3:
        return Answer(why="no HTTP" if came else SILENCE, body=text)
    return Answer(status=int(words[1]), body=text)


def _main() -> None:
    work = json.loads(sys.stdin.read())

    def one(request: dict[str, Any]) -> Answer:
        time.sleep(work["pause"] + request["after"])
        return _send(request)

    with ThreadPoolExecutor(work["at_once"]) as clients:
        answers = list(clients.map(one, work["requests"]))
    print(json.dumps([asdict(answer) for answer in answers]))


if __name__ == "__main__":
    _main()
