"""Passwords, and the hashes that stand for them on the server's side.

A hash must be the same on every run, or every `pulumi up` would change every host: its salt is a
RandomBytes in the state, never one that bcrypt draws anew.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import bcrypt
import pulumi
import pulumi_random as random
from pulumi import Output, ResourceOptions
from pydantic import SecretStr

from components.generations import numbered
from hostfiles.model import Credential

PASSWORD_LENGTH = 48

# exporter-toolkit caches what it checked, so 12 costs once. nginx does not cache: cost 12 blocks a
# worker for 200 ms on every request, and adds nothing to 48 random characters; cost 5 takes 2 ms.
STRONG_COST = 12
CHEAP_COST = 5

_STANDARD = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BCRYPT = b"./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def bcrypt_hash(password: str, salt_base64: str, cost: int) -> str:
    """The bcrypt hash of a password with a salt of 16 bytes, given in standard base64.

    bcrypt writes base64 with an alphabet of its own; 16 bytes are 22 characters of it.
    """
    salt = base64.b64decode(salt_base64)
    if len(salt) != 16:
        raise ValueError(f"a bcrypt salt has 16 bytes, this one {len(salt)}")
    letters = base64.b64encode(salt).rstrip(b"=").translate(bytes.maketrans(_STANDARD, _BCRYPT))
    return bcrypt.hashpw(password.encode(), b"$2b$%02d$%b" % (cost, letters)).decode()


class RandomCredential(pulumi.ComponentResource):
    """A user and a password: the user's own, or 48 random characters.

    `credential` holds the password and its hashes, as a secret.
    """

    password: Output[str]
    credential: Output[Credential]

    def __init__(
        self,
        name: str,
        user: str,
        password: SecretStr | None = None,
        opts: ResourceOptions | None = None,
    ) -> None:
        super().__init__("prometheus-federation:index:RandomCredential", name, None, opts)
        child_opts = ResourceOptions(parent=self)
        salt = random.RandomBytes(f"{name}-salt", length=16, opts=child_opts)
        if password is None:
            # No special characters: the password must survive a curl config file and a copy-paste.
            made = random.RandomPassword(
                f"{name}-password", length=PASSWORD_LENGTH, special=False, opts=child_opts
            )
            self.password = Output.secret(made.result)
        else:
            self.password = Output.secret(password.get_secret_value())
        self.credential = Output.secret(
            Output.all(self.password, salt.base64).apply(
                lambda pair: Credential(
                    user=user,
                    password=pair[0],
                    strong_hash=bcrypt_hash(pair[0], pair[1], STRONG_COST),
                    cheap_hash=bcrypt_hash(pair[0], pair[1], CHEAP_COST),
                )
            )
        )
        self.register_outputs({})


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Which password is in use, whether the one before it is still good, and the user's own."""

    generation: int = 1
    keep_old: bool = False
    password: SecretStr | None = None
    next_password: SecretStr | None = None


class RotatingCredential(pulumi.ComponentResource):
    """Passwords under several user names: the one in use, and the next one.

    Servers take all of them, clients send `current`. One generation more makes today's `next` the
    current one: clients may change before their servers do, and no request is refused in between.
    """

    user: str
    current: Output[Credential]
    next: Output[Credential]
    accepted: Sequence[Output[Credential]]

    def __init__(
        self, name: str, user: str, rotation: Rotation, opts: ResourceOptions | None = None
    ) -> None:
        super().__init__("prometheus-federation:index:RotatingCredential", name, None, opts)
        now = rotation.generation
        own = {now: rotation.password, now + 1: rotation.next_password}
        first = now - 1 if rotation.keep_old and now > 1 else now
        made = {
            number: RandomCredential(
                numbered(name, number),
                numbered(user, number),
                own.get(number),
                opts=ResourceOptions(parent=self),
            ).credential
            for number in range(first, now + 2)
        }
        self.user = numbered(user, now)
        self.current, self.next = made[now], made[now + 1]
        self.accepted = list(made.values())
        self.register_outputs({})


def password(credential: Output[Credential]) -> Output[str]:
    """The password of a credential, as an output."""
    return credential.apply(lambda known: known.password)
