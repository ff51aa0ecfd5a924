"""What an instance may ask of AWS: one role, with the statements that its features need.

None is needed by most hosts, and then there is no role. The credentials reach the host by the
instance metadata service, and are nowhere in the program's state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pulumi_aws as aws
from pulumi import ResourceOptions

from components.environment import Environment

Statement = dict[str, Any]


def discovery(regions: Sequence[str]) -> Statement:
    """To describe the instances of these regions.

    These actions know no ARNs, so the region is what limits them.
    https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonec2.html
    """
    return {
        "Effect": "Allow",
        "Action": ["ec2:DescribeAvailabilityZones", "ec2:DescribeInstances"],
        "Resource": "*",
        "Condition": {"StringEquals": {"ec2:Region": list(regions)}},
    }


def challenge_record(zone_id: str, fqdn: str) -> list[Statement]:
    """To write, and to take away, the TXT record in a zone that proves one name by DNS-01.

    certbot looks for the zone by its name, and asks how far a change has come, which has an id of
    its own each time. ListHostedZones knows neither ARNs nor conditions.
    https://docs.aws.amazon.com/Route53/latest/DeveloperGuide/specifying-conditions-route53.html
    """
    only = {
        "NormalizedRecordNames": [f"_acme-challenge.{fqdn}"],
        "RecordTypes": ["TXT"],
        "Actions": ["UPSERT", "DELETE"],
    }
    named = {f"route53:ChangeResourceRecordSets{key}": values for key, values in only.items()}
    return [
        {
            "Effect": "Allow",
            "Action": ["route53:ChangeResourceRecordSets"],
            "Resource": f"arn:aws:route53:::hostedzone/{zone_id}",
            "Condition": {
                "ForAllValues:StringEquals": named,
                # "All values" is true of none at all.
                "Null": dict.fromkeys(named, "false"),
            },
        },
        {
            "Effect": "Allow",
            "Action": ["route53:GetChange"],
            "Resource": "arn:aws:route53:::change/*",
        },
        {"Effect": "Allow", "Action": ["route53:ListHostedZones"], "Resource": "*"},
    ]


def service_role(
    name: str, service: str, environment: Environment, opts: ResourceOptions
) -> aws.iam.Role:
    """A role that a service of AWS takes on, and nobody else."""
    return aws.iam.Role(
        name,
        name_prefix=f"{environment.prefix}-"[:38],
        assume_role_policy=json.dumps(
            {
                "Version": "2012-10-17",
                "Statement": [
                    {
                        "Effect": "Allow",
                        "Action": "sts:AssumeRole",
                        "Principal": {"Service": service},
                    }
                ],
            }
        ),
        tags=environment.tags(name),
        opts=opts,
    )


def instance_profile(
    name: str, statements: Sequence[Statement], environment: Environment, opts: ResourceOptions
) -> aws.iam.InstanceProfile | None:
    """A profile that allows an instance these and nothing else; None if there are none."""
    if not statements:
        return None
    role = service_role(name, "ec2.amazonaws.com", environment, opts)
    aws.iam.RolePolicy(
        name,
        role=role.name,
        policy=json.dumps({"Version": "2012-10-17", "Statement": list(statements)}),
        opts=opts,
    )
    return aws.iam.InstanceProfile(name, role=role.name, tags=environment.tags(name), opts=opts)
