"""What the program asks of the cloud, resource by resource."""

from __future__ import annotations

import base64
import gzip
import ipaddress
import json
import time
from collections.abc import Callable
from typing import Any

import pulumi
import pytest
import yaml

from sandbox import providers
from sandbox.program import Resource, Secret, evaluate, plain
from sandbox.recorder import Recorder
from tests.unit.conftest import NAMESPACE, Evaluated, run_program
from tests.unit.policy import strings

# A rename of one of these would replace a user's instances and data: it needs an alias.
COMPONENT_TYPES = {
    "prometheus-federation:index:Backups",
    "prometheus-federation:index:CertificateAuthority",
    "prometheus-federation:index:ExistingMaster",
    "prometheus-federation:index:Firewall",
    "prometheus-federation:index:Host",
    "prometheus-federation:index:HostAddress",
    "prometheus-federation:index:LeafCertificate",
    "prometheus-federation:index:Master",
    "prometheus-federation:index:NodeExporter",
    "prometheus-federation:index:RandomCredential",
    "prometheus-federation:index:RotatingCredential",
    "prometheus-federation:index:Slave",
}
# Resources of AWS that can carry no tags.
WITHOUT_TAGS = {
    *(providers.RECORD, providers.EIP_ASSOCIATION, providers.VOLUME_ATTACHMENT),
    providers.ROLE_POLICY_ATTACHMENT,
}
USER_DATA_LIMIT = 16_384
# The commands of a server, by the ends of their names.
PURPOSES = ("first-contact", "first-boot", "bundle")


def test_slave_and_master_are_components_of_one_run(dev: Evaluated) -> None:
    names = {(r.type.rpartition(":")[2], r.name) for r in dev.recorder.resources}
    assert {("Slave", "slave-dublin"), ("Master", "master")} <= names
    assert [r.name for r in dev.recorder.of_type(providers.INSTANCE)] == [
        "master-1",
        "slave-dublin-1",
    ]
    for instance in dev.recorder.of_type(providers.INSTANCE):
        assert instance.inputs["instanceType"] == "t3.micro"


def test_every_component_type_is_a_known_one() -> None:
    with_master = run_program().recorder.resources
    existing = {"host": "m.example.com", "cidrs": ["203.0.113.9/32"]}
    without = run_program(master={}, existingMaster=existing).recorder.resources
    assert {r.type for r in [*with_master, *without] if not r.custom} == COMPONENT_TYPES


def test_every_resource_but_the_components_of_the_stack_has_a_component_as_parent(
    dev: Evaluated,
) -> None:
    by_urn = {r.urn: r for r in dev.recorder.resources}
    on_top = {r.name for r in dev.recorder.resources if r.parent not in by_urn}
    assert on_top == {"ca", "operator-ssh", "operator-ssh-2", "backups", "master", "slave-dublin"}
    for resource in dev.recorder.resources:
        if resource.parent in by_urn:
            assert not by_urn[resource.parent].custom


def test_everything_of_a_site_hangs_below_its_slave(dev: Evaluated) -> None:
    for resource in dev.recorder.resources:
        if resource.name.startswith("slave-dublin") and resource.custom:
            assert "prometheus-federation:index:Slave$" in resource.urn


def test_every_aws_resource_has_the_tags() -> None:
    evaluated = run_program(tags={"team": "platform", "ManagedBy": "hand"})
    tagged = [
        r
        for r in evaluated.recorder.resources
        if r.type.startswith("aws:") and r.type not in WITHOUT_TAGS
    ]
    assert len(tagged) > 20
    for resource in tagged:
        tags = resource.inputs.get("tags")
        assert tags, resource.urn
        assert tags["Project"] == NAMESPACE
        assert tags["Stack"] == "dev"
        assert tags["ManagedBy"] == "pulumi", "the program's own tags win"
        assert tags["team"] == "platform"
        assert tags["Name"].startswith("prometheus-federation-dev-")


def test_a_running_instance_is_not_replaced_for_its_image_or_user_data(dev: Evaluated) -> None:
    for instance in dev.recorder.of_type(providers.INSTANCE):
        assert instance.inputs["creditSpecification"] == {"cpuCredits": "standard"}
        assert set(instance.ignore_changes) == {"userDataBase64", "ami"}


def test_a_data_volume_leaves_its_old_instance_first(dev: Evaluated) -> None:
    assert len(dev.recorder.of_type(providers.VOLUME)) == 2
    for attachment in dev.recorder.of_type(providers.VOLUME_ATTACHMENT):
        assert attachment.delete_before_replace


def ingress(evaluated: Evaluated, host: str) -> set[tuple[str, int, str]]:
    return {
        (r.inputs["ipProtocol"], r.inputs["fromPort"], r.inputs["cidrIpv4"])
        for r in evaluated.recorder.of_type(providers.INGRESS_RULE)
        if r.name.startswith(host)
    }


