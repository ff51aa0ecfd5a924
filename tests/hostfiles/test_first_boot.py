"""first-boot, with a cloud-init that says what the test wants."""

from __future__ import annotations

import pytest

from hostfiles.templates import FOLDER
from tests.hostfiles.conftest import Root

pytestmark = pytest.mark.machines

# cloud-init waits for nobody in particular; `--long` is asked for its words.
CLOUD_INIT = """#!/bin/sh
echo "$*" >>/stub/calls
[ "$2" != --long ] || echo "errors: no package nginxx"
exit {status}
"""


@pytest.mark.parametrize(
    ("status", "exit_status"),
    [(0, 0), pytest.param(2, 0, id="done, with complaints"), (1, 1)],
)
def test_the_first_boot_s_end_is_waited_for_and_judged(
    tool_root: Root, status: int, exit_status: int
) -> None:
    tool_root.write("/stub/cloud-init", CLOUD_INIT.format(status=status), 0o755)
    tool_root.write("/stub/replace-host-key", '#!/bin/sh\necho "key $*" >>/stub/calls\n', 0o755)
    tool_root.write("/usr/local/sbin/first-boot", (FOLDER / "first-boot").read_text(), 0o755)
    done = tool_root.run(["first-boot"])
    assert done.returncode == exit_status, done.stderr
    calls = (tool_root.upper / "stub/calls").read_text().splitlines()
    assert calls[:2] == ["key --keep", "status --wait"], "the key first: it alternates"
    assert ("no package nginxx" in done.stderr) == (exit_status == 1)
