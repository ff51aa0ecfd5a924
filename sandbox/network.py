"""A network like AWS's, each hop of which is a real routed hop.

One namespace is the internet. Each network (a VPC) has a router in a namespace of its own, which
does what the internet gateway, the route tables and the security groups do. Each machine hangs
off its router by a link of its own, with no switch between machines, as in a VPC: two machines of
one subnet talk through the router, and the security groups apply to them too.

    machine ── router ── internet ── this machine ── packages
                            ├── releases server, strangers
                            └── router ── machine

`NetworkModel` says what shall be; `apply` brings the kernel to it, and touches nothing that is
so already. What cannot be had from AWS's behaviour is not here: no rule for "this machine".
"""

import hashlib
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from urllib.parse import urlsplit

from sandbox import dns
from sandbox.acme import ACME_HOST
from sandbox.aws_api import ROUTE53_HOST
from sandbox.host import SandboxError, run
from sandbox.image import image_sources
from sandbox.plan import NETNS_DIR, Plan, check_ranges
from sandbox.releases import RELEASE_HOST

# The links between the routers and the internet are numbered out of this range.
_TRANSIT = IPv4Network("169.254.0.0/20")
# Ranges that the internet has no routes to (RFC 1918, RFC 6598). Without this, a private address
# that a machine may not reach could be answered by the network that this machine is in.
_NOT_ON_THE_INTERNET = ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16")
_UPLINK = "inet"  # A router's interface to the internet.
# What this machine's kernel must allow at least, while a sandbox is up. Each machine's systemd
# takes several inotify instances, and all are root's.
_SYSCTLS = {"net.ipv4.ip_forward": 1, "fs.inotify.max_user_instances": 4096}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One security group rule, in the terms of AWS.

    protocol: "tcp", "udp", "icmp", or "-1" for all. from_port, to_port: both ends included;
    not used with "icmp" and "-1". peer: a CIDR, or the name of a security group.
    """

    protocol: str
    peer: str
    from_port: int = 0
    to_port: int = 65535


@dataclass(frozen=True, kw_only=True)
class SecurityGroup:
    """Who may connect in, and where its members may connect to."""

    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Network:
    """A VPC: its range, and its subnets' ranges by id.

    nat_gateway: whether whoever has no public address gets out all the same, under the network's.
    """

    id: str
    cidr: str
    subnets: Mapping[str, str]
    private_names: Mapping[str, str] = field(default_factory=dict)
    nat_gateway: bool = False

    @property
    def resolver(self) -> str:
        """The DNS server of the VPC: the base of its range plus two."""
        return str(IPv4Network(self.cidr)[2])


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A machine's interface: its subnet and address.

    groups: the security groups that it is in; None for a given host, which is open to its own
    network and closed to all others, unless it has a public address: then it is open to all.
    """

    machine: str
    subnet: str
    private_ip: str
    groups: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkModel:
    """All that the network shall be.

    groups: security groups by id. attachments: by machine. eips: public address → machine; an
    address that belongs to nobody yet has None. temporary: machine → public address, in force
    while the machine has no EIP. gateways: network → public address of its NAT gateway.
    public_names: DNS names on the internet. zones: domains that are ours alone.
    """

    networks: Mapping[str, Network] = field(default_factory=dict)
    groups: Mapping[str, SecurityGroup] = field(default_factory=dict)
    attachments: Mapping[str, Attachment] = field(default_factory=dict)
    eips: Mapping[str, str | None] = field(default_factory=dict)
    temporary: Mapping[str, str] = field(default_factory=dict)
    gateways: Mapping[str, str] = field(default_factory=dict)
    public_names: Mapping[str, str] = field(default_factory=dict)
    zones: tuple[str, ...] = ()

    def network_of(self, subnet: str) -> Network:
        """Return the network in which a subnet is; raise SandboxError where there is none."""
        for network in self.networks.values():
            if subnet in network.subnets:
                return network
        raise SandboxError(
            f"There is no subnet '{subnet}' in the sandbox's world.",
            f"Use one of: {', '.join(sorted(s for n in self.networks.values() for s in n.subnets))}"
            " (sandbox/world.yaml).",
        )

    def members(self, network_id: str) -> list[Attachment]:
        """Return the machines of a network, in the order of their addresses."""
        subnets = self.networks[network_id].subnets
        found = [a for a in self.attachments.values() if a.subnet in subnets]
        return sorted(found, key=lambda a: IPv4Address(a.private_ip))

    def public_addresses(self, network_id: str) -> dict[str, str]:
        """Return public → private address of the machines of a network that have one."""
        eip_of = {machine: eip for eip, machine in self.eips.items() if machine}
        found: dict[str, str] = {}
        for member in self.members(network_id):
            public = eip_of.get(member.machine) or self.temporary.get(member.machine)
            if public:
                found[public] = member.private_ip
        return found

    def free_private_ip(self, subnet: str) -> str:
        """Return the next free address of a subnet; AWS keeps the first four for itself."""
        cidr = IPv4Network(self.network_of(subnet).subnets[subnet])
        taken = {a.private_ip for a in self.attachments.values()}
        # From the middle on: the given world's hosts have low addresses.
        for number in range(cidr.num_addresses // 2, cidr.num_addresses - 1):
            if str(cidr[number]) not in taken:
                return str(cidr[number])
        raise SandboxError(f"The subnet '{subnet}' ({cidr}) has no free address.", "Use another.")

    def check(self) -> None:
        """Raise SandboxError for an address outside its subnet, or one that is used twice."""
        seen: dict[tuple[str, str], str] = {}
        for attachment in self.attachments.values():
            network = self.network_of(attachment.subnet)
            cidr = IPv4Network(network.subnets[attachment.subnet])
            if IPv4Address(attachment.private_ip) not in cidr:
                raise SandboxError(
                    f"{attachment.machine}'s address {attachment.private_ip} is not in "
                    f"{attachment.subnet} ({cidr}).",
                    "Give it an address of that subnet.",
                )
            if other := seen.get((network.id, attachment.private_ip)):
                raise SandboxError(
                    f"{attachment.machine} and {other} both have {attachment.private_ip}.",
                    "Give one of them another address.",
                )
            seen[network.id, attachment.private_ip] = attachment.machine
            for group in attachment.groups or ():
                if group not in self.groups:
                    raise SandboxError(
                        f"{attachment.machine} is in an unknown security group, '{group}'.",
                        "Add the group to the model before the machine.",
                    )


# Rendering: pure.


def machine_link(private_ip: str) -> str:
    """Name the router's end of a machine's link."""
    return f"m{int(IPv4Address(private_ip)):08x}"


def render_router(model: NetworkModel, network_id: str) -> str:
    """Render a router's nftables table: address translation, and the security groups."""
    network = model.networks[network_id]
    members = model.members(network_id)
    public = model.public_addresses(network_id)
    gateway = model.gateways.get(network_id)
    links = {member.machine: machine_link(member.private_ip) for member in members}
    lines = ["table inet aws {"]
    for direction, hook, priority, map_type, rule in (
        (
            "translate_in",
            "prerouting",
            "dstnat",
            public,
            f'iifname "{_UPLINK}" dnat ip to ip daddr',
        ),
        (
            "translate_out",
            "postrouting",
            "srcnat",
            {private: address for address, private in public.items()},
            f'oifname "{_UPLINK}" snat ip to ip saddr',
        ),
    ):
        lines += [f" chain {direction} {{", f"  type nat hook {hook} priority {priority};"]
        if map_type:
            elements = ", ".join(f"{a} : {b}" for a, b in map_type.items())
            lines.append(f"  {rule} map {{ {elements} }}")
        if map_type is not public and gateway:
            # After the map: whoever has an address of its own keeps it.
            lines.append(f'  oifname "{_UPLINK}" ip saddr {network.cidr} snat ip to {gateway}')
        lines.append(" }")
    # What the router itself offers: DNS and ping, and answers to what it asked.
    lines += [
        " chain input {",
        "  type filter hook input priority filter; policy drop;",
        "  ct state established,related accept",
        '  iifname "lo" accept',
        f'  iifname != "{_UPLINK}" ip daddr {network.resolver} meta l4proto {{ tcp, udp }} '
        "th dport 53 accept",
        f'  iifname != "{_UPLINK}" icmp type echo-request accept',
        " }",
        " chain forward {",
        "  type filter hook forward priority filter; policy drop;",
        "  ct state established,related accept",
        "  ct state invalid drop",
    ]
    if members:
        out_map = ", ".join(f'"{link}" : jump out_{link}' for link in links.values())
        in_map = ", ".join(f'"{link}" : goto in_{link}' for link in links.values())
        lines += [f"  iifname vmap {{ {out_map} }}", f"  oifname vmap {{ {in_map} }}"]
    if gateway:
        lines.append(f'  iifname != "{_UPLINK}" oifname "{_UPLINK}" ip saddr {network.cidr} accept')
    elif public:
        # Whoever has no public address has no way to the internet, as at a real gateway.
        lines.append(f'  oifname "{_UPLINK}" ip saddr {{ {", ".join(public.values())} }} accept')
    lines.append(" }")
    for member in members:
        lines += _member_chains(model, network, member, links[member.machine])
    lines.append("}")
    return "\n".join(lines) + "\n"


def _member_chains(
    model: NetworkModel, network: Network, member: Attachment, link: str
) -> list[str]:
    if member.groups is None:
        inside = Rule(protocol="-1", peer=network.cidr)
        anywhere = Rule(protocol="-1", peer="0.0.0.0/0")
        public = member.private_ip in model.public_addresses(network.id).values()
        ingress = [anywhere if public else inside]
        egress = [anywhere if public or network.id in model.gateways else inside]
    else:
        groups = [model.groups[group] for group in member.groups]
        ingress = [rule for group in groups for rule in group.ingress]
        egress = [rule for group in groups for rule in group.egress]
    return [
        f" chain out_{link} {{",
        # The source check of every network interface.
        f"  ip saddr != {member.private_ip} drop",
        *(f"  {match} return" for match in _matches(model, network, "daddr", egress)),
        "  counter drop",
        " }",
        f" chain in_{link} {{",
        *(f"  {match} accept" for match in _matches(model, network, "saddr", ingress)),
        "  counter drop",
        " }",
    ]


def _matches(model: NetworkModel, network: Network, side: str, rules: Iterable[Rule]) -> list[str]:
    matches: list[str] = []
    for rule in rules:
        peers = _peer_addresses(model, network, rule.peer)
        if not peers:
            continue
        where = "" if peers == ["0.0.0.0/0"] else f"ip {side} {{ {', '.join(peers)} }} "
        if rule.protocol in ("tcp", "udp"):
            ports = (
                str(rule.from_port)
                if rule.from_port == rule.to_port
                else f"{rule.from_port}-{rule.to_port}"
            )
            matches.append(f"{where}{rule.protocol} dport {ports}")
        elif rule.protocol == "icmp":
            matches.append(f"{where}ip protocol icmp")
        elif rule.protocol == "-1":
            matches.append(where or "meta nfproto ipv4 ")
        else:
            raise SandboxError(
                f"The sandbox knows no security group protocol '{rule.protocol}'.",
                "Use tcp, udp, icmp or -1.",
            )
    return sorted({match.rstrip() for match in matches})


def _peer_addresses(model: NetworkModel, network: Network, peer: str) -> list[str]:
    """A group stands for its members' private addresses, and only within their network."""
    if "/" in peer:
        return [str(IPv4Network(peer, strict=False))] if ":" not in peer else []
    return [a.private_ip for a in model.members(network.id) if peer in (a.groups or ())]


def dns_servers(plan: Plan, model: NetworkModel, upstreams: Sequence[str]) -> list[dns.DnsServer]:
    """Return the servers that a model needs: the internet's, then one for each network."""
    return [
        dns.DnsServer(
            netns=plan.inet_netns,
            address=plan.inet_ip,
            records={
                **model.public_names,
                RELEASE_HOST: plan.releases_ip,
                ACME_HOST: plan.acme_ip,
                ROUTE53_HOST: plan.aws_ip,
            },
            upstreams=tuple(upstreams),
            # A private name asked for from outside its network does not exist.
            zones=tuple(dict.fromkeys((*model.zones, "example.net", "internal"))),
            # Written by hosts themselves, through Route 53's API.
            delegated={f"_acme-challenge.{name}": plan.aws_ip for name in model.public_names},
            cache=True,
        ),
        *(
            dns.DnsServer(
                netns=plan.router_netns(network.id),
                address=network.resolver,
                records=network.private_names,
                upstreams=(plan.inet_ip,),
            )
            for network in model.networks.values()
        ),
    ]


# The kernel: reading what is, and changing what differs.


def _ip_json(netns: str | None, *words: str) -> list[dict]:
    where = ["-netns", netns] if netns else []
    return json.loads(run(["ip", *where, "-json", *words]).stdout or "[]")


def _batch(netns: str, commands: Iterable[str]) -> None:
    run(["ip", "-netns", netns, "-batch", "-"], stdin="\n".join(commands) + "\n")


def _netns_exists(name: str) -> bool:
    """A file left without its mount is no namespace: make it anew."""
    path = NETNS_DIR / name
    if not path.exists():
        return False
    if run(["nsenter", f"--net={path}", "true"], check=False).returncode == 0:
        return True
    path.unlink()
    return False


def _sysctl(netns: str, settings: Mapping[str, int]) -> None:
    # /proc/sys/net shows the namespace of whoever opens it.
    script = ";".join(f"echo {value} > /proc/sys/net/{key}" for key, value in settings.items())
    run(["nsenter", f"--net={NETNS_DIR / netns}", "sh", "-ec", script])


def _prepare_netns(name: str, settings: Mapping[str, int]) -> None:
    """Make a namespace where there is none, and set it up: also one left half done by a kill."""
    if not _netns_exists(name):
        run(["ip", "netns", "add", name])
    _sysctl(name, settings)
    _batch(name, ["link set lo up"])


_ROUTER_SYSCTL = {
    "ipv4/ip_forward": 1,
    # Neighbours of a subnet find each other through us.
    "ipv4/conf/default/proxy_arp": 1,
    "ipv4/conf/all/rp_filter": 0,
    "ipv4/conf/default/rp_filter": 0,
    "ipv4/conf/all/send_redirects": 0,
    "ipv4/conf/default/send_redirects": 0,
    "ipv6/conf/default/disable_ipv6": 1,
}
_INET_SYSCTL = {**_ROUTER_SYSCTL, "ipv4/conf/default/proxy_arp": 0}
_END_SYSCTL = {"ipv6/conf/default/disable_ipv6": 1, "ipv4/conf/default/rp_filter": 0}


def uplink_mtu() -> int:
    """Return the MTU of this machine's way out, which every link of ours takes too."""
    for route in _ip_json(None, "-4", "route", "show", "default"):
        for link in _ip_json(None, "link", "show", "dev", route["dev"]):
            return int(link["mtu"])
    return 1500


def _load(netns: str, table: str, rules: str) -> bool:
    """Replace a namespace's table by these rules, in one transaction, unless it has them.

    A chain with no rules, named by a digest, says in the kernel itself which rules these are.
    """
    digest = f"rules_{hashlib.sha256(rules.encode()).hexdigest()[:16]}"
    nft = ["nsenter", f"--net={NETNS_DIR / netns}", "nft"]
    if f"chain {digest} " in run([*nft, "list", "chains", "inet"], check=False).stdout:
        return False
    text = (
        f"table inet {table}\ndelete table inet {table}\n{rules}add chain inet {table} {digest}\n"
    )
    run([*nft, "-f", "-"], stdin=text)
    return True


def _private(addresses: Iterable[str]) -> list[str]:
    """Return those addresses that the sandbox's internet would have no route to."""
    ranges = [IPv4Network(cidr) for cidr in _NOT_ON_THE_INTERNET]
    return [a for a in addresses if any(IPv4Address(a) in network for network in ranges)]


def _mirror_addresses() -> list[str]:
    """Return where this machine's package mirror is now; nothing when it cannot be found out."""
    names = {urlsplit(source.uri).hostname for source in image_sources()}
    found: set[str] = set()
    for name in names:
        try:
            found.update(str(row[4][0]) for row in socket.getaddrinfo(name, None, socket.AF_INET))
        except OSError:
            continue
    return sorted(found)


def check_forwarding(chains: Iterable[Mapping[str, object]]) -> None:
    """Refuse a machine whose own firewall forwards nothing, given `nft -j list chains`'s chains.

    A packet must be accepted by every table: ours cannot open what another one drops.
    """
    for chain in chains:
        # The sandbox has no IPv6: what drops that alone is no hindrance.
        ours = chain.get("family") in ("ip", "inet")
        if ours and chain.get("hook") == "forward" and chain.get("policy") == "drop":
            raise SandboxError(
                f"This machine's firewall forwards nothing (chain {chain.get('name')} of table "
                f"{chain.get('family')} {chain.get('table')} drops; Docker and ufw set that), so "
                "the sandbox's machines could not fetch packages.",
                "Allow it with `iptables -P FORWARD ACCEPT`, or use a virtual machine.",
            )


def _host_chains() -> list[Mapping[str, object]]:
    listed = json.loads(run(["nft", "-j", "list", "chains"]).stdout)["nftables"]
    return [row["chain"] for row in listed if "chain" in row]


def _ensure_inet(plan: Plan, mtu: int, upstreams: Sequence[str]) -> bool:
    """Make the internet and this machine's link to it."""
    eips, services = plan.public_ranges
    table = (
        f"table ip {plan.host_table} {{\n"
        " chain postrouting {\n"
        "  type nat hook postrouting priority srcnat;\n"
        f"  ip saddr {{ {eips}, {services} }} ip daddr != {{ {eips}, {services} }} masquerade\n"
        " }\n}\n"
    )
    changed = False
    host_links = {link["ifname"] for link in _ip_json(None, "link", "show", "type", "veth")}
    exists = _netns_exists(plan.inet_netns) and plan.host_link in host_links
    if not exists or not _routed(plan, _private(upstreams)):
        mirror_addresses = _mirror_addresses()
        check_ranges(plan, in_use=[*upstreams, *mirror_addresses])
        check_forwarding(_host_chains())
        outside = _private([*upstreams, *mirror_addresses])
        _prepare_netns(plan.inet_netns, _INET_SYSCTL)
        run(["ip", "link", "del", plan.host_link], check=False)
        command = f"ip link add {plan.host_link} mtu {mtu} type veth peer name host mtu {mtu}"
        run([*command.split(), "netns", plan.inet_netns])
        _batch(
            plan.inet_netns,
            [
                f"address replace {plan.inet_ip} peer {plan.operator_ip} dev host",
                f"address replace {plan.releases_ip}/32 dev lo",
                "link set host up",
                f"route replace default via {plan.operator_ip} dev host",
                # An address that nobody has is nowhere, and not this machine's to answer for.
                *(f"route replace blackhole {network}" for network in plan.public_ranges),
                *(f"route replace blackhole {network}" for network in _NOT_ON_THE_INTERNET),
                *(f"route replace {address} via {plan.operator_ip}" for address in outside),
            ],
        )
        host = [
            f"address replace {plan.operator_ip} peer {plan.inet_ip} dev {plan.host_link}",
            f"link set {plan.host_link} up",
            *(
                f"route replace {network} via {plan.inet_ip} dev {plan.host_link} "
                f"src {plan.operator_ip}"
                for network in plan.public_ranges
            ),
        ]
        run(["ip", "-batch", "-"], stdin="\n".join(host) + "\n")
        changed = True
    if run(["nft", "list", "table", "ip", plan.host_table], check=False).returncode != 0:
        run(["nft", "-f", "-"], stdin=table)
        changed = True
    for name, least in _SYSCTLS.items():
        now = _sysctl_file(name).read_text()
        if int(now) < least:
            (plan.runtime_dir.parent / name).write_text(now)
            _sysctl_file(name).write_text(f"{least}\n")
            changed = True
    return changed


def _sysctl_file(name: str) -> Path:
    return Path("/proc/sys", *name.split("."))


def _routed(plan: Plan, outside: Sequence[str]) -> bool:
    routes = _ip_json(None, "-4", "route", "show", "dev", plan.host_link)
    here = {route["dst"] for route in routes}
    there = _routes_by_target(plan.inet_netns).keys()
    return {str(network) for network in plan.public_ranges} <= here and {
        "default",
        *outside,
    } <= there


def _routes_by_target(netns: str) -> dict[str, dict]:
    return {route["dst"]: route for route in _ip_json(netns, "-4", "route", "show")}


def _transit(number: int) -> tuple[str, str]:
    """Return the internet's and the router's end of the numbered link between them."""
    return str(_TRANSIT[4 * number + 1]), str(_TRANSIT[4 * number + 2])


def _ensure_router(plan: Plan, network: Network, mtu: int) -> bool:
    netns = plan.router_netns(network.id)
    link = plan.link("r", network.id)
    changed = False
    if not _netns_exists(netns) or "default" not in _routes_by_target(netns):
        _prepare_netns(netns, _ROUTER_SYSCTL)
        # Numbered by what is free, and read back from the kernel ever after.
        addresses = _ip_json(plan.inet_netns, "-4", "address", "show")
        taken = {info["local"] for row in addresses for info in row["addr_info"]}
        number = next(n for n in range(1, 1024) if _transit(n)[0] not in taken)
        ours, theirs = _transit(number)
        run(["ip", "-netns", plan.inet_netns, "link", "del", link], check=False)
        command = f"link add {link} mtu {mtu} type veth peer name {_UPLINK} mtu {mtu}"
        run(["ip", "-netns", plan.inet_netns, *command.split(), "netns", netns])
        up = [f"address replace {ours}/30 dev {link}", f"link set {link} up"]
        _batch(plan.inet_netns, up)
        _batch(
            netns,
            [
                f"address replace {theirs}/30 dev {_UPLINK}",
                f"link set {_UPLINK} up",
                # Private addresses that nobody has must not leave.
                f"route replace blackhole {network.cidr}",
                f"route replace default via {ours} dev {_UPLINK}",
            ],
        )
        changed = True
    gateways = {str(IPv4Network(cidr)[1]) for cidr in network.subnets.values()}
    lo = {
        info["local"]
        for row in _ip_json(netns, "-4", "address", "show", "dev", "lo")
        for info in row["addr_info"]
    }
    if absent := sorted((gateways | {network.resolver}) - lo):
        _batch(netns, [f"address replace {address}/32 dev lo" for address in absent])
        changed = True
    return changed


def attach(plan: Plan, network: Network, attachment: Attachment, mtu: int) -> bool:
    """Give a machine its namespace with eth0, address and default route; return if it lacked it."""
    netns = plan.machine_netns(attachment.machine)
    router = plan.router_netns(network.id)
    link = machine_link(attachment.private_ip)
    cidr = IPv4Network(network.subnets[attachment.subnet])
    wanted = f"{attachment.private_ip}/{cidr.prefixlen}"
    if _netns_exists(netns):
        have = [
            f"{info['local']}/{info['prefixlen']}"
            for row in _ip_json(netns, "-4", "address", "show")
            if row["ifname"] == "eth0"
            for info in row["addr_info"]
        ]
        routed = "default" in _routes_by_target(netns)
        if have == [wanted] and routed and attachment.private_ip in _routes_by_target(router):
            return False
        run(["ip", "-netns", netns, "link", "del", "eth0"], check=False)
    _prepare_netns(netns, _END_SYSCTL)
    # What a machine of this address, gone since, may have left.
    run(["ip", "-netns", router, "link", "del", link], check=False)
    mac = "02:00:" + ":".join(f"{byte:02x}" for byte in IPv4Address(attachment.private_ip).packed)
    command = f"link add {link} mtu {mtu} type veth peer name eth0 mtu {mtu} address {mac}"
    run(["ip", "-netns", router, *command.split(), "netns", netns])
    # At once: by default an answer for a neighbour waits up to 0.8 s.
    _sysctl(router, {f"ipv4/neigh/{link}/proxy_delay": 0})
    _batch(router, [f"link set {link} up"])
    _batch(
        netns,
        [
            f"address replace {wanted} dev eth0",
            "link set eth0 up",
            f"route replace default via {cidr[1]} dev eth0",
        ],
    )
    # Last, since it says that the link is complete.
    _batch(router, [f"route replace {attachment.private_ip}/32 dev {link}"])
    return True


def detach(plan: Plan, machine: str) -> bool:
    """Remove a machine's namespace and with it its link; return whether there was one."""
    if not _netns_exists(plan.machine_netns(machine)):
        return False
    run(["ip", "netns", "del", plan.machine_netns(machine)])
    return True


def _route_public(plan: Plan, model: NetworkModel) -> bool:
    """Lead each public address in use to its network's router, and no other."""
    wanted = {
        address: plan.link("r", network_id)
        for network_id in model.networks
        for address in (
            *model.public_addresses(network_id),
            *([model.gateways[network_id]] if network_id in model.gateways else []),
        )
    }
    routes = _ip_json(plan.inet_netns, "-4", "route", "show")
    have = {
        route["dst"]: route["dev"]
        for route in routes
        if "gateway" in route and route["dst"] != "default" and route["dev"].startswith("r-")
    }
    if wanted == have:
        return False
    link_addresses = {
        row["ifname"]: row["addr_info"][0]["local"]
        for row in _ip_json(plan.inet_netns, "-4", "address", "show")
        if row["addr_info"]
    }
    commands = [f"route del {address}/32" for address in sorted(have.keys() - wanted.keys())]
    for address, link in sorted(wanted.items()):
        if have.get(address) != link:
            router = IPv4Address(link_addresses[link]) + 1
            commands.append(f"route replace {address}/32 via {router} dev {link}")
    _batch(plan.inet_netns, commands)
    return True


def apply(plan: Plan, model: NetworkModel) -> bool:
    """Bring the kernel's networks, rules and names to the model. Return whether any changed.

    Machines and networks that are gone from the model are removed. Raises SandboxError for a
    model that contradicts itself, and when this machine already routes our public ranges.
    """
    model.check()
    mtu = uplink_mtu()
    upstreams = dns.upstream_nameservers()
    plan.runtime_dir.mkdir(parents=True, exist_ok=True)
    changed = _ensure_inet(plan, mtu, upstreams)
    existing = netns_names(plan)
    machines = {plan.machine_netns(machine) for machine in model.attachments}
    routers = {plan.router_netns(network) for network in model.networks}
    for name in existing:
        ours = name.startswith((plan.machine_netns("x")[:-1], plan.router_netns("x")[:-1]))
        if ours and name not in machines | routers:
            run(["ip", "netns", "del", name])
            changed = True
    for network in model.networks.values():
        changed |= _ensure_router(plan, network, mtu)
    for attachment in model.attachments.values():
        network = model.network_of(attachment.subnet)
        changed |= attach(plan, network, attachment, mtu)
    # The rules before the routes: an address is never reachable without its security groups.
    for network_id in model.networks:
        changed |= _load(plan.router_netns(network_id), "aws", render_router(model, network_id))
    changed |= _route_public(plan, model)
    return dns.apply(plan, dns_servers(plan, model, upstreams)) | changed


class Fabric:
    """The network as it shall be, shared by all who change a part of it.

    The model is kept in the runtime directory, so that the next run starts from what is there.
    `update` may be called from several threads.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._file = plan.runtime_dir / "network.json"
        self._lock = threading.Lock()
        self._model = read_model(self._file)

    @property
    def model(self) -> NetworkModel:
        """What the network shall be now."""
        return self._model

    def update(self, change: Callable[[NetworkModel], NetworkModel]) -> bool:
        """Change the model and apply it; return whether anything changed in the kernel.

        A model that cannot be applied is forgotten: the one before stays in force.
        """
        with self._lock:
            model = change(self._model)
            changed = apply(self.plan, model)
            if model != self._model or not self._file.exists():
                write_model(self._file, model)
                self._model = model
            return changed


def write_model(file: Path, model: NetworkModel) -> None:
    """Write a model as JSON, at once or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(model), indent=1))
    temporary.rename(file)


