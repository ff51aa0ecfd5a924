"""What the program asks of a Prometheus that somebody else runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from hostfiles.nginx import CONFIG
from sandbox import providers
from sandbox.program import Secret, plain
from tests.unit.conftest import Evaluated, run_program

NAME = "prometheus.example.org"
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\ncanary\n-----END OPENSSH PRIVATE KEY-----\n"
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"
EXISTING = {
    "host": NAME,
    "cidrs": ["203.0.113.9/32"],
    "access": {"user": "admin", "privateKey": KEY, "hostKey": HOST_KEY, "port": 2222},
    "url": "https://prometheus.example.org/prom/",
    "basicAuth": {"username": "probe", "password": "canary-of-the-api"},
}


@pytest.fixture(scope="module")
def evaluated() -> Evaluated:
    return run_program(master={}, existingMaster=EXISTING)


def delivery(evaluated: Evaluated) -> dict[str, Any]:
    command = evaluated.recorder.one(providers.COMMAND, "existing-master")
    return json.loads(plain(command.inputs["stdin"]))


def test_it_is_reached_once_its_slaves_serve_and_must_show_its_key(evaluated: Evaluated) -> None:
    command = evaluated.recorder.one(providers.COMMAND, "existing-master")
    connection = plain(command.inputs["connection"])
    assert connection["host"] == NAME
    assert connection["port"] == 2222
    assert connection["hostKey"] == HOST_KEY
    assert isinstance(command.inputs["connection"], Secret)
    assert isinstance(command.inputs["stdin"], Secret)
    assert {"stdout", "stderr"} <= set(command.secret_outputs)
    assert command.inputs["logging"] == "none"
    assert command.timeout_create == "300s"
    bundle = evaluated.recorder.one(providers.COMMAND, "slave-dublin-bundle")
    assert bundle.urn in command.dependencies
    assert "remove prometheus-federation/dev; " in command.inputs["delete"]
    assert "canary" not in command.inputs["create"] + command.inputs["delete"]


def test_its_time_is_told_in_a_unit_that_pulumi_knows() -> None:
    access = {**EXISTING["access"], "timeout": "1d"}
    found = run_program(master={}, existingMaster={**EXISTING, "access": access})
    command = found.recorder.one(providers.COMMAND, "existing-master")
    assert command.timeout_create == "86400s"


def test_its_sshd_may_answer_elsewhere_than_its_name() -> None:
    access = {**EXISTING["access"], "host": "10.9.8.7"}
    found = run_program(master={}, existingMaster={**EXISTING, "access": access})
    command = found.recorder.one(providers.COMMAND, "existing-master")
    assert plain(command.inputs["connection"])["host"] == "10.9.8.7"


def test_it_gets_its_own_certificate_and_the_password_of_each_site(evaluated: Evaluated) -> None:
    told = delivery(evaluated)
    (job,) = yaml.safe_load(told["sites"]["dublin"]["content"])["scrape_configs"]
    files = {f"files/{name}": content for name, content in told["files"].items()}
    passwords = plain(evaluated.outputs["federationPasswords"])
    assert files[job["basic_auth"]["password_file"]] == passwords["dublin"]
    leaf = plain(evaluated.outputs["existingMasterCertificate"])
    assert files[job["tls_config"]["cert_file"]] == leaf
    assert job["tls_config"]["server_name"] == "prometheus-slave.example.com"
    assert told["server"]["url"] == "https://prometheus.example.org/prom"
    assert (told["server"]["username"], told["server"]["password"]) == (
        "probe",
        "canary-of-the-api",
    )


def test_without_access_it_gets_a_certificate_and_no_command() -> None:
    bare = {key: EXISTING[key] for key in ("host", "cidrs")}
    found = run_program(master={}, existingMaster=bare)
    commands = {r.name for r in found.recorder.of_type(providers.COMMAND)}
    assert "existing-master" not in commands
    assert plain(found.outputs["existingMasterCertificate"])


def test_beside_a_master_of_our_own_both_may_federate() -> None:
    both = run_program(existingMaster=EXISTING)
    bundle = both.recorder.one(providers.COMMAND, "slave-dublin-bundle")
    files = json.loads(plain(bundle.inputs["stdin"]))["files"]
    (config,) = (file["content"] for file in files if file["path"] == CONFIG)
    allowed = [line for line in config.splitlines() if "CN=" in line]
    assert len(allowed) == 2
    assert "CN=prometheus-master\\.example\\.com(" in allowed[0]
    assert "CN=prometheus\\.example\\.org(" in allowed[1]
    sources = {
        rule.inputs["cidrIpv4"]
        for rule in both.recorder.of_type(providers.INGRESS_RULE)
        if rule.name.startswith("slave-dublin") and rule.inputs["fromPort"] == 9095
    }
    assert sources == {"203.0.113.9/32", f"{both.outputs['master']['publicIp']}/32"}


def test_a_master_that_goes_leaves_the_rules_of_others_alone() -> None:
    def rules(found: Evaluated) -> dict[str, str]:
        of_type = found.recorder.of_type(providers.INGRESS_RULE)
        return {rule.name: rule.inputs["cidrIpv4"] for rule in of_type}

    cidrs = ["203.0.113.9/32", "203.0.113.10/32"]
    both = rules(run_program(existingMaster={"host": "prometheus.example.org", "cidrs": cidrs}))
    own = rules(run_program(existingMaster={}))
    assert {name: both[name] for name in own} == own
    assert sorted(cidr for name, cidr in both.items() if name not in own) == sorted(cidrs)
