"""The version of nginx, where settings name one: the distribution's package, held at it.

https://manpages.debian.org/trixie/apt/apt-get.8.en.html
"""

from __future__ import annotations

from hostfiles.files import Check, File, Unit
from hostfiles.model import Server
from hostfiles.nginx import CONFIG, PACKAGE_SERVICE
from hostfiles.templates import FOLDER, render

PROGRAM = "/usr/local/sbin/install-nginx"
# All that is not needed before the first bundle.
PATHS = (PROGRAM, PACKAGE_SERVICE)


def files(server: Server) -> tuple[File, ...]:
    """The program and the unit that runs it. Without a version too: that is the way back."""
    return (
        File(path=PROGRAM, content=(FOLDER / "install-nginx").read_text(), mode=0o755),
        File(
            path=PACKAGE_SERVICE,
            content=render("systemd/nginx-package.service.j2", version=server.nginx_version),
        ),
    )


def checks(server: Server) -> tuple[Check, ...]:
    """That the version is to be had, and takes the configuration."""
    if server.nginx_version is None:
        return ()
    program, config = f"{{tree}}{PROGRAM}", f"{{tree}}{CONFIG}"
    argv = ("/bin/sh", program, "--check", config, server.nginx_version)
    return (Check(name="nginx's package", argv=argv),)


UNIT = Unit(name="nginx-package.service", restart_on=(PACKAGE_SERVICE,))
