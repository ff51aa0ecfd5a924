"""A Prometheus that someone else runs and that federates the slaves of this environment.

It gets a client certificate of this stack's CA. Nothing is installed on it from here.
"""

from __future__ import annotations

import pulumi
from pulumi import Output, ResourceOptions

from components.environment import Environment
from components.pki import LeafArgs, LeafCertificate
from hostfiles.model import Leaf
from settings import ExistingMasterSettings


class ExistingMaster(pulumi.ComponentResource):
    """The client certificate by which an existing master comes in at each slave."""

    leaf: Output[Leaf]

    def __init__(
        self,
        settings: ExistingMasterSettings,
        environment: Environment,
        opts: ResourceOptions | None = None,
    ) -> None:
        name = "existing-master"
        super().__init__("prometheus-federation:index:ExistingMaster", name, None, opts)
        self.leaf = LeafCertificate(
            name,
            LeafArgs(common_name=settings.host, generation=1, server=False, client=True),
            environment.authority,
            opts=ResourceOptions(parent=self),
        ).leaf
        self.register_outputs({})
