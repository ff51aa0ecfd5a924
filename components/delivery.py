"""A host of the user's is reached over SSH, and given a program with what it shall bring about."""

from __future__ import annotations

from collections.abc import Sequence

import pulumi
import pulumi_command as command
from pulumi import CustomTimeouts, Output, ResourceOptions

# One attempt to connect; attempts follow each other until the command's time is up.
DIAL_SECONDS = 15


def deliver(
    name: str,
    parent: pulumi.Resource,
    *,
    host: str,
    port: int,
    user: str,
    private_key: str,
    host_key: str,
    proxy: command.remote.ProxyConnectionArgs | None = None,
    install: str,
    remove: str,
    delivery: Output[str],
    timeout: str,
    depends_on: Sequence[pulumi.Resource],
) -> None:
    """Sends `delivery` on stdin to `install`, again whenever it changes; on destroy runs `remove`.

    https://www.pulumi.com/registry/packages/command/api-docs/remote/command/
    """
    command.remote.Command(
        name,
        connection=command.remote.ConnectionArgs(
            host=host,
            port=port,
            user=user,
            private_key=Output.secret(private_key),
            # Without it the provider would talk to anyone.
            host_key=host_key,
            # Refused dials use up a limit of tries at once; custom_timeouts bounds the wait.
            dial_error_limit=-1,
            per_dial_timeout=DIAL_SECONDS,
            proxy=proxy,
        ),
        create=install,
        update=install,
        delete=remove,
        stdin=Output.secret(delivery),
        logging=command.remote.Logging.NONE,
        add_previous_output_in_env=False,
        opts=ResourceOptions(
            parent=parent,
            depends_on=list(depends_on),
            additional_secret_outputs=["stdout", "stderr"],
            custom_timeouts=CustomTimeouts(create=timeout, update=timeout, delete=timeout),
        ),
    )
