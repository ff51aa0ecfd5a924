"""What must hold of every resource, whatever the settings: functions from a run of the program to
what breaks the rule, a line each.

A number such as EC2.8 is a control of AWS's Foundational Security Best Practices.
https://docs.aws.amazon.com/securityhub/latest/userguide/fsbp-standard.html
Controls that do not apply, as the environment is meant to be so: EC2.9 (a server federates across
the internet, so it has a public address), SSM.1 (the way in is SSH with pinned keys). What belongs
to the account and not to a stack is not asked here: EC2.2, EC2.6, EC2.7, EC2.182.
"""

from __future__ import annotations

import base64
import gzip
import ipaddress
import json
from collections.abc import Iterator, Mapping
from typing import Any

from components.backup import MANAGED_POLICY
from sandbox import providers
from sandbox.program import Resource, Secret, plain
from sandbox.recorder import Recorder
from tests.unit.conftest import NAMESPACE, Evaluated

ANYWHERE = "0.0.0.0/0"
FEDERATION_PORT = 9095
LEAF_HOURS_MAX = 90 * 24
CA_HOURS_MAX = 10 * 365 * 24
PASSWORD_MIN = 32
SALT_BYTES = 16
# Who may take a role on: instances that discover targets, and EBS's lifecycle manager.
TRUSTED_SERVICES = {"ec2.amazonaws.com", "dlm.amazonaws.com"}
# Actions that know no resource; a condition limits them.
# https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonec2.html
WITHOUT_ARN = {"ec2:DescribeAvailabilityZones", "ec2:DescribeInstances"}
# Those that know neither, or whose resource has an id of its own each time: they only read.
# https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonroute53.html
WITHOUT_LIMIT = {"route53:ListHostedZones": "*", "route53:GetChange": "arn:aws:route53:::change/*"}
CHANGE_RECORDS = "route53:ChangeResourceRecordSets"


def every_type_is_a_known_one(run: Evaluated) -> Iterator[str]:
    """A type that no rule was written for is looked at before it is used."""
    for resource in run.recorder.resources:
        if resource.custom and resource.type not in providers.REPLACE_ON:
            yield f"{resource.name}: {resource.type} has no rules yet"


def instances_ask_for_session_tokens(run: Evaluated) -> Iterator[str]:
    """EC2.8: IMDSv2 only, and its answers do not leave the host."""
    wanted = {"httpEndpoint": "enabled", "httpTokens": "required", "httpPutResponseHopLimit": 1}
    for instance in run.recorder.of_type(providers.INSTANCE):
        if instance.inputs.get("metadataOptions") != wanted:
            yield f"{instance.name}: metadataOptions are not {wanted}"


def instances_check_where_packets_are_for(run: Evaluated) -> Iterator[str]:
    """EC2.180: no server routes for others."""
    for instance in run.recorder.of_type(providers.INSTANCE):
        if instance.inputs.get("sourceDestCheck", True) is not True:
            yield f"{instance.name}: sourceDestCheck is off"


def disks_are_encrypted(run: Evaluated) -> Iterator[str]:
    """EC2.3: root disks and data volumes."""
    for instance in run.recorder.of_type(providers.INSTANCE):
        disks = [instance.inputs.get("rootBlockDevice", {})]
        for disk in [*disks, *instance.inputs.get("ebsBlockDevices", [])]:
            if disk.get("encrypted") is not True:
                yield f"{instance.name}: a disk of it is not encrypted"
    for volume in run.recorder.of_type(providers.VOLUME):
        if volume.inputs.get("encrypted") is not True:
            yield f"{volume.name}: is not encrypted"


def data_is_protected_and_backed_up(run: Evaluated) -> Iterator[str]:
    """EC2.28, and Pulumi's protect. Snapshots stay in the account (EC2.1)."""
    policies = run.recorder.of_type(providers.LIFECYCLE_POLICY)
    backed_up = [policy.inputs["policyDetails"]["targetTags"].items() for policy in policies]
    for volume in run.recorder.of_type(providers.VOLUME):
        if not volume.protect:
            yield f"{volume.name}: is not protected"
        if not any(tags <= volume.inputs["tags"].items() for tags in backed_up):
            yield f"{volume.name}: no lifecycle policy takes its snapshots"
    for policy in policies:
        for schedule in policy.inputs["policyDetails"]["schedules"]:
            if "shareRules" in schedule or "crossRegionCopyRules" in schedule:
                yield f"{policy.name}: snapshots go to other accounts or regions"


