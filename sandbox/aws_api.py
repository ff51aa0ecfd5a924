"""What a host itself asks of AWS: credentials of its role (IMDSv2), and Route 53's API.

A process on the sandbox's internet, asked at the same addresses as AWS is. It knows a host by its
public address, verifies signatures, and does what the policy of the host's role allows. TXT
records that it is told of are answered by a dnsmasq of its own, to which the public DNS server
sends whoever asks for a challenge. https://docs.aws.amazon.com/Route53/latest/APIReference/
"""

import hashlib
import hmac
import http.server
import json
import re
import secrets
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.message import Message
from http import HTTPStatus
from os import kill
from pathlib import Path
from socket import create_connection
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from sandbox import dns, iam, service
from sandbox.host import Progress, SandboxError, run, wait_until
from sandbox.plan import NETNS_DIR, Plan

ROUTE53_HOST = "route53.amazonaws.com"
METADATA_IP = "169.254.169.254"
_CREDENTIALS = "/latest/meta-data/iam/security-credentials/"
_LIFETIME = timedelta(hours=6)
_SKEW_SECONDS = 300
_XML = "https://route53.amazonaws.com/doc/2013-04-01/"


def ensure(plan: Plan, zone: str, zone_id: str, progress: Progress) -> None:
    """Start the server where it does not run. The networks must exist (world.ensure_networks)."""
    folder = _folder(plan)
    if service.pid(folder) is not None:
        return
    with progress("Starting the sandbox's metadata service and Route 53"):
        folder.mkdir(parents=True, exist_ok=True)
        service.certificate(folder, "the sandbox's Route 53", [ROUTE53_HOST], plan.aws_ip)
        where = ["nsenter", f"--net={NETNS_DIR / plan.inet_netns}"]
        for address in (plan.aws_ip, METADATA_IP):
            run([*where, "ip", "address", "replace", f"{address}/32", "dev", "lo"])
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [
                    *(*where, sys.executable, "-m", "sandbox.aws_api"),
                    *(str(folder), plan.aws_ip, zone, zone_id),
                ],
                cwd=Path(__file__).parent.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (folder / "pid").write_text(str(process.pid))

        def answers() -> bool:
            if process.poll() is not None:
                raise SandboxError(f"Route 53 ended: {(folder / 'log').read_text()[-500:]}")
            with suppress(OSError), create_connection((plan.aws_ip, 443), timeout=1):
                return True
            return False

        if not wait_until(answers, seconds=20):
            raise SandboxError("Route 53 does not answer.", f"Look into {folder / 'log'}.")


def stop(plan: Plan) -> None:
    """End the server; does nothing where none runs."""
    service.stop(_folder(plan))


def tell(
    plan: Plan, roles: Mapping[str, Sequence[iam.Statement]], holders: Mapping[str, str]
) -> None:
    """Say which statements each role has, and which role the instance at a public address."""
    file = _folder(plan) / "roles.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps({"roles": roles, "holders": holders}))
    fresh.replace(file)


def certificate(plan: Plan) -> str:
    """Return the PEM that a host must trust, as Amazon's own is trusted everywhere."""
    return (_folder(plan) / "server.pem").read_text()


def _folder(plan: Plan) -> Path:
    return plan.state_dir / "aws"


# The server, in a process of its own.


@dataclass(frozen=True, kw_only=True)
class _Session:
    """Temporary credentials of a role."""

    role: str
    secret: str
    token: str
    ends: datetime


class _Refused(Exception):  # noqa: N818
    """An answer that is an error: its code and status."""

    def __init__(self, code: str, status: HTTPStatus = HTTPStatus.FORBIDDEN, why: str = "") -> None:
        super().__init__(why or code)
        self.code, self.status = code, status


class _Records:
    """The TXT records of a zone, by name, and the dnsmasq that answers with them."""

    def __init__(self, folder: Path, address: str, zone: str) -> None:
        self._folder = folder / "dns"
        self._folder.mkdir(exist_ok=True)
        self._command = [
            *("dnsmasq", "--conf-file=/dev/null", "--user=root", "--no-hosts", "--no-resolv"),
            *("--bind-interfaces", f"--listen-address={address}", f"--local=/{zone}/"),
            f"--pid-file={self._folder / 'pid'}",
        ]
        self._values: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self._answer()

    def change(self, action: str, name: str, values: list[str]) -> None:
        with self._lock:
            if action == "UPSERT":
                self._values[name] = values
            elif action == "DELETE" and self._values.get(name) == values:
                del self._values[name]
            else:
                raise _Refused("InvalidChangeBatch", HTTPStatus.BAD_REQUEST, f"{action} {name}")
            self._answer()

    def _answer(self) -> None:
        # It reads these at its start alone. Nobody asks it but for a challenge.
        if pid := dns.running(self._folder):
            kill(pid, signal.SIGTERM)
            wait_until(lambda: dns.running(self._folder) is None, seconds=5, step=0.01)
        texts = [(name, value) for name, values in self._values.items() for value in values]
        run([*self._command, *(f"--txt-record={name},{value}" for name, value in texts)])


