"""The aws provider, as far as it needs no kernel."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox import providers, snapshots
from sandbox.aws import AwsProvider, Cloud, Instance
from sandbox.host import SandboxError
from sandbox.image import Image
from sandbox.network import Fabric, NetworkModel
from sandbox.plan import Plan
from sandbox.program import Resource
from sandbox.progress import silent
from sandbox.world import load_world, with_world

NOTHING = json.dumps({"Statement": []})
SOMETHING = json.dumps({"Statement": [{"Effect": "Allow", "Action": "a:B", "Resource": "*"}]})


@pytest.fixture
def aws(tmp_path: Path) -> AwsProvider:
    # A slot whose runtime folder is never there.
    plan = Plan(3, tmp_path)
    return AwsProvider(plan, load_world(), Fabric(plan), Image(name="i", layers=()), silent)


def create(aws: AwsProvider, type_: str, **inputs: Any) -> tuple[str, dict[str, Any]]:
    resource = Resource(urn="u", type=type_, name="watcher", inputs=inputs, custom=True, parent="")
    return aws.create(resource, inputs)


RULE = {
    "securityGroupId": "sg-1",
    "cidrIpv4": "203.0.113.7/32",
    "ipProtocol": "tcp",
    "fromPort": 22,
    "toPort": 22,
}


def named(urn: str, type_: str, inputs: dict[str, Any]) -> Resource:
    return Resource(urn=urn, type=type_, name=urn, inputs=inputs, custom=True, parent="")


def test_a_group_takes_no_rule_twice_but_finds_that_of_a_killed_run(
    aws: AwsProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws, "_apply", lambda: None)
    ingress = providers.INGRESS_RULE
    one, _ = aws.create(named("one", ingress, RULE), RULE)
    assert aws.create(named("one", ingress, RULE), RULE)[0] == one
    with pytest.raises(SandboxError, match=r"InvalidPermission\.Duplicate"):
        aws.create(named("two", ingress, RULE), RULE)
    other = RULE | {"fromPort": 23, "toPort": 23}
    two, _ = aws.create(named("two", ingress, other), other)
    with pytest.raises(SandboxError, match="has this very rule already"):
        aws.update(named("two", ingress, RULE), two, RULE, other, {})
    aws.delete(ingress, one, RULE, "")
    aws.update(named("two", ingress, RULE), two, RULE, other, {})
    # The same the other way is another rule.
    aws.create(named("out", providers.EGRESS_RULE, RULE), RULE)


def test_a_zone_takes_no_name_twice(aws: AwsProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "_apply", lambda: None)
    record = {"zoneId": "Z", "name": "a.example.com", "type": "A", "records": ["198.51.100.40"]}
    aws.create(named("one", providers.RECORD, record), record)
    aws.create(named("one", providers.RECORD, record), record)
    elsewhere = record | {"records": ["198.51.100.41"]}
    with pytest.raises(SandboxError, match=r"has a record a\.example\.com already"):
        aws.create(named("two", providers.RECORD, elsewhere), elsewhere)


def test_roles_are_noted(aws: AwsProvider) -> None:
    name, role = create(aws, providers.ROLE, namePrefix="watch-")
    assert name.startswith("watch-")
    assert role["arn"] == f"arn:aws:iam::000000000000:role/{name}"
    policy, _ = create(aws, providers.ROLE_POLICY, role=name, name="read", policy=NOTHING)
    assert policy == f"{name}:read"
    profile, outputs = create(aws, providers.INSTANCE_PROFILE, role=name)
    assert profile.startswith("watcher-")
    assert (outputs["name"], outputs["role"]) == (profile, name)


def test_user_data_is_its_owners_alone(
    aws: AwsProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the key of the first contact."""
    monkeypatch.setattr(aws, "_apply", lambda: None)
    monkeypatch.setattr(aws, "_start", lambda id_: None)
    monkeypatch.setattr(
        Fabric,
        "model",
        property(lambda fabric: with_world(NetworkModel(), load_world(), Plan(3, tmp_path))),
    )
    create(
        aws,
        providers.INSTANCE,
        instanceType="t3.micro",
        ami="ami",
        subnetId="subnet-dublin",
        vpcSecurityGroupIds=[],
        userDataBase64="c2VjcmV0",
    )
    (file,) = tmp_path.rglob("user-data")
    assert file.read_text() == "secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def told(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "aws" / "roles.json").read_text())


