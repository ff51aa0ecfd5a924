import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox import dns, network
from sandbox import plan as plan_module
from sandbox.host import SandboxError
from sandbox.network import (
    Attachment,
    Network,
    NetworkModel,
    Rule,
    SecurityGroup,
    check_forwarding,
    dns_servers,
    machine_link,
    read_model,
    render_router,
    with_attachment,
    without_machine,
    write_model,
)
from sandbox.plan import Plan

ALL = Rule(protocol="-1", peer="0.0.0.0/0")
SLAVE_IP, CORE_IP, MASTER_IP = "10.20.1.128", "10.20.1.11", "10.30.1.128"
SLAVE, CORE = machine_link(SLAVE_IP), machine_link(CORE_IP)


@pytest.fixture
def model() -> NetworkModel:
    ingress = (
        Rule(protocol="tcp", peer="198.51.100.2/32", from_port=9095, to_port=9095),
        Rule(protocol="tcp", peer="203.0.113.1/32", from_port=22, to_port=22),
    )
    return NetworkModel(
        networks={
            "vpc-dublin": Network(
                id="vpc-dublin",
                cidr="10.20.0.0/16",
                subnets={"subnet-dublin": "10.20.1.0/24"},
                private_names={"core01.example.internal": CORE_IP},
            ),
            "vpc-hq": Network(
                id="vpc-hq", cidr="10.30.0.0/16", subnets={"subnet-hq": "10.30.1.0/24"}
            ),
        },
        groups={"sg-slave": SecurityGroup(ingress=ingress, egress=(ALL,))},
        attachments={
            "core01": Attachment(machine="core01", subnet="subnet-dublin", private_ip=CORE_IP),
            "slave": Attachment(
                machine="slave",
                subnet="subnet-dublin",
                private_ip=SLAVE_IP,
                groups=("sg-slave",),
            ),
            "master": Attachment(
                machine="master", subnet="subnet-hq", private_ip=MASTER_IP, groups=()
            ),
        },
        eips={"198.51.100.1": "slave", "198.51.100.2": None},
    )


def chain(rules: str, name: str) -> list[str]:
    body = rules.split(f" chain {name} {{\n")[1].split("\n }")[0]
    return [line.strip() for line in body.splitlines()]


def test_ingress_is_exactly_the_rules_and_then_nothing(model: NetworkModel):
    assert chain(render_router(model, "vpc-dublin"), f"in_{SLAVE}") == [
        "ip saddr { 198.51.100.2/32 } tcp dport 9095 accept",
        "ip saddr { 203.0.113.1/32 } tcp dport 22 accept",
        "counter drop",
    ]


def test_a_machine_may_send_only_from_its_own_address(model: NetworkModel):
    assert chain(render_router(model, "vpc-dublin"), f"out_{SLAVE}") == [
        f"ip saddr != {SLAVE_IP} drop",
        "meta nfproto ipv4 return",
        "counter drop",
    ]


def test_a_given_host_is_open_to_its_own_network_only(model: NetworkModel):
    rules = render_router(model, "vpc-dublin")
    assert chain(rules, f"in_{CORE}") == ["ip saddr { 10.20.0.0/16 } accept", "counter drop"]
    assert "ip daddr { 10.20.0.0/16 } return" in chain(rules, f"out_{CORE}")


def test_a_machine_whose_groups_have_no_rules_is_shut(model: NetworkModel):
    rules = render_router(model, "vpc-hq")
    assert chain(rules, f"in_{machine_link(MASTER_IP)}") == ["counter drop"]


def test_an_eip_is_translated_one_to_one(model: NetworkModel):
    rules = render_router(model, "vpc-dublin")
    assert f"dnat ip to ip daddr map {{ 198.51.100.1 : {SLAVE_IP} }}" in rules
    assert f"snat ip to ip saddr map {{ {SLAVE_IP} : 198.51.100.1 }}" in rules


def test_only_who_has_a_public_address_gets_out(model: NetworkModel):
    out = 'oifname "inet" ip saddr'
    assert f"{out} {{ {SLAVE_IP} }} accept" in render_router(model, "vpc-dublin")
    assert out not in render_router(model, "vpc-hq").split("chain forward")[1]