def address(evaluated: Evaluated, host: str) -> str:
    rows = [evaluated.outputs["master"], *evaluated.outputs["slaves"].values()]
    return next(row["publicIp"] for row in rows if row["host"].startswith(host))


def test_a_slave_lets_in_its_master_and_operators_and_nobody_else(dev: Evaluated) -> None:
    master = f"{address(dev, 'prometheus-master')}/32"
    assert ingress(dev, "slave-dublin") == {
        ("tcp", 9095, master),
        ("tcp", 22, "203.0.113.7/32"),
    }


def test_a_master_lets_in_operators_and_nobody_else(dev: Evaluated) -> None:
    assert ingress(dev, "master") == {
        ("tcp", 443, "203.0.113.7/32"),
        ("tcp", 22, "203.0.113.7/32"),
    }


def test_nothing_goes_anywhere_but_packages_unless_the_user_says_so(dev: Evaluated) -> None:
    anywhere = [
        r.inputs["fromPort"]
        for r in dev.recorder.of_type(providers.EGRESS_RULE)
        if r.inputs["cidrIpv4"] == "0.0.0.0/0"
    ]
    assert set(anywhere) == {80, 443}
    narrowed = run_program(packageCidrs=["198.51.100.0/24"])
    for rule in narrowed.recorder.of_type(providers.EGRESS_RULE):
        assert ipaddress.IPv4Network(rule.inputs["cidrIpv4"]).prefixlen > 0


def test_the_firewall_table_is_the_same_in_the_security_group_and_in_ufw(dev: Evaluated) -> None:
    for host in ("master", "slave-dublin"):
        group = {
            (kind, r.inputs["ipProtocol"], str(r.inputs["fromPort"]), r.inputs["cidrIpv4"])
            for kind, type_ in (("in", providers.INGRESS_RULE), ("out", providers.EGRESS_RULE))
            for r in dev.recorder.of_type(type_)
            if r.name.startswith(host)
        }
        text = bundle_files(dev, host)["/etc/ufw/user.rules"]["content"]
        tuples = [line.split() for line in text.splitlines() if line.startswith("### tuple ###")]
        # allow PROTOCOL DPORT DST SPORT SRC DIRECTION comment=…
        ufw = set()
        for words in tuples:
            protocol, port, destination, _, source, direction = words[4:10]
            peer = ipaddress.IPv4Network(source if direction == "in" else destination)
            ufw.add((direction, protocol, port, str(peer)))
        assert ufw == group


def bundle_files(evaluated: Evaluated, host: str) -> dict[str, dict[str, Any]]:
    command = evaluated.recorder.one(providers.COMMAND, f"{host}-bundle")
    return {f["path"]: f for f in json.loads(plain(command.inputs["stdin"]))["files"]}


@pytest.mark.parametrize("count", [1, 40])
def test_user_data_fits_and_is_a_cloud_config(
    slaves: Callable[[int], list[dict[str, Any]]], count: int
) -> None:
    evaluated = run_program(slaves=slaves(count))
    for instance in evaluated.recorder.of_type(providers.INSTANCE):
        raw = base64.b64decode(plain(instance.inputs["userDataBase64"]))
        assert len(raw) <= USER_DATA_LIMIT
        assert gzip.decompress(raw).startswith(b"#cloud-config\n")


def test_user_data_does_not_grow_with_the_hosts_that_a_slave_scrapes(
    slaves: Callable[[int], list[dict[str, Any]]],
) -> None:
    (slave,) = slaves(1)
    targets = [f"10.20.{n // 200}.{n % 200 + 10}:9100" for n in range(600)]
    slave["jobs"] = [{"name": "fleet", "targets": targets}]
    evaluated = run_program(slaves=[slave])
    instance = evaluated.recorder.one(providers.INSTANCE, "slave-site0-1")
    raw = base64.b64decode(plain(instance.inputs["userDataBase64"]))
    assert len(raw) <= USER_DATA_LIMIT
    written = {f["path"]: f for f in yaml.safe_load(gzip.decompress(raw))["write_files"]}
    first = written["/etc/ufw/user.rules"]["content"]
    whole = bundle_files(evaluated, "slave-site0")["/etc/ufw/user.rules"]["content"]
    assert "10.20.2.209" in whole
    assert "10.20." not in first.replace("10.20.0.0/16", "")
    # What is there at first is there afterwards, too: in by SSH, out for packages and names.
    rules = [line for line in first.splitlines() if line.startswith("-A")]
    assert rules
    assert set(rules) < set(whole.splitlines())
    for port in (22, 80, 443, 53, 123):
        assert f"--dport {port} " in first


