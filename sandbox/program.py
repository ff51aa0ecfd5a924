"""Runs the program with somebody else in the place of Pulumi's engine.

`evaluate` runs a project's `__main__.py` exactly as it stands, with the settings that the Pulumi
CLI would give it, and hands each resource that it registers to a Backend. The sandbox, the
preview without an account and the unit tests are three Backends.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import json
import re
import runpy
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pulumi
import yaml
from pulumi.runtime import config as runtime_config
from pulumi.runtime import mocks as runtime_mocks
from pulumi.runtime import rpc, settings
from pulumi.runtime.proto import resource_pb2
from pulumi.runtime.sync_await import _ensure_event_loop, _sync_await

from sandbox.host import SandboxError

_HERE = Path(__file__).resolve().parent.parent
# How a secret looks on the wire: https://github.com/pulumi/pulumi/blob/master/sdk/python/lib/pulumi/runtime/rpc.py
_SIGNATURE = rpc._special_sig_key
_SECRET = rpc._special_secret_sig

# Resources wait for each other inside their threads, so there must be more threads than are ever
# waiting; asyncio's own executor has six on two cores.
_THREADS = 64
# After a failure: so long nothing at all happens when nothing will happen any more.
_QUIET_SECONDS = 1.0


@dataclass(frozen=True)
class Secret:
    """A value that must not be shown."""

    value: Any = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Resource:
    """A resource as the program registers it.

    In `inputs`, what is secret is a `Secret`, at any depth. Keys are camelCase, as on the wire.
    """

    urn: str
    type: str
    name: str
    inputs: Mapping[str, Any]
    custom: bool
    parent: str
    dependencies: tuple[str, ...] = ()
    ignore_changes: tuple[str, ...] = ()
    secret_outputs: tuple[str, ...] = ()
    protect: bool = False
    delete_before_replace: bool = False
    timeout_create: str = ""
    timeout_update: str = ""
    timeout_delete: str = ""


class Backend(Protocol):
    """What stands in for the engine and the providers. Its methods are called from threads."""

    def register(self, resource: Resource) -> tuple[str, dict[str, Any]]:
        """Makes (or finds) a resource; returns its id and outputs. An error fails the run."""
        ...

    def invoke(self, token: str, args: Mapping[str, Any]) -> dict[str, Any]:
        """Answers a provider function, such as `aws:ec2/getSubnet:getSubnet`."""
        ...

    def read_stack(self, name: str) -> Mapping[str, Any]:
        """The outputs of another stack, in which what is secret is a `Secret`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Project:
    """A checkout and the settings of one of its stacks.

    `encrypted` names the settings that have a stand-in in `config`, as only the Pulumi CLI can
    decrypt them.
    """

    directory: Path
    name: str
    stack: str
    config: Mapping[str, Any]
    encrypted: tuple[str, ...] = ()


class Named(Protocol):
    """Whatever has a name: a resource, or the record of one."""

    @property
    def name(self) -> str:
        """The name that the program gave it."""
        ...


class ResourcesFailedError(Exception):
    """More than one resource failed: what became of each."""

    def __init__(self, failures: Sequence[tuple[Named, Exception]]) -> None:
        self.failures = tuple(failures)
        told = sorted(
            # A command's error says itself whose it is.
            str(error) if str(error).startswith(f"{what.name}:") else f"{what.name}: {error}"
            for what, error in failures
        )
        super().__init__("\n".join([f"{len(told)} resources failed:", *told]))


