"""What bcrypt made of a password once is not made again."""

from __future__ import annotations

from pathlib import Path

import bcrypt
import pytest

from sandbox import hashes
from sandbox.program import Secret
from sandbox.state import State


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Of which passwords bcrypt itself was asked for a hash."""
    asked: list[bytes] = []
    compute = bcrypt.hashpw

    def hashpw(password: bytes, salt: bytes) -> bytes:
        asked.append(password)
        return compute(password, salt)

    monkeypatch.setattr(bcrypt, "hashpw", hashpw)
    return asked


def test_a_hash_is_computed_once_and_known_the_next_time(computed: list[bytes]) -> None:
    cheap, dearer = (b"$2b$%02d$%b" % (cost, b"." * 22) for cost in (4, 5))
    with hashes.remembered({}) as first:
        made = [bcrypt.hashpw(b"one", salt) for salt in (cheap, dearer, cheap)]
    assert made[0] == made[2] != made[1]
    assert all(bcrypt.checkpw(b"one", one) for one in made)
    assert computed == [b"one", b"one"], "one for each salt and cost"
    with hashes.remembered(first) as second:
        assert bcrypt.hashpw(b"one", cheap) == made[0]
        assert bcrypt.hashpw(b"two", cheap) != made[0]
    assert computed == [b"one", b"one", b"two"]
    assert len(second) == 2, "what nobody asked for is forgotten"
    bcrypt.hashpw(b"one", cheap)
    assert computed[-1] == b"one", "from here on bcrypt is asked again"


def test_a_state_keeps_them_and_shows_neither_them_nor_passwords(tmp_path: Path) -> None:
    state = State.load(tmp_path / "state.json")
    with hashes.remembered({}) as asked:
        state.hashes = Secret(asked)
        made = bcrypt.hashpw(b"canary", b"$2b$04$" + b"." * 22).decode()
        state.save()
    text = state.path.read_text()
    assert made not in text
    assert "canary" not in text
    assert list(State.load(state.path).hashes.value.values()) == [made]
