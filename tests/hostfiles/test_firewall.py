"""The firewall tables."""

from __future__ import annotations

from typing import Any

from hostfiles import firewall
from hostfiles.model import Acme, Job, Rule


def slave_rules(**changed: Any) -> tuple[Rule, ...]:
    values: dict[str, Any] = {
        "operator_cidrs": ["203.0.113.1/32"],
        "master_cidrs": [],
        "masters": {"master": "198.51.100.7/32"},
        "federation_port": 9095,
        "package_cidrs": ["0.0.0.0/0"],
        "vpc_cidr": "10.0.0.0/16",
        "jobs": (Job(name="x", targets=("a.internal:9100", "b.internal:9100")),),
    }
    return firewall.slave_rules(**{**values, **changed})


def openings(rules: tuple[Rule, ...], direction: str) -> set[tuple[str, int, str]]:
    return {(r.protocol, r.port, r.cidr) for r in rules if r.direction == direction}


def test_a_slave_lets_in_its_master_and_operators_and_nobody_else() -> None:
    assert openings(slave_rules(), "ingress") == {
        ("tcp", 9095, "198.51.100.7/32"),
        ("tcp", 22, "203.0.113.1/32"),
    }


def test_a_master_lets_in_operators_alone_and_reaches_each_slave() -> None:
    rules = firewall.master_rules(
        operator_cidrs=["203.0.113.1/32"],
        ui_port=443,
        package_cidrs=["0.0.0.0/0"],
        vpc_cidr="10.0.0.0/16",
        slaves={"oslo": ("198.51.100.9/32", 9095), "dublin": ("198.51.100.8/32", 9095)},
        jobs=(),
    )
    assert openings(rules, "ingress") == {
        ("tcp", 443, "203.0.113.1/32"),
        ("tcp", 22, "203.0.113.1/32"),
    }
    assert ("tcp", 9095, "198.51.100.8/32") in openings(rules, "egress")
    assert {"out-federate-dublin", "out-federate-oslo"} <= {rule.name for rule in rules}


def test_named_targets_open_the_vpc_and_addressed_ones_their_address() -> None:
    jobs = (Job(name="x", targets=("a.internal:9100", "192.0.2.8:9182", "192.0.2.8:9182")),)
    rules = slave_rules(jobs=jobs)
    targets = [rule for rule in rules if rule.description == "Scrape targets"]
    assert [(rule.port, rule.cidr) for rule in targets] == [
        (9100, "10.0.0.0/16"),
        (9182, "192.0.2.8/32"),
    ]


def test_target_networks_take_the_place_of_the_vpc() -> None:
    cidrs = {
        cidr
        for _, port, cidr in openings(slave_rules(target_cidrs=["10.9.0.0/24"]), "egress")
        if port == 9100
    }
    assert cidrs == {"10.9.0.0/24"}


def test_nothing_is_allowed_twice_and_every_name_is_unique() -> None:
    jobs = (Job(name="x", targets=("a.internal:443", "b.internal:443")),)
    rules = slave_rules(jobs=jobs, package_cidrs=["10.0.0.0/16"])
    allowed = [(r.direction, r.protocol, r.port, r.cidr) for r in rules]
    assert len(allowed) == len(set(allowed))
    assert len({rule.name for rule in rules}) == len(rules)


def test_a_rule_keeps_its_name_when_another_network_joins() -> None:
    one = slave_rules(operator_cidrs=["203.0.113.1/32"])
    two = slave_rules(operator_cidrs=["192.0.2.1/32", "203.0.113.1/32"])
    assert set(one) <= set(two)


def test_the_masters_rule_is_not_named_by_its_address() -> None:
    names = [rule.name for rule in slave_rules()]
    assert names == [rule.name for rule in slave_rules(masters={"master": "0.0.0.0/32"})]


def test_a_rule_that_stays_with_another_purpose_keeps_its_name() -> None:
    def by_content(**changed: Any) -> dict[tuple[str, str, int, str], str]:
        return {(r.direction, r.protocol, r.port, r.cidr): r.name for r in slave_rules(**changed)}

    acme = Acme(
        email="a@example.com",
        server="https://acme.example.net/dir",
        port=443,
        challenge="http-01",
        roots="",
        private=False,
    )
    receivers = [(443, "0.0.0.0/0")]
    existing = ["203.0.113.50/32", "203.0.113.51/32"]
    wide = by_content(acme=acme, notifications=receivers, master_cidrs=existing)
    narrow = by_content(
        acme=acme,
        notifications=receivers,
        package_cidrs=["192.0.2.0/24"],
        master_cidrs=existing[1:],
    )
    no_acme = by_content(notifications=receivers, package_cidrs=["192.0.2.0/24"], master_cidrs=[])
    assert {("egress", "tcp", 443, "0.0.0.0/0")} <= set(wide) & set(narrow) & set(no_acme)
    for one, other in ((wide, narrow), (narrow, no_acme), (wide, no_acme)):
        assert {one[rule] == other[rule] for rule in set(one) & set(other)} == {True}


def test_no_rule_for_ipv6() -> None:
    (user6,) = (f for f in firewall.files(slave_rules()) if f.path == firewall.USER6_RULES)
    assert "### tuple ###" not in user6.content
