"""Who is notified: a web server and a mail server, which write down what they are told.

Run inside a network namespace, with the certificate and key to show, and the token and password to
ask for, on stdin. It prints a JSON line when both listen, and one for each alert that it is told
of; a mail's subject says status, alert and Alertmanager's address. Without
TLS, token or password nothing is taken. It ends when stdin does.
"""

from __future__ import annotations

import email
import email.policy
import hmac
import http.server
import json
import ssl
import sys
import threading
import time
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope, LoginPassword

from tests.sandbox.attacker import server_context

WEB_PORT, MAIL_PORT = 8443, 587
USER = "alerts"


def _tell(**what: Any) -> None:
    sys.stdout.write(json.dumps({"at": time.time(), **what}) + "\n")
    sys.stdout.flush()


def _web(context: ssl.SSLContext, token: str) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            given = self.headers.get("Authorization", "")
            if not hmac.compare_digest(given, f"Bearer {token}"):
                self.send_error(401)
                return
            message = json.loads(body)
            for alert in message["alerts"]:
                _tell(
                    receiver=message["receiver"],
                    url=message["externalURL"],
                    status=alert["status"],
                    labels=alert["labels"],
                    text=json.dumps(alert["annotations"]),
                )
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *_: Any) -> None:  # noqa: A002 - its own name
            pass

    server = http.server.ThreadingHTTPServer(("", WEB_PORT), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()


class _Mailbox:
    async def handle_DATA(self, server: Any, session: Any, envelope: Envelope) -> str:  # noqa: N802
        content = envelope.content if isinstance(envelope.content, bytes) else b""
        message = email.message_from_bytes(content, policy=email.policy.default)
        body = message.get_body(("plain", "html"))
        status, alert, url = message["subject"].split()
        _tell(
            receiver=",".join(envelope.rcpt_tos),
            url=url,
            status=status.lower(),
            labels={"alertname": alert},
            text=body.get_content() if body else "",
        )
        return "250 OK"


def _mail(context: ssl.SSLContext, password: str) -> Controller:
    def authenticate(*arguments: Any) -> AuthResult:
        given = arguments[-1]
        good = (
            isinstance(given, LoginPassword)
            and given.login == USER.encode()
            and hmac.compare_digest(given.password, password.encode())
        )
        return AuthResult(success=good, handled=True)

    controller = Controller(
        _Mailbox(),
        hostname="0.0.0.0",  # noqa: S104 - in a namespace of its own
        port=MAIL_PORT,
        tls_context=context,
        require_starttls=True,
        authenticator=authenticate,
        auth_required=True,
        # Its LOGIN asks in words that Alertmanager does not know.
        auth_exclude_mechanism=["LOGIN"],
    )
    controller.start()
    return controller


def _main() -> None:
    order = json.loads(sys.stdin.readline())
    context = server_context(order["certificate"], order["key"])
    _web(context, order["token"])
    mail = _mail(context, order["password"])
    _tell(listening=True)
    sys.stdin.read()
    mail.stop()


if __name__ == "__main__":
    _main()