def read_model(file: Path) -> NetworkModel:
    """Read a model written by `write_model`; the empty one where there is no such file."""
    if not file.exists():
        return NetworkModel()
    data = json.loads(file.read_text())

    def rules(rows: list[dict]) -> tuple[Rule, ...]:
        return tuple(Rule(**row) for row in rows)

    def attachment(row: dict) -> Attachment:
        groups = row["groups"]
        return Attachment(**{**row, "groups": None if groups is None else tuple(groups)})

    return NetworkModel(
        networks={key: Network(**row) for key, row in data["networks"].items()},
        groups={
            key: SecurityGroup(ingress=rules(row["ingress"]), egress=rules(row["egress"]))
            for key, row in data["groups"].items()
        },
        attachments={key: attachment(row) for key, row in data["attachments"].items()},
        eips=data["eips"],
        temporary=data["temporary"],
        # A model of an older version has none.
        gateways=data.get("gateways", {}),
        public_names=data["public_names"],
        zones=tuple(data["zones"]),
    )


def without(mapping: Mapping[str, object], *keys: str) -> dict:
    """Return a copy of a mapping without some keys: a helper for `Fabric.update`."""
    return {key: value for key, value in mapping.items() if key not in keys}


def with_attachment(model: NetworkModel, attachment: Attachment) -> NetworkModel:
    """Return the model with a machine attached, or attached otherwise than before."""
    return replace(model, attachments={**model.attachments, attachment.machine: attachment})


