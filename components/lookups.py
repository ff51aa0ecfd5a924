"""What the program must know of the account before it makes anything.

Looks up and makes nothing. All of it is done first and once for an environment: an answer that is
waited for while hundreds of resources are pending costs as much as they all do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pulumi_aws as aws

from settings import HostSettings, Settings


@dataclass(frozen=True, kw_only=True)
class Network:
    """A subnet and the VPC it belongs to."""

    vpc_id: str
    vpc_cidr: str
    subnet_id: str
    availability_zone: str


@dataclass(frozen=True, kw_only=True)
class Image:
    """An operating system's official images: who publishes them, their name, their user.

    https://wiki.debian.org/Cloud/AmazonEC2Image and
    https://documentation.ubuntu.com/aws/aws-how-to/instances/find-ubuntu-images/
    """

    owner: str
    name: str
    user: str


IMAGES = {
    "debian13": Image(owner="136693071363", name="debian-13-amd64-*", user="admin"),
    # The first LTS whose OpenSSL knows X25519MLKEM768, which nginx is told to prefer.
    "ubuntu2604": Image(
        owner="099720109477",
        name="ubuntu/images/hvm-ssd-gp3/ubuntu-*-26.04-amd64-server-*",
        user="ubuntu",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """The answers. Plain values, not Outputs: they decide where a data volume is made."""

    zone_id: str
    _networks: Mapping[str, Network]
    _images: Mapping[str | None, str]

    def network(self, host: HostSettings) -> Network:
        """Where a host stands: the subnet that the user names, else a default one."""
        return self._networks[host.host]

    def image(self, host: HostSettings) -> str:
        """The id of the machine image that a host is made from."""
        return self._images[host.region]


def look_up(settings: Settings) -> Lookups:
    """Asks AWS for everything that an environment needs to know."""
    hosts = [*settings.slaves, *([settings.master] if settings.master else [])]
    places = {
        host.host: (host.subnet_id, host.region, settings.instance_type_of(host)) for host in hosts
    }
    networks = {place: _find_network(*place) for place in dict.fromkeys(places.values())}
    regions = dict.fromkeys(host.region for host in hosts)
    return Lookups(
        zone_id=aws.route53.get_zone(name=settings.zone).zone_id,
        _networks={host: networks[place] for host, place in places.items()},
        _images={region: settings.ami_id or _find_image(settings.os, region) for region in regions},
    )


def _find_network(subnet_id: str | None, region: str | None, instance_type: str) -> Network:
    """The subnet of that id, or the first (by id) default subnet of the region whose zone has
    such instances: not every zone has all types.

    https://docs.aws.amazon.com/vpc/latest/userguide/default-vpc.html
    https://docs.aws.amazon.com/ec2/latest/instancetypes/instance-discovery.html
    """
    if subnet_id is None:
        default = aws.ec2.get_vpc(default=True, region=region)
        zones = aws.ec2.get_instance_type_offerings(
            location_type="availability-zone",
            filters=[
                aws.ec2.GetInstanceTypeOfferingsFilterArgs(
                    name="instance-type", values=[instance_type]
                )
            ],
            region=region,
        ).locations
        candidates = aws.ec2.get_subnets(
            filters=[
                aws.ec2.GetSubnetsFilterArgs(name="vpc-id", values=[default.id]),
                aws.ec2.GetSubnetsFilterArgs(name="default-for-az", values=["true"]),
                # No such zone at all would be no filter at all.
                aws.ec2.GetSubnetsFilterArgs(name="availability-zone", values=zones or ["none"]),
            ],
            region=region,
        ).ids
        if not candidates:
            raise LookupError(
                f"the default VPC {default.id} has no default subnet in a zone that has "
                f"{instance_type}; name a subnet with subnetId, or another instanceType"
            )
        subnet_id = min(candidates)
    subnet = aws.ec2.get_subnet(id=subnet_id, region=region)
    vpc = aws.ec2.get_vpc(id=subnet.vpc_id, region=region)
    return Network(
        vpc_id=subnet.vpc_id,
        vpc_cidr=vpc.cidr_block,
        subnet_id=subnet_id,
        availability_zone=subnet.availability_zone,
    )


def _find_image(os: str, region: str | None) -> str:
    image = IMAGES[os]
    return aws.ec2.get_ami(
        most_recent=True,
        owners=[image.owner],
        filters=[aws.ec2.GetAmiFilterArgs(name="name", values=[image.name])],
        region=region,
    ).id
