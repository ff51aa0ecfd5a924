"""A TLS server that is as careless as openssl still lets it be: CERTIFICATE KEY PORT.

The scanner of tests/sandbox/scanner.py must see all of it. On loopback, until it is ended.
"""

from __future__ import annotations

import contextlib
import socketserver
import ssl
import sys
import warnings

# SSL_OP_ALLOW_CLIENT_RENEGOTIATION of OpenSSL 3, which the ssl module has no name for.
CLIENT_RENEGOTIATION = 1 << 8


class Handler(socketserver.BaseRequestHandler):
    """Shakes hands and reads until the other side goes."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.settimeout(10)
            with context.wrap_socket(self.request, server_side=True) as stream:
                while stream.recv(4096):
                    pass


class Server(socketserver.ThreadingTCPServer):
    """One thread for each connection: a scanner makes many at once."""

    daemon_threads = True
    allow_reuse_address = True


certificate, key, port = sys.argv[1:]
warnings.simplefilter("ignore", DeprecationWarning)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.minimum_version = ssl.TLSVersion.TLSv1
context.set_ciphers("ALL:@SECLEVEL=0")
context.options |= CLIENT_RENEGOTIATION
context.load_cert_chain(certificate, key)
with Server(("127.0.0.1", int(port)), Handler) as server:
    server.serve_forever()
