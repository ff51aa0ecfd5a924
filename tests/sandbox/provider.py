"""A provider of OpenID Connect somewhere on the sandbox's internet, for people of a test.

Run inside a network namespace, with its address, certificate and people on stdin. It asks nobody
for a password: who says that he is somebody is believed. It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from pathlib import Path

import oidc_provider_mock
import uvicorn


def _main() -> None:
    order = json.loads(sys.stdin.readline())
    people = [
        oidc_provider_mock.User(sub=name, claims=claims) for name, claims in order["people"].items()
    ]
    # uvicorn takes files only.
    folder = Path(tempfile.mkdtemp())
    for part in ("certificate", "key"):
        (folder / part).touch(mode=0o600)
        (folder / part).write_text(order[part])
    server = uvicorn.Server(
        uvicorn.Config(
            oidc_provider_mock.app(user_claims=people),
            interface="wsgi",
            host=order["address"],
            port=order["port"],
            ssl_certfile=folder / "certificate",
            ssl_keyfile=folder / "key",
            log_level="error",
        )
    )
    threading.Thread(target=_end_with_parent, daemon=True).start()
    server.run()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _main()