def without_machine(model: NetworkModel, machine: str) -> NetworkModel:
    """Return the model without a machine; an EIP of it stays allocated, to nobody."""
    return replace(
        model,
        attachments=without(model.attachments, machine),
        temporary=without(model.temporary, machine),
        eips={eip: None if owner == machine else owner for eip, owner in model.eips.items()},
    )


# Strangers, and the end of it all.


def stranger(plan: Plan, name: str) -> str:
    """Return the namespace of a stranger: on the internet, with a public address of its own."""
    netns = plan.stranger_netns(name)
    if _netns_exists(netns) and "default" in _routes_by_target(netns):
        return netns
    link = plan.link("s", name)
    taken = _routes_by_target(plan.inet_netns)
    address = next((ip for ip in plan.stranger_ips if ip not in taken), None)
    if address is None:
        raise SandboxError(
            f"All {len(plan.stranger_ips)} addresses for strangers are taken.",
            "Remove one with remove_stranger().",
        )
    _prepare_netns(netns, _END_SYSCTL)
    run(["ip", "-netns", plan.inet_netns, "link", "del", link], check=False)
    mtu = uplink_mtu()
    command = f"link add {link} mtu {mtu} type veth peer name eth0 mtu {mtu}"
    run(["ip", "-netns", plan.inet_netns, *command.split(), "netns", netns])
    route = f"route replace {address}/32 dev {link} src {plan.inet_ip}"
    _batch(plan.inet_netns, [f"link set {link} up", route])
    _batch(
        netns,
        [
            f"address replace {address}/32 dev eth0",
            "link set eth0 up",
            f"route replace {plan.inet_ip}/32 dev eth0",
            f"route replace default via {plan.inet_ip} dev eth0",
        ],
    )
    return netns