def read_project(
    directory: Path,
    stack: str,
    *,
    stack_file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Project:
    """Pulumi.yaml's defaults, under the stack's own file, under `overrides`.

    Keys are full (`prometheus-federation:zone`). An encrypted value has a stand-in that changes
    when it does. Raises SandboxError for a file of a stack that is missing or that the Pulumi CLI
    would refuse. https://www.pulumi.com/docs/iac/concepts/projects/project-file/
    """
    description = yaml.safe_load((directory / "Pulumi.yaml").read_text())
    name = description["name"]
    config = {
        f"{name}:{key}": schema["default"]
        for key, schema in description.get("config", {}).items()
        if "default" in schema
    }
    chosen = stack_file or directory / f"Pulumi.{stack}.yaml"
    config.update(_stack_settings(chosen, name))
    config.update(overrides or {})
    encrypted: list[str] = []
    return Project(
        directory=directory,
        name=name,
        stack=stack,
        config={key: _without_cipher(item, key, key, encrypted) for key, item in config.items()},
        encrypted=tuple(encrypted),
    )


def _stack_settings(file: Path, project: str) -> dict[str, Any]:
    """What a stack's file sets. No error shows a value: any may be a secret."""
    try:
        # As bytes: what is no text is no YAML either.
        content = yaml.safe_load(file.read_bytes())
    except FileNotFoundError:
        raise SandboxError(
            f"There is no file {file}.",
            "Write it, or name another: CONFIG=<file> for `make up`, STACK=<stack> for "
            "`make preview`.",
        ) from None
    except OSError as error:
        raise SandboxError(
            f"{file} cannot be read: {error.strerror}.", "Name a file of settings."
        ) from None
    except yaml.YAMLError as error:
        # Its own text would show the line.
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SandboxError(f"{file} is not YAML{where}.", "Correct the file.") from None
    if content is None:
        return {}
    settings = content.get("config") if isinstance(content, dict) else content
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        what = "config" if isinstance(content, dict) else "the file"
        raise SandboxError(
            f"{file}: {what} is no mapping.",
            f"Write keys with their values under `config:`, such as `{project}:zone: example.com`.",
        )
    # The CLI refuses these; here nobody would read them.
    bare = [str(key) for key in settings if ":" not in str(key)]
    if bare:
        raise SandboxError(
            f"{file}: {', '.join(bare)}: a key of `config:` without a prefix.",
            f"Write {', '.join(f'{project}:{key}' for key in bare)}.",
        )
    return settings


def _without_cipher(value: Any, path: str, name: str, found: list[str]) -> Any:
    """A setting with a stand-in for each value that only the stack's owner can decrypt.

    `found` gets their paths; `name` is the key under which the value stands.
    """
    if isinstance(value, Mapping):
        if set(value) == {"secure"}:
            found.append(path)
            return _stand_in(name.rpartition(":")[2], str(value["secure"]))
        return {
            key: _without_cipher(item, f"{path}.{key}", str(key), found)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [
            _without_cipher(item, f"{path}[{number}]", name, found)
            for number, item in enumerate(value)
        ]
    return value


def _stand_in(name: str, ciphertext: str) -> str:
    digest = hashlib.sha256(ciphertext.encode()).hexdigest()[:48]
    if re.search(r"^key$|privateKey$", name, re.IGNORECASE):
        label = "PRIVATE KEY"
    elif re.search(r"^ca$|(cert|certificate|pem)$", name, re.IGNORECASE):
        label = "CERTIFICATE"
    else:
        return digest
    return f"-----BEGIN {label}-----\n{digest}\n-----END {label}-----\n"


def evaluate(project: Project, backend: Backend, *, preview: bool = False) -> dict[str, Any]:
    """Runs the program and returns its outputs, in which what is secret is a `Secret`.

    Raises what the program or the backend raised, when all that does not depend on it is done;
    ResourcesFailedError for more than one resource. Several evaluations may follow one another in
    a process: each has a Pulumi runtime of its own.
    """
    # In a thread of its own: Pulumi runs event loops inside event loops, which leaves the
    # interpreter's count of recursions wrong for what comes after on the same thread.
    with (
        # To the very end: what waits for a resource looks its types up by its module's name.
        _modules_from(project.directory),
        ThreadPoolExecutor(1, thread_name_prefix="program") as thread,
    ):
        return thread.submit(
            contextvars.Context().run, _evaluate, project, backend, preview
        ).result()


def plain(value: Any) -> Any:
    """A value with its secrets unwrapped."""
    if isinstance(value, Secret):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _evaluate(project: Project, backend: Backend, preview: bool) -> dict[str, Any]:
    loop = asyncio.new_event_loop()
    loop.set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="resource"))
    # What failed is raised below; what failed because of it would only be noise.
    loop.set_exception_handler(lambda *_: None)
    asyncio.set_event_loop(loop)
    monitor = _Monitor(backend)
    try:
        runtime_mocks.set_mocks(
            _Mocks(backend), project.name, project.stack, preview=preview, monitor=monitor
        )
        runtime_config.set_all_config({k: _encoded(v) for k, v in project.config.items()}, [])
        outputs: dict[str, Any] = {}

        @runtime_mocks.test
        def run() -> None:
            with contextlib.chdir(project.directory):
                runpy.run_path(str(project.directory / "__main__.py"), run_name="__main__")

        run()
        root = settings.get_root_resource()
        exported: Mapping[str, Any] = getattr(root, "outputs", {})

        @runtime_mocks.test
        def read() -> pulumi.Output[None]:
            every = {key: pulumi.Output.from_input(value) for key, value in exported.items()}
            return pulumi.Output.from_input(
                {key: _with_secrecy(output) for key, output in every.items()}
            ).apply(outputs.update)

        read()
        return outputs
    except Exception as error:
        _drain(loop, monitor)
        raise (monitor.failure or error) from None
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        asyncio.set_event_loop(None)


