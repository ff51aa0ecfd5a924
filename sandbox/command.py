"""The command provider: remote commands, over real SSH, from this machine.

https://www.pulumi.com/registry/packages/command/api-docs/remote/command/
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from sandbox.program import Resource
from sandbox.providers import Inputs, Outputs, Provider

_UNITS = {"s": 1, "m": 60, "h": 3600}
# OpenSSH's own exit code: the connection failed and the command never ran.
_SSH_FAILED = 255


class CommandError(Exception):
    """The command ran and failed, or its host could not be reached in time."""


class CommandProvider(Provider):
    """Runs `create`, and `update` (else `create` again) when an input changed.

    `cancelled`, once set, ends the waiting for hosts that do not answer.
    """

    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled

    def create(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        """Runs the command for the first time."""
        output = self._run(
            resource.name, inputs, inputs["create"], _seconds(resource.timeout_create)
        )
        return f"command-{resource.name}", output

    def update(
        self,
        resource: Resource,
        id_: str,
        inputs: Inputs,
        old: Inputs,
        outputs: Outputs,
    ) -> Outputs:
        """Runs it again with the new inputs."""
        command = inputs.get("update") or inputs["create"]
        return self._run(resource.name, inputs, command, _seconds(resource.timeout_update))

    def delete(self, type_: str, id_: str, inputs: Inputs) -> None:
        """Runs `delete`, where there is one."""
        if "delete" in inputs:
            self._run(id_, inputs, inputs["delete"], 60.0)

    def _run(self, name: str, inputs: Inputs, command: str, timeout: float) -> Outputs:
        connection = inputs["connection"]
        deadline = time.monotonic() + timeout
        with tempfile.TemporaryDirectory(prefix="pf-ssh-") as folder:
            key = Path(folder, "key")
            key.touch(mode=0o600)
            key.write_text(connection["privateKey"])
            known = Path(folder, "known_hosts")
            known.write_text(f"{connection['host']} {connection['hostKey']}\n")
            options = {
                "BatchMode": "yes",
                "ConnectTimeout": str(connection.get("perDialTimeout", 15)),
                "GlobalKnownHostsFile": "/dev/null",
                "IdentitiesOnly": "yes",
                "IdentityAgent": "none",
                "ServerAliveInterval": "15",
                "StrictHostKeyChecking": "yes",
                "UserKnownHostsFile": str(known),
            }
            argv = ["ssh", "-F", "none", "-T", "-i", str(key)]
            argv += [part for key_, value in options.items() for part in ("-o", f"{key_}={value}")]
            argv += ["-p", str(connection.get("port", 22))]
            argv += [f"{connection['user']}@{connection['host']}", command]
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise CommandError(f"{name}: no answer within {timeout:.0f} s")
                try:
                    done = subprocess.run(
                        argv,
                        input=inputs.get("stdin", ""),
                        capture_output=True,
                        text=True,
                        timeout=left,
                        check=False,
                    )
                except subprocess.TimeoutExpired:
                    raise CommandError(
                        f"{name}: {command!r} on {connection['host']} did not end within "
                        f"{timeout:.0f} s; see the console in the sandbox's folder"
                    ) from None
                if done.returncode == 0:
                    return {"stdout": done.stdout, "stderr": done.stderr}
                refused = done.returncode == _SSH_FAILED
                # As the provider does with dialErrorLimit -1: try until the time is up.
                if not refused or self._cancelled.is_set() or time.monotonic() + 1 > deadline:
                    raise CommandError(
                        f"{name}: {command!r} on {connection['host']} exited with "
                        f"{done.returncode}:\n{done.stderr.strip() or done.stdout.strip()}"
                    )
                self._cancelled.wait(0.3)


def _seconds(timeout: str) -> float:
    """Seconds of a Go duration such as `15m`; the provider's default is 20 minutes."""
    parts = re.findall(r"(\d+)([smh])", timeout)
    return sum(int(number) * _UNITS[unit] for number, unit in parts) or 1200.0