def rules_name_one_port_and_one_network(run: Evaluated) -> Iterator[str]:
    """EC2.19. Standalone rules, since inline ones and standalone ones undo each other."""
    for group in run.recorder.of_type(providers.SECURITY_GROUP):
        if {"ingress", "egress"} & set(group.inputs):
            yield f"{group.name}: has inline rules"
    for rule in _rules(run):
        inputs = rule.inputs
        if inputs["ipProtocol"] not in ("tcp", "udp") or inputs["fromPort"] != inputs["toPort"]:
            yield f"{rule.name}: is not of one protocol and one port"
        if not inputs.get("cidrIpv4") or {"cidrIpv6", "prefixListId"} & set(inputs):
            yield f"{rule.name}: is not of one IPv4 network"


def nobody_comes_in_but_who_was_named(run: Evaluated) -> Iterator[str]:
    """EC2.18, EC2.53: operators on 22 and 443, masters on the port of federation. Anybody on 80
    where a public authority looks there, which it does from addresses that it does not publish."""
    operators = set(_setting(run, "operatorCidrs"))
    own = {f"{_address(run, eip)}/32" for eip in run.recorder.of_type(providers.EIP)}
    masters = own | set((_setting(run, "existingMaster") or {}).get("cidrs", []))
    allowed = {22: operators, 443: operators, FEDERATION_PORT: masters}
    for rule in run.recorder.of_type(providers.INGRESS_RULE):
        port, network = rule.inputs["fromPort"], rule.inputs.get("cidrIpv4")
        public = (port, network) == (80, ANYWHERE) and _challenge(run, rule) == "http-01"
        if network not in allowed.get(port, set()) and not public:
            yield f"{rule.name}: lets {network} in on {port}, which no setting asks for"


def nothing_goes_anywhere_unless_named(run: Evaluated) -> Iterator[str]:
    """Out to the whole internet: packages on 80 and 443, and what a server's settings name."""
    packages = ANYWHERE in _setting(run, "packageCidrs")
    named = ANYWHERE in _texts([_setting(run, "slaves"), _setting(run, "master")])
    for rule in run.recorder.of_type(providers.EGRESS_RULE):
        network, port = ipaddress.IPv4Network(rule.inputs["cidrIpv4"]), rule.inputs["fromPort"]
        if network.prefixlen == 0 and not named and not (packages and port in (80, 443)):
            yield f"{rule.name}: goes anywhere on {port}, which no setting asks for"


def rights_are_exact(run: Evaluated) -> Iterator[str]:
    """IAM.1, IAM.21: exact actions on exact ARNs, for one service, and no policy but one of AWS."""
    for role in run.recorder.of_type(providers.ROLE):
        for statement in json.loads(role.inputs["assumeRolePolicy"])["Statement"]:
            who = statement["Principal"]
            if set(who) != {"Service"} or who["Service"] not in TRUSTED_SERVICES:
                yield f"{role.name}: may be taken on by {who}"
    for attachment in run.recorder.of_type(providers.ROLE_POLICY_ATTACHMENT):
        if attachment.inputs["policyArn"] != MANAGED_POLICY:
            yield f"{attachment.name}: gives {attachment.inputs['policyArn']}"
    for policy in run.recorder.of_type(providers.ROLE_POLICY):
        for statement in json.loads(policy.inputs["policy"])["Statement"]:
            if "NotAction" in statement or "NotResource" in statement:
                yield f"{policy.name}: allows all but something"
            for action in _list(statement.get("Action", [])):
                if "*" in action:
                    yield f"{policy.name}: allows {action}"
            for arn in _list(statement.get("Resource", [])):
                limited = "Condition" in statement and WITHOUT_ARN.issuperset(statement["Action"])
                reads = all(WITHOUT_LIMIT.get(a) == arn for a in _list(statement["Action"]))
                if "*" in arn and not limited and not reads:
                    yield f"{policy.name}: on {arn}"