def address_of(netns: str) -> str:
    """Return the address of the one interface of a machine's or stranger's namespace."""
    rows = _ip_json(netns, "-4", "address", "show", "dev", "eth0")
    return rows[0]["addr_info"][0]["local"]


def remove_stranger(plan: Plan, name: str) -> None:
    """Remove a stranger and its link."""
    run(["ip", "netns", "del", plan.stranger_netns(name)], check=False)


def netns_names(plan: Plan) -> list[str]:
    """Return the names of all namespaces of this sandbox."""
    if not NETNS_DIR.is_dir():
        return []
    return sorted(p.name for p in NETNS_DIR.iterdir() if p.name.startswith(f"{plan.prefix}-"))


def destroy_all(plan: Plan) -> list[str]:
    """Remove every namespace, link and rule of this sandbox; return what was removed.

    Needs no state. The processes in the namespaces must have ended, or they would keep them.
    """
    removed: list[str] = []
    for name in netns_names(plan):
        # Fails for a file that never was mounted over (killed in between).
        if run(["ip", "netns", "del", name], check=False).returncode != 0:
            (NETNS_DIR / name).unlink(missing_ok=True)
        removed.append(f"network namespace {name}")
    if run(["ip", "link", "del", plan.host_link], check=False).returncode == 0:
        removed.append(f"link {plan.host_link}")
    tables = ""
    # Where nft is not installed, there is no table: `up`, which installs it, did not come so far.
    if shutil.which("nft"):
        if run(["nft", "delete", "table", "ip", plan.host_table], check=False).returncode == 0:
            removed.append(f"nftables table ip {plan.host_table}")
        tables = run(["nft", "list", "tables", "ip"], check=False).stdout
    # Another slot's sandbox still needs them; the last to go sets them back.
    if not re.search(r"^table ip pf\d+$", tables, re.MULTILINE):
        for name in _SYSCTLS:
            recorded = plan.runtime_dir.parent / name
            if recorded.exists():
                _sysctl_file(name).write_text(recorded.read_text())
                recorded.unlink()
                removed.append(f"{name}, set back")
    return removed
