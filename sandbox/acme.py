"""A public certificate authority on the sandbox's internet: pebble, Let's Encrypt's test server.

It is asked at ACME_HOST as the real one is, and comes to the hosts' port 80 as the real one does.
It forgets everything and has another root each time it starts. https://github.com/letsencrypt/pebble
"""

import json
import ssl
import subprocess
from pathlib import Path

import httpx

from sandbox import releases, service
from sandbox.host import Progress, SandboxError, run, wait_until
from sandbox.plan import NETNS_DIR, Plan

ACME_HOST = "acme.example.net"
_MANAGEMENT_PORT = 15000
_LIFETIME_SECONDS = 90 * 24 * 3600
# Validation at once and every time; and no nonce is refused: what pebble does otherwise by chance.
_CALM = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_AUTHZREUSE": "0", "PEBBLE_WFE_NONCEREJECT": "0"}


def ensure(plan: Plan, progress: Progress) -> None:
    """Start the server where it does not run. The networks must exist (world.ensure_networks)."""
    if service.pid(_folder(plan)) is None:
        program = releases.debian_tool(progress, "pebble")
        with progress("Starting the sandbox's ACME server"):
            start(plan, program)


def roots(plan: Plan) -> str:
    """Return the PEM that its certificates, and its own as a server, chain to."""
    return (_folder(plan) / "roots.pem").read_text()


def start(plan: Plan, program: Path, **faults: str) -> None:
    """Start the server; one that runs is ended first.

    faults: pebble's own environment variables, such as PEBBLE_WFE_NONCEREJECT.
    """
    stop(plan)
    folder = _folder(plan)
    folder.mkdir(parents=True, exist_ok=True)
    who = "the sandbox's ACME server"
    certificate = service.certificate(folder, who, [ACME_HOST], plan.acme_ip)
    settings = {
        "listenAddress": f"{plan.acme_ip}:443",
        "managementListenAddress": f"{plan.acme_ip}:{_MANAGEMENT_PORT}",
        "certificate": str(certificate),
        "privateKey": str(certificate.with_suffix(".key")),
        "httpPort": 80,
        "tlsPort": 443,
        "keyAlgorithm": "ecdsa",
        "profiles": {
            "default": {"description": "90 days", "validityPeriod": _LIFETIME_SECONDS},
        },
    }
    (folder / "config.json").write_text(json.dumps({"pebble": settings}))
    where = ["nsenter", f"--net={NETNS_DIR / plan.inet_netns}"]
    run([*where, "ip", "address", "replace", f"{plan.acme_ip}/32", "dev", "lo"])
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *(*where, str(program), "-config", str(folder / "config.json")),
                *("-dnsserver", f"{plan.inet_ip}:53"),
            ],
            env={**_CALM, **faults},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (folder / "pid").write_text(str(process.pid))
    trust = ssl.create_default_context(cadata=certificate.read_text())
    url = f"https://{plan.acme_ip}:{_MANAGEMENT_PORT}/roots/0"

    def root() -> str | None:
        if process.poll() is not None:
            raise SandboxError(f"The ACME server ended: {(folder / 'log').read_text()[-500:]}")
        try:
            return httpx.get(url, verify=trust, trust_env=False).text
        except httpx.TransportError:
            return None

    issuer = wait_until(root, seconds=20)
    if issuer is None:
        raise SandboxError("The ACME server does not answer.", f"Look into {folder / 'log'}.")
    (folder / "roots.pem").write_text(certificate.read_text() + issuer)


def stop(plan: Plan) -> None:
    """End the server; does nothing where none runs."""
    service.stop(_folder(plan))


def _folder(plan: Plan) -> Path:
    return plan.state_dir / "acme"
