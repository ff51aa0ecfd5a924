"""What the program asks of hosts that are not its own, and of the server that scrapes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import bcrypt
import pytest
import yaml

from sandbox import providers
from sandbox.program import Resource, Secret, plain
from tests.unit.conftest import NAMESPACE, Evaluated, run_program

CORES = [f"core0{n}.example.internal" for n in range(1, 5)]


def command(evaluated: Evaluated, host: str) -> Resource:
    return evaluated.recorder.one(providers.COMMAND, f"slave-dublin-{host}")


def delivery(evaluated: Evaluated, host: str) -> dict[str, Any]:
    return json.loads(plain(command(evaluated, host).inputs["stdin"]))


def files(bundle: dict[str, Any]) -> dict[str, str]:
    return {file["path"]: file["content"] for file in bundle["files"]}


def slave_files(evaluated: Evaluated) -> dict[str, str]:
    bundle = evaluated.recorder.one(providers.COMMAND, "slave-dublin-bundle")
    return files(json.loads(plain(bundle.inputs["stdin"])))


def exporter(evaluated: Evaluated, host: str) -> dict[str, Any]:
    return yaml.safe_load(
        files(delivery(evaluated, host)["bundle"])["/etc/node_exporter/config.yml"]
    )


def sent(evaluated: Evaluated) -> tuple[str, str]:
    """The user and password that the slave sends."""
    on_slave = slave_files(evaluated)
    (job,) = yaml.safe_load(on_slave["/etc/prometheus/jobs.d/CoreSystems.yml"])["scrape_configs"]
    name = job["basic_auth"]["password_file"].removeprefix("../")
    return job["basic_auth"]["username"], on_slave[f"/etc/prometheus/{name}"]


@pytest.fixture
def changed(dev: Evaluated) -> Callable[..., Evaluated]:
    """The environment of Pulumi.dev.yaml with something else in its slave or its job."""

    def evaluate(
        job: dict[str, Any] | None = None, access: dict[str, Any] | None = None, **slave: Any
    ) -> Evaluated:
        slaves = copy.deepcopy(dev.project.config[f"{NAMESPACE}:slaves"])
        slaves[0].update(slave)
        slaves[0]["jobs"][0].update(job or {})
        slaves[0]["hostAccess"].update(access or {})
        return run_program(slaves=slaves)

    return evaluate


def test_each_host_is_reached_through_its_slave_and_both_must_show_their_keys(
    dev: Evaluated,
) -> None:
    bundle = dev.recorder.one(providers.COMMAND, "slave-dublin-bundle")
    for host in CORES:
        one = command(dev, host)
        connection = plain(one.inputs["connection"])
        assert isinstance(one.inputs["connection"], Secret)
        assert isinstance(one.inputs["stdin"], Secret)
        assert connection["host"].startswith("10.0.0.1")
        assert connection["hostKey"].startswith("ssh-ed25519 AAAAC3")
        jump, own = connection["proxy"], plain(bundle.inputs["connection"])
        assert {key: jump[key] for key in ("host", "user", "hostKey", "privateKey")} == {
            key: own[key] for key in ("host", "user", "hostKey", "privateKey")
        }
        assert jump["privateKey"] != connection["privateKey"]
        # Who sends a new password comes before who asks for it.
        assert bundle.urn in one.dependencies
        assert {"stdout", "stderr"} <= set(one.secret_outputs)
        assert one.inputs["logging"] == "none"
        assert "remove prometheus-federation/dev/slave-dublin; " in one.inputs["delete"]


def test_a_host_that_is_reached_directly_is_scraped_from_the_public_address(
    changed: Callable[..., Evaluated],
) -> None:
    direct = changed(access={"jump": False})
    assert "proxy" not in plain(command(direct, CORES[0]).inputs["connection"])
    public = direct.outputs["slaves"]["dublin"]["publicIp"]
    assert delivery(direct, CORES[0])["allow_from"] == [f"{public}/32"]
    assert "AllowTcpForwarding no" in slave_files(direct)[SSHD]


SSHD = "/etc/ssh/sshd_config.d/10-federation.conf"


def test_a_slave_lets_its_operators_on_to_the_ssh_of_hosts_and_nowhere_else(
    dev: Evaluated,
) -> None:
    lines = slave_files(dev)[SSHD].splitlines()
    assert "AllowTcpForwarding local" in lines
    assert "PermitOpen *:22" in lines
    rules = [
        rule.inputs
        for rule in dev.recorder.of_type(providers.EGRESS_RULE)
        if rule.name.startswith("slave-dublin-out-tcp-22-")
    ]
    assert [(rule["fromPort"], rule["cidrIpv4"]) for rule in rules] == [(22, "10.0.0.0/16")]


def test_a_server_without_hosts_forwards_nothing(dev: Evaluated) -> None:
    bundle = dev.recorder.one(providers.COMMAND, "master-bundle")
    text = files(json.loads(plain(bundle.inputs["stdin"])))[SSHD]
    assert "AllowTcpForwarding no" in text.splitlines()
    assert "PermitOpen" not in text


def test_a_host_lets_in_its_slaves_certificate_with_the_password_that_it_sends(
    dev: Evaluated,
) -> None:
    user, password = sent(dev)
    for host in CORES:
        config = exporter(dev, host)
        tls = config["tls_server_config"]
        assert tls["client_auth_type"] == "RequireAndVerifyClientCert"
        assert tls["client_allowed_sans"] == ["prometheus-slave.example.com"]
        hashed = config["basic_auth_users"][user]
        assert hashed.startswith("$2b$12$")
        assert bcrypt.checkpw(password.encode(), hashed.encode())


def test_a_certificate_names_host_and_address(dev: Evaluated) -> None:
    request = dev.recorder.one(providers.CERT_REQUEST, f"slave-dublin-{CORES[0]}-request")
    assert request.inputs["dnsNames"] == [CORES[0]]
    assert request.inputs["ipAddresses"] == ["10.0.0.11"]


def test_a_host_known_by_its_address_alone_has_a_certificate_for_that(
    changed: Callable[..., Evaluated], dev: Evaluated
) -> None:
    key = dev.project.config[f"{NAMESPACE}:slaves"][0]["jobs"][0]["hosts"][0]["hostKey"]
    only = changed(job={"hosts": [{"host": "10.0.0.77", "hostKey": key}]})
    request = only.recorder.one(providers.CERT_REQUEST, "slave-dublin-10.0.0.77-request")
    assert request.inputs["dnsNames"] == []
    assert request.inputs["ipAddresses"] == ["10.0.0.77"]
    rules = {rule.name for rule in only.recorder.of_type(providers.EGRESS_RULE)}
    assert "slave-dublin-out-tcp-9100-10-0-0-77-32" in rules


def test_a_new_password_is_known_to_the_hosts_before_anybody_sends_it(
    dev: Evaluated, changed: Callable[..., Evaluated]
) -> None:
    later = changed(rotation={"exporterPassword": 2})
    before, after = sent(dev), sent(later)
    assert before != after
    for host in CORES:
        now = exporter(dev, host)["basic_auth_users"]
        then = exporter(later, host)["basic_auth_users"]
        # While the slave has changed and this host has not yet: accepted.
        assert bcrypt.checkpw(after[1].encode(), now[after[0]].encode())
        # Once both have: the old one is not.
        assert before[0] not in then
        assert bcrypt.checkpw(after[1].encode(), then[after[0]].encode())


def test_certificates_renewed_on_purpose_are_made_beside_the_old_ones(
    dev: Evaluated, changed: Callable[..., Evaluated]
) -> None:
    def leaves(evaluated: Evaluated) -> set[str]:
        found = evaluated.recorder.of_type(providers.LOCALLY_SIGNED_CERT)
        return {leaf.name for leaf in found if leaf.name.startswith("slave-dublin-")}

    later = leaves(changed(rotation={"leafCertificates": 2}))
    assert later == {name.removesuffix("-certificate") + "-2-certificate" for name in leaves(dev)}


def test_only_discovery_brings_an_instance_profile_and_it_may_only_describe(
    dev: Evaluated, changed: Callable[..., Evaluated]
) -> None:
    for kind in ("rolePolicy:RolePolicy", "instanceProfile:InstanceProfile"):
        assert not dev.recorder.of_type(f"aws:iam/{kind}")
    assert [role.name for role in dev.recorder.of_type("aws:iam/role:Role")] == ["backups"]
    tagged = {"region": "eu-west-1", "filters": [{"name": "tag:monitor", "values": ["yes"]}]}
    job = {"name": "fleet", "ec2_sd_configs": [tagged | {"port": 9200}]}
    slaves = copy.deepcopy(dev.project.config[f"{NAMESPACE}:slaves"])
    found = changed(jobs=[*slaves[0]["jobs"], job])
    (policy,) = found.recorder.of_type("aws:iam/rolePolicy:RolePolicy")
    (statement,) = json.loads(policy.inputs["policy"])["Statement"]
    assert statement["Action"] == ["ec2:DescribeAvailabilityZones", "ec2:DescribeInstances"]
    assert statement["Condition"] == {"StringEquals": {"ec2:Region": ["eu-west-1"]}}
    instances = {i.name: i for i in found.recorder.of_type(providers.INSTANCE)}
    assert instances["slave-dublin-1"].inputs["iamInstanceProfile"]
    assert "iamInstanceProfile" not in instances["master-1"].inputs
    rules = {rule.name for rule in found.recorder.of_type(providers.EGRESS_RULE)}
    assert "slave-dublin-out-tcp-9200-10-0-0-0-16" in rules


def test_the_ends_of_all_certificates_of_a_machine_are_metrics_on_it(dev: Evaluated) -> None:
    metrics = "/etc/node_exporter/textfile/certificates.prom"
    for contents in (files(delivery(dev, CORES[0])["bundle"]), slave_files(dev)):
        told = contents[metrics]
        leaves = [path for path in contents if path.endswith(".crt")]
        assert leaves
        for path in leaves:
            assert f'{{path="{path}"}} 1893456000' in told
        assert '/tls/ca.pem"} 1893456000' in told