def _drain(loop: asyncio.AbstractEventLoop, monitor: _Monitor) -> None:
    """Lets what does not depend on a failure go on to its end: Pulumi stops waiting at the first.

    What waits for something that now never comes has no end; it is left when nothing else moves.
    """
    while pending := asyncio.all_tasks(loop):
        ended, _ = loop.run_until_complete(
            asyncio.wait(pending, timeout=_QUIET_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        )
        if not ended and not monitor.busy:
            return


def _with_secrecy(output: pulumi.Output[Any]) -> pulumi.Output[Any]:
    async def secrecy() -> Any:
        value = await output.future()
        return Secret(value) if await output.is_secret() else value

    # Output.unsecret would lose what we ask about, hence the detour over the future.
    return pulumi.Output.from_input(asyncio.ensure_future(secrecy()))


class _Monitor(runtime_mocks.MockMonitor):
    """Pulumi's mock engine, with what it leaves out: parents, dependencies and options."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(_Mocks(backend))
        self._backend = backend
        self._failures: list[tuple[Resource, Exception]] = []
        self._under_way = 0
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether anything is being made or looked up."""
        return self._under_way > 0

    @property
    def failure(self) -> Exception | None:
        """What went wrong, without what failed because of it and what was called off."""
        called_off = [f for f in self._failures if isinstance(f[1], InterruptedError)]
        real = [f for f in self._failures if f not in called_off]
        if len(real) > 1:
            return ResourcesFailedError(real)
        return next((error for _, error in [*real, *called_off]), None)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1

    def Invoke(self, request: Any) -> Any:  # noqa: N802 - gRPC's name
        with self._counted():
            return super().Invoke(request)

    def make_urn(self, parent: str, type_: str, name: str) -> str:
        """As the real engine does: with the types of all components above, but not the stack's."""
        above = parent.split("::")[2] if parent else ""
        chain = "" if above in ("", "pulumi:pulumi:Stack") else f"{above}$"
        stack, project = settings.get_stack(), settings.get_project()
        return f"urn:pulumi:{stack}::{project}::{chain}{type_}::{name}"

    def RegisterResource(self, request: Any) -> Any:  # noqa: N802 - gRPC's name
        urn = self.make_urn(request.parent, request.type, request.name)
        if request.type == "pulumi:pulumi:Stack":
            return resource_pb2.RegisterResourceResponse(urn=urn)
        _ensure_event_loop()
        resource = Resource(
            urn=urn,
            type=request.type,
            name=request.name,
            inputs=_secrets_marked(rpc.deserialize_properties(request.object)),
            custom=request.custom,
            parent=request.parent,
            dependencies=tuple(sorted(request.dependencies)),
            ignore_changes=tuple(request.ignoreChanges),
            secret_outputs=tuple(request.additionalSecretOutputs),
            protect=request.protect,
            delete_before_replace=request.deleteBeforeReplace,
            timeout_create=request.customTimeouts.create,
            timeout_update=request.customTimeouts.update,
            timeout_delete=request.customTimeouts.delete,
        )
        try:
            with self._counted():
                id_, outputs = self._backend.register(resource)
        except Exception as error:
            self._failures.append((resource, error))
            raise
        self.resources[urn] = self.ResourceRegistration(urn, id_, outputs)
        wire = _sync_await(rpc.serialize_properties(outputs, {}))
        return resource_pb2.RegisterResourceResponse(urn=urn, id=id_, object=wire)

    def ReadResource(self, request: Any) -> Any:  # noqa: N802 - gRPC's name
        if request.type != "pulumi:pulumi:StackReference":
            return super().ReadResource(request)
        _ensure_event_loop()
        with self._counted():
            outputs = self._backend.read_stack(request.id)
        known = {
            "name": request.id,
            "outputs": plain(outputs),
            "secretOutputNames": sorted(k for k, v in outputs.items() if plain(v) != v),
        }
        return resource_pb2.ReadResourceResponse(
            urn=self.make_urn(request.parent, request.type, request.name),
            properties=_sync_await(rpc.serialize_properties(known, {})),
        )


class _Mocks(runtime_mocks.Mocks):
    """Only functions come here; resources are handled by _Monitor."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def new_resource(self, args: runtime_mocks.MockResourceArgs) -> tuple[str | None, dict]:
        raise NotImplementedError(f"{args.typ} {args.name}: nothing here is read or imported")

    def call(self, args: runtime_mocks.MockCallArgs) -> tuple[dict, list[tuple[str, str]] | None]:
        return self._backend.invoke(args.token, _integers(args.args)), []


def _secrets_marked(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.get(_SIGNATURE) == _SECRET:
            return Secret(_secrets_marked(value["value"]))
        return {key: _secrets_marked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_secrets_marked(item) for item in value]
    return _integers(value)


def _integers(value: Any) -> Any:
    """On the wire every number is a float; what has no fraction was an integer."""
    if isinstance(value, Mapping):
        return {key: _integers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _encoded(value: Any) -> str:
    """A setting as the CLI hands it over: strings as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


@contextlib.contextmanager
def _modules_from(directory: Path) -> Iterator[None]:
    """The program's own folder first on the import path.

    Modules of this checkout's program are forgotten for the while where another one's is run.
    """
    another = not directory.samefile(_HERE)
    ours = _modules_of(_HERE) if another else {}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))
        for name in _modules_of(directory) if another else ():
            del sys.modules[name]
        sys.modules.update(ours)


def _modules_of(directory: Path) -> dict[str, ModuleType]:
    """What was imported from a checkout, but for this package, and for what is in its .venv."""
    return {
        name: module
        for name, module in sys.modules.items()
        if (top := name.partition(".")[0]) not in ("sandbox", "__main__")
        and (getattr(module, "__file__", None) or "").startswith(str(directory / top))
    }
