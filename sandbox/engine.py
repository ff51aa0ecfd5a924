"""Pulumi's engine on this machine: compares what the program wants with what there is.

Creates what is new, changes what differs, replaces what cannot be changed, leaves the rest alone,
and deletes what the program no longer names. It knows nothing of what a resource is: that is the
providers' business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from sandbox.program import Project, Resource, ResourcesFailedError, Secret, evaluate, plain
from sandbox.providers import SECRET_OUTPUTS, Provider, replaces
from sandbox.state import Record, State

Progress = Callable[[str], AbstractContextManager[None]]


@dataclass(kw_only=True)
class Changes:
    """What a run did, by URN."""

    created: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    # Machines that had stopped, by name.
    started: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {
            "created": self.created,
            "changed": self.updated,
            "replaced": self.replaced,
            "deleted": self.deleted,
            "started": self.started,
        }
        told = [f"{len(urns)} {word}" for word, urns in counts.items() if urns]
        return ", ".join(told) or "no changes"


class ProtectedError(Exception):
    """A resource that must not be destroyed would have been."""


class Engine:
    """A Backend that keeps state and drives the providers.

    `providers` are by package (`aws`, `tls`, …); `functions` answer the program's look-ups;
    `stacks` tells the outputs of another stack, by its name. `cancelled`, once set, lets nothing
    more begin.
    """

    def __init__(
        self,
        state: State,
        providers: Mapping[str, Provider],
        functions: Callable[[str, Mapping[str, Any]], dict[str, Any]],
        progress: Progress,
        stacks: Callable[[str], Mapping[str, Any]],
        cancelled: threading.Event,
    ) -> None:
        self._state = state
        self._stacks = stacks
        self.providers = providers
        self._functions = functions
        self._progress = progress
        self._registered: set[str] = set()
        self._lock = threading.Lock()
        self.changes = Changes()
        self.cancelled = cancelled

    def up(self, project: Project) -> Changes:
        """Makes the world what the project says; raises what went wrong, with the rest done.

        ResourcesFailedError names every resource that failed. After a failure nothing is deleted:
        what the program did not reach may still be wanted.
        """
        self.changes = Changes()
        self._registered = set()
        self._state.outputs = evaluate(project, self)
        self._delete_what_is_gone()
        self._state.save()
        return self.changes

    def _delete_what_is_gone(self) -> None:
        gone = [r for urn, r in self._state.records.items() if urn not in self._registered]
        for record in [*gone, *self._state.condemned]:
            self._refuse_if_protected(record)
        failures: list[tuple[Record, Exception]] = []
        # What could not be deleted may need what it depends on to be deleted later.
        needed: set[str] = set()
        for record in _dependents_first([*gone, *self._state.condemned]):
            if self.cancelled.is_set():
                raise InterruptedError("stopped before this was done; `up` again finishes it")
            try:
                if record.urn not in needed:
                    self._delete(record)
                    continue
            except Exception as error:
                failures.append((record, error))
            needed.update(record.dependencies)
        if failures:
            raise failures[0][1] if len(failures) == 1 else ResourcesFailedError(failures)

    def invoke(self, token: str, args: Mapping[str, Any]) -> dict[str, Any]:
        """Answers a provider function."""
        return self._functions(token, args)

    def read_stack(self, name: str) -> Mapping[str, Any]:
        """The outputs of another stack."""
        return self._stacks(name)

    def register(self, resource: Resource) -> tuple[str, dict[str, Any]]:
        """Brings one resource to what the program says of it."""
        if self.cancelled.is_set():
            raise InterruptedError("stopped before this was done; `up` again finishes it")
        with self._lock:
            if resource.urn in self._registered:
                raise ValueError(f"two resources are named {resource.urn}; name one otherwise")
            self._registered.add(resource.urn)
        old = self._state.records.get(resource.urn)
        if not resource.custom:
            if old is None:
                self._state.put(_record(resource, "", {}, dict(resource.inputs)))
            return "", {}
        if old is None:
            return self._create(resource)
        wanted = dict(resource.inputs)
        for key in resource.ignore_changes:
            wanted.pop(key, None)
            if key in old.inputs:
                wanted[key] = old.inputs[key]
        changed = {
            key
            for key in wanted.keys() | old.inputs.keys()
            if plain(wanted.get(key)) != plain(old.inputs.get(key))
        }
        provider = self._provider(resource.type)
        reason = provider.outdated(old.type, old.id, plain(old.outputs))
        if reason or replaces(resource.type, changed):
            return self._replace(resource, old)
        if changed:
            return self._update(resource, wanted, old)
        kept = _kept(resource)
        if any(getattr(old, name) != value for name, value in kept.items()):
            for name, value in kept.items():
                setattr(old, name, value)
            self._state.save()
        return old.id, plain(old.outputs)

    def _provider(self, type_: str) -> Provider:
        return self.providers[type_.partition(":")[0]]

    def _create(self, resource: Resource) -> tuple[str, dict[str, Any]]:
        # Noted down before it is told: what was told is done, whatever ends this run.
        with self._step("create", resource):
            made = self._provider(resource.type).create(resource, plain(resource.inputs))
            self._state.put(_record(resource, *made, dict(resource.inputs)))
        self.changes.created.append(resource.urn)
        return made

    def _update(
        self, resource: Resource, wanted: dict[str, Any], old: Record
    ) -> tuple[str, dict[str, Any]]:
        with self._step("change", resource):
            outputs = self._provider(resource.type).update(
                resource, old.id, plain(wanted), plain(old.inputs), plain(old.outputs)
            )
            record = _record(resource, old.id, outputs, wanted)
            record.sequence = old.sequence
            self._state.put(record)
        self.changes.updated.append(resource.urn)
        return old.id, outputs

    def _replace(self, resource: Resource, old: Record) -> tuple[str, dict[str, Any]]:
        if old.protect:
            raise ProtectedError(
                f"{resource.urn} would be replaced, and it is protected: its data would be lost. "
                "Undo the change, or set protectData to false first"
            )
        if resource.delete_before_replace:
            self._delete(old, counted=False)
        with self._step("replace", resource):
            made = self._provider(resource.type).create(resource, plain(resource.inputs))
            self._state.put(
                _record(resource, *made, dict(resource.inputs)),
                replaced=None if resource.delete_before_replace else old,
            )
        self.changes.replaced.append(resource.urn)
        return made

    def _refuse_if_protected(self, record: Record) -> None:
        if record.protect:
            raise ProtectedError(
                f"{record.urn} would be deleted, and it is protected. Set protectData to false "
                "and run `up` once before removing it"
            )

    def _delete(self, record: Record, *, counted: bool = True) -> None:
        self._refuse_if_protected(record)
        if record.custom:
            with self._step("delete", record):
                self._provider(record.type).delete(
                    record.type, record.id, plain(record.inputs), record.timeout_delete
                )
                self._state.forget(record)
        else:
            self._state.forget(record)
        if counted and record.custom:
            self.changes.deleted.append(record.urn)

    def _step(self, verb: str, what: Resource | Record) -> AbstractContextManager[None]:
        return self._progress(f"{verb} {what.type.rpartition(':')[2]} {what.name}")


def _dependents_first(records: Iterable[Record]) -> list[Record]:
    """In the order in which they may be deleted; of those that need each other not, the newest.

    Not by age alone: what was replaced is younger than what depends on it.
    """
    newest_first = sorted(records, key=lambda record: record.sequence, reverse=True)
    dependents: dict[str, list[Record]] = {}
    for record in newest_first:
        for urn in record.dependencies:
            dependents.setdefault(urn, []).append(record)
    ordered: list[Record] = []
    visited: set[int] = set()

    def visit(record: Record) -> None:
        if id(record) in visited:
            return
        visited.add(id(record))
        for dependent in dependents.get(record.urn, []):
            visit(dependent)
        ordered.append(record)

    for record in newest_first:
        visit(record)
    return ordered


def _record(
    resource: Resource, id_: str, outputs: dict[str, Any], inputs: dict[str, Any]
) -> Record:
    # As in Pulumi's engine: an output is secret if the input of its name is.
    secret = {key for key, value in inputs.items() if plain(value) != value}
    secret |= SECRET_OUTPUTS.get(resource.type, frozenset()) | set(resource.secret_outputs)
    return Record(
        urn=resource.urn,
        type=resource.type,
        name=resource.name,
        id=id_,
        inputs=inputs,
        outputs={k: Secret(v) if k in secret else v for k, v in outputs.items()},
        custom=resource.custom,
        **_kept(resource),
    )


def _kept(resource: Resource) -> dict[str, Any]:
    """What is remembered of a resource's options, for the run that deletes it."""
    return {
        "protect": resource.protect,
        "dependencies": list(resource.dependencies),
        "timeout_delete": resource.timeout_delete,
    }