def test_outputs_derived_from_secrets_are_secret(dev: Evaluated) -> None:
    secret = {name for name, value in dev.outputs.items() if isinstance(value, Secret)}
    assert secret == {
        "caCertificate",
        "sshPrivateKey",
        "federationPasswords",
        "masterPassword",
        "masterNextPassword",
    }


def test_outputs_tell_a_person_where_everything_is(dev: Evaluated) -> None:
    assert dev.outputs["master"]["url"] == "https://prometheus-master.example.com"
    slave = dev.outputs["slaves"]["dublin"]
    assert slave["federationUrl"] == "https://prometheus-slave.example.com:9095/federate"
    assert slave["sshCommand"].endswith("admin@prometheus-slave.example.com")


def test_commands_verify_the_host_show_nothing_and_follow_the_instance(dev: Evaluated) -> None:
    for command in [*commands_of(dev, "master"), *commands_of(dev, "slave-dublin")]:
        connection = plain(command.inputs["connection"])
        assert isinstance(command.inputs["connection"], Secret)
        assert connection["hostKey"].startswith("ssh-ed25519 ")
        assert connection["dialErrorLimit"] == -1
        # first-boot is sent nothing.
        assert isinstance(command.inputs.get("stdin"), Secret) == ("first-boot" not in command.name)
        assert command.inputs["logging"] == "none"
        assert command.inputs["addPreviousOutputInEnv"] is False
        assert {"stdout", "stderr"} <= set(command.secret_outputs)
        assert command.timeout_create
        assert command.inputs["create"] == command.inputs["update"]
        assert " " not in command.inputs["create"].removeprefix("sudo ")
        assert command.inputs["triggers"][0].startswith(command.name.rpartition("-")[0][:6])
        assert "delete" not in command.inputs


def commands_of(evaluated: Evaluated, host: str) -> list[Resource]:
    """The commands of a server, in the order of their purposes."""
    names = [f"{host}-{purpose}" for purpose in PURPOSES]
    return [evaluated.recorder.one(providers.COMMAND, name) for name in names]


def test_only_the_first_contact_is_made_by_its_key_and_none_of_first_boot_is_made_again(
    dev: Evaluated,
) -> None:
    for host in ("master", "slave-dublin"):
        first, booted, bundle = commands_of(dev, host)
        keys = [plain(c.inputs["connection"])["hostKey"] for c in (first, booted, bundle)]
        assert keys[0] != keys[1]
        assert keys[1] == keys[2]
        # With a renewed operators' key nobody must look for a host key or an address that is gone.
        assert first.ignore_changes == booted.ignore_changes == ("connection",)
        assert not bundle.ignore_changes


def test_address_and_volume_join_an_instance_after_its_first_boot_over_its_own_address(
    dev: Evaluated,
) -> None:
    for host in ("master", "slave-dublin"):
        first, booted, bundle = commands_of(dev, host)
        assert first.urn in booted.dependencies
        joining = [
            dev.recorder.one(type_, host)
            for type_ in (providers.EIP_ASSOCIATION, providers.VOLUME_ATTACHMENT)
        ]
        for resource in joining:
            assert booted.urn in resource.dependencies
            assert resource.urn in bundle.dependencies
        own, same, elastic = (
            plain(command.inputs["connection"])["host"] for command in (first, booted, bundle)
        )
        assert own == same
        assert own != elastic == address(dev, f"prometheus-{host.partition('-')[0]}")


