"""The firewall table of a host as a security group.

The same table becomes the host's ufw rules (hostfiles.firewall). Rules are standalone resources:
inline rules and standalone ones undo each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pulumi
import pulumi_aws as aws
from pulumi import Input, Output, ResourceOptions

from components.environment import Environment
from components.lookups import Network
from hostfiles.model import Rule

# A table may depend on public addresses that exist only after `up` began, but how many rules it
# has must not: it is built once from these names alone, and again from the addresses.
Table = Callable[[Mapping[str, str]], tuple[Rule, ...]]
# What makes the table once the host's network is known.
TableOf = Callable[[Network], Table]


class Firewall(pulumi.ComponentResource):
    """A security group whose rules are those of a table.

    `addresses` are the public addresses (without prefix length) that the table refers to, by name.
    """

    security_group_id: Output[str]
    rules: Output[tuple[Rule, ...]]

    def __init__(
        self,
        name: str,
        table: Table,
        addresses: Mapping[str, Input[str]],
        environment: Environment,
        vpc_id: str,
        region: str | None,
        opts: ResourceOptions | None = None,
    ) -> None:
        super().__init__("prometheus-federation:index:Firewall", name, None, opts)
        child_opts = ResourceOptions(parent=self)
        group = aws.ec2.SecurityGroup(
            name,
            name_prefix=f"{environment.prefix}-{name}-",
            description=f"Prometheus federation: {name}",
            vpc_id=vpc_id,
            region=region,
            tags=environment.tags(name),
            opts=child_opts,
        )
        self.rules = Output.all(**addresses).apply(lambda known: table(dict(known)))
        for rule in table(dict.fromkeys(addresses, "0.0.0.0")):  # noqa: S104 - only names are read
            kind = (
                aws.vpc.SecurityGroupIngressRule
                if rule.direction == "ingress"
                else aws.vpc.SecurityGroupEgressRule
            )
            kind(
                f"{name}-{rule.name}",
                security_group_id=group.id,
                ip_protocol=rule.protocol,
                from_port=rule.port,
                to_port=rule.port,
                cidr_ipv4=self.rules.apply(lambda rules, name=rule.name: _cidr(rules, name)),
                description=rule.description,
                region=region,
                tags=environment.tags(f"{name}-{rule.name}"),
                opts=child_opts,
            )
        self.security_group_id = group.id
        self.register_outputs({"securityGroupId": self.security_group_id})


def _cidr(rules: tuple[Rule, ...], name: str) -> str:
    return next(rule.cidr for rule in rules if rule.name == name)
