"""A server that listens in the place of another, and writes down all that it is told.

Run inside a network namespace, with where to listen and the certificate to show (none: plain http)
on stdin. It prints one JSON line when it listens, and one for each connection: the bytes as they
came, and what it could read of them. It answers whole requests with 503, and ends by itself after
a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import sys
from typing import Any

LIFE_SECONDS = 60
_PATIENCE_SECONDS = 3
_ANSWER = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_END_OF_REQUEST = b"\r\n\r\n"


def server_context(certificate: str, key: str) -> ssl.SSLContext:
    """Of a certificate and key that stand in no file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files = [os.memfd_create(part) for part in ("certificate", "key")]
    for file, content in zip(files, (certificate, key), strict=True):
        os.write(file, content.encode())
    context.load_cert_chain(*(f"/proc/self/fd/{file}" for file in files))
    return context


def _listen_to(connection: socket.socket, context: ssl.SSLContext | None) -> dict[str, Any]:
    raw, heard, alert = bytearray(), bytearray(), ""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    stream = context.wrap_bio(incoming, outgoing, server_side=True) if context else None
    with contextlib.suppress(TimeoutError, ConnectionError):
        while _END_OF_REQUEST not in heard:
            if stream is not None:
                try:
                    # Does the handshake first.
                    heard += stream.read(65536)
                    continue
                except ssl.SSLWantReadError:
                    connection.sendall(outgoing.read())
                except ssl.SSLError as error:
                    alert = error.reason or str(error)
                    break
            part = connection.recv(65536)
            if not part:
                break
            raw += part
            incoming.write(part)
            if stream is None:
                heard += part
                # Whoever speaks TLS to us gets what a plain server would say.
                if part.startswith(b"\x16"):
                    break
        if stream is None:
            connection.sendall(_ANSWER)
        elif _END_OF_REQUEST in heard:
            stream.write(_ANSWER)
            connection.sendall(outgoing.read())
    return {
        "raw": raw.decode("latin-1"),
        "heard": "" if stream is None and raw.startswith(b"\x16") else heard.decode("latin-1"),
        "alert": alert,
    }


def _main() -> None:
    signal.alarm(LIFE_SECONDS)
    order = json.loads(sys.stdin.readline())
    pair = order["certificate"], order["key"]
    context = server_context(*pair) if order["certificate"] else None
    with socket.create_server((order["address"], order["port"])) as server:
        print(json.dumps({"listening": True}), flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(_PATIENCE_SECONDS)
                print(json.dumps(_listen_to(connection, context)), flush=True)


if __name__ == "__main__":
    _main()
