"""What the engine remembers between runs: a file, with the secrets in it encrypted.

As in Pulumi's own state, only secret values are ciphertext. The passphrase lies beside the file,
readable by its owner alone: whoever copies the state does not get the secrets with it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet

from sandbox.host import SandboxError
from sandbox.program import Secret

_MARK = "__secret__"


@dataclass(kw_only=True)
class Record:
    """A resource that exists. Secrets in `inputs` and `outputs` are `Secret`, at any depth."""

    urn: str
    type: str
    name: str
    id: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    custom: bool
    protect: bool = False
    # What deleting it needs: the URNs of what it depends on, and its own timeout.
    dependencies: list[str] = field(default_factory=list)
    timeout_delete: str = ""
    # Counts up over the life of the state: what came later depends on what came before.
    sequence: int = 0


@dataclass(kw_only=True)
class State:
    """The resources by URN, and the old ones that a replacement left for deletion."""

    path: Path
    records: dict[str, Record] = field(default_factory=dict)
    condemned: list[Record] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    settings: Secret = field(default_factory=lambda: Secret({}))
    # What bcrypt made of which password (sandbox.hashes).
    hashes: Secret = field(default_factory=lambda: Secret({}))

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._cipher = Fernet(_passphrase(self.path.with_name("passphrase")))

    @classmethod
    def load(cls, path: Path) -> State:
        """The state at a path; an empty one if there is none yet."""
        state = cls(path=path)
        if path.exists():
            known = state._decrypted(json.loads(path.read_text()))
            try:
                state.records = {urn: Record(**record) for urn, record in known["records"].items()}
                state.condemned = [Record(**record) for record in known["condemned"]]
                state.outputs, state.settings = known["outputs"], known["settings"]
                state.hashes = known["hashes"]
            except (KeyError, TypeError):
                raise SandboxError(
                    f"{path} was written by another version of the sandbox.",
                    "Run `make down` and `make up`.",
                ) from None
        return state

    @property
    def everything(self) -> list[Record]:
        """Every resource that exists, those left for deletion too."""
        return [*self.records.values(), *self.condemned]

    def put(self, record: Record, replaced: Record | None = None) -> None:
        """Remembers a resource, and an old one in its place for deletion."""
        with self._lock:
            newest = max((known.sequence for known in self.records.values()), default=0)
            record.sequence = record.sequence or newest + 1
            self.records[record.urn] = record
            if replaced is not None:
                self.condemned.append(replaced)
            self.save()

    def forget(self, record: Record) -> None:
        """Forgets a resource that is gone."""
        with self._lock:
            if self.records.get(record.urn) is record:
                del self.records[record.urn]
            self.condemned = [other for other in self.condemned if other is not record]
            self.save()

    def save(self) -> None:
        """Writes the file whole, or leaves the old one."""
        with self._lock:
            whole = {
                "records": {urn: _fields(rec) for urn, rec in self.records.items()},
                "condemned": [_fields(record) for record in self.condemned],
                "outputs": self.outputs,
                "settings": self.settings,
                "hashes": self.hashes,
            }
            fresh = self.path.with_suffix(".new")
            fresh.touch(mode=0o600)
            fresh.write_text(json.dumps(self._encrypted(whole), indent=1, sort_keys=True))
            fresh.replace(self.path)

    def _encrypted(self, value: Any) -> Any:
        if isinstance(value, Secret):
            return {_MARK: self._cipher.encrypt(json.dumps(value.value).encode()).decode()}
        if isinstance(value, Mapping):
            return {key: self._encrypted(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._encrypted(item) for item in value]
        return value

    def _decrypted(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            if _MARK in value:
                return Secret(json.loads(self._cipher.decrypt(value[_MARK].encode())))
            return {key: self._decrypted(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._decrypted(item) for item in value]
        return value


def _fields(record: Record) -> dict[str, Any]:
    """A record's fields, one level deep: dataclasses.asdict would unwrap the secrets."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _passphrase(path: Path) -> bytes:
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(Fernet.generate_key())
        fresh.replace(path)
    return path.read_bytes()
