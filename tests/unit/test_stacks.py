"""Sites of another stack: what that one exports, and what a master's stack makes of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import yaml

from sandbox import providers
from sandbox.program import Secret, evaluate, plain, read_project
from sandbox.recorder import Recorder
from settings import SettingsError
from tests.unit.conftest import NAMESPACE, ROOT, Evaluated, run_program

MASTER = {"host": "prometheus-hq"}
EXISTING = {"host": "prometheus-hq.example.com", "cidrs": ["203.0.113.9/32"]}
STACK = "example/prometheus-federation/west"


@pytest.fixture(scope="module")
def west() -> Evaluated:
    """A stack of one site, `dublin`, which the master elsewhere may federate."""
    return run_program(master={}, existingMaster=EXISTING)


def run_hq(*others: dict[str, Any], known: Mapping[str, Any], **settings: Any) -> Evaluated:
    """The master's stack, where the stack STACK has such outputs."""
    chosen = {"slaves": [], **settings, "master": {**MASTER, "otherStacks": list(others)}}
    overrides = {f"{NAMESPACE}:{key}": value for key, value in chosen.items()}
    project = read_project(ROOT, "dev", overrides=overrides)
    recorder = Recorder({STACK: known}.__getitem__)
    return Evaluated(recorder=recorder, outputs=evaluate(project, recorder), project=project)


@pytest.fixture(scope="module")
def hq(west: Evaluated) -> Evaluated:
    return run_hq({"stack": STACK, "sites": ["dublin"]}, known=west.outputs)


def files(evaluated: Evaluated) -> Mapping[str, Mapping[str, Any]]:
    command = evaluated.recorder.one(providers.COMMAND, "master-bundle")
    return {file["path"]: file for file in json.loads(plain(command.inputs["stdin"]))["files"]}


def job(evaluated: Evaluated, site: str) -> dict[str, Any]:
    content = files(evaluated)[f"/etc/prometheus/federate.d/{site}.yml"]["content"]
    (found,) = yaml.safe_load(content)["scrape_configs"]
    return found


def test_a_stack_exports_its_sites_only_for_a_master_elsewhere(
    west: Evaluated, dev: Evaluated
) -> None:
    assert set(west.outputs["federation"]) == {"dublin"}
    assert not {"federation", "federationSecrets"} & set(dev.outputs)


def test_keys_and_passwords_are_exported_as_secrets_and_by_themselves(west: Evaluated) -> None:
    secret = west.outputs["federationSecrets"]
    assert isinstance(secret, Secret)
    public = json.dumps(west.outputs["federation"])
    for key in ("password", "key"):
        value = plain(secret)["dublin"][key]
        assert value
        assert value not in public


def test_the_master_comes_in_with_what_the_other_stack_gave_it(
    west: Evaluated, hq: Evaluated
) -> None:
    public, secret = west.outputs["federation"]["dublin"], plain(west.outputs["federationSecrets"])
    there, scrape = files(hq), job(hq, "dublin")

    def read(path: str) -> str:
        return there[f"/etc/prometheus/{path.removeprefix('../')}"]["content"]

    assert read(scrape["tls_config"]["ca_file"]) == secret["dublin"]["caCertificate"]
    assert read(scrape["tls_config"]["cert_file"]) == secret["dublin"]["certificate"]
    assert read(scrape["tls_config"]["key_file"]) == secret["dublin"]["key"]
    assert read(scrape["basic_auth"]["password_file"]) == secret["dublin"]["password"]
    assert scrape["tls_config"]["server_name"] == public["host"] == "prometheus-slave.example.com"
    assert scrape["static_configs"][0]["targets"] == [f"{public['host']}:9095"]
    # Its own authority is trusted by its own hosts alone.
    assert there["/etc/prometheus/tls/ca.pem"]["content"] == plain(hq.outputs["caCertificate"])


def test_what_came_as_a_secret_stays_one_and_what_did_not_is_shown(
    west: Evaluated, hq: Evaluated
) -> None:
    there, scrape = files(hq), job(hq, "dublin")
    for path in (scrape["tls_config"]["key_file"], scrape["basic_auth"]["password_file"]):
        assert there[f"/etc/prometheus/{path.removeprefix('../')}"]["secret"] is True
    rule = hq.recorder.one(providers.EGRESS_RULE, "master-out-federate-dublin")
    assert rule.inputs["cidrIpv4"] == f"{west.outputs['federation']['dublin']['publicIp']}/32"
    instance = hq.recorder.one(providers.INSTANCE, "master-1")
    assert isinstance(instance.inputs["userDataBase64"], str)


def test_sites_of_its_own_and_of_others_stand_side_by_side(
    west: Evaluated, slaves: Callable[[int], list[dict[str, Any]]]
) -> None:
    found = run_hq({"stack": STACK, "sites": ["dublin"]}, known=west.outputs, slaves=slaves(1))
    assert job(found, "site0")["tls_config"]["cert_file"] == "../tls/prometheus.crt"
    assert job(found, "dublin")["tls_config"]["cert_file"] != "../tls/prometheus.crt"


def test_the_end_of_the_other_stacks_certificates_is_watched(hq: Evaluated) -> None:
    metrics = files(hq)["/etc/node_exporter/textfile/certificates.prom"]["content"]
    for name in ("dublin.crt", "dublin-ca.pem"):
        assert f'path="/etc/prometheus/tls/federate/{name}"' in metrics


def refused(known: Mapping[str, Any], *sites: str) -> str:
    with pytest.raises(SettingsError) as refusal:
        run_hq({"stack": STACK, "sites": list(sites)}, known=known)
    return str(refusal.value)


def test_a_site_that_the_other_stack_does_not_have_is_refused_with_those_it_has(
    west: Evaluated,
) -> None:
    told = refused(west.outputs, "dublin", "cork")
    assert f"{NAMESPACE}:master.otherStacks: the stack {STACK!r}" in told
    assert "exports no site 'cork', but dublin;" in told
    assert "`pulumi up`" in told


def test_a_stack_that_exports_nothing_is_refused_with_what_to_set_there(dev: Evaluated) -> None:
    for nothing in ({}, dev.outputs):
        told = refused(nothing, "dublin")
        assert f"{NAMESPACE}:master.otherStacks: the stack {STACK!r} exports no federation" in told
        assert "set existingMaster there" in told


def test_an_address_that_is_none_never_reaches_the_firewall(west: Evaluated) -> None:
    known = copy.deepcopy(dict(west.outputs))
    known["federation"]["dublin"]["publicIp"] = "198.18.0.1/0 -j ACCEPT"
    with pytest.raises(ValueError, match="ACCEPT"):
        run_hq({"stack": STACK, "sites": ["dublin"]}, known=known)


def test_secrets_that_this_stack_cannot_decrypt_are_missed_by_their_name(west: Evaluated) -> None:
    told = refused({"federation": west.outputs["federation"]}, "dublin")
    assert "exports no federationSecrets" in told
    assert "secrets that this stack can decrypt" in told
