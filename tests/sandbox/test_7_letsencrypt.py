"""Certificates of a public authority, obtained over ACME from pebble on the sandbox's internet.

Whatever the authority does, or does not, the site is scraped every second and no scrape fails.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from sandbox import acme, aws_api, host, machine, releases
from sandbox.aws import Cloud
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
    aws_api.stop(sandbox.plan)


def signed_by(sandbox: Sandbox, authority: str, challenge: str = "http-01") -> None:
    """Changes who signs the certificate of site dublin, and how it proves its name."""
    slaves = sandbox.get("slaves")
    slaves[0] |= {"certificates": authority, "challenge": challenge}
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
        timer = public.script(
            "dublin", "systemctl show -p ActiveState,TimersCalendar certbot.timer"
        )
        assert "ActiveState=active" in timer
        assert "OnCalendar=*-*-* 00,12:00:00" in timer
        # Open, and nobody there but during an attempt.
        assert knock(None, [door])[door] not in (OPEN, SILENCE)
        signed_by(public, "ownCa")
        assert OWN in shown(public, "dublin")
        assert knock(None, [door])[door] == SILENCE
        # Nor is there the package's own, stopped, of which TimerStopped would tell.
        units = ("list-units", "--all", "--type=timer", "--no-pager")
        assert "certbot" not in public.inside("dublin", "systemctl", *units)
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


def trust_route_53(sandbox: Sandbox, site: str) -> None:
    """Puts the one who plays Amazon here among those that a machine trusts."""
    sandbox.inside(
        site,
        *("bash", "-c", "cat >/usr/local/share/ca-certificates/amazon.crt; update-ca-certificates"),
        stdin=aws_api.certificate(sandbox.plan),
    )


def requests(sandbox: Sandbox) -> list[str]:
    """What was asked of Route 53, and whether it was allowed."""
    return (sandbox.plan.state_dir / "aws" / "log").read_text().splitlines()


def test_a_record_proves_the_name_with_port_80_shut(public: Sandbox) -> None:
    door = (public.public_ip("dublin"), 80)
    trust_route_53(public, "dublin")
    serials = {shown(public, "dublin", "-serial")}
    with nothing_failed(public):
        signed_by(public, "letsencrypt", "dns-01")
        assert knock(None, [door])[door] == SILENCE
        assert "ACME challenge" not in public.inside("dublin", "ufw", "status")
        since = len(requests(public))
        for _ in range(RENEWALS):
            assert attempt(public, "dublin")
            assert PUBLIC in shown(public, "dublin")
            serials.add(shown(public, "dublin", "-serial"))
    assert len(serials) == RENEWALS + 1
    asked = requests(public)[since:]
    changes = [line for line in asked if "route53:ChangeResourceRecordSets " in line]
    record = "_acme-challenge.prometheus-slave.example.com"
    assert all(line.startswith("allowed") and record in line for line in changes)
    # Each record that was written was taken away. Whoever waits too long for an answer asks again.
    assert sum("UPSERT" in line for line in changes) >= RENEWALS
    assert sum("DELETE" in line for line in changes) >= RENEWALS
    assert "DELETE" in changes[-1]


# What who holds the credentials of a host can do by them.
RIGHTS = """
import boto3, botocore.exceptions, json
ours = boto3.client("route53")
held = boto3.Session().get_credentials()
forged = boto3.client("route53", aws_access_key_id=held.access_key,
                      aws_secret_access_key="x" * 40, aws_session_token=held.token)
mine = "_acme-challenge.prometheus-slave.example.com"
(zone,) = ours.list_hosted_zones()["HostedZones"]
def change(action, name=mine, kind="TXT", value='"proof"', zone=zone["Id"], client=ours):
    record = {"Name": name, "Type": kind, "TTL": 10, "ResourceRecords": [{"Value": value}]}
    batch = {"Changes": [{"Action": action, "ResourceRecordSet": record}]}
    try:
        client.change_resource_record_sets(HostedZoneId=zone, ChangeBatch=batch)
    except botocore.exceptions.ClientError as error:
        return error.response["Error"]["Code"]
    return "done"
