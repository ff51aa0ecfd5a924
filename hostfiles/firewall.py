"""The firewall table of each kind of host, and the same table as ufw's own files.

The table also becomes the security group (components.firewall). AWS does not filter DHCP, NTP,
DNS and metadata on their link-local addresses by security groups; ufw does, so they stand here.
https://manpages.debian.org/trixie/ufw/ufw.8.en.html
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from hostfiles.files import Check, File, Unit
from hostfiles.model import Acme, Job, Rule
from hostfiles.templates import render

SSH_PORT = 22
# https://letsencrypt.org/docs/challenge-types/#http-01-challenge
CHALLENGE_PORT = 80
# https://docs.aws.amazon.com/general/latest/gr/r53.html
ROUTE53_PORT = 443
ANYWHERE = "0.0.0.0/0"
# https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/set-time.html
TIME_CIDR = "169.254.169.123/32"
# https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html
METADATA_CIDR = "169.254.169.254/32"

USER_RULES = "/etc/ufw/user.rules"
USER6_RULES = "/etc/ufw/user6.rules"
CONFIG = "/etc/ufw/ufw.conf"
DROP_IN = "/etc/systemd/system/ufw.service.d/federation.conf"


def slave_rules(
    *,
    operator_cidrs: Sequence[str],
    master_cidrs: Sequence[str],
    masters: Mapping[str, str],
    federation_port: int,
    package_cidrs: Sequence[str],
    vpc_cidr: str,
    jobs: Iterable[Job],
    target_cidrs: Sequence[str] = (),
    jump_ports: Sequence[int] = (),
    acme: Acme | None = None,
    notifications: Iterable[tuple[int, str]] = (),
) -> tuple[Rule, ...]:
    """A slave: its masters on the federation port, operators on SSH, out to its targets.

    `masters` are the CIDRs, by name, of those whose addresses may be known only after `up` began.
    Targets that are named by host are reached in `target_cidrs`, or in the VPC if there are none;
    so are the SSH ports of monitored hosts. `notifications` are ports and CIDRs of receivers.
    """
    federation = "Federation by the master"
    named_cidrs = target_cidrs or (vpc_cidr,)
    return _unique(
        *(
            Rule(
                name=f"federate-{name}",
                direction="ingress",
                protocol="tcp",
                port=federation_port,
                cidr=cidr,
                description=federation,
            )
            for name, cidr in sorted(masters.items())
        ),
        *_each("ingress", federation_port, master_cidrs, federation),
        *_base(operator_cidrs, package_cidrs, vpc_cidr),
        *_jumps(jump_ports, named_cidrs),
        *_acme(acme),
        *_out(notifications, "Notifications"),
        *_targets(jobs, named_cidrs),
    )


def master_rules(
    *,
    operator_cidrs: Sequence[str],
    ui_port: int,
    package_cidrs: Sequence[str],
    vpc_cidr: str,
    slaves: Mapping[str, tuple[str, int]],
    jobs: Iterable[Job],
    target_cidrs: Sequence[str] = (),
    jump_ports: Sequence[int] = (),
    acme: Acme | None = None,
    notifications: Iterable[tuple[int, str]] = (),
    provider_cidrs: Sequence[str] = (),
    provider_port: int = 443,
) -> tuple[Rule, ...]:
    """A master: operators on its pages and on SSH, out to each slave and to its own targets.

    `slaves` gives the CIDR and port of each site, by site; `provider_…` say where people log in.
    """
    named_cidrs = target_cidrs or (vpc_cidr,)
    return _unique(
        *_each("ingress", ui_port, operator_cidrs, "Web page for operators"),
        *_base(operator_cidrs, package_cidrs, vpc_cidr),
        *_jumps(jump_ports, named_cidrs),
        *_each("egress", provider_port, provider_cidrs, "Log-ins"),
        *_acme(acme),
        *_out(notifications, "Notifications"),
        *(
            Rule(
                name=f"out-federate-{site}",
                direction="egress",
                protocol="tcp",
                port=port,
                cidr=cidr,
                description=f"Federation of site {site}",
            )
            for site, (cidr, port) in sorted(slaves.items())
        ),
        *_targets(jobs, named_cidrs),
    )


def first_boot_files(rules: Sequence[Rule]) -> tuple[File, ...]:
    """The table until the first bundle: its rules that do not grow with the settings' hosts.

    In by SSH, out for packages, names and the time; nothing listens or asks for more before.
    """
    return _tables([rule for rule in rules if rule.first_boot])


def files(rules: Sequence[Rule]) -> tuple[File, ...]:
    """The table as ufw writes it itself, so that `ufw status` shows it."""
    return (
        File(path=CONFIG, content=render("ufw/ufw.conf.j2")),
        *_tables(rules),
        File(path=DROP_IN, content=render("systemd/ufw.conf.j2")),
    )


def _tables(rules: Sequence[Rule]) -> tuple[File, ...]:
    return tuple(
        File(
            path=path,
            content=render("ufw/user.rules.j2", ufw=ufw, rules=[_tuple(r) for r in of]),
            mode=0o640,
        )
        for path, ufw, of in ((USER_RULES, "ufw", rules), (USER6_RULES, "ufw6", ()))
    )


CHECKS = (
    Check(
        name="ufw's user.rules",
        argv=("/usr/sbin/iptables-restore", "--test", "--noflush", f"{{tree}}{USER_RULES}"),
    ),
    Check(
        name="ufw's user6.rules",
        argv=("/usr/sbin/ip6tables-restore", "--test", "--noflush", f"{{tree}}{USER6_RULES}"),
    ),
)

UNIT = Unit(
    name="ufw.service",
    restart_on=(CONFIG,),
    reload_on=("/etc/ufw/",),
    ready=("/usr/sbin/iptables", "--list-rules", "ufw-user-input"),
)


def _base(
    operator_cidrs: Sequence[str], package_cidrs: Sequence[str], vpc_cidr: str
) -> tuple[Rule, ...]:
    """What every host needs, from its first boot on."""
    rules = (
        *_each("ingress", SSH_PORT, operator_cidrs, "SSH for operators"),
        *_each("egress", 80, package_cidrs, "Packages"),
        *_each("egress", 443, package_cidrs, "Packages and releases"),
        _rule("egress", 53, vpc_cidr, "DNS", protocol="udp"),
        _rule("egress", 53, vpc_cidr, "DNS with long answers"),
        _rule("egress", 67, vpc_cidr, "DHCP renewal", protocol="udp"),
        _rule("egress", 123, TIME_CIDR, "Amazon Time Sync Service", protocol="udp"),
        _rule("egress", 80, METADATA_CIDR, "Instance metadata"),
    )
    return tuple(replace(rule, first_boot=True) for rule in rules)


def _rule(
    direction: Literal["ingress", "egress"],
    port: int,
    cidr: str,
    description: str,
    protocol: Literal["tcp", "udp"] = "tcp",
) -> Rule:
    """A rule that is named by what it says, and by nothing else.

    A security group refuses the same rule twice, and a new resource is made before an old one
    goes: a rule of another purpose must be the same resource.
    https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
    """
    way = "in" if direction == "ingress" else "out"
    return Rule(
        name=f"{way}-{protocol}-{port}-{_slug(cidr)}",
        direction=direction,
        protocol=protocol,
        port=port,
        cidr=cidr,
        description=description,
    )


def _each(
    direction: Literal["ingress", "egress"], port: int, cidrs: Sequence[str], description: str
) -> tuple[Rule, ...]:
    return tuple(_rule(direction, port, cidr, description) for cidr in sorted(set(cidrs)))


def _jumps(ports: Sequence[int], cidrs: Sequence[str]) -> tuple[Rule, ...]:
    """Out to the SSH of monitored hosts. Not by address: a host that leaves the settings is gone
    from them before node_exporter is taken off it."""
    return tuple(
        rule for port in ports for rule in _each("egress", port, cidrs, "SSH to monitored hosts")
    )


def _acme(acme: Acme | None) -> tuple[Rule, ...]:
    """Out to the authority, and where it finds its challenge: in on port 80, or out to Route 53.

    None by address: neither Let's Encrypt nor Route 53's API publishes its own, and the former
    looks from several at once.
    https://letsencrypt.org/docs/faq/#what-ip-addresses-does-let-s-encrypt-use-to-validate-my-web-server
    """
    if acme is None:
        return ()
    return (
        _rule("ingress", CHALLENGE_PORT, ANYWHERE, "ACME challenge")
        if acme.challenge == "http-01"
        else _rule("egress", ROUTE53_PORT, ANYWHERE, "Route 53"),
        _rule("egress", acme.port, ANYWHERE, "ACME server"),
    )


def _targets(jobs: Iterable[Job], named_cidrs: Sequence[str]) -> tuple[Rule, ...]:
    """One rule for each port and network that jobs need."""
    wanted: set[tuple[int, str]] = set()
    for job in jobs:
        for target in job.targets:
            host, _, port = target.rpartition(":")
            try:
                address = ipaddress.IPv4Address(job.addresses.get(target, host))
                wanted.add((int(port), f"{address}/32"))
            except ipaddress.AddressValueError:
                wanted.update((int(port), cidr) for cidr in named_cidrs)
        wanted.update((port, cidr) for port in job.discovered_ports for cidr in named_cidrs)
    return _out(wanted, "Scrape targets")


def _out(wanted: Iterable[tuple[int, str]], description: str) -> tuple[Rule, ...]:
    """Egress rules to these ports and networks (CIDR)."""
    return tuple(_rule("egress", port, cidr, description) for port, cidr in sorted(set(wanted)))


def _unique(*rules: Rule) -> tuple[Rule, ...]:
    """Of those that say the same, the first."""
    found: dict[str, Rule] = {}
    for rule in rules:
        found.setdefault(rule.name, rule)
    return tuple(found.values())


def _slug(cidr: str) -> str:
    return cidr.replace(".", "-").replace("/", "-")


def _tuple(rule: Rule) -> dict[str, str | int]:
    """A rule as the template needs it. ufw leaves /32 away, and the match on any address too."""
    address = rule.cidr.removesuffix("/32")
    anywhere = address == ANYWHERE
    return {
        "direction": rule.direction,
        "protocol": rule.protocol,
        "port": rule.port,
        "address": address,
        "source": "" if anywhere else f" -s {address}",
        "destination": "" if anywhere else f" -d {address}",
        "comment": rule.description.encode().hex(),
    }