GATEWAY = "203.0.113.4"


def test_a_nat_gateway_lets_out_who_has_no_public_address_and_nobody_in(model: NetworkModel):
    model = replace(model, gateways={"vpc-dublin": GATEWAY})
    rules = render_router(model, "vpc-dublin")
    out = chain(rules, "translate_out")
    # Who has an address of its own comes first and keeps it.
    assert out[1:] == [
        f'oifname "inet" snat ip to ip saddr map {{ {SLAVE_IP} : 198.51.100.1 }}',
        f'oifname "inet" ip saddr 10.20.0.0/16 snat ip to {GATEWAY}',
    ]
    assert GATEWAY not in "".join(chain(rules, "translate_in"))
    assert chain(rules, "forward")[-1] == (
        'iifname != "inet" oifname "inet" ip saddr 10.20.0.0/16 accept'
    )
    assert chain(rules, f"in_{CORE}") == ["ip saddr { 10.20.0.0/16 } accept", "counter drop"]
    assert chain(rules, f"out_{CORE}")[1:] == ["meta nfproto ipv4 return", "counter drop"]
    assert GATEWAY not in render_router(model, "vpc-hq")


def test_without_a_nat_gateway_a_given_host_stays_inside(model: NetworkModel):
    assert chain(render_router(model, "vpc-dublin"), f"out_{CORE}")[1:] == [
        "ip daddr { 10.20.0.0/16 } return",
        "counter drop",
    ]


def test_a_given_host_with_a_public_address_is_open_to_all(model: NetworkModel):
    model = replace(model, eips={**model.eips, "198.51.100.62": "core01"})
    rules = render_router(model, "vpc-dublin")
    assert chain(rules, f"in_{CORE}") == ["meta nfproto ipv4 accept", "counter drop"]
    assert chain(rules, f"out_{CORE}")[1:] == ["meta nfproto ipv4 return", "counter drop"]
    assert f"198.51.100.62 : {CORE_IP}" in rules


def test_an_eip_takes_the_place_of_a_temporary_address(model: NetworkModel):
    model = replace(model, temporary={"slave": "203.0.113.8", "master": "203.0.113.9"})
    assert model.public_addresses("vpc-dublin") == {"198.51.100.1": SLAVE_IP}
    assert model.public_addresses("vpc-hq") == {"203.0.113.9": MASTER_IP}


def test_a_group_as_peer_stands_for_its_members_private_addresses(model: NetworkModel):
    group = SecurityGroup(ingress=(Rule(protocol="tcp", peer="sg-slave", from_port=1, to_port=2),))
    model = replace(model, groups={**model.groups, "sg-core": group})
    core = replace(model.attachments["core01"], groups=("sg-core",))
    rules = render_router(with_attachment(model, core), "vpc-dublin")
    assert chain(rules, f"in_{CORE}")[0] == f"ip saddr {{ {SLAVE_IP} }} tcp dport 1-2 accept"


def test_rendering_does_not_depend_on_the_order_of_rules_or_machines(model: NetworkModel):
    group = model.groups["sg-slave"]
    turned = replace(
        model,
        groups={"sg-slave": replace(group, ingress=tuple(reversed(group.ingress)))},
        attachments=dict(reversed(list(model.attachments.items()))),
    )
    assert render_router(turned, "vpc-dublin") == render_router(model, "vpc-dublin")


def test_an_address_outside_its_subnet_is_refused(model: NetworkModel):
    stray = Attachment(machine="stray", subnet="subnet-hq", private_ip="10.20.1.5")
    with pytest.raises(SandboxError, match=r"stray's address 10\.20\.1\.5 is not in subnet-hq"):
        with_attachment(model, stray).check()


def test_an_address_used_twice_is_refused(model: NetworkModel):
    twin = Attachment(machine="twin", subnet="subnet-dublin", private_ip=CORE_IP)
    with pytest.raises(SandboxError, match="twin and core01 both have"):
        with_attachment(model, twin).check()


