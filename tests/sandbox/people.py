"""People: where they log in, the settings for that, and the browser that they come with."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from playwright.sync_api import BrowserContext, Page, sync_playwright

from sandbox import host, network
from sandbox.progress import silent
from tests.sandbox.conftest import ROOT, Sandbox
from tests.sandbox.keyring import Keyring, forge_authority, issue
from tests.sandbox.probe import OPEN, knock

MASTER = "prometheus-master.example.com"
CHROMIUM = Path("/usr/bin/chromium")
PROVIDER = Path(__file__).with_name("provider.py")
PROVIDER_PORT = 8443
SCREENSHOTS = ROOT / "docs" / "screenshots"
CLIENT_SECRET = "canary-of-the-client-secret-at-the-provider"
PEOPLE = {
    "alice": {"email": "alice@example.com", "email_verified": True, "groups": ["monitoring"]},
    "mallory": {"email": "mallory@example.com", "email_verified": True, "groups": ["sales"]},
}


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Where people log in, the certificate that it shows, and whose that is."""

    address: str
    certificate: str
    ca: str

    @property
    def issuer(self) -> str:
        return f"https://{self.address}:{PROVIDER_PORT}"

    @property
    def setting(self) -> dict[str, Any]:
        """`master.oauth2`, which lets the people of one group in."""
        return {
            "issuer": self.issuer,
            "clientId": "federation",
            "clientSecret": CLIENT_SECRET,
            "allowedGroups": ["monitoring"],
            "ca": self.ca,
            "cidrs": [f"{self.address}/32"],
        }


@contextlib.contextmanager
def provider_for(sandbox: Sandbox) -> Iterator[Provider]:
    """A provider on a sandbox's internet, with a CA of its own. The sandbox must be up."""
    name = "provider"
    namespace = sandbox.stranger(name)
    address = network.address_of(namespace)
    authority = forge_authority()
    leaf = issue("login.example.net", authority, address=address)
    order = {
        "address": address,
        "port": PROVIDER_PORT,
        "certificate": leaf.certificate,
        "key": leaf.key,
        "people": PEOPLE,
    }
    argv = ["nsenter", f"--net=/run/netns/{namespace}", sys.executable, str(PROVIDER)]
    running = subprocess.Popen(argv, stdin=subprocess.PIPE, text=True)
    assert running.stdin
    try:
        running.stdin.write(f"{json.dumps(order)}\n")
        running.stdin.flush()
        door = (address, PROVIDER_PORT)
        assert host.wait_until(lambda: knock(namespace, [door])[door] == OPEN, seconds=20)
        yield Provider(address=address, certificate=leaf.certificate, ca=authority.certificate)
    finally:
        running.stdin.close()
        running.wait(10)
        network.remove_stranger(sandbox.plan, name)


@contextlib.contextmanager
def browser_of(sandbox: Sandbox, provider: Provider, profile: Path) -> Iterator[BrowserContext]:
    """A browser that knows nobody yet. It takes the two servers' own certificates and no other."""
    host.install(silent, {"chromium": str(CHROMIUM)})
    page = Keyring(sandbox.state).leaf("master-nginx").certificate
    pins = [_pin(page), _pin(provider.certificate)]
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                f"--host-resolver-rules=MAP {MASTER} {sandbox.public_ip('master')}",
                f"--ignore-certificate-errors-spki-list={','.join(pins)}",
            ],
        )
        yield context
        context.close()


def screenshot(tab: Page, name: str, *, height: int = 600) -> None:
    """One for the docs, where there is none: a test run changes no file of the repository."""
    path = SCREENSHOTS / f"{name}.png"
    if not path.exists():
        tab.set_viewport_size({"width": 1000, "height": height})
        tab.screenshot(path=path)


def _pin(certificate: str) -> str:
    key = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(spki).digest()).decode()
