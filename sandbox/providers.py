"""What a provider is to the engine, and what the engine must know of resource types.

The types and their replacing properties are those of the providers' schemas:
https://www.pulumi.com/registry/packages/aws/api-docs/ (and tls, random, command).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sandbox.program import Resource

Inputs = Mapping[str, Any]
Outputs = dict[str, Any]

INSTANCE = "aws:ec2/instance:Instance"
VOLUME = "aws:ebs/volume:Volume"
VOLUME_ATTACHMENT = "aws:ec2/volumeAttachment:VolumeAttachment"
EIP = "aws:ec2/eip:Eip"
EIP_ASSOCIATION = "aws:ec2/eipAssociation:EipAssociation"
RECORD = "aws:route53/record:Record"
SECURITY_GROUP = "aws:ec2/securityGroup:SecurityGroup"
INGRESS_RULE = "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule"
EGRESS_RULE = "aws:vpc/securityGroupEgressRule:SecurityGroupEgressRule"
ROLE = "aws:iam/role:Role"
ROLE_POLICY = "aws:iam/rolePolicy:RolePolicy"
ROLE_POLICY_ATTACHMENT = "aws:iam/rolePolicyAttachment:RolePolicyAttachment"
INSTANCE_PROFILE = "aws:iam/instanceProfile:InstanceProfile"
LIFECYCLE_POLICY = "aws:dlm/lifecyclePolicy:LifecyclePolicy"
PRIVATE_KEY = "tls:index/privateKey:PrivateKey"
SELF_SIGNED_CERT = "tls:index/selfSignedCert:SelfSignedCert"
CERT_REQUEST = "tls:index/certRequest:CertRequest"
LOCALLY_SIGNED_CERT = "tls:index/locallySignedCert:LocallySignedCert"
RANDOM_PASSWORD = "random:index/randomPassword:RandomPassword"  # noqa: S105 - a type, no password
RANDOM_BYTES = "random:index/randomBytes:RandomBytes"
COMMAND = "command:remote:Command"

_ALL = frozenset({"*"})

# Properties whose change makes a new resource instead of changing the old one.
REPLACE_ON: Mapping[str, frozenset[str]] = {
    INSTANCE: frozenset("ami associatePublicIpAddress availabilityZone privateIp subnetId".split()),
    VOLUME: frozenset("availabilityZone encrypted kmsKeyId snapshotId".split()),
    VOLUME_ATTACHMENT: frozenset("deviceName instanceId volumeId".split()),
    EIP: frozenset({"domain"}),
    EIP_ASSOCIATION: frozenset("allocationId instanceId publicIp".split()),
    RECORD: frozenset("name type zoneId".split()),
    SECURITY_GROUP: frozenset("description name namePrefix vpcId".split()),
    INGRESS_RULE: frozenset({"securityGroupId"}),
    EGRESS_RULE: frozenset({"securityGroupId"}),
    ROLE: frozenset("name namePrefix path".split()),
    ROLE_POLICY: frozenset("name namePrefix role".split()),
    LIFECYCLE_POLICY: frozenset(),
    ROLE_POLICY_ATTACHMENT: frozenset("policyArn role".split()),
    INSTANCE_PROFILE: frozenset("name namePrefix path".split()),
    PRIVATE_KEY: _ALL,
    SELF_SIGNED_CERT: _ALL,
    CERT_REQUEST: _ALL,
    LOCALLY_SIGNED_CERT: _ALL - {"earlyRenewalHours"},
    RANDOM_PASSWORD: _ALL,
    RANDOM_BYTES: _ALL,
    COMMAND: frozenset({"triggers"}),
}

# Outputs that the real provider declares secret.
SECRET_OUTPUTS: Mapping[str, frozenset[str]] = {
    PRIVATE_KEY: frozenset("privateKeyPem privateKeyOpenssh privateKeyPemPkcs8".split()),
    RANDOM_PASSWORD: frozenset("result bcryptHash".split()),
    RANDOM_BYTES: frozenset("base64 hex".split()),
}


def replaces(type_: str, changed: set[str]) -> set[str]:
    """Those of the changed properties that make a new resource of the type."""
    which = REPLACE_ON.get(type_, frozenset())
    return changed if "*" in which else changed & which


class Provider:
    """One cloud provider on this machine. Methods run in threads, side by side.

    A method may be killed half way and called again: each must find and finish what is there.
    """

    def create(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        """Makes the resource; returns its id and outputs."""
        raise NotImplementedError(f"{resource.type}: the sandbox has no such resource")

    def update(
        self, resource: Resource, id_: str, inputs: Inputs, old: Inputs, outputs: Outputs
    ) -> Outputs:
        """Changes the resource in place, from the inputs `old`; returns its outputs."""
        raise NotImplementedError(f"{resource.type} is replaced, not changed")

    def delete(self, type_: str, id_: str, inputs: Inputs, timeout: str) -> None:
        """Removes the resource; one that is gone already is no error.

        `timeout` is a Go duration such as `5m`, or empty where the program sets none.
        """

    def outdated(self, type_: str, id_: str, outputs: Outputs) -> str:
        """Why an unchanged resource must be made anew, or an empty string."""
        return ""