def test_an_unknown_subnet_is_refused_with_those_there_are(model: NetworkModel):
    with pytest.raises(SandboxError) as caught:
        model.network_of("subnet-x")
    assert "subnet-dublin, subnet-hq" in caught.value.remedy


def test_an_unknown_protocol_is_refused(model: NetworkModel):
    group = SecurityGroup(ingress=(Rule(protocol="sctp", peer="0.0.0.0/0"),))
    with pytest.raises(SandboxError, match="sctp"):
        render_router(replace(model, groups={"sg-slave": group}), "vpc-dublin")


def test_a_removed_machines_eip_stays_allocated(model: NetworkModel):
    left = without_machine(model, "slave")
    assert left.eips == {"198.51.100.1": None, "198.51.100.2": None}
    assert "slave" not in left.attachments


def test_a_free_address_is_one_that_nobody_has(model: NetworkModel):
    assert model.free_private_ip("subnet-dublin") == "10.20.1.129"
    assert model.free_private_ip("subnet-hq") == "10.30.1.129"


def test_a_model_is_read_as_it_was_written(model: NetworkModel, tmp_path: Path):
    model = replace(model, gateways={"vpc-dublin": GATEWAY})
    write_model(tmp_path / "m.json", model)
    assert read_model(tmp_path / "m.json") == model
    assert read_model(tmp_path / "none.json") == NetworkModel()


def test_private_names_stay_in_their_network(model: NetworkModel, tmp_path: Path):
    model = replace(model, public_names={"a.example.com": "198.51.100.1"}, zones=("example.com",))
    inet, dublin, hq = dns_servers(Plan(0, tmp_path), model, ["192.0.2.53"])
    assert "a.example.com" in inet.records
    assert "example.com" in inet.zones
    assert dict(dublin.records) == {"core01.example.internal": CORE_IP}
    assert dict(hq.records) == {}
    assert dublin.address == "10.20.0.2"


def test_who_asks_for_a_challenge_is_sent_to_route_53(model: NetworkModel, tmp_path: Path) -> None:
    plan = Plan(0, tmp_path)
    model = replace(model, public_names={"a.example.com": "198.51.100.1"})
    inet, *others = dns_servers(plan, model, ["192.0.2.53"])
    assert dns.render_servers(inet.delegated) == (
        f"server=/_acme-challenge.a.example.com/{plan.aws_ip}\n"
    )
    assert inet.records["route53.amazonaws.com"] == plan.aws_ip
    assert not any(other.delegated for other in others)


def test_name_servers_are_read_and_ipv6_left_out():
    text = "# c\nnameserver 192.0.2.53\nnameserver fe80::1%eth0\nsearch x\nnameserver 127.0.0.53\n"
    assert dns.parse_nameservers(text) == ["192.0.2.53", "127.0.0.53"]


def test_hosts_files_are_in_order():
    text = dns.render_hosts({"b.x": "192.0.2.2", "a.x": "192.0.2.1"})
    assert text == "192.0.2.1 a.x\n192.0.2.2 b.x\n"


def test_a_firewall_that_forwards_nothing_is_refused_with_the_remedy() -> None:
    docker = {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward"}
    check_forwarding([{**docker, "policy": "accept"}, {"name": "of no hook"}])
    # The sandbox has no IPv6, nor a bridge.
    check_forwarding([{**docker, "family": kind, "policy": "drop"} for kind in ("ip6", "bridge")])
    with pytest.raises(SandboxError, match="inet filter drops"):
        check_forwarding([{**docker, "family": "inet", "policy": "drop"}])
    with pytest.raises(SandboxError, match="FORWARD") as refusal:
        check_forwarding([{**docker, "policy": "drop"}])
    assert "iptables -P FORWARD ACCEPT" in refusal.value.remedy


def test_where_nft_is_not_installed_there_is_no_table_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if argv[0] == "nft":
            raise SandboxError("The program 'nft' is not installed.")
        return subprocess.CompletedProcess(argv, 1, "", "")

    monkeypatch.setattr(plan_module, "RUNTIME_ROOT", tmp_path)
    monkeypatch.setattr(network, "NETNS_DIR", tmp_path)
    monkeypatch.setattr(network, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert network.destroy_all(Plan(3, tmp_path)) == []
