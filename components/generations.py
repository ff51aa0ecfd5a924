"""Names of what is renewed on purpose: beside each other while both are in use."""

from __future__ import annotations


def numbered(name: str, generation: int) -> str:
    """The resource's name in that generation; the first one has none of its own."""
    return name if generation == 1 else f"{name}-{generation}"