class _Account:
    """Who holds which credentials, and what they allow."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "roles.json"
        self._sessions: dict[str, _Session] = {}
        self.tokens: set[tuple[str, str]] = set()

    def role_of(self, address: str) -> str | None:
        return json.loads(self._file.read_text())["holders"].get(address)

    def credentials(self, role: str) -> dict[str, str]:
        key = f"ASIA{secrets.token_hex(8).upper()}"
        session = self._sessions[key] = _Session(
            role=role,
            secret=secrets.token_urlsafe(30),
            token=secrets.token_urlsafe(60),
            ends=datetime.now(UTC) + _LIFETIME,
        )
        return {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "LastUpdated": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "AccessKeyId": key,
            "SecretAccessKey": session.secret,
            "Token": session.token,
            "Expiration": f"{session.ends:%Y-%m-%dT%H:%M:%SZ}",
        }

    def verify(self, method: str, target: str, headers: Message, body: bytes) -> str:
        """The role whose credentials signed a request (Signature Version 4).

        https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
        """
        given = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=(\w+)/(\d{8}/us-east-1/route53/aws4_request), "
            r"SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})",
            headers.get("Authorization", ""),
        )
        if given is None:
            raise _Refused("MissingAuthenticationToken")
        key, scope, names, signature = given.groups()
        session, moment = self._sessions.get(key), headers.get("X-Amz-Date", "")
        token = headers.get("X-Amz-Security-Token", "")
        known = session is not None and hmac.compare_digest(token, session.token)
        if session is None or not known or session.role not in self._roles():
            raise _Refused("InvalidClientTokenId")
        when = datetime.strptime(moment, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if session.ends < datetime.now(UTC) or abs(time.time() - when.timestamp()) > _SKEW_SECONDS:
            raise _Refused("ExpiredToken")
        if not {"host", "x-amz-date", "x-amz-security-token"} <= set(names.split(";")):
            raise _Refused("IncompleteSignature")
        url = urlsplit(target)
        query = sorted(parse_qsl(url.query, keep_blank_values=True))
        canonical = "\n".join(
            [
                method,
                quote(url.path, safe="/~%"),
                "&".join(f"{quote(k, safe='~')}={quote(v, safe='~')}" for k, v in query),
                *(f"{name}:{' '.join(headers.get(name, '').split())}" for name in names.split(";")),
                "",
                names,
                hashlib.sha256(body).hexdigest(),
            ]
        )
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        signed = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}"
        secret = f"AWS4{session.secret}".encode()
        for part in (*scope.split("/"), signed):
            secret = hmac.digest(secret, part.encode(), "sha256")
        if not hmac.compare_digest(secret.hex(), signature):
            raise _Refused("SignatureDoesNotMatch")
        return session.role

    def require(self, role: str, action: str, resource: str, context: iam.Context) -> None:
        allowed = iam.allows(self._roles()[role], action, resource, context)
        print(
            "allowed" if allowed else "refused", role, action, resource, dict(context), flush=True
        )
        if not allowed:
            raise _Refused("AccessDenied", why=f"{role} is not authorized to perform: {action}")

    def _roles(self) -> dict[str, list[iam.Statement]]:
        return json.loads(self._file.read_text())["roles"]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: what is asked holds tokens."""


def _metadata(account: _Account) -> type[_Handler]:
    """https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html."""

    class Metadata(_Handler):
        def do_PUT(self) -> None:
            forwarded = "X-Forwarded-For" in self.headers
            asked = "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
            if self.path != "/latest/api/token" or forwarded:
                return self.answer(HTTPStatus.FORBIDDEN, "")
            if not asked:
                return self.answer(HTTPStatus.BAD_REQUEST, "")
            token = secrets.token_urlsafe(40)
            account.tokens.add((self.client_address[0], token))
            return self.answer(HTTPStatus.OK, token)

        def do_GET(self) -> None:
            address = self.client_address[0]
            if (address, self.headers.get("X-aws-ec2-metadata-token", "")) not in account.tokens:
                return self.answer(HTTPStatus.UNAUTHORIZED, "")
            role = account.role_of(address)
            if role and self.path == _CREDENTIALS:
                return self.answer(HTTPStatus.OK, role)
            if role and self.path == f"{_CREDENTIALS}{role}":
                return self.answer(HTTPStatus.OK, json.dumps(account.credentials(role)))
            return self.answer(HTTPStatus.NOT_FOUND, "")

    return Metadata