def one_txt_record_is_all_that_a_host_may_write(run: Evaluated) -> Iterator[str]:
    """The one that proves its own name, in the zone of the settings; and no request may leave out
    what it changes."""
    (zone,) = {record.inputs["zoneId"] for record in run.recorder.of_type(providers.RECORD)}
    for policy in run.recorder.of_type(providers.ROLE_POLICY):
        for statement in json.loads(policy.inputs["policy"])["Statement"]:
            if CHANGE_RECORDS not in _list(statement.get("Action", [])):
                continue
            fqdn = run.recorder.one(providers.RECORD, policy.name).inputs["name"]
            only = {
                f"{CHANGE_RECORDS}NormalizedRecordNames": [f"_acme-challenge.{fqdn}"],
                f"{CHANGE_RECORDS}RecordTypes": ["TXT"],
                f"{CHANGE_RECORDS}Actions": ["UPSERT", "DELETE"],
            }
            given = dict.fromkeys(only, "false")
            if statement.get("Condition") != {"ForAllValues:StringEquals": only, "Null": given}:
                yield f"{policy.name}: may write other records than that of _acme-challenge.{fqdn}"
            if statement["Resource"] != f"arn:aws:route53:::hostedzone/{zone}":
                yield f"{policy.name}: may write to {statement['Resource']}"


def an_instance_has_no_rights_that_it_does_not_use(run: Evaluated) -> Iterator[str]:
    """A profile only where a job of that host discovers instances, or where a record proves its
    name, and in it what that one needs."""
    for instance in run.recorder.of_type(providers.INSTANCE):
        if "iamInstanceProfile" in instance.inputs and not _services(run, instance):
            yield f"{instance.name}: has a profile and asks nothing of AWS"
    for policy in run.recorder.of_type(providers.ROLE_POLICY):
        for statement in json.loads(policy.inputs["policy"])["Statement"]:
            for action in _list(statement.get("Action", [])):
                if action.partition(":")[0] not in _services(run, policy):
                    yield f"{policy.name}: may {action} and has no use for it"


def secrets_are_marked(run: Evaluated) -> Iterator[str]:
    """Nothing that is derived from a secret reaches a resource or an output in clear."""
    values = list(_secret_values(run))
    inputs = [(resource.name, resource.inputs) for resource in run.recorder.resources]
    for name, value in [*inputs, ("the outputs", run.outputs)]:
        for text, marked in strings(value):
            if not marked:
                for source in (source for source, secret in values if secret in text):
                    yield f"{name}: shows a secret of {source}"


def user_data_holds_no_secret(run: Evaluated) -> Iterator[str]:
    """Whoever may describe an instance reads it. The key of the first contact is good for one."""
    values = list(_secret_values(run))
    for instance in run.recorder.of_type(providers.INSTANCE):
        text = _user_data(instance)
        for source, value in values:
            if value in text and source.replace("-first-contact-", "-") != instance.name:
                yield f"{instance.name}: user-data holds a secret of {source}"


def commands_trust_no_unknown_host_and_show_nothing(run: Evaluated) -> Iterator[str]:
    """Without a host key the provider talks to anyone; with logging it shows what was sent, if
    anything was."""
    for command in run.recorder.of_type(providers.COMMAND):
        connection = plain(command.inputs["connection"])
        for hop in (connection, connection.get("proxy")):
            if hop is not None and not hop.get("hostKey"):
                yield f"{command.name}: trusts whoever answers at {hop['host']}"
        if "stdin" in command.inputs and command.inputs.get("logging") != "none":
            yield f"{command.name}: logs"
        if not {"stdout", "stderr"} <= set(command.secret_outputs):
            yield f"{command.name}: shows what the host said"
        if "stdin" in command.inputs and not isinstance(command.inputs["stdin"], Secret):
            yield f"{command.name}: shows what it sends"


def keys_and_certificates_are_of_today(run: Evaluated) -> Iterator[str]:
    """Elliptic curves; leaves of 90 days at most that sign nothing."""
    for key in run.recorder.of_type(providers.PRIVATE_KEY):
        kind = (key.inputs["algorithm"], key.inputs.get("ecdsaCurve"))
        if kind not in (("ED25519", None), ("ECDSA", "P256")):
            yield f"{key.name}: is a key of {kind}"
    for leaf in run.recorder.of_type(providers.LOCALLY_SIGNED_CERT):
        if leaf.inputs["validityPeriodHours"] > LEAF_HOURS_MAX:
            yield f"{leaf.name}: is good for longer than {LEAF_HOURS_MAX} hours"
        uses = {"digital_signature", "server_auth", "client_auth"}
        if leaf.inputs.get("isCaCertificate") or not uses.issuperset(leaf.inputs["allowedUses"]):
            yield f"{leaf.name}: may do more than serve and ask"
    for authority in run.recorder.of_type(providers.SELF_SIGNED_CERT):
        if authority.inputs["validityPeriodHours"] > CA_HOURS_MAX:
            yield f"{authority.name}: is good for longer than {CA_HOURS_MAX} hours"


