"""The version of nginx that settings name. That it gets there: tests/sandbox/test_5_upgrade.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hostfiles import nginx, slave
from hostfiles.model import SlaveServer


@pytest.mark.parametrize("version", [None, "1.26.3-3+deb13u7"])
def test_a_version_is_tried_before_it_is_installed_and_none_lets_go_of_it(
    slave_server: Callable[..., SlaveServer], version: str | None
) -> None:
    host = slave.host_files(slave_server(nginx_version=version))
    (unit,) = [f.content for f in host.files if f.path == nginx.PACKAGE_SERVICE]
    (start,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert start.endswith(f"/install-nginx {version}" if version else "/install-nginx")
    tried = [check.argv[-1] for check in host.checks if check.name == "nginx's package"]
    assert tried == ([version] if version else [])
    names = [unit.name for unit in host.units]
    assert names.index("nginx-package.service") < names.index("nginx.service")
