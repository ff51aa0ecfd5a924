"""The random provider: passwords and bytes from the machine's own entropy, kept in the state."""

from __future__ import annotations

import base64
import secrets
import string

from sandbox.program import Resource
from sandbox.providers import RANDOM_BYTES, Inputs, Outputs, Provider


class RandomProvider(Provider):
    """https://www.pulumi.com/registry/packages/random/."""

    def create(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        """A random value of the asked length."""
        if resource.type == RANDOM_BYTES:
            value = secrets.token_bytes(inputs["length"])
            return "none", {"base64": base64.b64encode(value).decode(), "hex": value.hex()}
        if inputs.get("special", True):
            raise NotImplementedError(f"{resource.name}: passwords with special characters")
        letters = string.ascii_letters + string.digits
        return "none", {"result": "".join(secrets.choice(letters) for _ in range(inputs["length"]))}