def _route53(account: _Account, records: _Records, zone: str, zone_id: str) -> type[_Handler]:
    """ListHostedZones, ChangeResourceRecordSets of TXT records, GetChange."""
    arn = "arn:aws:route53:::"
    change = (
        "<ChangeInfo><Id>/change/{}</Id><Status>INSYNC</Status>"
        "<SubmittedAt>{}</SubmittedAt></ChangeInfo>"
    )

    class Route53(_Handler):
        def do_GET(self) -> None:
            self._do(b"")

        def do_POST(self) -> None:
            self._do(self.rfile.read(int(self.headers["Content-Length"])))

        def _do(self, body: bytes) -> None:
            try:
                role = account.verify(self.command, self.path, self.headers, body)
                name, content = self._perform(role, urlsplit(self.path).path, body)
                text = f'<{name}Response xmlns="{_XML}">{content}</{name}Response>'
                self.answer(HTTPStatus.OK, text, "text/xml")
            except _Refused as error:
                text = (
                    f'<ErrorResponse xmlns="{_XML}"><Error><Type>Sender</Type>'
                    f"<Code>{error.code}</Code><Message>{escape(str(error))}</Message></Error>"
                    "<RequestId>0</RequestId></ErrorResponse>"
                )
                self.answer(error.status, text, "text/xml")

        def _perform(self, role: str, path: str, body: bytes) -> tuple[str, str]:
            if (self.command, path) == ("GET", "/2013-04-01/hostedzone"):
                account.require(role, "route53:ListHostedZones", "*", {})
                return "ListHostedZones", (
                    f"<HostedZones><HostedZone><Id>/hostedzone/{zone_id}</Id><Name>{zone}.</Name>"
                    "<CallerReference>given</CallerReference><Config><PrivateZone>false"
                    "</PrivateZone></Config></HostedZone></HostedZones><Marker></Marker>"
                    "<IsTruncated>false</IsTruncated><MaxItems>100</MaxItems>"
                )
            moment = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
            if found := re.fullmatch(r"/2013-04-01/change/(\w+)", path):
                account.require(role, "route53:GetChange", f"{arn}change/{found[1]}", {})
                return "GetChange", change.format(found[1], moment)
            found = re.fullmatch(r"/2013-04-01/hostedzone/(\w+)/rrset/?", path)
            if found and self.command == "POST":
                self._change(role, f"{arn}hostedzone/{found[1]}", found[1], body)
                return "ChangeResourceRecordSets", change.format(secrets.token_hex(7), moment)
            raise _Refused("NotImplemented", HTTPStatus.NOT_IMPLEMENTED, f"{self.command} {path}")

        def _change(self, role: str, resource: str, id_: str, body: bytes) -> None:
            tag = f"{{{_XML}}}"
            tree = ElementTree.fromstring(body)  # noqa: S314 - of our own hosts

            def texts(at: ElementTree.Element, path: str) -> list[str]:
                found = at.findall("/".join(f"{tag}{part}" for part in path.split("/")))
                return [element.text or "" for element in found]

            changes = tree.findall(f"{tag}ChangeBatch/{tag}Changes/{tag}Change")
            of = [
                (
                    texts(one, "Action")[0],
                    texts(one, "ResourceRecordSet/Name")[0].lower().rstrip("."),
                    texts(one, "ResourceRecordSet/Type")[0],
                    texts(one, "ResourceRecordSet/ResourceRecords/ResourceRecord/Value"),
                )
                for one in changes
            ]
            key = "route53:ChangeResourceRecordSets{}".format
            context = {
                key("Actions"): [action for action, *_ in of],
                key("NormalizedRecordNames"): [name for _, name, *_ in of],
                key("RecordTypes"): [type_ for _, _, type_, _ in of],
            }
            account.require(role, "route53:ChangeResourceRecordSets", resource, context)
            if id_ != zone_id:
                raise _Refused("NoSuchHostedZone", HTTPStatus.NOT_FOUND)
            for action, name, type_, values in of:
                if type_ != "TXT" or not name.endswith(f".{zone}"):
                    raise _Refused("InvalidChangeBatch", HTTPStatus.BAD_REQUEST, f"{type_} {name}")
                records.change(action, name, [value.strip('"') for value in values])

    return Route53


def _main() -> None:
    folder, address, zone, zone_id = Path(sys.argv[1]), *sys.argv[2:]
    account, records = _Account(folder), _Records(folder, address, zone)
    metadata = http.server.ThreadingHTTPServer((METADATA_IP, 80), _metadata(account))
    threading.Thread(target=metadata.serve_forever, daemon=True).start()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    handler = _route53(account, records, zone, zone_id)
    api = http.server.ThreadingHTTPServer((address, 443), handler)
    api.socket = context.wrap_socket(api.socket, server_side=True)
    api.serve_forever()


if __name__ == "__main__":
    _main()
