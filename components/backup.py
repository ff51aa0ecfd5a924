"""Backups off the host: EBS snapshots of the data volumes, by a lifecycle policy in each region.

AWS makes and prunes them, whether or not a host of ours is well.
https://docs.aws.amazon.com/ebs/latest/userguide/snapshot-lifecycle.html
"""

from __future__ import annotations

from collections.abc import Mapping

import pulumi
import pulumi_aws as aws
from pulumi import ResourceOptions

from components.environment import Environment
from components.rights import service_role

# https://docs.aws.amazon.com/aws-managed-policy/latest/reference/AWSDataLifecycleManagerServiceRole.html
MANAGED_POLICY = "arn:aws:iam::aws:policy/service-role/AWSDataLifecycleManagerServiceRole"
# The timer of the hosts starts at 00:00 and has half an hour of delay: the volume's snapshot holds
# Prometheus's own of the same day.
START = "01:00"


def backup_tag(environment: Environment) -> Mapping[str, str]:
    """What the policy finds data volumes by: one tag, as a second one would be an "or"."""
    return {"Backup": environment.prefix}


class Backups(pulumi.ComponentResource):
    """The lifecycle policies of an environment. `keep: 0` makes none."""

    def __init__(self, environment: Environment, opts: ResourceOptions | None = None) -> None:
        super().__init__("prometheus-federation:index:Backups", "backups", None, opts)
        self._child_opts = ResourceOptions(parent=self)
        chosen = environment.settings
        hosts = [*chosen.slaves, *([chosen.master] if chosen.master else [])]
        regions = dict.fromkeys(host.region for host in hosts)
        if chosen.backup.keep:
            role, allowed = self._create_role(environment)
            for region in regions:
                self._create_policy(region, role, allowed, environment)
        self.register_outputs({})

    def _create_role(
        self, environment: Environment
    ) -> tuple[aws.iam.Role, aws.iam.RolePolicyAttachment]:
        role = service_role("backups", "dlm.amazonaws.com", environment, self._child_opts)
        allowed = aws.iam.RolePolicyAttachment(
            "backups", role=role.name, policy_arn=MANAGED_POLICY, opts=self._child_opts
        )
        return role, allowed

    def _create_policy(
        self,
        region: str | None,
        role: aws.iam.Role,
        allowed: aws.iam.RolePolicyAttachment,
        environment: Environment,
    ) -> None:
        backup = environment.settings.backup
        aws.dlm.LifecyclePolicy(
            f"backups-{region}" if region else "backups",
            # Not the stack's name: it may have a dot, and this may not.
            description="Data volumes of a federated Prometheus",
            execution_role_arn=role.arn,
            state="ENABLED",
            policy_details=aws.dlm.LifecyclePolicyPolicyDetailsArgs(
                policy_type="EBS_SNAPSHOT_MANAGEMENT",
                resource_types=["VOLUME"],
                target_tags=dict(backup_tag(environment)),
                schedules=[
                    aws.dlm.LifecyclePolicyPolicyDetailsScheduleArgs(
                        name="data",
                        # The name of the volume, to find the snapshots of a host by.
                        copy_tags=True,
                        create_rule=aws.dlm.LifecyclePolicyPolicyDetailsScheduleCreateRuleArgs(
                            interval=backup.interval_hours, interval_unit="HOURS", times=START
                        ),
                        retain_rule=aws.dlm.LifecyclePolicyPolicyDetailsScheduleRetainRuleArgs(
                            count=backup.keep
                        ),
                    )
                ],
            ),
            region=region,
            tags=environment.tags("backups"),
            opts=ResourceOptions(parent=self, depends_on=[allowed]),
        )