def test_the_metadata_service_hears_which_instance_has_which_role_as_long_as_it_has(
    aws: AwsProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws, "_apply", lambda: None)
    role, _ = create(aws, providers.ROLE, namePrefix="watch-")
    policy, _ = create(aws, providers.ROLE_POLICY, role=role, policy=NOTHING)
    profile, _ = create(aws, providers.INSTANCE_PROFILE, role=role)
    aws._cloud.instances["i-1"] = Instance(
        machine="m",
        image_id="ami",
        instance_type="t3.micro",
        subnet_id="subnet-dublin",
        groups=[],
        private_ip="10.20.1.128",
        temporary_ip="203.0.113.40",
        name="watcher",
        profile=profile,
    )
    aws._remember_identity(providers.ROLE_POLICY, policy, {"role": role, "policy": SOMETHING})
    assert told(tmp_path)["holders"] == {"203.0.113.40": role}
    assert told(tmp_path)["roles"] == {role: json.loads(SOMETHING)["Statement"]}
    aws._cloud.associations["eipassoc-1"] = ("eipalloc-1", "i-1")
    aws._cloud.addresses["eipalloc-1"] = "198.51.100.40"
    aws._tell_identities()
    assert told(tmp_path)["holders"] == {"198.51.100.40": role}
    reloaded = Cloud.load(tmp_path / "cloud.json")
    assert (reloaded.profiles, reloaded.role_policies) == (
        {profile: role},
        {policy: (role, SOMETHING)},
    )
    aws.delete(providers.INSTANCE_PROFILE, profile, {}, "")
    aws.delete(providers.ROLE_POLICY, policy, {}, "")
    assert told(tmp_path) == {"roles": {}, "holders": {}}


def test_given_hosts_keep_their_public_addresses_beside_the_programs_own(
    aws: AwsProvider, tmp_path: Path
) -> None:
    world = load_world()
    public = replace(world, hosts=(replace(world.hosts[0], public=True), *world.hosts[1:]))
    given = with_world(NetworkModel(), public, Plan(3, tmp_path))
    assert aws._model(given).eips == given.eips
    assert list(given.eips.values()) == ["core01"]
    stale = replace(given, eips={**given.eips, "198.51.100.65": "an-instance-that-is-gone"})
    assert aws._model(stale).eips == given.eips


def volume(aws: AwsProvider, **inputs: Any) -> str:
    tags = {"Backup": "stack", "Name": "stack-watcher-data"}
    return create(aws, providers.VOLUME, **{"size": 1, "tags": tags, **inputs})[0]


def policy(keep: int) -> dict[str, Any]:
    return {
        "policyDetails": {
            "targetTags": {"Backup": "stack"},
            "schedules": [{"retainRule": {"count": keep}}],
        }
    }


def test_a_policy_s_snapshot_is_the_volume_at_that_moment_and_a_volume_is_made_of_it(
    aws: AwsProvider, tmp_path: Path
) -> None:
    create(aws, providers.LIFECYCLE_POLICY, **policy(2))
    id_, _ = volume(aws), volume(aws, tags={"Backup": "another stack"})
    file = tmp_path / "volumes" / f"{id_}.img"
    with file.open("r+b") as image:
        image.write(b"before")
    (taken,) = aws.run_policies()
    with file.open("r+b") as image:
        image.write(b"later!")
    restored = volume(aws, size=2, snapshotId=taken.id)
    made = tmp_path / "volumes" / f"{restored}.img"
    with made.open("rb") as image:
        assert image.read(6) == b"before"
    assert made.stat().st_size == 2 << 30
    assert made.stat().st_blocks < 1000, "sparse"
    with pytest.raises(SandboxError, match=f"no snapshot snap-none.\nThere are: {taken.id}"):
        volume(aws, snapshotId="snap-none")


def test_a_policy_prunes_and_snapshots_outlive_volume_and_policy(aws: AwsProvider) -> None:
    create(aws, providers.LIFECYCLE_POLICY, **policy(2))
    first = volume(aws)
    taken = [snapshot.id for _ in range(3) for snapshot in aws.run_policies()]
    assert [s.id for s in snapshots.every(aws._plan)] == taken[1:]
    aws._cloud.policies.clear()
    aws._cloud.volumes.clear()
    assert not aws.run_policies()
    assert [s.volume for s in snapshots.every(aws._plan)] == [first, first]


def test_a_volume_smaller_than_its_snapshot_is_refused(aws: AwsProvider) -> None:
    create(aws, providers.LIFECYCLE_POLICY, **policy(2))
    volume(aws, size=2)
    (taken,) = aws.run_policies()
    with pytest.raises(SandboxError, match="has 2 GiB, the volume 1"):
        volume(aws, snapshotId=taken.id)
