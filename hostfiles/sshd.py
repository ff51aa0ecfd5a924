"""sshd by a drop-in: keys only, no root, one host key.

https://man.openbsd.org/sshd_config
"""

from __future__ import annotations

from hostfiles.files import Check, File, Unit
from hostfiles.model import Server
from hostfiles.templates import render

# Read before cloud-init's 50-cloud-init.conf; sshd takes the first value of a keyword.
DROP_IN = "/etc/ssh/sshd_config.d/10-federation.conf"

# Who may log in, and nobody else: not those whom the image or the account would let in.
OPERATORS = "/etc/ssh/operators"


def files(server: Server) -> tuple[File, ...]:
    """The drop-in. Who logs in may go on to the SSH of monitored hosts, and nowhere else."""
    content = render("ssh/sshd.conf.j2", jump_ports=server.jump_ports)
    return (
        File(path=DROP_IN, content=content, mode=0o600),
        File(path=OPERATORS, content=server.operator_keys),
    )


CHECKS = (Check(name="sshd's drop-in", argv=("/usr/sbin/sshd", "-t", "-f", f"{{tree}}{DROP_IN}")),)
UNIT = Unit(name="ssh.service", reload_on=(DROP_IN,))
