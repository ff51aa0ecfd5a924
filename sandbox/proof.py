"""The proof that federation works: asked of the master, through its own front door.

Nothing here looks into a machine. It sees what an operator sees: the master's HTTP API, over TLS
that is verified against the stack's CA.
"""

from __future__ import annotations

import base64
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from hostfiles.duration import milliseconds
from sandbox.host import Progress, SandboxError
from sandbox.program import plain

# As old as a sample may be: it waited one interval at the slave and one at the master.
FRESH_INTERVALS = 2
TIMEOUT_SECONDS = 120.0
EXPORTER_PORT = 9100


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One series of an instant query's answer."""

    labels: Mapping[str, str]
    value: float
    timestamp: float


class MasterApi:
    """The master's API as an operator uses it, at its name; `address` is its public IP."""

    def __init__(self, name: str, address: str, authorization: str, ca: str) -> None:
        # A public authority's certificate is of the name alone.
        self._named: Mapping[str, Any] = {
            "headers": {"Host": name},
            "extensions": {"sni_hostname": name},
        }
        self._base = f"https://{address}"
        self._client = httpx.Client(
            headers={"Authorization": authorization},
            verify=ssl.create_default_context(cadata=ca),
            timeout=10,
            trust_env=False,
        )

    @classmethod
    def of(cls, outputs: Mapping[str, Any]) -> MasterApi:
        """The API of the master that a stack's outputs describe."""
        master = plain(outputs["master"])
        return cls(
            master["host"],
            master["publicIp"],
            authorization(plain(outputs)),
            plain(outputs["caCertificate"]),
        )

    def has_pages(self) -> bool:
        """Whether this build of Prometheus has web pages: Debian's own has none."""
        return self._client.get(f"{self._base}/query", **self._named).status_code == httpx.codes.OK

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an API's answer. https://prometheus.io/docs/prometheus/latest/querying/api/."""
        answer = self._client.get(f"{self._base}/api/v1/{path}", params=parameters, **self._named)
        answer.raise_for_status()
        return answer.json()["data"]

    def query(self, promql: str) -> list[Sample]:
        """The answer of an instant query."""
        return [
            Sample(labels=row["metric"], timestamp=row["value"][0], value=float(row["value"][1]))
            for row in self.get("query", query=promql)["result"]
        ]

    def samples(self, range_selector: str) -> list[Sample]:
        """The raw samples of a range selector such as `up[5m]`, as they were stored."""
        return [
            Sample(labels=row["metric"], timestamp=timestamp, value=float(value))
            for row in self.get("query", query=range_selector)["result"]
            for timestamp, value in row["values"]
        ]


def authorization(known: Mapping[str, Any]) -> str:
    """How an operator comes in: by the password, or where people log in elsewhere by a token.

    `known` are a stack's outputs, secrets unwrapped.
    """
    if "masterPassword" in known:
        pair = f"{known['master']['user']}:{known['masterPassword']}"
        return f"Basic {base64.b64encode(pair.encode()).decode()}"
    if not known["masterTokens"]:
        raise SandboxError(
            "With master.oauth2 only people with a browser come in, and nothing proves federation.",
            "Name a token in master.tokens, or leave the proof out: up --no-verify.",
        )
    return f"Bearer {next(iter(known['masterTokens'].values()))}"


@dataclass(kw_only=True)
class Proof:
    """What was found, and what is still missing (empty: proven)."""

    found: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def prove(
    outputs: Mapping[str, Any], config: Mapping[str, Any], namespace: str, progress: Progress
) -> Proof:
    """Waits until the master federates every target of every slave; SandboxError if it does not.

    `config` are the environment's settings, from which follows what the master must have.
    """
    api = MasterApi.of(outputs)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    with progress("wait until the master has federated every target"):
        while True:
            try:
                proof = look(api, config, namespace)
            except httpx.HTTPError as error:
                proof = Proof(missing=[f"the master does not answer: {error}"])
            if not proof.missing:
                return proof
            if time.monotonic() > deadline:
                raise SandboxError(
                    "Federation is not proven:\n  " + "\n  ".join(proof.missing),
                    "Look at `make status`, and at the services with `make ssh NAME=...`.",
                )
            time.sleep(0.5)


def look(api: MasterApi, config: Mapping[str, Any], namespace: str) -> Proof:
    """One look at the master."""
    proof = Proof()
    interval = milliseconds(config[f"{namespace}:scrapeInterval"])
    zone = config[f"{namespace}:zone"]
    up = {
        (s.labels.get("site"), s.labels.get("job"), s.labels.get("instance")): s
        for s in api.query("up")
    }
    ages = {
        (s.labels.get("site"), s.labels.get("job"), s.labels.get("instance")): s.value
        for s in api.query('time() - timestamp(up{site!=""})')
    }
    own = f"{config[f'{namespace}:master']['host']}.{zone}"
    for job in ("prometheus", "node"):
        _expect(proof, up, (None, job, own), {})
    for job in config[f"{namespace}:master"].get("jobs", []):
        for instance in _instances(job):
            _expect(proof, up, (None, job["name"], instance), job.get("labels", {}))
    for slave in config[f"{namespace}:slaves"]:
        site = slave["site"]
        _expect(proof, up, (site, "federate", f"{slave['host']}.{zone}:9095"), {})
        for job in slave.get("jobs", []):
            slowest = max(interval, milliseconds(job.get("scrape_interval", "1ms")))
            for target in _instances(job):
                key = (site, job["name"], target)
                if _expect(proof, up, key, job.get("labels", {})):
                    limit = FRESH_INTERVALS * slowest / 1000
                    if ages.get(key, limit + 1) > limit:
                        proof.missing.append(f"a fresh sample of {target}, at most {limit:g} s old")
    for other in config[f"{namespace}:master"].get("otherStacks", []):
        for site in other["sites"]:
            # Of another stack's site the settings know the name alone.
            instance = next((key[2] for key in up if key[:2] == (site, "federate")), None)
            _expect(proof, up, (site, "federate", instance or "?"), {})
    if ages and not proof.missing:
        proof.found.append(f"newest sample of each target at most {max(ages.values()):.1f} s old")
    return proof


def _instances(job: Mapping[str, Any]) -> list[str]:
    """The instances that a job must have: its plain targets, and the hosts that we monitor."""
    hosts = [f"{host['host']}:{EXPORTER_PORT}" for host in job.get("hosts", [])]
    return [*job.get("targets", []), *hosts]


def _expect(
    proof: Proof,
    up: Mapping[tuple[str | None, str | None, str | None], Sample],
    key: tuple[str | None, str, str],
    labels: Mapping[str, str],
) -> bool:
    site, job, instance = key
    name = f'up{{job="{job}", instance="{instance}"' + (f', site="{site}"}}' if site else "}")
    sample = up.get(key)
    if sample is None:
        proof.missing.append(f"{name} is not there")
    elif sample.value != 1:
        proof.missing.append(f"{name} is {sample.value:g}")
    elif wrong := {k: v for k, v in labels.items() if sample.labels.get(k) != v}:
        proof.missing.append(f"{name} lacks the labels {wrong}")
    else:
        proof.found.append(f"{name} = 1")
        return True
    return False
