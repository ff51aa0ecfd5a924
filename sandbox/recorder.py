"""A Backend that makes nothing: it writes down what the program registers.

What it answers follows from names and inputs alone, so that the same program gives the same
resources on every machine, without an account. The preview and the unit tests use it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from sandbox import providers
from sandbox.program import Resource, plain


class Recorder:
    """Records resources and functions, in the order in which they came.

    `stacks` tells the outputs of another stack, by its name.
    """

    def __init__(self, stacks: Callable[[str], Mapping[str, Any]] = lambda name: {}) -> None:
        self._stacks = stacks
        self.resources: list[Resource] = []
        self.functions: list[tuple[str, Mapping[str, Any]]] = []

    def register(self, resource: Resource) -> tuple[str, dict[str, Any]]:
        """Writes a resource down.

        The id holds a digest of what replaces the resource when it changes: whatever depends on a
        replaced resource sees another id, as it would from the real provider.
        """
        self.resources.append(resource)
        if not resource.custom:
            return "", {}
        settled = {
            key: value
            for key, value in plain(resource.inputs).items()
            if providers.replaces(resource.type, {key}) and key not in resource.ignore_changes
        }
        id_ = f"{resource.name}-{_digest(settled).hex()[:8]}"
        return id_, _outputs(resource, id_)

    def invoke(self, token: str, args: Mapping[str, Any]) -> dict[str, Any]:
        """Answers the look-ups of the program."""
        self.functions.append((token, args))
        answers: dict[str, dict[str, Any]] = {
            "aws:ec2/getVpc:getVpc": {
                "id": args.get("id") or "vpc-default",
                "cidrBlock": "10.0.0.0/16",
            },
            "aws:ec2/getInstanceTypeOfferings:getInstanceTypeOfferings": {"locations": ["zone-a"]},
            "aws:ec2/getSubnets:getSubnets": {"ids": ["subnet-a", "subnet-b"]},
            "aws:ec2/getSubnet:getSubnet": {
                "vpcId": f"vpc-of-{args.get('id')}",
                "availabilityZone": "zone-a",
            },
            "aws:ec2/getAmi:getAmi": {"id": "ami-newest"},
            "aws:route53/getZone:getZone": {"zoneId": f"Z-{args.get('name')}"},
        }
        return {**args, **answers[token]}

    def read_stack(self, name: str) -> Mapping[str, Any]:
        """The outputs of another stack."""
        return self._stacks(name)

    def of_type(self, type_: str) -> list[Resource]:
        """The resources of one type, by name."""
        return sorted((r for r in self.resources if r.type == type_), key=lambda r: r.name)

    def one(self, type_: str, name: str) -> Resource:
        """The resource of that type and name; LookupError if there is none."""
        for resource in self.resources:
            if (resource.type, resource.name) == (type_, name):
                return resource
        raise LookupError(f"no {type_} named {name!r}")


_VALIDITY = {
    "validityStartTime": "2020-01-01T00:00:00Z",
    "validityEndTime": "2030-01-01T00:00:00Z",
}


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()


def _outputs(resource: Resource, id_: str) -> dict[str, Any]:
    """Outputs that are deterministic and no secret, though they stand where secrets would."""
    inputs = plain(resource.inputs)
    digest = _digest(id_)
    answers: dict[str, dict[str, Any]] = {
        # 198.18.0.0/15 is for benchmarks (RFC 2544): never somebody's address.
        providers.EIP: {
            "publicIp": f"198.18.{digest[0]}.{digest[1]}",
            "allocationId": f"eipalloc-{id_}",
        },
        providers.PRIVATE_KEY: {
            "privateKeyPem": f"private key {id_}\n",
            "privateKeyOpenssh": f"private OpenSSH key {id_}\n",
            "publicKeyOpenssh": f"ssh-ed25519 {digest.hex()}\n",
            "publicKeyPem": f"public key {id_}\n",
        },
        providers.SELF_SIGNED_CERT: {"certPem": f"certificate {id_}\n", **_VALIDITY},
        providers.CERT_REQUEST: {"certRequestPem": f"request {id_}\n"},
        providers.LOCALLY_SIGNED_CERT: {"certPem": f"certificate {id_}\n", **_VALIDITY},
        providers.RANDOM_PASSWORD: {"result": digest.hex()[:48]},
        providers.RANDOM_BYTES: {"base64": base64.b64encode(digest[:16]).decode()},
        providers.COMMAND: {"stdout": "", "stderr": ""},
        providers.VOLUME: {"arn": f"arn:{id_}"},
        providers.INSTANCE: {
            "privateIp": f"10.{digest[0]}.{digest[1]}.{digest[2]}",
            "publicIp": f"198.19.{digest[0]}.{digest[1]}",
        },
        providers.ROLE: {"name": id_, "arn": f"arn:{id_}"},
        providers.ROLE_POLICY: {"name": id_},
        providers.INSTANCE_PROFILE: {"name": id_, "arn": f"arn:{id_}"},
    }
    return {**inputs, **answers.get(resource.type, {})}
