"""What every component of an environment shares: settings, look-ups, tags, CA, SSH key.

Tags come from here and from nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pulumi
import pulumi_tls as tls
from pulumi import Output

from components.generations import numbered
from components.lookups import Lookups, look_up
from components.pki import CertificateAuthority
from settings import NAMESPACE, Settings


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One environment, as its components see it."""

    stack: str
    settings: Settings
    lookups: Lookups
    authority: CertificateAuthority
    ssh_key: tls.PrivateKey
    # Who may log in: today's key and the next one, so that it can be renewed over itself.
    operator_keys: Output[str]

    @property
    def prefix(self) -> str:
        """What names of AWS resources begin with, so that two stacks can share an account."""
        return f"{NAMESPACE}-{self.stack}"

    @property
    def trusted(self) -> Output[str]:
        """The PEM of all that a certificate of ours may chain to."""
        return Output.concat(self.authority.bundle, self.settings.public_roots)

    def tags(self, name: str) -> Mapping[str, str]:
        """The tags of an AWS resource. The program's own win over the user's."""
        return {
            **self.settings.tags,
            "Name": f"{self.prefix}-{name}",
            "Project": NAMESPACE,
            "Stack": self.stack,
            "ManagedBy": "pulumi",
        }


def make_environment(settings: Settings) -> Environment:
    """The environment of the current stack."""
    lookups = look_up(settings)
    rotation = settings.rotation
    # ED25519: the one kind that every SSH server of the last decade takes and that is short.
    keys = [
        tls.PrivateKey(numbered("operator-ssh", number), algorithm="ED25519")
        for number in (rotation.ssh_key, rotation.ssh_key + 1)
    ]
    return Environment(
        stack=pulumi.get_stack(),
        settings=settings,
        lookups=lookups,
        authority=CertificateAuthority("ca", rotation.ca, rotation.oldest_ca or rotation.ca),
        ssh_key=keys[0],
        operator_keys=Output.concat(*(key.public_key_openssh for key in keys)),
    )
