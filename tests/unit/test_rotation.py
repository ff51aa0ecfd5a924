"""What is renewed on purpose overlaps: who asks for a secret knows the next one beforehand."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import bcrypt
import yaml

from sandbox import providers
from sandbox.program import plain
from tests.unit.conftest import NAMESPACE, Evaluated, run_program


def files(evaluated: Evaluated, host: str) -> Mapping[str, str]:
    command = evaluated.recorder.one(providers.COMMAND, f"{host}-bundle")
    bundle = json.loads(plain(command.inputs["stdin"]))
    return {file["path"]: file["content"] for file in bundle["files"]}


def with_slave(dev: Evaluated, **change: Any) -> Evaluated:
    slaves = copy.deepcopy(dev.project.config[f"{NAMESPACE}:slaves"])
    slaves[0].update(change)
    return run_program(slaves=slaves)


def accepted(evaluated: Evaluated) -> dict[str, str]:
    """Users and hashes of nginx on the slave; web.yml behind it must know the same."""
    on_slave = files(evaluated, "slave-dublin")
    lines = on_slave["/etc/nginx/users.htpasswd"].splitlines()
    hashes = dict(line.split(":") for line in lines)
    web = yaml.safe_load(on_slave["/etc/prometheus/web.yml"])["basic_auth_users"]
    assert {*hashes, "local"} == set(web)
    return hashes


def sent(evaluated: Evaluated) -> tuple[str, str]:
    """The user and password of the master's federate job."""
    on_master = files(evaluated, "master")
    (job,) = yaml.safe_load(on_master["/etc/prometheus/federate.d/dublin.yml"])["scrape_configs"]
    auth = job["basic_auth"]
    return auth["username"], on_master[f"/etc/prometheus/{auth['password_file'][3:]}"]


def lets_in(evaluated: Evaluated, user: str, password: str) -> bool:
    hashed = accepted(evaluated).get(user)
    return hashed is not None and bcrypt.checkpw(password.encode(), hashed.encode())


def test_the_federation_password_is_known_before_it_is_sent_and_forgotten_after(
    dev: Evaluated,
) -> None:
    later = with_slave(dev, rotation={"password": 2})
    assert sent(dev)[0] == "prometheus-admin"
    assert sent(later)[0] == "prometheus-admin-2"
    assert lets_in(dev, *sent(dev))
    assert lets_in(dev, *sent(later)), "the slave has not changed yet"
    assert lets_in(later, *sent(later))
    assert not lets_in(later, *sent(dev))


def test_the_master_changes_before_the_slave_does(dev: Evaluated) -> None:
    def waits(evaluated: Evaluated) -> bool:
        master = evaluated.recorder.one(providers.COMMAND, "master-bundle")
        slave = evaluated.recorder.one(providers.COMMAND, "slave-dublin-bundle")
        # Where its instance is new, the old one serves until then.
        joining = evaluated.recorder.one(providers.EIP_ASSOCIATION, "slave-dublin")
        assert joining.urn in slave.dependencies
        return master.urn in joining.dependencies

    # At first they boot side by side.
    assert not waits(dev)
    assert waits(with_slave(dev, rotation={"password": 2}))


def test_an_old_password_may_be_kept_for_a_while(dev: Evaluated) -> None:
    kept = with_slave(dev, rotation={"password": 2, "keepOldPassword": True})
    assert lets_in(kept, *sent(dev))
    assert lets_in(kept, *sent(kept))


def test_a_password_of_the_users_own_can_be_made_known_first(dev: Evaluated) -> None:
    chosen = "a-password-of-the-user-s-own-choice"
    first = with_slave(dev, nextPassword=chosen)
    assert lets_in(first, "prometheus-admin-2", chosen)
    assert sent(first) == sent(dev)
    second = with_slave(dev, password=chosen, rotation={"password": 2})
    assert sent(second) == ("prometheus-admin-2", chosen)
    assert lets_in(second, *sent(second))


def test_all_hosts_trust_the_next_authority_and_drop_the_old_one_in_a_second_step(
    dev: Evaluated,
) -> None:
    def trusted(evaluated: Evaluated) -> list[str]:
        text = files(evaluated, "slave-dublin")["/etc/prometheus/tls/ca.pem"]
        return [line.split()[1].rpartition("-certificate")[0] for line in text.splitlines()]

    def signs(evaluated: Evaluated) -> set[str]:
        leaves = evaluated.recorder.of_type(providers.LOCALLY_SIGNED_CERT)
        return {
            str(plain(leaf.inputs["caCertPem"])).split()[1].split("-cert")[0] for leaf in leaves
        }

    both = run_program(rotation={"ca": 2, "oldestCa": 1})
    after = run_program(rotation={"ca": 2})
    assert (trusted(dev), signs(dev)) == (["ca", "ca-2"], {"ca"})
    assert (trusted(both), signs(both)) == (["ca", "ca-2", "ca-3"], {"ca-2"})
    assert (trusted(after), signs(after)) == (["ca-2", "ca-3"], {"ca-2"})


def test_the_next_ssh_key_may_log_in_before_it_is_used(dev: Evaluated) -> None:
    def keys(evaluated: Evaluated) -> list[str]:
        return files(evaluated, "slave-dublin")["/etc/ssh/operators"].splitlines()

    def used(evaluated: Evaluated) -> str:
        command = evaluated.recorder.one(providers.COMMAND, "slave-dublin-bundle")
        return plain(command.inputs["connection"])["privateKey"]

    later = run_program(rotation={"sshKey": 2})
    assert keys(dev)[1] == keys(later)[0]
    assert keys(dev)[0] not in keys(later)
    assert used(dev) != used(later)
    assert plain(later.outputs["sshPrivateKey"]) == used(later)
    # EC2's own key pairs could only change with the instance.
    assert "keyName" not in later.recorder.one(providers.INSTANCE, "slave-dublin-1").inputs
