"""What the sandbox takes a policy to allow, on the policies that the program writes."""

from __future__ import annotations

from typing import Any

import pytest

from components import rights
from sandbox import iam

CHANGE = "route53:ChangeResourceRecordSets"
ZONE = "arn:aws:route53:::hostedzone/Z1"
RECORD = rights.challenge_record("Z1", "a.example.com")


def context(**changed: list[str]) -> dict[str, list[str]]:
    given = {
        "NormalizedRecordNames": ["_acme-challenge.a.example.com"],
        "RecordTypes": ["TXT"],
        "Actions": ["UPSERT"],
    }
    return {f"{CHANGE}{key}": values for key, values in {**given, **changed}.items()}


def test_its_own_record_may_be_written_and_taken_away() -> None:
    for action in ("UPSERT", "DELETE"):
        assert iam.allows(RECORD, CHANGE, ZONE, context(Actions=[action]))
    assert iam.allows(RECORD, "route53:ListHostedZones", "*", {})
    assert iam.allows(RECORD, "route53:GetChange", "arn:aws:route53:::change/C1", {})


@pytest.mark.parametrize(
    ("action", "resource", "asked"),
    [
        (CHANGE, ZONE, context(NormalizedRecordNames=["_acme-challenge.b.example.com"])),
        (CHANGE, ZONE, context(NormalizedRecordNames=["a.example.com"])),
        (CHANGE, ZONE, context(RecordTypes=["A"])),
        (CHANGE, ZONE, context(RecordTypes=["TXT", "A"])),
        (CHANGE, ZONE, context(Actions=["CREATE"])),
        (CHANGE, ZONE, {}),
        (CHANGE, "arn:aws:route53:::hostedzone/Z2", context()),
        ("route53:GetChange", ZONE, {}),
        ("route53:GetHostedZone", ZONE, {}),
        ("ec2:DescribeInstances", "*", {}),
    ],
)
def test_nothing_else_is_allowed(action: str, resource: str, asked: iam.Context) -> None:
    assert not iam.allows(RECORD, action, resource, asked)


def test_discovery_is_of_its_region() -> None:
    for region, allowed in (("eu-west-1", True), ("us-east-2", False)):
        asked = {"ec2:Region": [region]}
        statements = [rights.discovery(["eu-west-1"])]
        assert iam.allows(statements, "ec2:DescribeInstances", "*", asked) is allowed
    assert not iam.allows([rights.discovery(["eu-west-1"])], "ec2:DescribeInstances", "*", {})


@pytest.mark.parametrize(
    "unknown",
    [
        {"Effect": "Deny"},
        {"NotAction": "a:B"},
        {"Condition": {"StringLike": {"aws:PrincipalTag/x": "*"}}},
    ],
)
def test_what_is_not_known_is_not_passed_over(unknown: dict[str, Any]) -> None:
    statement = {"Effect": "Allow", "Action": "a:B", "Resource": "*", **unknown}
    with pytest.raises(NotImplementedError):
        iam.allows([statement], "a:B", "*", {})
