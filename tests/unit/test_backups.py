"""Backups off the host, and volumes that are made from them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sandbox import providers
from settings import Settings, check
from tests.unit.conftest import Evaluated, run_program
from tests.unit.test_settings import environment

SNAPSHOT = "snap-0123456789abcdef0"
LATER = "snap-0fedcba9876543210"


def test_every_data_volume_and_nothing_else_is_in_the_policy(dev: Evaluated) -> None:
    (policy,) = dev.recorder.of_type(providers.LIFECYCLE_POLICY)
    details = policy.inputs["policyDetails"]
    # Two tags would be an "or".
    assert details["targetTags"] == {"Backup": "prometheus-federation-dev"}
    tagged = [
        r.name
        for r in dev.recorder.resources
        if details["targetTags"].items() <= r.inputs.get("tags", {}).items()
    ]
    assert sorted(tagged) == [volume.name for volume in dev.recorder.of_type(providers.VOLUME)]
    (schedule,) = details["schedules"]
    assert schedule["createRule"] == {"interval": 24, "intervalUnit": "HOURS", "times": "01:00"}
    assert schedule["retainRule"] == {"count": 7}
    assert schedule["copyTags"] is True
    assert policy.inputs["state"] == "ENABLED"


def test_the_policy_s_role_is_for_the_lifecycle_manager_with_its_managed_policy(
    dev: Evaluated,
) -> None:
    role = dev.recorder.one(providers.ROLE, "backups")
    (statement,) = json.loads(role.inputs["assumeRolePolicy"])["Statement"]
    assert statement["Principal"] == {"Service": "dlm.amazonaws.com"}
    attachment = dev.recorder.one(providers.ROLE_POLICY_ATTACHMENT, "backups")
    assert (
        attachment.inputs["policyArn"]
        == "arn:aws:iam::aws:policy/service-role/AWSDataLifecycleManagerServiceRole"
    )
    (policy,) = dev.recorder.of_type(providers.LIFECYCLE_POLICY)
    assert attachment.urn in policy.dependencies


def test_each_region_has_a_policy_and_settings_say_when_and_how_many() -> None:
    slaves = [
        {"site": "dublin", "host": "a"},
        {"site": "ohio", "host": "b", "region": "us-east-2"},
        {"site": "iowa", "host": "c", "region": "us-east-2"},
    ]
    found = run_program(slaves=slaves, backup={"intervalHours": 6, "keep": 28})
    policies = found.recorder.of_type(providers.LIFECYCLE_POLICY)
    assert {policy.inputs.get("region") for policy in policies} == {None, "us-east-2"}
    assert len(policies) == 2
    for policy in policies:
        (schedule,) = policy.inputs["policyDetails"]["schedules"]
        assert schedule["createRule"]["interval"] == 6
        assert schedule["retainRule"] == {"count": 28}


def test_keep_0_makes_no_policy_and_no_role() -> None:
    found = run_program(backup={"keep": 0})
    for type_ in (providers.LIFECYCLE_POLICY, providers.ROLE, providers.ROLE_POLICY_ATTACHMENT):
        assert not found.recorder.of_type(type_)


def restored(snapshots: str | list[str], **more: Any) -> Evaluated:
    return run_program(master={"host": "prometheus-master", "restoreFrom": snapshots, **more})


def volumes(evaluated: Evaluated) -> list[str]:
    names = [volume.name for volume in evaluated.recorder.of_type(providers.VOLUME)]
    return [name for name in names if name.startswith("master")]


def attached(evaluated: Evaluated) -> str:
    id_ = evaluated.recorder.one(providers.VOLUME_ATTACHMENT, "master").inputs["volumeId"]
    return id_.rpartition("-")[0]


def test_a_restored_volume_stands_beside_the_old_one_in_a_new_instance(dev: Evaluated) -> None:
    found = restored(SNAPSHOT)
    assert volumes(found) == ["master-data", f"master-data-{SNAPSHOT}"]
    assert attached(found) == f"master-data-{SNAPSHOT}"
    new = found.recorder.one(providers.VOLUME, f"master-data-{SNAPSHOT}")
    assert new.inputs["snapshotId"] == SNAPSHOT
    assert new.inputs["encrypted"] is True
    assert new.protect
    # What is there already is neither changed nor replaced, and stays protected.
    old, before = (e.recorder.one(providers.VOLUME, "master-data") for e in (found, dev))
    assert (old.urn, old.inputs, old.protect) == (before.urn, before.inputs, before.protect)
    instances = [i.name for i in found.recorder.of_type(providers.INSTANCE)]
    # EBS stops an instance to take its volume away: another volume needs another instance.
    assert instances == ["master-1-9abcdef0", "slave-dublin-1"]


def test_a_second_restore_keeps_the_first_and_the_user_lets_both_go() -> None:
    found = restored([SNAPSHOT, LATER])
    assert volumes(found) == ["master-data", f"master-data-{SNAPSHOT}", f"master-data-{LATER}"]
    assert attached(found) == f"master-data-{LATER}"
    last = restored([SNAPSHOT, LATER], keepReplacedVolumes=False)
    assert volumes(last) == [f"master-data-{LATER}"]
    assert [i.urn for i in last.recorder.of_type(providers.INSTANCE)] == [
        i.urn for i in found.recorder.of_type(providers.INSTANCE)
    ]


def chosen(**master: Any) -> Settings:
    return check(environment() | {"master": {"host": "prometheus-master", **master}})


def test_without_restore_the_instance_is_named_after_its_generation_alone() -> None:
    master = chosen(generation=3).master
    assert master
    assert master.instance_generation == "3"
    assert master.volumes == (None,)


@pytest.mark.parametrize("hours", [1, 8, 24])
def test_the_hours_are_those_that_the_lifecycle_manager_takes(hours: int) -> None:
    assert check(environment() | {"backup": {"intervalHours": hours}}).backup.keep == 7
