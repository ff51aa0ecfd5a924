"""Certificates of a public authority, as the program asks for them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from lets_encrypt_settings import ROOTS
from sandbox import providers
from sandbox.program import Resource, plain
from tests.hostfiles.conftest import Authority
from tests.unit.conftest import Evaluated, run_program

ACCOUNT = {"email": "operator@example.com", "agreeToTerms": True}
PRIVATE = Authority().certificate


def public(**changed: Any) -> Evaluated:
    return run_program(**{"certificates": "letsencrypt", "letsEncrypt": ACCOUNT, **changed})


def command(run: Evaluated, name: str) -> Resource:
    (found,) = (one for one in run.recorder.of_type(providers.COMMAND) if one.name == name)
    return found


def bundle(run: Evaluated, name: str) -> dict[str, str]:
    """The content of each file that is delivered to a host."""
    stdin = plain(command(run, f"{name}-bundle").inputs["stdin"])
    return {file["path"]: file["content"] for file in json.loads(stdin)["files"]}


def open_on_80(run: Evaluated) -> set[str]:
    rules = run.recorder.of_type(providers.INGRESS_RULE)
    return {rule.name.partition("-in-")[0] for rule in rules if rule.inputs["fromPort"] == 80}


def waits(run: Evaluated) -> dict[str, str]:
    return {
        one.name.removesuffix("-public-certificate"): one.inputs["create"]
        for one in run.recorder.of_type(providers.COMMAND)
        if one.name.endswith("-public-certificate")
    }


def test_port_80_is_open_where_a_public_authority_signs_and_nowhere_else(dev: Evaluated) -> None:
    assert open_on_80(dev) == set()
    assert open_on_80(public()) == {"master", "slave-dublin"}
    (slave,) = run_program().project.config["prometheus-federation:slaves"]
    slaves = [slave, slave | {"site": "cork", "host": "cork", "certificates": "letsencrypt"}]
    assert open_on_80(run_program(letsEncrypt=ACCOUNT, slaves=slaves)) == {"slave-cork"}
    for path in bundle(run_program(letsEncrypt=ACCOUNT, slaves=slaves), "slave-dublin"):
        assert "certbot" not in path


def proves_by_record(**changed: Any) -> Evaluated:
    """Where a record proves the slave's name and port 80 the master's."""
    (slave,) = run_program().project.config["prometheus-federation:slaves"]
    return public(slaves=[slave | {"challenge": "dns-01"}], **changed)


def test_a_record_in_the_zone_takes_the_place_of_port_80() -> None:
    run = proves_by_record()
    assert open_on_80(run) == {"master"}
    files = bundle(run, "slave-dublin")
    in_on_80 = "-A ufw-user-input -p tcp --dport 80 "
    assert in_on_80 not in files["/etc/ufw/user.rules"]
    assert in_on_80 in bundle(run, "master")["/etc/ufw/user.rules"]
    certbot = files["/etc/systemd/system/certbot.service"]
    assert " --dns-route53 " in certbot
    assert "--standalone" not in certbot
    assert "CAP_NET_BIND_SERVICE" not in certbot
    package = files["/etc/systemd/system/certbot-package.service"]
    assert package.count(" python3-certbot-dns-route53\n") == 1
    for text in bundle(run, "master").values():
        assert "route53" not in text
    everywhere = public(letsEncrypt=ACCOUNT | {"challenge": "dns-01"})
    assert open_on_80(everywhere) == set()


def test_a_host_that_writes_its_record_has_the_right_to_that_one_alone() -> None:
    run = proves_by_record()
    instances = {one.name: one.inputs for one in run.recorder.of_type(providers.INSTANCE)}
    assert instances["slave-dublin-1"]["iamInstanceProfile"]
    assert "iamInstanceProfile" not in instances["master-1"]
    (policy,) = run.recorder.of_type(providers.ROLE_POLICY)
    change, *reads = json.loads(policy.inputs["policy"])["Statement"]
    assert change["Action"] == ["route53:ChangeResourceRecordSets"]
    assert change["Resource"] == "arn:aws:route53:::hostedzone/Z-example.com"
    name = "route53:ChangeResourceRecordSetsNormalizedRecordNames"
    allowed = change["Condition"]["ForAllValues:StringEquals"]
    assert allowed[name] == ["_acme-challenge.prometheus-slave.example.com"]
    assert {action for read in reads for action in read["Action"]} == {
        "route53:GetChange",
        "route53:ListHostedZones",
    }


def test_one_role_holds_the_rights_of_discovery_and_of_the_record() -> None:
    tagged = {"region": "eu-west-1", "filters": [{"name": "tag:monitor", "values": ["yes"]}]}
    job = {"name": "fleet", "ec2_sd_configs": [tagged | {"port": 9200}]}
    site = {"site": "cork", "host": "cork", "challenge": "dns-01", "jobs": [job]}
    run = public(slaves=[site])
    (policy,) = run.recorder.of_type(providers.ROLE_POLICY)
    statements = json.loads(policy.inputs["policy"])["Statement"]
    assert {action.partition(":")[0] for one in statements for action in one["Action"]} == {
        "ec2",
        "route53",
    }


@pytest.mark.parametrize("server", [None, "https://acme.example.org:14000/dir"])
def test_a_host_of_few_networks_reaches_the_authority_and_route_53(server: str | None) -> None:
    account = ACCOUNT | ({"server": server, "caRoot": PRIVATE} if server else {})
    run = proves_by_record(packageCidrs=["203.0.113.80/32"], letsEncrypt=account)
    rules = {
        rule.inputs["fromPort"]
        for rule in run.recorder.of_type(providers.EGRESS_RULE)
        if rule.name.startswith("slave-dublin-") and rule.inputs["cidrIpv4"] == "0.0.0.0/0"
    }
    assert rules == ({443, 14000} if server else {443})


def test_route_53_is_verified_by_public_roots_whatever_the_authority_chains_to() -> None:
    private = ACCOUNT | {"server": "https://acme.example.org/dir", "caRoot": PRIVATE}
    unit = bundle(proves_by_record(letsEncrypt=private), "slave-dublin")
    lines = unit["/etc/systemd/system/certbot.service"].splitlines()
    # botocore heeds the first one, too, unless it is given the second.
    assert "Environment=REQUESTS_CA_BUNDLE=/etc/nginx/tls/trusted.pem" in lines
    assert "Environment=AWS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt" in lines


def test_up_waits_for_each_certificate_and_bounds_the_wait(dev: Evaluated) -> None:
    assert waits(dev) == {}
    found = waits(public(letsEncrypt=ACCOUNT | {"timeout": "3m"}))
    assert set(found) == {"master", "slave-dublin"}
    assert found["slave-dublin"].endswith(" prometheus-slave.example.com 180")


def test_the_master_trusts_the_authority_before_and_after_a_site_uses_it(dev: Evaluated) -> None:
    name = "/etc/prometheus/tls/federate/dublin-ca.pem"
    assert name not in bundle(dev, "master")
    own = bundle(dev, "master")["/etc/prometheus/tls/ca.pem"]
    for run in (public(), public(certificates="ownCa")):
        files = bundle(run, "master")
        assert files[name] == own + ROOTS.read_text()
        job = yaml.safe_load(files["/etc/prometheus/federate.d/dublin.yml"])["scrape_configs"][0]
        assert job["tls_config"]["ca_file"] == "../tls/federate/dublin-ca.pem"
        assert job["tls_config"]["server_name"] == "prometheus-slave.example.com"
        assert job["tls_config"]["cert_file"] == "../tls/prometheus.crt"


def test_a_master_learns_of_the_authority_before_a_slave_uses_it(dev: Evaluated) -> None:
    def waits(run: Evaluated) -> bool:
        # The delivery waits for the address, and this for the master.
        joining = run.recorder.one(providers.EIP_ASSOCIATION, "slave-dublin")
        assert joining.urn in command(run, "slave-dublin-bundle").dependencies
        return command(run, "master-bundle").urn in joining.dependencies

    assert not waits(dev)
    assert waits(public())


@pytest.mark.parametrize(
    "server", ["https://acme.example.org/dir", "https://acme.example.org:14000/dir"]
)
def test_a_private_authority_is_reached_on_its_port_and_verified_by_its_root(
    server: str,
) -> None:
    run = public(letsEncrypt=ACCOUNT | {"server": server, "caRoot": PRIVATE})
    files = bundle(run, "slave-dublin")
    unit = files["/etc/systemd/system/certbot.service"]
    assert f"--server {server} " in unit
    assert "REQUESTS_CA_BUNDLE=/etc/nginx/tls/trusted.pem" in unit
    assert files["/etc/nginx/tls/trusted.pem"].endswith(PRIVATE)
    rules = [rule.inputs for rule in run.recorder.of_type(providers.EGRESS_RULE)]
    port = {rule["fromPort"] for rule in rules if rule["description"] == "ACME server"}
    # Port 443 is open to everywhere already, for packages.
    assert port == ({14000} if "14000" in server else set())
