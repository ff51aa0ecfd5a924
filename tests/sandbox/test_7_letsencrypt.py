"""Certificates of a public authority, obtained over ACME from pebble on the sandbox's internet.

Whatever the authority does, or does not, the site is scraped every second and no scrape fails.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from sandbox import acme, host, releases
from sandbox.plan import NETNS_DIR
from tests.sandbox.conftest import Sandbox, no_scrape_lost
from tests.sandbox.probe import OPEN, SILENCE, knock

FEDERATE = 'up{job="federate",site="dublin"}'
METRIC = "federation_public_certificate"
RENEWALS = 10
# From nothing to a certificate. The machine that tests this may be busy.
WAIT_SECONDS = 60

# Of letsEncrypt, for the authority on the sandbox's internet.
SETTINGS = {
    "email": "operator@example.com",
    "agreeToTerms": True,
    "server": f"https://{acme.ACME_HOST}/dir",
    "caRoot": {"given": "acmeRoots"},
    "timeout": f"{WAIT_SECONDS}s",
}

OWN = "Prometheus federation CA"
PUBLIC = "Pebble Intermediate CA"


@pytest.fixture(scope="module")
def public(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The shared sandbox with a public authority, that nobody uses yet; scraped every second."""
    sandbox.world["acme"] = True
    sandbox.set(
        scrapeInterval="1s",
        evaluationInterval="1s",
        letsEncrypt=SETTINGS,
    )
    sandbox.up()
    sandbox.wait(f"count_over_time({FEDERATE}[10s]) >= 9")
    yield sandbox
    acme.stop(sandbox.plan)


def signed_by(sandbox: Sandbox, authority: str) -> None:
    """Changes who signs the certificate of site dublin."""
    slaves = sandbox.get("slaves")
    slaves[0]["certificates"] = authority
    sandbox.set(slaves=slaves)
    sandbox.up()


def shown(sandbox: Sandbox, site: str, what: str = "-issuer") -> str:
    """What the certificate says that nginx of a site shows; its issuer unless told."""
    return sandbox.script(
        site,
        "openssl s_client -connect 127.0.0.1:9095 </dev/null 2>/dev/null"
        f" | openssl x509 -noout {what}",
    )


@contextlib.contextmanager
def nothing_failed(sandbox: Sandbox) -> Iterator[None]:
    """Not one failed or missing scrape of site dublin, and nothing of it restarted."""
    before, since = sandbox.start_times()["dublin"], time.time()
    yield
    time.sleep(2)
    no_scrape_lost(sandbox, FEDERATE, since, 1, rescheduled=True)
    assert sandbox.start_times()["dublin"] == before


def attempt(sandbox: Sandbox, site: str) -> bool:
    """Has certbot renew a certificate that is good still; whether it could."""
    script = """
    unit=/etc/systemd/system/certbot.service folder=/run/systemd/system/certbot.service.d
    mkdir -p $folder
    # Its command, all lines of it.
    command=$(sed -n '/^ExecStart=/,/[^\\\\]$/p' $unit)
    printf '[Service]\\nRestart=no\\nExecStart=\\n%s --force-renewal\\n' "$command" \\
        >$folder/force.conf
    systemctl daemon-reload
    systemctl start certbot.service && echo renewed
    rm -r $folder
    systemctl daemon-reload
    """
    return "renewed" in sandbox.script(site, script, check=False)


def test_a_running_site_changes_its_authority_and_goes_back(public: Sandbox) -> None:
    door = (public.public_ip("dublin"), 80)
    assert knock(None, [door])[door] == SILENCE
    with nothing_failed(public):
        signed_by(public, "letsencrypt")
        assert PUBLIC in shown(public, "dublin")
        # Open, and nobody there but during an attempt.
        assert knock(None, [door])[door] not in (OPEN, SILENCE)
        signed_by(public, "ownCa")
        assert OWN in shown(public, "dublin")
        assert knock(None, [door])[door] == SILENCE
        timers = public.inside("dublin", "systemctl", "list-timers", "--no-pager")
        assert "certbot" not in timers
        assert not public.script("dublin", "ls /run/public-certificate 2>/dev/null", check=False)
        signed_by(public, "letsencrypt")
        assert PUBLIC in shown(public, "dublin")


def test_ten_renewals_lose_no_scrape(public: Sandbox) -> None:
    serials = {shown(public, "dublin", "-serial")}
    with nothing_failed(public):
        for _ in range(RENEWALS):
            assert attempt(public, "dublin")
            serials.add(shown(public, "dublin", "-serial"))
    assert len(serials) == RENEWALS + 1