print(json.dumps({
    "its own": [change("UPSERT"), change("DELETE")],
    "of another host": change("UPSERT", "_acme-challenge.prometheus-master.example.com"),
    "an address": change("UPSERT", "prometheus-slave.example.com", "A", "203.0.113.66"),
    "another action": change("CREATE"),
    "another zone": change("UPSERT", zone="Z00000000SANDBOX0002"),
    "without the secret": change("UPSERT", client=forged),
}))
"""


def test_the_hosts_role_writes_that_record_and_nothing_else(public: Sandbox) -> None:
    as_certbot = ["runuser", "-u", "certbot", "--", "env"]
    as_certbot += ["AWS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt", "python3", "-"]
    assert json.loads(public.inside("dublin", *as_certbot, stdin=RIGHTS)) == {
        "its own": ["done", "done"],
        "of another host": "AccessDenied",
        "an address": "AccessDenied",
        "another action": "AccessDenied",
        "another zone": "AccessDenied",
        "without the secret": "SignatureDoesNotMatch",
    }


METADATA = "http://169.254.169.254/latest"
STATUS = "curl --silent --max-time 5 --output /dev/null --write-out %{http_code}"
TOKEN = f"$(curl -s -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' {METADATA}/api/token)"
ROLE = f"{METADATA}/meta-data/iam/security-credentials/"


def test_only_a_host_that_proves_its_name_by_a_record_has_a_role(public: Sandbox) -> None:
    asked = f'{STATUS} -H "X-aws-ec2-metadata-token: {TOKEN}" {ROLE}'
    assert public.script("dublin", asked) == "200"
    assert public.script("dublin", f"{STATUS} {ROLE}") == "401"
    assert public.script("master", asked) == "404"


def test_it_goes_from_a_record_to_its_own_ca(public: Sandbox) -> None:
    with nothing_failed(public):
        signed_by(public, "ownCa")
        assert OWN in shown(public, "dublin")
    signed_by(public, "letsencrypt")
    assert PUBLIC in shown(public, "dublin")


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
def no_record(sandbox: Sandbox, name: str) -> Iterator[None]:
    """The zone is not the one that the internet asks: it has no address of a name."""

    def asked(cloud: Cloud) -> None:
        cloud.save(path)
        names = {id_.split("_")[1]: ip for id_, ip in cloud.records.items()}
        sandbox.fabric.update(lambda model: replace(model, public_names=names))

    path = sandbox.plan.state_dir / "cloud.json"
    cloud = Cloud.load(path)
    (id_,) = (id_ for id_ in cloud.records if f"_{name}_" in id_)
    address = cloud.records.pop(id_)
    asked(cloud)
    try:
        yield
    finally:
        cloud = Cloud.load(path)
        cloud.records[id_] = address
        asked(cloud)


def test_up_says_that_the_internet_knows_no_address_of_the_name(public: Sandbox) -> None:
    account = public.get("letsEncrypt")
    public.set(letsEncrypt=account | {"timeout": "30s"})
    public.set(master=public.get("master") | {"certificates": "letsencrypt"})
    with nothing_failed(public), no_record(public, "prometheus-master.example.com"):
        told = public.refused()
    assert "no certificate after 30 s. The site works with the one of our own CA" in told
    assert "-> the authority finds no record of that name" in told
    public.set(letsEncrypt=account)


# What `up` runs on the master, which has no certificate yet.
WAIT = """
set -- $(sed -n 's/^ExecReload=//p' /etc/systemd/system/public-certificate.service)
$1 $2 wait $4 $5 10
"""


@contextlib.contextmanager
def port_80_shut(sandbox: Sandbox) -> Iterator[None]:
    rule = "INPUT -p tcp --dport 80 -j DROP"
    for site in ("dublin", "master"):
        sandbox.script(site, f"iptables -I {rule}")
    try:
        yield
    finally:
        for site in ("dublin", "master"):
            sandbox.script(site, f"iptables -D {rule}")


@contextlib.contextmanager
def nonces_rejected(sandbox: Sandbox) -> Iterator[None]:
    acme.start(sandbox.plan, releases.tool("pebble"), PEBBLE_WFE_NONCEREJECT="100")
    for site in ("dublin", "master"):
        sandbox.script(site, FORGET)
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


# What certbot says, and what `up` says then. The one that keeps its pebble is first: accounts and
# roots are gone with it.
Fault = Callable[[Sandbox], contextlib.AbstractContextManager[None]]
FAULTS: dict[str, tuple[Fault, str, str]] = {
    "port 80 is shut": (port_80_shut, "Type:   connection", "does not reach port 80 of this host"),
    "it rejects every nonce": (nonces_rejected, "nonce", "nonce"),
    "its limit is reached": (limit_reached, "too many", "the authority's rate limit is reached"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_old_certificate_serves_and_the_reason_is_told(public: Sandbox, fault: str) -> None:
    broken, words, remedy = FAULTS[fault]
    before = shown(public, "dublin", "-serial")
    since = f"--since=@{time.time():.0f}"
    with nothing_failed(public), broken(public):
        assert not attempt(public, "dublin")
        assert shown(public, "dublin", "-serial") == before
        public.wait(f'{METRIC}_failed_attempts{{site="dublin"}} >= 1')
        assert remedy in public.script("master", WAIT, check=False)
    assert words in public.inside("dublin", "journalctl", "--unit=certbot", since)


def test_a_slow_authority_with_another_root_is_waited_for(public: Sandbox) -> None:
    slow = {"PEBBLE_VA_NOSLEEP": "", "PEBBLE_VA_SLEEPTIME": "5"}
    acme.start(public.plan, releases.tool("pebble"), **slow)
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


def with_site(sandbox: Sandbox, site: str, **change: object) -> str:
    """Changes a site, or adds it with a public certificate; returns what `up` printed."""
    sites = {slave["site"]: slave for slave in sandbox.get("slaves")}
    new = {"site": site, "host": f"slave-{site}", "subnetId": "subnet-dublin"}
    new |= {"certificates": "letsencrypt"}
    sites[site] = {**sites.get(site, new), **change}
    sandbox.set(slaves=list(sites.values()))
    return sandbox.up()


@contextlib.contextmanager
def issuers(sandbox: Sandbox, site: str) -> Iterator[list[str]]:
    """Who signed what a site shows, each time that it changes."""
    seen: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            with contextlib.suppress(AssertionError, host.SandboxError):
                issuer = shown(sandbox, site)
                if "issuer" in issuer and issuer not in seen[-1:]:
                    seen.append(issuer)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def test_a_new_site_begins_with_its_own_ca_and_ends_with_the_public_one(public: Sandbox) -> None:
    with issuers(public, "cork") as seen:
        printed = with_site(public, "cork")
    assert [OWN in issuer for issuer in seen] == [True, False]
    assert PUBLIC in seen[-1]
    assert "create Command slave-cork-public-certificate" in printed
    public.wait('up{job="federate",site="cork"} == 1')


# The key of the account, and when and by whom the certificate was signed.
LINEAGE = """
cd /data/letsencrypt/*/
sha256sum accounts/*/*/*/private_key.json
ls archive/prometheus-slave
"""


def orders(sandbox: Sandbox) -> int:
    """How many certificates were asked for of pebble since it was started."""
    return (sandbox.plan.state_dir / "acme" / "log").read_text().count("/order-plz")


def test_another_instance_goes_on_with_account_and_certificate(public: Sandbox) -> None:
    before = [shown(public, "cork", "-serial"), public.script("cork", LINEAGE), orders(public)]
    old = public.machine("cork")
    with_site(public, "cork", generation=2)
    assert public.machine("cork") != old
    assert old not in machine.machines(public.plan)
    after = [shown(public, "cork", "-serial"), public.script("cork", LINEAGE), orders(public)]
    assert after == before
    # certbot of the new instance can use them, too.
    assert attempt(public, "cork")
    assert orders(public) == before[2] + 1


def test_a_new_site_proves_its_name_by_a_record_from_its_first_boot_on(public: Sandbox) -> None:
    def trust() -> bool:
        with contextlib.suppress(AssertionError, host.SandboxError):
            trust_route_53(public, "galway")
            return True
        return False

    with ThreadPoolExecutor(1) as pool, issuers(public, "galway") as seen:
        # As soon as there is a machine: long before certbot is.
        trusted = pool.submit(host.wait_until, trust, seconds=WAIT_SECONDS, step=0.5)
        with_site(public, "galway", challenge="dns-01")
        assert trusted.result()
    assert [OWN in issuer for issuer in seen] == [True, False]
    assert PUBLIC in seen[-1]
    door = (public.public_ip("galway"), 80)
    assert knock(None, [door])[door] == SILENCE
    public.wait('up{job="federate",site="galway"} == 1')
