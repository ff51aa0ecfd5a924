"""Every rule of tests/unit/policy.py: the program keeps it, and what breaks it is seen."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from sandbox import providers
from sandbox.program import Resource, Secret, plain
from sandbox.recorder import Recorder
from tests.unit import policy
from tests.unit.conftest import Evaluated, run_program

Rule = Callable[[Evaluated], Any]
DISCOVERY = "slave-ohio"


@pytest.fixture(scope="module")
def rich() -> Evaluated:
    """An environment with all that a user may add: two regions, discovery, a restored volume, a
    public authority by both challenges, an existing master, Grafana, an operator from anywhere."""
    tagged = {"region": "us-east-2", "filters": [{"name": "tag:monitor", "values": ["yes"]}]}
    ohio = {
        "site": "ohio",
        "host": "slave-ohio",
        "region": "us-east-2",
        "restoreFrom": "snap-0123456789abcdef0",
        "certificates": "letsencrypt",
        "jobs": [{"name": "fleet", "ec2_sd_configs": [tagged | {"port": 9200}]}],
        "targetCidrs": ["0.0.0.0/0"],
    }
    grafana = {"version": "12.1.0", "sha256": "0" * 64, "url": "https://example.com/g.tar.gz"}
    return run_program(
        slaves=[ohio],
        letsEncrypt={"email": "operator@example.com", "agreeToTerms": True},
        master={
            "host": "prometheus-master",
            "grafana": grafana,
            "certificates": "letsencrypt",
            "challenge": "dns-01",
        },
        existingMaster={"host": "m.example.com", "cidrs": ["203.0.113.9/32"]},
        operatorCidrs=["0.0.0.0/0", "203.0.113.7/32"],
    )


def names(rules: tuple[Rule, ...]) -> list[str]:
    return [rule.__name__ for rule in rules]


@pytest.mark.parametrize("rule", policy.RULES, ids=names(policy.RULES))
def test_the_environment_to_copy_keeps_every_rule(dev: Evaluated, rule: Rule) -> None:
    assert list(rule(dev)) == []


@pytest.mark.parametrize("rule", policy.RULES, ids=names(policy.RULES))
def test_an_environment_with_everything_keeps_every_rule(rich: Evaluated, rule: Rule) -> None:
    assert list(rule(rich)) == []


def changed(run: Evaluated, name: str, type_: str, **fields: Any) -> Evaluated:
    """The same run with another value for some fields of one resource."""
    recorder = Recorder()
    old = run.recorder.one(type_, name)
    recorder.resources = [
        dataclasses.replace(old, **fields) if resource is old else resource
        for resource in run.recorder.resources
    ]
    return dataclasses.replace(run, recorder=recorder)


def with_inputs(**inputs: Any) -> Callable[[Resource], Mapping[str, Any]]:
    """A change of some inputs of a resource."""
    return lambda old: {"inputs": {**old.inputs, **inputs}}


def with_statement(key: str, **statement: Any) -> Callable[[Resource], Mapping[str, Any]]:
    """A change of the first statement of a policy document."""

    def change(old: Resource) -> Mapping[str, Any]:
        document = json.loads(old.inputs[key])
        document["Statement"][0] |= statement
        return {"inputs": {**old.inputs, key: json.dumps(document)}}

    return change


def with_connection(**connection: Any) -> Callable[[Resource], Mapping[str, Any]]:
    """A change of how a command connects."""

    def change(old: Resource) -> Mapping[str, Any]:
        told = {**plain(old.inputs["connection"]), **connection}
        return {"inputs": {**old.inputs, "connection": Secret(told)}}

    return change


def with_schedule(**more: Any) -> Callable[[Resource], Mapping[str, Any]]:
    """A lifecycle policy whose schedule does something more."""

    def change(old: Resource) -> Mapping[str, Any]:
        details = plain(old.inputs["policyDetails"])
        details["schedules"] = [{**details["schedules"][0], **more}]
        return {"inputs": {**old.inputs, "policyDetails": details}}

    return change


CHANGE = "route53:ChangeResourceRecordSets"
# A condition on which records a host may write: those of the master.
NARROW = {
    "ForAllValues:StringEquals": {
        f"{CHANGE}NormalizedRecordNames": ["_acme-challenge.prometheus-master.example.com"],
        f"{CHANGE}RecordTypes": ["TXT"],
        f"{CHANGE}Actions": ["UPSERT", "DELETE"],
    }
}

Case = tuple[Rule, str, str, Callable[[Resource], Mapping[str, Any]]]
INSTANCE, RULE_IN, RULE_OUT = providers.INSTANCE, providers.INGRESS_RULE, providers.EGRESS_RULE
SSH_RULE = "master-in-tcp-22-203-0-113-7-32"
UI_RULE = "master-in-tcp-443-203-0-113-7-32"

# A rule, a resource by name and type, and what is done to it.
BROKEN: list[Case] = [
    (
        policy.every_type_is_a_known_one,
        "master-data",
        providers.VOLUME,
        lambda _: {"type": "aws:s3/bucket:Bucket"},
    ),
    (
        policy.instances_ask_for_session_tokens,
        "master-1",
        INSTANCE,
        with_inputs(metadataOptions={"httpTokens": "optional"}),
    ),
    (
        policy.instances_ask_for_session_tokens,
        "master-1",
        INSTANCE,
        with_inputs(
            metadataOptions={
                "httpEndpoint": "enabled",
                "httpTokens": "required",
                "httpPutResponseHopLimit": 2,
            }
        ),
    ),
    (
        policy.instances_check_where_packets_are_for,
        "master-1",
        INSTANCE,
        with_inputs(sourceDestCheck=False),
    ),
    (
        policy.disks_are_encrypted,
        "master-1",
        INSTANCE,
        with_inputs(rootBlockDevice={"volumeSize": 8}),
    ),
    (
        policy.disks_are_encrypted,
        "master-1",
        INSTANCE,
        with_inputs(ebsBlockDevices=[{"deviceName": "/dev/sdg"}]),
    ),
    (policy.disks_are_encrypted, "master-data", providers.VOLUME, with_inputs(encrypted=False)),
    (
        policy.data_is_protected_and_backed_up,
        "master-data",
        providers.VOLUME,
        lambda _: {"protect": False},
    ),
    (
        policy.data_is_protected_and_backed_up,
        "master-data",
        providers.VOLUME,
        with_inputs(tags={}),
    ),
    (
        policy.data_is_protected_and_backed_up,
        "backups",
        providers.LIFECYCLE_POLICY,
        with_schedule(shareRules=[{"targetAccounts": ["123456789012"]}]),
    ),
    (
        policy.rules_name_one_port_and_one_network,
        "master",
        providers.SECURITY_GROUP,
        with_inputs(ingress=[]),
    ),
    (policy.rules_name_one_port_and_one_network, SSH_RULE, RULE_IN, with_inputs(toPort=65535)),
    (policy.rules_name_one_port_and_one_network, SSH_RULE, RULE_IN, with_inputs(ipProtocol="-1")),
    (policy.rules_name_one_port_and_one_network, SSH_RULE, RULE_IN, with_inputs(cidrIpv6="::/0")),
    (
        policy.nobody_comes_in_but_who_was_named,
        SSH_RULE,
        RULE_IN,
        with_inputs(cidrIpv4="0.0.0.0/0"),
    ),
    (
        policy.nobody_comes_in_but_who_was_named,
        UI_RULE,
        RULE_IN,
        with_inputs(cidrIpv4="203.0.113.0/24"),
    ),
    (policy.nobody_comes_in_but_who_was_named, UI_RULE, RULE_IN, with_inputs(fromPort=9090)),
    (
        policy.nobody_comes_in_but_who_was_named,
        "slave-dublin-federate-master",
        RULE_IN,
        # An operator, but not on the port of federation.
        with_inputs(cidrIpv4="203.0.113.7/32"),
    ),
    (
        policy.nothing_goes_anywhere_unless_named,
        "master-out-tcp-53-10-0-0-0-16",
        RULE_OUT,
        with_inputs(cidrIpv4="0.0.0.0/0"),
    ),
    (
        policy.secrets_are_marked,
        "master-bundle",
        providers.COMMAND,
        lambda old: {"inputs": {**old.inputs, "stdin": plain(old.inputs["stdin"])}},
    ),
    (
        policy.commands_trust_no_unknown_host_and_show_nothing,
        "master-bundle",
        providers.COMMAND,
        with_connection(hostKey=None),
    ),
    (
        policy.commands_trust_no_unknown_host_and_show_nothing,
        "slave-dublin-core01.example.internal",
        providers.COMMAND,
        with_connection(proxy={"host": "198.18.0.1"}),
    ),
    (
        policy.commands_trust_no_unknown_host_and_show_nothing,
        "master-bundle",
        providers.COMMAND,
        with_inputs(logging="stdoutAndStderr"),
    ),
    (
        policy.commands_trust_no_unknown_host_and_show_nothing,
        "master-bundle",
        providers.COMMAND,
        lambda _: {"secret_outputs": ()},
    ),
    (
        policy.commands_trust_no_unknown_host_and_show_nothing,
        "master-bundle",
        providers.COMMAND,
        lambda old: {"inputs": {**old.inputs, "stdin": "in clear"}},
    ),
    (
        policy.keys_and_certificates_are_of_today,
        "ca-key",
        providers.PRIVATE_KEY,
        with_inputs(algorithm="RSA", ecdsaCurve=None),
    ),
    (
        policy.keys_and_certificates_are_of_today,
        "master-nginx-certificate",
        providers.LOCALLY_SIGNED_CERT,
        with_inputs(validityPeriodHours=398 * 24),
    ),
    (
        policy.keys_and_certificates_are_of_today,
        "master-nginx-certificate",
        providers.LOCALLY_SIGNED_CERT,
        with_inputs(isCaCertificate=True),
    ),
    (
        policy.keys_and_certificates_are_of_today,
        "master-nginx-certificate",
        providers.LOCALLY_SIGNED_CERT,
        with_inputs(allowedUses=["cert_signing"]),
    ),
    (
        policy.keys_and_certificates_are_of_today,
        "ca-certificate",
        providers.SELF_SIGNED_CERT,
        with_inputs(validityPeriodHours=20 * 365 * 24),
    ),
    (
        policy.passwords_are_long,
        "master-local-password",
        providers.RANDOM_PASSWORD,
        with_inputs(length=12),
    ),
    (policy.passwords_are_long, "master-local-salt", providers.RANDOM_BYTES, with_inputs(length=8)),
    (
        policy.an_instance_has_no_rights_that_it_does_not_use,
        "master-1",
        INSTANCE,
        with_inputs(iamInstanceProfile="everything"),
    ),
]
# The same, of the environment with everything.
BROKEN_RIGHTS: list[Case] = [
    (
        policy.rights_are_exact,
        DISCOVERY,
        providers.ROLE_POLICY,
        with_statement("policy", Action=["ec2:*"]),
    ),
    (
        # Without the region they are the whole account's.
        policy.rights_are_exact,
        DISCOVERY,
        providers.ROLE_POLICY,
        lambda old: {
            "inputs": {
                **old.inputs,
                "policy": json.dumps(
                    {"Statement": [{"Action": ["ec2:DescribeInstances"], "Resource": "*"}]}
                ),
            }
        },
    ),
    (
        policy.rights_are_exact,
        DISCOVERY,
        providers.ROLE_POLICY,
        with_statement("policy", Action=["s3:GetObject"], Resource="arn:aws:s3:::*"),
    ),
    (
        policy.rights_are_exact,
        DISCOVERY,
        providers.ROLE_POLICY,
        with_statement("policy", NotAction="iam:PassRole"),
    ),
    (
        policy.rights_are_exact,
        DISCOVERY,
        providers.ROLE,
        with_statement("assumeRolePolicy", Principal={"AWS": "*"}),
    ),
    (
        policy.rights_are_exact,
        "backups",
        providers.ROLE_POLICY_ATTACHMENT,
        with_inputs(policyArn="arn:aws:iam::aws:policy/AdministratorAccess"),
    ),
    (
        policy.rights_are_exact,
        "master",
        providers.ROLE_POLICY,
        # To read about changes is no reason to read about zones.
        with_statement("policy", Action=["route53:GetHostedZone"], Resource="*"),
    ),
    (
        policy.one_txt_record_is_all_that_a_host_may_write,
        "master",
        providers.ROLE_POLICY,
        with_statement("policy", Condition=NARROW | {"Null": {}}),
    ),
    (
        policy.one_txt_record_is_all_that_a_host_may_write,
        "master",
        providers.ROLE_POLICY,
        with_statement("policy", Resource="arn:aws:route53:::hostedzone/Z-other.example.com"),
    ),
    (
        policy.an_instance_has_no_rights_that_it_does_not_use,
        "master",
        providers.ROLE_POLICY,
        with_statement("policy", Action=["ec2:DescribeInstances"]),
    ),
    (
        # The authority looks on the slave's port 80, and for the master into the zone.
        policy.nobody_comes_in_but_who_was_named,
        UI_RULE,
        RULE_IN,
        with_inputs(fromPort=80, toPort=80, cidrIpv4="0.0.0.0/0"),
    ),
]


def ids(cases: list[Case]) -> list[str]:
    return [f"{rule.__name__}-{name}" for rule, name, _, _ in cases]


def assert_seen(run: Evaluated, case: Case) -> None:
    rule, name, type_, change = case
    fields = change(run.recorder.one(type_, name))
    found = list(rule(changed(run, name, type_, **fields)))
    assert found
    assert all(line.startswith(f"{name}: ") for line in found), found


@pytest.mark.parametrize("case", BROKEN, ids=ids(BROKEN))
def test_a_resource_that_breaks_a_rule_is_named(dev: Evaluated, case: Case) -> None:
    assert_seen(dev, case)


@pytest.mark.parametrize("case", BROKEN_RIGHTS, ids=ids(BROKEN_RIGHTS))
def test_rights_that_go_too_far_are_named(rich: Evaluated, case: Case) -> None:
    assert_seen(rich, case)


def test_a_secret_in_user_data_is_named(dev: Evaluated) -> None:
    password = dev.recorder.one(providers.RANDOM_PASSWORD, "master-local-password")
    _, answers = Recorder().register(password)
    instance = dev.recorder.one(INSTANCE, "master-1")
    text = gzip.decompress(base64.b64decode(plain(instance.inputs["userDataBase64"])))
    data = base64.b64encode(gzip.compress(text + answers["result"].encode())).decode()
    case: Case = (
        policy.user_data_holds_no_secret,
        "master-1",
        INSTANCE,
        with_inputs(userDataBase64=Secret(data)),
    )
    assert_seen(dev, case)


def test_a_secret_in_an_output_is_named(dev: Evaluated) -> None:
    shown = {**dev.outputs, "masterPassword": plain(dev.outputs["masterPassword"])}
    found = list(policy.secrets_are_marked(dataclasses.replace(dev, outputs=shown)))
    assert len(found) == 1
    assert found[0].startswith("the outputs: shows a secret of master-ui-password")


def test_every_rule_has_something_that_breaks_it() -> None:
    broken = {rule for rule, *_ in [*BROKEN, *BROKEN_RIGHTS]}
    assert broken | {policy.user_data_holds_no_secret} == set(policy.RULES)
