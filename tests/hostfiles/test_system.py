"""What is set of the operating system itself."""

from __future__ import annotations

from hostfiles import system
from hostfiles.model import SecurityUpdates


def apt(updates: SecurityUpdates) -> str:
    (content,) = (f.content for f in system.files(updates) if f.path == system.UPDATES)
    return content


def test_security_updates_are_installed_and_no_host_restarts_by_itself() -> None:
    content = apt(SecurityUpdates())
    assert 'APT::Periodic::Unattended-Upgrade "1";' in content
    assert 'Automatic-Reboot "false";' in content
    assert "Reboot-Time" not in content


def test_a_host_restarts_at_the_time_that_was_named() -> None:
    content = apt(SecurityUpdates(reboot_at="04:00"))
    assert 'Automatic-Reboot "true";' in content
    assert 'Automatic-Reboot-Time "04:00";' in content


def test_updates_may_be_left_to_the_user() -> None:
    updates = SecurityUpdates(install=False)
    assert 'APT::Periodic::Unattended-Upgrade "0";' in apt(updates)
    # Then the program that installs them need not be there.
    assert not any(unit.ready for unit in system.units(updates))
