"""A certificate of a public authority for nginx: certbot, and what brings nginx to show it.

nginx has a certificate of our CA in any case, and shows it until there is one of the authority
and whenever there is none that is good. certbot's account, keys and certificates are on the data
volume, so that they outlive the instance. https://eff-certbot.readthedocs.io/
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import urlsplit

from hostfiles import certificates
from hostfiles.files import File, Unit
from hostfiles.model import Acme, Challenge, Server
from hostfiles.templates import FOLDER as TEMPLATES
from hostfiles.templates import render

PROGRAM = "/usr/local/sbin/public-certificate"
# certbot's name of it, whatever the host is called.
NAME = "prometheus-slave"
# What nginx is told to show; nothing there means our CA's certificate.
INCLUDE = "/run/public-certificate/nginx*.conf"
TRUSTED = "/etc/nginx/tls/trusted.pem"
_METRICS = f"{certificates.FOLDER}/public-certificate.prom"
_UNITS = "/etc/systemd/system"
SERVICES = tuple(
    f"{_UNITS}/{name}.service" for name in ("certbot", "certbot-package", "public-certificate")
)
TIMER = f"{_UNITS}/certbot.timer"
# All that is not needed before the first bundle.
PATHS = (PROGRAM, *SERVICES, TIMER, TRUSTED)


@dataclass(frozen=True, kw_only=True)
class _Prover:
    """What of certbot meets a challenge: its packages and the last file of them, its arguments,
    and the capabilities that it needs."""

    packages: str
    installed: str
    arguments: str
    capabilities: str = ""


_PROVERS: dict[Challenge, _Prover] = {
    "http-01": _Prover(
        packages="certbot",
        installed="/usr/bin/certbot",
        arguments="--standalone --preferred-challenges http",
        capabilities="CAP_NET_BIND_SERVICE",
    ),
    # https://certbot-dns-route53.readthedocs.io/
    "dns-01": _Prover(
        packages="certbot python3-certbot-dns-route53",
        installed="/usr/lib/python3/dist-packages/certbot_dns_route53",
        arguments="--dns-route53",
    ),
}

# https://www.freedesktop.org/software/systemd/man/latest/sysusers.d.html
USER = 'u certbot - "certbot"\n'


def files(server: Server, port: int) -> tuple[File, ...]:
    """Nothing where our own CA signs. `port` is the one that nginx shows it on."""
    acme = server.acme
    if acme is None:
        return ()
    account = _account(acme)
    values = {
        "account": account,
        "trusted": TRUSTED,
        "private": acme.private,
        "prover": _PROVERS[acme.challenge],
        "challenge": acme.challenge,
        "name": NAME,
        "fqdn": server.fqdn,
        "server": acme.server,
        "email": acme.email,
        "deploy": f"/usr/bin/python3 {PROGRAM} {_arguments('deploy', acme, server.fqdn, port)}",
        "metrics": _METRICS,
        "metrics_folder": certificates.FOLDER,
    }
    return (
        File(path=PROGRAM, content=(TEMPLATES / "public-certificate").read_text(), mode=0o755),
        File(path=TRUSTED, content=server.ca_bundle + acme.roots),
        *(
            File(path=path, content=render(f"systemd/{path.rpartition('/')[2]}.j2", **values))
            for path in (*SERVICES, TIMER)
        ),
    )


def units(server: Server) -> tuple[Unit, ...]:
    """Before nginx: one from before is shown as soon as nginx is told to look for it."""
    if server.acme is None:
        return ()
    (*_, deploys) = SERVICES
    return (
        # certbot.service is read when it is started, and its changes show at the next attempt.
        Unit(name="public-certificate.service", restart_on=(deploys,), reload_on=(TRUSTED,)),
        Unit(name="certbot.timer", restart_on=(TIMER,)),
    )


def wait_command(acme: Acme, fqdn: str, seconds: int) -> str:
    """What waits, on the host, until nginx shows such a certificate."""
    return f"sudo {PROGRAM} {_arguments('wait', acme, fqdn, seconds)}"


def _arguments(command: str, acme: Acme, fqdn: str, number: int) -> str:
    return f"{command} {_account(acme)}/live/{NAME} {fqdn} {number}"


def _account(acme: Acme) -> str:
    # What another authority signed, or one with another root, is not to be kept until it ends.
    root = f"-{sha256(acme.roots.encode()).hexdigest()[:8]}" if acme.private else ""
    return f"/data/letsencrypt/{urlsplit(acme.server).hostname}{root}"