def test_what_nginx_refuses_is_not_shown(public: Sandbox) -> None:
    before = shown(public, "dublin", "-serial")
    broken = "/run/public-certificate/nginx-broken.conf"
    with nothing_failed(public):
        public.script("dublin", f"echo no_such_directive on\\; >{broken}")
        assert not attempt(public, "dublin")
        assert shown(public, "dublin", "-serial") == before
        public.wait(f'{METRIC}_refused{{site="dublin"}} == 1')
        public.wait('ALERTS{alertname="PublicCertificateRefused", alertstate="firing"}')
        assert "nginx refuses" in public.inside("dublin", "journalctl", "-u", "public-certificate")
        # The next attempt, however it comes about, brings the one that is there.
        public.script("dublin", f"rm {broken}; systemctl start certbot.service")
        public.wait(f'{METRIC}_refused{{site="dublin"}} == 0')
    assert shown(public, "dublin", "-serial") != before


# Answers as an authority does whose limit is reached, with the key and certificate of ours.
LIMITED = """
import http.server, json, ssl, sys
address, certificate = sys.argv[1:]
class Limited(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Replay-Nonce", "bm9uY2U")
        self.send_header("Content-Type", "application/problem+json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)
    def do_GET(self):
        names = ("newNonce", "newAccount", "newOrder", "revokeCert", "keyChange")
        self.answer(200, {name: "https://acme.example.net/" + name for name in names})
    def do_HEAD(self):
        self.answer(200, {})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(429, {"type": "urn:ietf:params:acme:error:rateLimited", "status": 429,
                          "detail": "too many certificates already issued for example.com"})
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(certificate, certificate.replace(".pem", ".key"))
server = http.server.ThreadingHTTPServer((address, 443), Limited)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


# pebble knows no account any more once it was started anew.
FORGET = "rm -rf /data/letsencrypt/*/accounts"


@contextlib.contextmanager
def port_80_shut(sandbox: Sandbox) -> Iterator[None]:
    rule = "INPUT -p tcp --dport 80 -j DROP"
    sandbox.script("dublin", f"iptables -I {rule}")
    try:
        yield
    finally:
        sandbox.script("dublin", f"iptables -D {rule}")


@contextlib.contextmanager
def nonces_rejected(sandbox: Sandbox) -> Iterator[None]:
    acme.start(sandbox.plan, releases.tool("pebble"), PEBBLE_WFE_NONCEREJECT="100")
    sandbox.script("dublin", FORGET)
    yield


@contextlib.contextmanager
def limit_reached(sandbox: Sandbox) -> Iterator[None]:
    acme.stop(sandbox.plan)
    netns = NETNS_DIR / sandbox.plan.inet_netns
    certificate = sandbox.plan.state_dir / "acme" / "server.pem"
    argv = [sys.executable, "-I", "-c", LIMITED, sandbox.plan.acme_ip, str(certificate)]
    with subprocess.Popen(["nsenter", f"--net={netns}", *argv]) as server:
        try:
            yield
        finally:
            server.kill()


# The one that keeps its pebble is first: accounts and roots are gone with it.
FAULTS: dict[str, tuple[Callable[[Sandbox], contextlib.AbstractContextManager[None]], str]] = {
    "port 80 is shut": (port_80_shut, "Type:   connection"),
    "it rejects every nonce": (nonces_rejected, "nonce"),
    "its limit is reached": (limit_reached, "too many"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_old_certificate_serves_and_the_reason_is_told(public: Sandbox, fault: str) -> None:
    broken, words = FAULTS[fault]
    before = shown(public, "dublin", "-serial")
    since = f"--since=@{time.time():.0f}"
    with nothing_failed(public), broken(public):
        assert not attempt(public, "dublin")
        assert shown(public, "dublin", "-serial") == before
        public.wait(f'{METRIC}_failed_attempts{{site="dublin"}} >= 1')
    assert words in public.inside("dublin", "journalctl", "--unit=certbot", since)


def test_a_slow_authority_with_another_root_is_waited_for(public: Sandbox) -> None:
    slow = {"PEBBLE_VA_NOSLEEP": "", "PEBBLE_VA_SLEEPTIME": "5"}
    acme.start(public.plan, releases.tool("pebble"), **slow)
    public.set(letsEncrypt=public.get("letsEncrypt") | {"timeout": f"{WAIT_SECONDS}s"})
    public.set(master=public.get("master") | {"certificates": "letsencrypt"})
    # Nobody trusts both roots here, so a scrape may fail: caRoot would have to name them both.
    public.up()
    roots = acme.roots(public.plan)
    servers = {
        "dublin": ("prometheus-slave", 9095),
        "master": ("prometheus-master", 443),
    }
    for site, (name, port) in servers.items():
        verified = public.inside(
            site,
            *("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-verify_return_error"),
            *("-CAfile", "/dev/stdin", "-verify_hostname", f"{name}.example.com"),
            stdin=roots,
            check=False,
        )
        assert "Verify return code: 0 (ok)" in verified
    # As `up` tells the operator.
    login = public.plan.state_dir / "outputs" / "master.curl"
    query = "https://prometheus-master.example.com/api/v1/query?query=up"
    host.run(["curl", "--silent", "--show-error", "--fail", "--config", login, query])
    public.wait(f"sum({METRIC}_shown) == 2")
    public.wait(f"sum({METRIC}_failed_attempts) == 0")
