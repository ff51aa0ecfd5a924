"""Validated values that settings are made of: a domain name is not any text.

Each error says what the value is not and what to write instead; settings.py adds the key.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, SecretStr
from pydantic.alias_generators import to_camel

from hostfiles.duration import milliseconds

# 24 characters of [A-Za-z0-9] are 142 bits: out of reach for guessing even behind a cheap hash.
PASSWORD_MIN = 24
# bcrypt reads 72 bytes and no more (bcrypt 5 raises beyond them).
PASSWORD_MAX = 72


def matching(pattern: str, remedy: str) -> AfterValidator:
    """A text that is all of a pattern; `remedy` says what another is not, and what to write."""

    def checked(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(remedy)
        return value

    return AfterValidator(checked)


def split_url(value: str, *schemes: str) -> SplitResult | None:
    """The parts of a URL of one of these schemes; None if it is none, or names no host.

    Nor is it one with a port beyond 65535.
    """
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        return None
    return parts if parts.scheme in schemes and parts.hostname else None


def _domain_name(value: str) -> str:
    label = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    if len(value) > 253 or not re.fullmatch(rf"{label}(\.{label})+", value):
        raise ValueError("is not a domain name; write it like example.com")
    return value


def _host_label(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
        raise ValueError(
            "is not a host name; use up to 63 lower-case letters, digits and hyphens, "
            "without the zone"
        )
    return value


def _cidr(value: str) -> str:
    try:
        return str(ipaddress.IPv4Network(value))
    except ValueError as error:
        raise ValueError(
            f"is not an IPv4 network ({error}); write it like 203.0.113.7/32"
        ) from None


def duration(value: str) -> str:
    """The same text, if it is a Prometheus duration; ValueError if not."""
    try:
        milliseconds(value)
    except ValueError:
        raise ValueError("is not a Prometheus duration; write it like 15s, 1m30s or 30d") from None
    return value


def interval(value: str) -> str:
    """The same text, if it is a Prometheus duration of some length; ValueError if not."""
    # Prometheus would take nought for its own default of a minute.
    if milliseconds(duration(value)) == 0:
        raise ValueError("is no time at all; write it like 15s")
    return value


def _target(value: str) -> str:
    host, colon, port = value.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("has no port; write it like core01.example.internal:9100")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", host):
        raise ValueError("has no host name or IPv4 address; write it like core01.internal:9100")
    return value


def _label_name(value: str) -> str:
    if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", value) or value.startswith("__"):
        raise ValueError("is not a label name; use letters, digits and _, not __ in front")
    return value


def _host(value: str) -> str:
    try:
        return str(ipaddress.IPv4Address(value))
    except ValueError:
        return _domain_name(value)


def _address(value: str) -> str:
    try:
        return str(ipaddress.IPv4Address(value))
    except ValueError:
        raise ValueError("is not an IPv4 address; write it like 10.20.1.11") from None


def _host_key(value: str) -> str:
    # Not ssh-rsa: pulumi-command would ask for a signature by SHA-1, which OpenSSH 8.8 refuses.
    kinds = "ssh-ed25519|ecdsa-sha2-nistp256|ecdsa-sha2-nistp384|ecdsa-sha2-nistp521"
    match = re.fullmatch(rf"(({kinds}) [A-Za-z0-9+/]+=*)( .*)?", value.strip())
    if match is None:
        raise ValueError(
            "is no ed25519 or ecdsa host key; take it from the host itself: "
            "cat /etc/ssh/ssh_host_ed25519_key.pub"
        )
    return match[1]


def _private_key(value: SecretStr) -> SecretStr:
    if "PRIVATE KEY-----" not in value.get_secret_value():
        raise ValueError(
            "is not a private key; give the key itself (-----BEGIN … PRIVATE KEY-----), not a path"
        )
    return SecretStr(value.get_secret_value().strip() + "\n")


def _password(value: SecretStr) -> SecretStr:
    length = len(value.get_secret_value().encode())
    if not PASSWORD_MIN <= length <= PASSWORD_MAX:
        raise ValueError(
            f"has {length} bytes; give it {PASSWORD_MIN} to {PASSWORD_MAX}, "
            "or leave it out and a random one is made"
        )
    if not re.fullmatch(r"[!-9;-~]+", value.get_secret_value()):
        raise ValueError("holds a blank, a colon or a character beyond ASCII; leave these out")
    return value


DomainName = Annotated[str, AfterValidator(_domain_name)]
HostLabel = Annotated[str, AfterValidator(_host_label)]
Cidr = Annotated[str, AfterValidator(_cidr)]
Duration = Annotated[str, AfterValidator(duration)]
Interval = Annotated[str, AfterValidator(interval)]
Target = Annotated[str, AfterValidator(_target)]
HostName = Annotated[str, AfterValidator(_host)]
Address = Annotated[str, AfterValidator(_address)]
HostKey = Annotated[str, AfterValidator(_host_key)]
PrivateKey = Annotated[SecretStr, AfterValidator(_private_key)]
LabelName = Annotated[str, AfterValidator(_label_name)]
SubnetId = Annotated[
    str, matching(r"subnet-[a-z0-9-]+", "is no subnet; write it like subnet-0123456789abcdef0")
]
SnapshotId = Annotated[
    str, matching(r"snap-[0-9a-f]{8,17}", "is no snapshot; write it like snap-0123456789abcdef0")
]
Region = Annotated[
    str, matching(r"[a-z]{2}(-[a-z]+)+-\d", "is no region of AWS; write it like eu-west-1")
]
# Of Linux.
UserName = Annotated[
    str, matching(r"[a-z_][a-z0-9_-]*", "is no user of a Linux host; write it like admin")
]
Password = Annotated[SecretStr, AfterValidator(_password)]


class Model(BaseModel):
    """What all settings have in common: frozen, camelCase outside, no unknown key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, hide_input_in_errors=False
    )
