"""Federation across stacks: what a slave's stack exports, and how a master's stack reads it.

To the slave's stack that master is its `existingMaster`: it signs the certificate and opens the
door. What is exported is a contract between two runs of this program, perhaps of two versions:
keys may be added to it, and none may change its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

import pulumi
from pulumi import Input, Output

from components.credentials import password
from components.environment import Environment
from components.slave import Slave
from hostfiles.model import FederatedSite, Leaf, SiteTrust
from settings import NAMESPACE, OtherStack, SettingsError

PUBLIC = "federation"
SECRET = "federationSecrets"  # noqa: S105 - the name of an output


@dataclass(frozen=True, kw_only=True)
class RemoteSite:
    """A site of another stack. `password` and `trust` are secrets."""

    name: str
    site: Output[FederatedSite]
    public_ip: Output[str]
    password: Output[str]
    trust: Output[SiteTrust]


def export(slaves: Sequence[Slave], leaf: Output[Leaf], environment: Environment) -> None:
    """Exports by site what the master of another stack needs; `leaf` is its certificate."""
    pulumi.export(PUBLIC, {slave.site.site: _public(slave) for slave in slaves})
    authority = environment.authority
    pulumi.export(
        SECRET,
        Output.secret(
            {
                slave.site.site: {
                    "password": password(slave.federation.current),
                    "caCertificate": environment.trusted,
                    "caNotAfter": authority.not_after,
                    "certificate": leaf.apply(lambda leaf: leaf.certificate),
                    "key": leaf.apply(lambda leaf: leaf.key),
                    "notAfter": leaf.apply(lambda leaf: leaf.not_after),
                }
                for slave in slaves
            }
        ),
    )


def _public(slave: Slave) -> dict[str, Input[Any]]:
    site = slave.site
    return {
        "host": site.host,
        "publicIp": slave.host.address.public_ip,
        "port": site.port,
        "user": site.user,
        "match": list(site.match),
        "scrapeInterval": site.scrape_interval,
        "sampleLimit": site.sample_limit,
    }


def remote_sites(stacks: Sequence[OtherStack]) -> list[RemoteSite]:
    """The sites that settings name of other stacks.

    Their outputs fail with SettingsError where a stack does not export what it should.
    """
    return [site for other in stacks for site in _sites_of(other)]


def _sites_of(other: OtherStack) -> list[RemoteSite]:
    reference = pulumi.StackReference(other.stack)

    def row(output: str, site: str) -> Output[Mapping[str, Any]]:
        return reference.get_output(output).apply(
            lambda known: _row(known, output, other.stack, site)
        )

    sites = []
    for name in other.sites:
        public, secret = row(PUBLIC, name), Output.secret(row(SECRET, name))
        sites.append(
            RemoteSite(
                name=name,
                site=public.apply(lambda known, name=name: _site(name, known)),
                public_ip=public.apply(_address),
                password=secret.apply(lambda known: known["password"]),
                trust=secret.apply(_trust),
            )
        )
    return sites


def _row(known: Mapping[str, Any] | None, output: str, stack: str, site: str) -> Mapping[str, Any]:
    setting = f"{NAMESPACE}:master.otherStacks: the stack {stack!r}"
    if known is None:
        # Pulumi leaves an output out, too, where it cannot decrypt it.
        raise SettingsError(
            f"{setting} exports no {output}; set existingMaster there, with this master's host "
            "and address, and run `pulumi up` in it first, with secrets that this stack can "
            "decrypt, or take it out of here"
        )
    if site not in known:
        raise SettingsError(
            f"{setting} exports no site {site!r}, but {', '.join(sorted(known)) or 'none at all'}; "
            "correct its sites here, or add that site there and run `pulumi up` in it first"
        )
    return known[site]


def _address(known: Mapping[str, Any]) -> str:
    # It becomes a rule of the firewall, so it is an address and nothing else.
    return str(IPv4Address(known["publicIp"]))


def _site(name: str, known: Mapping[str, Any]) -> FederatedSite:
    # Numbers come as floats.
    return FederatedSite(
        site=name,
        host=known["host"],
        port=int(known["port"]),
        user=known["user"],
        match=tuple(known["match"]),
        scrape_interval=known["scrapeInterval"],
        sample_limit=int(known["sampleLimit"]),
    )


def _trust(known: Mapping[str, Any]) -> SiteTrust:
    leaf = Leaf(
        certificate=known["certificate"], key=known["key"], not_after=int(known["notAfter"])
    )
    return SiteTrust(
        ca_bundle=known["caCertificate"], ca_not_after=int(known["caNotAfter"]), leaf=leaf
    )
