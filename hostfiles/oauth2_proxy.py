"""OAuth2 Proxy, which nginx on a master asks whether a person is logged in at the provider.

It serves no page and passes no request on. https://oauth2-proxy.github.io/oauth2-proxy/
"""

from __future__ import annotations

import json

from hostfiles.files import Check, File, Unit, secret_file, unit_check
from hostfiles.model import MasterSecrets, MasterServer, OAuth2, Release
from hostfiles.releases import directory
from hostfiles.templates import render

FOLDER = "/etc/oauth2-proxy"
CONFIG = f"{FOLDER}/oauth2-proxy.cfg"
SERVICE = "/etc/systemd/system/oauth2-proxy.service"
USER = "oauth2-proxy"
PORT = 4180
# First boot needs none of it.
PATHS = (
    f"{FOLDER}/",
    SERVICE,
    "/etc/sysusers.d/oauth2-proxy.conf",
    "/etc/systemd/system/multi-user.target.d/oauth2-proxy.conf",
)
# A person logs in once in a working day; who has left the group is out after that long.
SESSION = "8h"


def files(server: MasterServer) -> tuple[File, ...]:
    """What is not secret."""
    if server.oauth2 is None:
        return ()
    ca = [File(path=f"{FOLDER}/provider-ca.pem", content=server.oauth2.ca)]
    return (
        *(ca if server.oauth2.ca != "system" else []),
        File(
            path="/etc/sysusers.d/oauth2-proxy.conf",
            content=f'# No home and no shell.\nu {USER} - "OAuth2 Proxy"\n',
        ),
        File(
            path="/etc/systemd/system/multi-user.target.d/oauth2-proxy.conf",
            content=render("systemd/multi-user.target.conf.j2", units=["oauth2-proxy.service"]),
        ),
        File(path=CONFIG, content=_configuration(server, server.oauth2)),
        File(
            path=SERVICE,
            content=render(
                "systemd/oauth2-proxy.service.j2",
                release_dir=directory(server.oauth2_proxy),
                folder=FOLDER,
                user=USER,
            ),
        ),
    )


def secret_files(server: MasterServer, secrets: MasterSecrets) -> tuple[File, ...]:
    """What it is known by at the provider, and what it encrypts cookies with."""
    if server.oauth2 is None:
        return ()
    contents = {"client": secrets.client_secret, "cookie": secrets.cookie_secret}
    return tuple(
        secret_file(f"{FOLDER}/{name}.secret", content, USER) for name, content in contents.items()
    )


def checks(server: MasterServer) -> tuple[Check, ...]:
    """Its own check, which reads the secrets too and asks nobody."""
    if server.oauth2 is None:
        return ()
    return (
        Check(
            name="oauth2-proxy.cfg",
            argv=(
                # Its paths are relative, so that a staged tree can be checked where it lies.
                *("/usr/bin/env", f"--chdir={{tree}}{FOLDER}"),
                *(f"{directory(server.oauth2_proxy)}/oauth2-proxy", "--config-test"),
                f"--config={{tree}}{CONFIG}",
            ),
        ),
        unit_check("oauth2-proxy's unit", SERVICE),
    )


def units(server: MasterServer) -> tuple[Unit, ...]:
    """It reads nothing anew: whoever is logged in stays so over a restart."""
    if server.oauth2 is None:
        return ()
    return (
        Unit(
            name="oauth2-proxy.service",
            restart_on=(SERVICE, f"{FOLDER}/"),
            ready=(
                *("/usr/bin/curl", "--silent", "--show-error", "--fail", "--max-time", "5"),
                *("--output", "/dev/null", f"http://127.0.0.1:{PORT}/ping"),
            ),
        ),
    )


def releases(server: MasterServer) -> tuple[Release, ...]:
    """Fetched only where it is used."""
    return (server.oauth2_proxy,) if server.oauth2 else ()


def _configuration(server: MasterServer, oauth2: OAuth2) -> str:
    """https://oauth2-proxy.github.io/oauth2-proxy/configuration/overview."""
    port = "" if server.ui_port == 443 else f":{server.ui_port}"
    options = {
        "http_address": f"127.0.0.1:{PORT}",
        # nginx asks, and does the rest.
        "reverse_proxy": True,
        "trusted_proxy_ips": ["127.0.0.1"],
        "upstreams": ["static://202"],
        "set_xauthrequest": True,
        "provider": "oidc",
        "oidc_issuer_url": oauth2.issuer,
        **({} if oauth2.ca == "system" else {"provider_ca_files": ["provider-ca.pem"]}),
        "client_id": oauth2.client_id,
        "client_secret_file": "client.secret",
        "code_challenge_method": "S256",
        "redirect_url": f"https://{server.fqdn}{port}/oauth2/callback",
        "skip_provider_button": True,
        # Its pages name its version unless told not to.
        "footer": "-",
        **({"scope": oauth2.scope} if oauth2.scope else {}),
        "email_domains": list(oauth2.email_domains) or ["*"],
        "allowed_groups": list(oauth2.allowed_groups),
        # Sent back to this host alone, over TLS, and to no other site's requests.
        "cookie_name": "__Host-federation",
        "cookie_secret_file": "cookie.secret",
        "cookie_expire": SESSION,
        "cookie_secure": True,
        "cookie_httponly": True,
        "cookie_samesite": "lax",
        # A line of a request would hold the code of a log-in; nginx writes the access log.
        "request_logging": False,
        "auth_logging": True,
    }
    # A JSON text or list of texts is TOML as well.
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in options.items()]
    return "# Written by the bundle.\n" + "".join(lines)
