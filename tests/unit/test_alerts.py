"""No alert is forgotten: each is caused on machines, either by `make test` or by `make soak`."""

from __future__ import annotations

from collections.abc import Iterable

import yaml

from hostfiles import rules
from tests.sandbox import test_5_alerts
from tests.sandbox.notified import DEAD_MAN, Fault
from tests.soak import test_every_alert


def raised(faults: Iterable[Fault]) -> set[str]:
    return {alert for fault in faults for alert, _ in fault.raises}


def test_each_alert_is_caused_once_by_make_test_or_by_make_soak() -> None:
    files = [yaml.safe_load(path.read_text()) for path in rules.FOLDER.glob("*.yml")]
    known = [rule["alert"] for file in files for group in file["groups"] for rule in group["rules"]]
    stopped = {alert for *_, told in test_5_alerts.STOPPED for alert, _ in told}
    stopped |= {alert for alert, _ in test_5_alerts.WITHOUT_NGINX}
    quick = raised(test_5_alerts.FAULTS.values()) | stopped | {DEAD_MAN}
    slow = {alert for faults in test_every_alert.ROUNDS for alert in raised(faults.values())}
    slow |= {alert for alert, *_ in test_every_alert.CLOCKS}
    assert quick & slow == set()
    assert sorted(quick | slow) == sorted(known)
