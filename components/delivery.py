"""How anything reaches a machine: a program is run there over SSH, and reads on stdin what it shall
bring about.

https://www.pulumi.com/registry/packages/command/api-docs/remote/command/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pulumi
import pulumi_command as command
from pulumi import CustomTimeouts, Input, Output, ResourceOptions

from hostfiles.duration import duration, milliseconds

# Refused dials use up a limit of tries at once, so attempts follow each other until the command's
# time is up; and how long one of them may take.
_DIALLING: dict[str, Any] = {"dial_error_limit": -1, "per_dial_timeout": 15}


def connection(
    *,
    host: Input[str],
    port: int | None = None,
    user: str,
    private_key: Input[str],
    host_key: Input[str],
    proxy: command.remote.ProxyConnectionArgs | None = None,
) -> command.remote.ConnectionArgs:
    """The way to a machine. Without `host_key` the provider would talk to anyone."""
    return command.remote.ConnectionArgs(
        host=host,
        port=port,
        user=user,
        private_key=Output.secret(private_key),
        host_key=host_key,
        proxy=proxy,
        **_DIALLING,
    )


def jump_host(
    *, host: Input[str], user: str, private_key: Input[str], host_key: Input[str]
) -> command.remote.ProxyConnectionArgs:
    """A machine on the way to another."""
    return command.remote.ProxyConnectionArgs(
        host=host,
        user=user,
        private_key=Output.secret(private_key),
        host_key=host_key,
        **_DIALLING,
    )


def deliver(
    name: str,
    parent: pulumi.Resource,
    *,
    to: command.remote.ConnectionArgs,
    run: str,
    remove: str | None = None,
    stdin: Output[str] | None = None,
    timeout: str,
    depends_on: Sequence[pulumi.Resource],
    triggers: list[Output[str]] | None = None,
    ignore_changes: list[str] | None = None,
    logging: command.remote.Logging = command.remote.Logging.NONE,
) -> command.remote.Command:
    """Runs `run`, and again whenever it, `stdin` or the connection changes; on destroy `remove`.

    `timeout` is a Prometheus duration. A change of `triggers` makes another command of it. What it
    prints is secret unless `logging` says otherwise.
    """
    # Pulumi reads Go's durations, which know no days.
    timeout = duration(milliseconds(timeout))
    return command.remote.Command(
        name,
        connection=to,
        create=run,
        update=run,
        delete=remove,
        stdin=None if stdin is None else Output.secret(stdin),
        triggers=triggers,
        logging=logging,
        add_previous_output_in_env=False,
        opts=ResourceOptions(
            parent=parent,
            depends_on=list(depends_on),
            ignore_changes=ignore_changes,
            additional_secret_outputs=["stdout", "stderr"],
            custom_timeouts=CustomTimeouts(
                create=timeout, update=timeout, delete=timeout if remove else None
            ),
        ),
    )
