"""bcrypt is slow on purpose: what it made of a password once is kept, and not made again.

Two thirds of what an `up` computed were hashes that the one before had computed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping

import bcrypt


@contextlib.contextmanager
def remembered(known: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """While it lasts, bcrypt computes no hash that is in `known`, and none twice.

    Yields those that were asked for so far: what to know the next time.
    """
    asked: dict[str, str] = {}
    compute = bcrypt.hashpw

    def hashpw(password: bytes, salt: bytes) -> bytes:
        # The salt says the cost, too.
        key = hashlib.sha256(salt + b"\0" + password).hexdigest()
        if key not in asked:
            asked[key] = known.get(key) or compute(password, salt).decode()
        return asked[key].encode()

    bcrypt.hashpw = hashpw
    try:
        yield asked
    finally:
        bcrypt.hashpw = compute
