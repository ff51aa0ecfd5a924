"""Config files for curl, as a password on a command line could be read by anyone.

https://curl.se/docs/manpage.html#-K
"""

from __future__ import annotations

from hostfiles.model import Credential


def curl_config(
    *,
    fqdn: str,
    port: int,
    path: str,
    user: Credential,
    ca: str,
    pair: str = "",
    method: str = "GET",
    max_seconds: int | None = None,
) -> str:
    """One request to a service of this host, by its name and loopback.

    `pair` is the path of the client certificate and key without their endings (none: empty).
    """
    lines = {
        "url": f"https://{fqdn}:{port}{path}",
        "connect-to": f"{fqdn}:{port}:127.0.0.1:{port}",
        "request": method,
        "user": f"{user.user}:{user.password}",
        "cacert": ca,
        **({"cert": f"{pair}.crt", "key": f"{pair}.key"} if pair else {}),
        "max-time": str(max_seconds or (60 if method == "POST" else 5)),
    }
    return "".join(
        [
            *(f'{name} = "{value}"\n' for name, value in lines.items()),
            "silent\nshow-error\nfail-with-body\n",
            # What a GET answers is of no interest, what a refused POST answers is the reason.
            "" if method == "POST" else 'output = "/dev/null"\n',
        ]
    )