class Refusing(Recorder):
    """A Recorder that fails to make the resource of one name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def register(self, resource: Resource) -> tuple[str, dict[str, Any]]:
        """Writes it down, or fails."""
        if resource.name == self._name:
            raise RuntimeError(f"{resource.name} failed")
        return super().register(resource)


def test_a_failed_first_boot_leaves_address_volume_and_secrets_where_they_are(
    dev: Evaluated,
) -> None:
    refusing = Refusing("master-first-boot")
    with pytest.raises(RuntimeError, match="master-first-boot failed"):
        evaluate(dev.project, refusing)
    made = {(r.type, r.name) for r in refusing.resources}
    moving = (providers.EIP_ASSOCIATION, providers.VOLUME_ATTACHMENT)
    assert not {(type_, "master") for type_ in moving} & made
    assert (providers.COMMAND, "master-bundle") not in made
    assert {(type_, "slave-dublin") for type_ in moving} <= made, "the other host goes on"


def test_hashes_are_bcrypt_of_the_agreed_costs(dev: Evaluated) -> None:
    files = bundle_files(dev, "slave-dublin")
    assert "$2b$12$" in files["/etc/prometheus/web.yml"]["content"]
    htpasswd = files["/etc/nginx/users.htpasswd"]
    assert "$2b$05$" in htpasswd["content"]
    assert htpasswd["secret"]


def inputs_of(evaluated: Evaluated) -> dict[str, Any]:
    return {r.urn: plain(r.inputs) for r in evaluated.recorder.resources}


def test_two_evaluations_give_identical_inputs_for_every_resource(dev: Evaluated) -> None:
    assert inputs_of(run_program()) == inputs_of(dev)


def test_a_user_s_own_password_is_used_and_kept_secret() -> None:
    password = "canary-canary-canary-canary"
    slave = {"site": "cork", "host": "slave", "password": password}
    evaluated = run_program(slaves=[slave])
    assert plain(evaluated.outputs["federationPasswords"]) == {"cork": password}
    for resource in evaluated.recorder.resources:
        for text, secret in strings(resource.inputs):
            assert secret or password not in text


def test_an_environment_may_have_only_slaves() -> None:
    existing = {"host": "prometheus.elsewhere.example", "cidrs": ["203.0.113.9/32"]}
    evaluated = run_program(master={}, existingMaster=existing)
    assert [r.name for r in evaluated.recorder.of_type(providers.INSTANCE)] == ["slave-dublin-1"]
    assert ("tcp", 9095, "203.0.113.9/32") in ingress(evaluated, "slave-dublin")
    assert isinstance(evaluated.outputs["existingMasterKey"], Secret)
    request = evaluated.recorder.one(providers.CERT_REQUEST, "existing-master-request")
    assert request.inputs["dnsNames"] == ["prometheus.elsewhere.example"]


def test_an_environment_may_have_only_a_master() -> None:
    evaluated = run_program(slaves=[])
    assert [r.name for r in evaluated.recorder.of_type(providers.INSTANCE)] == ["master-1"]


def test_the_subnet_is_the_user_s_or_one_of_the_default_vpc(dev: Evaluated) -> None:
    (instance, *_) = dev.recorder.of_type(providers.INSTANCE)
    assert instance.inputs["subnetId"] == "subnet-a"
    asked = {
        (name, *args["filters"][0]["values"], *args["filters"][-1]["values"])
        for name, args in dev.recorder.functions
        if "filters" in args and "getAmi" not in name
    }
    # In a zone that has such instances.
    assert asked == {
        ("aws:ec2/getInstanceTypeOfferings:getInstanceTypeOfferings", "t3.micro", "t3.micro"),
        ("aws:ec2/getSubnets:getSubnets", "vpc-default", "zone-a"),
    }
    named = run_program(master={"host": "m", "subnetId": "subnet-mine"})
    assert named.recorder.one(providers.INSTANCE, "master-1").inputs["subnetId"] == "subnet-mine"


def test_a_site_may_live_in_another_region() -> None:
    slave = {"site": "ohio", "host": "slave-ohio", "region": "us-east-2"}
    evaluated = run_program(slaves=[slave])
    for resource in evaluated.recorder.resources:
        if resource.type.startswith("aws:") and resource.name.startswith("slave-ohio"):
            expected = None if resource.type == providers.RECORD else "us-east-2"
            assert resource.inputs.get("region") == expected, resource.urn


def test_a_bumped_generation_makes_a_new_instance_and_keeps_address_and_volume(
    dev: Evaluated,
) -> None:
    bumped = run_program(master={"host": "prometheus-master", "generation": 2})
    names = {(r.type, r.name) for r in bumped.recorder.resources}
    assert (providers.INSTANCE, "master-2") in names
    assert (providers.INSTANCE, "master-1") not in names
    for type_ in (providers.EIP, providers.VOLUME):
        assert [r.urn for r in bumped.recorder.of_type(type_)] == [
            r.urn for r in dev.recorder.of_type(type_)
        ]


def test_a_pinned_image_is_used_as_it_is() -> None:
    evaluated = run_program(amiId="ami-0123456789abcdef0")
    for instance in evaluated.recorder.of_type(providers.INSTANCE):
        assert instance.inputs["ami"] == "ami-0123456789abcdef0"
    assert "aws:ec2/getAmi:getAmi" not in {name for name, _ in evaluated.recorder.functions}


def test_a_wrong_setting_ends_the_program_before_any_resource() -> None:
    with pytest.raises(pulumi.RunError, match=f"{NAMESPACE}:zone.*write it like example.com"):
        run_program(zone="nonsense")


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(pulumi.RunError, match=f"{NAMESPACE}:operatorCIDRs: there is no such"):
        run_program(operatorCIDRs=[])


def test_evaluation_time_grows_no_faster_than_the_number_of_sites(
    slaves: Callable[[int], list[dict[str, Any]]],
) -> None:
    seconds: dict[int, float] = {}
    for count in (1, 6, 24):
        started = time.process_time()
        run_program(slaves=slaves(count))
        seconds[count] = time.process_time() - started
    each = (seconds[6] - seconds[1]) / 5
    # Linear with room for noise; a quadratic term would give four times as much.
    assert seconds[24] <= seconds[6] + 18 * each * 1.6, seconds