def passwords_are_long(run: Evaluated) -> Iterator[str]:
    """Long enough for a cheap hash; and no salt is short."""
    for password in run.recorder.of_type(providers.RANDOM_PASSWORD):
        if password.inputs["length"] < PASSWORD_MIN:
            yield f"{password.name}: has fewer than {PASSWORD_MIN} characters"
    for salt in run.recorder.of_type(providers.RANDOM_BYTES):
        if salt.inputs["length"] < SALT_BYTES:
            yield f"{salt.name}: has fewer than {SALT_BYTES} bytes"


RULES = (
    every_type_is_a_known_one,
    instances_ask_for_session_tokens,
    instances_check_where_packets_are_for,
    disks_are_encrypted,
    data_is_protected_and_backed_up,
    rules_name_one_port_and_one_network,
    nobody_comes_in_but_who_was_named,
    nothing_goes_anywhere_unless_named,
    rights_are_exact,
    one_txt_record_is_all_that_a_host_may_write,
    an_instance_has_no_rights_that_it_does_not_use,
    secrets_are_marked,
    user_data_holds_no_secret,
    commands_trust_no_unknown_host_and_show_nothing,
    keys_and_certificates_are_of_today,
    passwords_are_long,
)


def _rules(run: Evaluated) -> list[Resource]:
    kinds = (providers.INGRESS_RULE, providers.EGRESS_RULE)
    return [rule for kind in kinds for rule in run.recorder.of_type(kind)]


def _setting(run: Evaluated, key: str) -> Any:
    return run.project.config.get(f"{NAMESPACE}:{key}") or []


def _server(run: Evaluated, resource: Resource) -> dict[str, Any]:
    """The settings of the server that a resource is of."""
    servers = {f"slave-{slave['site']}": slave for slave in _setting(run, "slaves")}
    servers["master"] = _setting(run, "master") or {}
    found = (known for name, known in servers.items() if f"{resource.name}-".startswith(f"{name}-"))
    return next(found)


def _challenge(run: Evaluated, resource: Resource) -> str | None:
    """How the server of a resource proves its name; None where no public authority signs."""
    server = _server(run, resource)
    if server.get("certificates", _setting(run, "certificates")) != "letsencrypt":
        return None
    return server.get("challenge", _setting(run, "letsEncrypt").get("challenge", "http-01"))


def _services(run: Evaluated, resource: Resource) -> set[str]:
    """The services of AWS that the server of a resource has something to ask."""
    discovery = {"ec2"} if "ec2_sd_configs" in str(_server(run, resource)) else set()
    return discovery | ({"route53"} if _challenge(run, resource) == "dns-01" else set())


def _address(run: Evaluated, eip: Resource) -> str:
    return _answers(eip)["publicIp"]


def _answers(resource: Resource) -> dict[str, Any]:
    """What a provider answered: it follows from the resource alone."""
    return Recorder().register(resource)[1]


def _secret_values(run: Evaluated) -> Iterator[tuple[str, str]]:
    """Every value that a provider declares secret, after the resource that it is of."""
    for type_, outputs in providers.SECRET_OUTPUTS.items():
        for resource in run.recorder.of_type(type_):
            for key, value in _answers(resource).items():
                if key in outputs:
                    yield resource.name, value.strip()


def _user_data(instance: Resource) -> str:
    return gzip.decompress(base64.b64decode(plain(instance.inputs["userDataBase64"]))).decode()


def strings(value: Any, *, secret: bool = False) -> Iterator[tuple[str, bool]]:
    """Every string in a value, and whether it is marked secret."""
    if isinstance(value, Secret):
        yield from strings(value.value, secret=True)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item, secret=secret)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, secret=secret)
    elif isinstance(value, str):
        yield value, secret


def _texts(value: Any) -> set[str]:
    return {text for text, _ in strings(value)}


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else value
