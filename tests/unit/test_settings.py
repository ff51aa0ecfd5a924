"""Every broken setting is refused with its key, its value and what to write instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import settings
from settings import SettingsError, check
from tests.hostfiles.conftest import Authority

ROOT = Path(__file__).parents[2]
PUBLIC = Authority().certificate


def environment() -> dict[str, Any]:
    """What DESIGN.md calls the whole of an environment, with Pulumi.yaml's defaults."""
    schema = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())["config"]
    given = {key: copy.deepcopy(s["default"]) for key, s in schema.items() if "default" in s}
    given |= {
        "zone": "example.com",
        "operatorCidrs": ["203.0.113.7/32"],
        "master": {"host": "prometheus-master"},
        "slaves": [
            {
                "site": "dublin",
                "host": "prometheus-slave",
                "jobs": [{"name": "CoreSystems", "targets": ["core01.example.internal:9100"]}],
            }
        ],
    }
    return given


def test_the_environment_of_the_readme_is_accepted() -> None:
    chosen = check(environment())
    assert chosen.slaves[0].match == ('{__name__=~".+"}',)
    assert chosen.fqdn(chosen.slaves[0]) == "prometheus-slave.example.com"
    assert chosen.memory_mib_of(chosen.slaves[0]) == 1024


def test_the_schema_of_pulumi_yaml_lists_exactly_the_settings_there_are() -> None:
    schema = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())["config"]
    assert set(schema) == {field.alias for field in settings.Settings.model_fields.values()}
    assert all(entry["type"] and entry["description"] for entry in schema.values())


def first_slave(given: dict[str, Any], **change: Any) -> None:
    given["slaves"][0].update(change)


def account(given: dict[str, Any], **change: Any) -> None:
    given.update(letsEncrypt={"email": "a@example.com", "agreeToTerms": True} | change)


def existing(given: dict[str, Any], **change: Any) -> None:
    master = {"host": "prometheus.example.org", "cidrs": ["203.0.113.9/32"]}
    given.update(existingMaster=master | change)


HOST = {
    "host": "core01.example.internal",
    "hostKey": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f",
}
ACCESS = {"user": "admin", "privateKey": "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n"}


def only_job(given: dict[str, Any], **change: Any) -> None:
    first_slave(given, jobs=[{"name": "a", "targets": ["a:1"], **change}])


def hosts(given: dict[str, Any], hosts: list[dict[str, Any]], **change: Any) -> None:
    first_slave(given, hostAccess=ACCESS, jobs=[{"name": "a", "hosts": hosts, **change}])


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str, str]] = {
    "an unknown key": (
        lambda g: g.update(operatorCIDRs=[]),
        "operatorCIDRs",
        "there is no such setting",
        "correct its spelling",
    ),
    "an unknown key of a slave": (
        lambda g: first_slave(g, hots="x"),
        "slaves[0].hots",
        "there is no such setting",
        "correct its spelling",
    ),
    "a missing key": (lambda g: g.pop("zone"), "zone", "is missing", "set it"),
    "a network that is none": (
        lambda g: g.update(operatorCidrs=["203.0.113.7/33"]),
        "operatorCidrs[0]",
        "'203.0.113.7/33'",
        "write it like 203.0.113.7/32",
    ),
    "a network with host bits": (
        lambda g: g.update(operatorCidrs=["203.0.113.7/24"]),
        "operatorCidrs[0]",
        "'203.0.113.7/24'",
        "write it like 203.0.113.7/32",
    ),
    "no operator at all": (
        lambda g: g.update(operatorCidrs=[]),
        "operatorCidrs",
        "",
        "give it at least one entry",
    ),
    "a target without port": (
        lambda g: first_slave(g, jobs=[{"name": "a", "targets": ["core01.example.internal"]}]),
        "slaves[0].jobs[0].targets[0]",
        "'core01.example.internal'",
        "write it like core01.example.internal:9100",
    ),
    "a target with a port beyond all ports": (
        lambda g: first_slave(g, jobs=[{"name": "a", "targets": ["core01:99999"]}]),
        "slaves[0].jobs[0].targets[0]",
        "'core01:99999'",
        "has no port",
    ),
    "two slaves of one site": (
        lambda g: g["slaves"].append({"site": "dublin", "host": "other"}),
        "slaves",
        "2 slaves with site 'dublin'",
        "give each its own",
    ),
    "a site here and in another stack": (
        lambda g: g["master"].update(otherStacks=[{"stack": "west", "sites": ["dublin"]}]),
        "",
        "master.otherStacks makes 2 sites named 'dublin' (slaves, west)",
        "rename it in one of them",
    ),
    "another stack twice": (
        lambda g: g["master"].update(otherStacks=[{"stack": "west", "sites": ["cork"]}] * 2),
        "master.otherStacks",
        "names the stack 'west' 2 times",
        "put its sites together",
    ),
    "another stack without sites": (
        lambda g: g["master"].update(otherStacks=[{"stack": "west", "sites": []}]),
        "master.otherStacks[0].sites",
        "",
        "give it at least one entry",
    ),
    "two slaves of one host name": (
        lambda g: g["slaves"].append({"site": "cork", "host": "prometheus-slave"}),
        "slaves",
        "2 slaves with host 'prometheus-slave'",
        "give each its own",
    ),
    "master and slave of one host name": (
        lambda g: g["master"].update(host="prometheus-slave"),
        "",
        "both named 'prometheus-slave'",
        "rename one",
    ),
    "a password that is short": (
        lambda g: first_slave(g, password="hunter2hunter2"),
        "slaves[0].password",
        "has 14 bytes",
        "24 to 72",
    ),
    "a password beyond what bcrypt reads": (
        lambda g: first_slave(g, password="x" * 73),
        "slaves[0].password",
        "has 73 bytes",
        "24 to 72",
    ),
    "a password with a colon": (
        lambda g: first_slave(g, password="abcdefghijkl:mnopqrstuvwxyz"),
        "slaves[0].password",
        "(not shown)",
        "leave these out",
    ),
    "a job with a key that Prometheus has and we must not take": (
        lambda g: first_slave(
            g,
            jobs=[{"name": "a", "targets": ["a:1"], "http_config": {}}],
        ),
        "slaves[0].jobs[0]",
        "'http_config'",
        "may not have",
    ),
    "a job that would not verify its targets": (
        lambda g: only_job(g, tls_config={"insecure_skip_verify": True}),
        "slaves[0].jobs[0].tls_config.insecure_skip_verify",
        "there is no such setting",
        "remove it",
    ),
    "a CA that is a path": (
        lambda g: only_job(g, tls_config={"ca": "/etc/ssl/ca.pem"}),
        "slaves[0].jobs[0].tls_config.ca",
        "'/etc/ssl/ca.pem'",
        "give the text itself",
    ),
    "a client key that is a path": (
        lambda g: only_job(g, tls_config={"cert": PUBLIC, "key": "/etc/ssl/x.key"}),
        "slaves[0].jobs[0].tls_config.key",
        "(not shown)",
        "not a path",
    ),
    "a client certificate without its key": (
        lambda g: only_job(g, tls_config={"cert": PUBLIC}),
        "slaves[0].jobs[0].tls_config",
        "cert and key",
        "or neither",
    ),
    "a password over plain http": (
        lambda g: only_job(g, scheme="http", basic_auth={"username": "a", "password": "b"}),
        "slaves[0].jobs[0]",
        "basic_auth over plain http",
        "use scheme https",
    ),
    "two ways to log in": (
        lambda g: only_job(
            g,
            basic_auth={"username": "a", "password": "b"},
            authorization={"credentials": "c"},
        ),
        "slaves[0].jobs[0]",
        "basic_auth and authorization",
        "one of them",
    ),
    "a job that scrapes nothing": (
        lambda g: first_slave(g, jobs=[{"name": "a"}]),
        "slaves[0].jobs[0]",
        "scrapes nothing",
        "give it hosts, targets",
    ),
    "hosts and no way to them": (
        lambda g: first_slave(g, jobs=[{"name": "a", "hosts": [HOST]}]),
        "slaves[0]",
        "no hostAccess",
        "add hostAccess",
    ),
    "hosts with an access of their own": (
        lambda g: hosts(g, [HOST], scheme="http"),
        "slaves[0].jobs[0]",
        "and scheme",
        "a job of their own",
    ),
    "a host twice": (
        lambda g: hosts(g, [HOST, HOST]),
        "slaves[0].jobs",
        "'core01.example.internal' 2 times",
        "list it in one job",
    ),
    "a host that is a server of ours": (
        lambda g: hosts(g, [HOST | {"host": "prometheus-slave.example.com"}]),
        "",
        "prometheus-slave.example.com",
        "take it out",
    ),
    "a host without its key": (
        lambda g: hosts(g, [{"host": "core01.example.internal"}]),
        "slaves[0].jobs[0].hosts[0].hostKey",
        "is missing",
        "set it",
    ),
    "a host key that is a fingerprint": (
        lambda g: hosts(g, [HOST | {"hostKey": "SHA256:abc"}]),
        "slaves[0].jobs[0].hosts[0].hostKey",
        "'SHA256:abc'",
        "cat /etc/ssh/ssh_host_ed25519_key.pub",
    ),
    "a host key that would be verified by SHA-1": (
        lambda g: hosts(g, [HOST | {"hostKey": "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABgQ"}]),
        "slaves[0].jobs[0].hosts[0].hostKey",
        "ssh-rsa",
        "no ed25519 or ecdsa host key",
    ),
    "an address that is a name": (
        lambda g: hosts(g, [HOST | {"address": "core01"}]),
        "slaves[0].jobs[0].hosts[0].address",
        "'core01'",
        "write it like 10.20.1.11",
    ),
    "an SSH key that is a path": (
        lambda g: first_slave(g, hostAccess={"user": "admin", "privateKey": "~/.ssh/id"}),
        "slaves[0].hostAccess.privateKey",
        "(not shown)",
        "not a path",
    ),
    "an old password beside one of the user's own": (
        lambda g: first_slave(
            g, password="x" * 24, rotation={"password": 2, "keepOldPassword": True}
        ),
        "slaves[0]",
        "cannot keep an old password",
        "set nextPassword first",
    ),
    "a CA that signs and is not trusted": (
        lambda g: g.update(rotation={"ca": 1, "oldestCa": 2}),
        "rotation",
        "from generation 2 on, and 1 signs",
        "leave it out",
    ),
    "target files that anybody may write": (
        lambda g: first_slave(
            g, jobs=[{"name": "a", "file_sd_configs": [{"files": ["/srv/x.yml"]}]}]
        ),
        "slaves[0].jobs[0].file_sd_configs[0].files[0]",
        "'/srv/x.yml'",
        "/data/targets",
    ),
    "discovery of every instance there is": (
        lambda g: first_slave(
            g,
            jobs=[{"name": "a", "ec2_sd_configs": [{"region": "eu-west-1", "filters": []}]}],
        ),
        "slaves[0].jobs[0].ec2_sd_configs[0].filters",
        "",
        "give it at least one entry",
    ),
    "a job named as one of ours": (
        lambda g: first_slave(g, jobs=[{"name": "federate", "targets": ["a:1"]}]),
        "slaves[0].jobs",
        "'federate'",
        "name it otherwise",
    ),
    "two jobs of one name": (
        lambda g: first_slave(g, jobs=[{"name": "a", "targets": ["a:1"]}] * 2),
        "slaves[0].jobs",
        "2 jobs named 'a'",
        "give each its own name",
    ),
    "an interval that is none": (
        lambda g: g.update(scrapeInterval="15"),
        "scrapeInterval",
        "'15'",
        "write it like 15s",
    ),
    "an interval of no time": (
        lambda g: g.update(evaluationInterval="0s"),
        "evaluationInterval",
        "'0s'",
        "write it like 15s",
    ),
    "a duration in an order that Prometheus does not read": (
        lambda g: g.update(retentionTime="30s1m"),
        "retentionTime",
        "'30s1m'",
        "write it like 15s, 1m30s or 30d",
    ),
    "an interval of a job that is none": (
        lambda g: only_job(g, scrape_interval="1 s"),
        "slaves[0].jobs[0]",
        "the scrape_interval '1 s'",
        "write it like 15s",
    ),
    "a port beyond all ports, of an issuer": (
        lambda g: g["master"].update(
            oauth2={"issuer": "https://x:99999", "clientId": "a", "clientSecret": "b"}
        ),
        "master.oauth2.issuer",
        "'https://x:99999'",
        "write it like https://accounts.example.com",
    ),
    "a port beyond all ports, of a receiver": (
        lambda g: g.update(
            alerting={
                "route": {"receiver": "a"},
                "receivers": [{"name": "a", "webhook_configs": [{"url": "https://a:99999"}]}],
            }
        ),
        "alerting",
        "receivers[0].webhook_configs[0].url (not shown)",
        "no https address",
    ),
    "a list that is one text": (
        lambda g: g.update(operatorCidrs="203.0.113.7/32"),
        "operatorCidrs",
        "'203.0.113.7/32'",
        "write it like [a, b]",
    ),
    "a list that is left empty": (
        lambda g: g.update(operatorCidrs=None),
        "operatorCidrs",
        "(nothing)",
        "write it like [a, b]",
    ),
    "an object that is a text": (
        lambda g: g.update(slaves=["dublin"]),
        "slaves[0]",
        "is no object",
        "write it as keys with their values",
    ),
    "a text that is a number": (
        lambda g: g.update(retentionTime=30),
        "retentionTime",
        "30",
        "put it in quotes",
    ),
    "a time of day that YAML takes for a number": (
        lambda g: g.update(securityUpdates={"rebootAt": 240}),
        "securityUpdates.rebootAt",
        "240",
        "put it in quotes",
    ),
    "a region that is a city": (
        lambda g: first_slave(g, region="Dublin"),
        "slaves[0].region",
        "'Dublin'",
        "write it like eu-west-1",
    ),
    "a password's generation that is a word": (
        lambda g: first_slave(g, rotation={"password": "twice"}),
        "slaves[0].rotation.password",
        "'twice'",
        "a valid integer",
    ),
    "a zone that is none": (
        lambda g: g.update(zone="https://example.com/"),
        "zone",
        "'https://example.com/'",
        "write it like example.com",
    ),
    "an instance type for another processor": (
        lambda g: g.update(instanceType="t4g.micro"),
        "instanceType",
        "'t4g.micro'",
        "use one such as t3.micro",
    ),
    "certificates by nobody": (
        lambda g: g.update(certificates="selfSigned"),
        "certificates",
        "'selfSigned'",
        "'ownCa'",
    ),
    "a public authority without an account": (
        lambda g: first_slave(g, certificates="letsencrypt"),
        "",
        "prometheus-slave has certificates: letsencrypt",
        "add it with email and agreeToTerms: true",
    ),
    "terms that are not agreed to": (
        lambda g: account(g, agreeToTerms=False),
        "letsEncrypt.agreeToTerms",
        "False",
        "set it to true",
    ),
    "a challenge that needs port 443": (
        lambda g: account(g, challenge="tls-alpn-01"),
        "letsEncrypt.challenge",
        "'tls-alpn-01'",
        "'http-01' or 'dns-01'",
    ),
    "a host with another challenge than there is": (
        lambda g: first_slave(g, challenge="dns"),
        "slaves[0].challenge",
        "'dns'",
        "'http-01' or 'dns-01'",
    ),
    "an account of nobody": (
        lambda g: account(g, email="operator"),
        "letsEncrypt.email",
        "'operator'",
        "write it like operator@example.com",
    ),
    "an authority that anyone could play": (
        lambda g: account(g, server="http://acme.example.org/dir"),
        "letsEncrypt.server",
        "'http://acme.example.org/dir'",
        "write it like https://acme-v02.api.letsencrypt.org/directory",
    ),
    "another authority without its roots": (
        lambda g: account(g, server="https://acme.example.org/dir"),
        "letsEncrypt",
        "https://acme.example.org/dir",
        "add caRoot",
    ),
    "roots that are a path": (
        lambda g: account(g, caRoot="/etc/ssl/ca.pem"),
        "letsEncrypt.caRoot",
        "'/etc/ssl/ca.pem'",
        "not a path",
    ),
    "roots of everybody": (
        lambda g: account(g, caRoot="system"),
        "letsEncrypt.caRoot",
        "'system'",
        "give the root certificates",
    ),
    "an existing master of a slave's name": (
        lambda g: g.update(
            existingMaster={"host": "prometheus-slave.example.com", "cidrs": ["203.0.113.9/32"]}
        ),
        "",
        "'prometheus-slave.example.com', as a server",
        "another name",
    ),
    "an existing master without a host key": (
        lambda g: existing(g, access=ACCESS),
        "existingMaster.access.hostKey",
        "",
        "is missing; set it",
    ),
    "an existing master's key that is a path": (
        lambda g: existing(g, access={"user": "a", "privateKey": "/k", "hostKey": "x"}),
        "existingMaster.access.privateKey",
        "(not shown)",
        "give the key itself",
    ),
    "a configuration file that is none": (
        lambda g: existing(g, configFile="prometheus.yml"),
        "existingMaster.configFile",
        "'prometheus.yml'",
        "write it like /etc/prometheus/prometheus.yml",
    ),
    "a url without scheme": (
        lambda g: existing(g, url="127.0.0.1:9090"),
        "existingMaster.url",
        "'127.0.0.1:9090'",
        "write it like http://127.0.0.1:9090",
    ),
    "an existing master's password in clear": (
        lambda g: existing(
            g,
            url="http://prometheus.example.org:9090",
            basicAuth={"username": "u", "password": "p"},
        ),
        "existingMaster",
        "readable by anyone on the way",
        "use an https url",
    ),
    "another way to reload": (
        lambda g: existing(g, reload="restart"),
        "existingMaster.reload",
        "'restart'",
        "'signal' or 'http'",
    ),
    "no master": (
        lambda g: g.update(master={}),
        "",
        "nobody may federate",
        "add master, or existingMaster",
    ),
    "nothing at all": (
        lambda g: g.update(master={}, slaves=[]),
        "",
        "neither a slave nor a master",
        "add slaves, master or both",
    ),
    "an interval that EBS does not know": (
        lambda g: g.update(backup={"intervalHours": 5}),
        "backup.intervalHours",
        "5",
        "6, 8",
    ),
    "a backup that would not stay": (
        lambda g: g.update(backup={"keepOnHost": 0}),
        "backup.keepOnHost",
        "0",
        "greater than or equal to 1",
    ),
    "a Grafana from nowhere": (
        lambda g: g["master"].update(grafana={"version": "12.1.0", "sha256": "0" * 64}),
        "master.grafana.url",
        "is missing",
        "set it",
    ),
    "a time of day that is none": (
        lambda g: g.update(securityUpdates={"rebootAt": "24:00"}),
        "securityUpdates.rebootAt",
        "24:00",
        'write it like "04:00"',
    ),
    "restarts for updates that nobody installs": (
        lambda g: g.update(securityUpdates={"install": False, "rebootAt": "04:00"}),
        "securityUpdates",
        "04:00",
        "leave rebootAt out or install away",
    ),
    "a snapshot that is none": (
        lambda g: first_slave(g, restoreFrom="vol-0123456789abcdef0"),
        "slaves[0].restoreFrom[0]",
        "vol-0123456789abcdef0",
        "snap-",
    ),
    "a snapshot twice": (
        lambda g: first_slave(g, restoreFrom=["snap-01234567", "snap-01234567"]),
        "slaves[0].restoreFrom",
        "snap-01234567",
        "take out the earlier ones",
    ),
    "a version of nginx that no package can have": (
        lambda g: g.update(releases={"nginx": {"version": "1.26 or so"}}),
        "releases.nginx.version",
        "1.26 or so",
        "is no version of a package",
    ),
    "a rule file that is not there": (
        lambda g: g.update(ruleFiles=["rules/none.yml"]),
        "ruleFiles",
        "'rules/none.yml'",
        "cannot be read",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_setting_is_refused_with_key_value_and_remedy(kind: str) -> None:
    break_it, key, value, remedy = BROKEN[kind]
    given = environment()
    break_it(given)
    with pytest.raises(SettingsError) as refusal:
        check(given)
    told = str(refusal.value)
    assert told.startswith(f"prometheus-federation{':' + key if key else ''}:")
    assert value in told
    assert remedy in told


def test_a_refused_password_is_shown_nowhere() -> None:
    given = environment()
    first_slave(given, password="canary-too-short")
    with pytest.raises(SettingsError) as refusal:
        check(given)
    assert "canary" not in str(refusal.value)
    assert refusal.value.__suppress_context__
    assert "canary" not in repr(refusal.value)


KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\ncanary\n"
# A secret where another thing belongs, mostly what is around it.
MISPLACED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the key as all of hostAccess": lambda g: first_slave(g, hostAccess=KEY),
    "the private host key": lambda g: hosts(g, [HOST | {"hostKey": KEY}]),
    "the key as the certificate": lambda g: only_job(g, tls_config={"cert": KEY}),
    "the password as all of basic_auth": lambda g: only_job(g, basic_auth="a:canary"),
    "the token as all of authorization": lambda g: only_job(g, authorization="Bearer canary"),
    "a target with a password": lambda g: only_job(g, targets=["a:canary@a:1"]),
    "the key as all of access": lambda g: existing(g, access=KEY),
    "the password as all of basicAuth": lambda g: existing(g, basicAuth="a:canary"),
    "a url with a password": lambda g: existing(g, url="http://a:canary@b:9090"),
    "the secret as all of oauth2": lambda g: g["master"].update(oauth2="canary"),
    "the hook as all of alerting": lambda g: g.update(alerting="https://hooks/canary"),
    "a release with a password": lambda g: g.update(
        releases={"prometheus": {"version": "3.13.2", "sha256": "0", "url": "ftp://a:canary@b/c"}}
    ),
}


@pytest.mark.parametrize("kind", MISPLACED)
def test_a_secret_in_the_wrong_place_is_not_shown_either(kind: str) -> None:
    given = environment()
    MISPLACED[kind](given)
    with pytest.raises(SettingsError) as refusal:
        check(given)
    assert "(not shown)" in str(refusal.value)
    assert "canary" not in str(refusal.value)


def test_an_accepted_secret_is_shown_nowhere() -> None:
    given = environment()
    access = {"user": "a", "privateKey": "-----BEGIN PRIVATE KEY-----\ncanary"}
    first_slave(given, password="canary-long-enough-to-be-taken", hostAccess=access)
    given["slaves"][0]["jobs"][0] |= {"basic_auth": {"username": "a", "password": "canary"}}
    given["slaves"][0]["jobs"].append(
        {"name": "b", "targets": ["b:1"], "authorization": {"credentials": "canary"}}
    )
    chosen = check(given)
    assert "canary" not in repr(chosen)
    for job in chosen.slaves[0].jobs:
        assert job.secrets().password == "canary"
        assert "canary" not in repr((job.job(), job.secrets()))


def test_hosts_are_reached_as_their_site_says_unless_they_say_otherwise() -> None:
    given = environment()
    direct = {"user": "root", "port": 2222, "jump": False}
    other = HOST | {"host": "core02.example.internal"} | direct
    hosts(given, [HOST, other])
    (slave,) = check(given).slaves
    assert slave.host_access
    plain, special = (slave.host_access.of(host) for host in slave.jobs[0].hosts)
    assert (plain.user, plain.port, plain.jump) == ("admin", 22, True)
    assert (special.user, special.port, special.jump) == ("root", 2222, False)
    assert slave.jump_ports == (22,)
    assert slave.jobs[0].job().targets == (
        "core01.example.internal:9100",
        "core02.example.internal:9100",
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("groups: [", "not YAML"),
        ("rules: []", "groups"),
        ("groups: [{name: a, rules: [{expr: up}]}]", "either record or alert"),
        ("groups: [{name: a, rules: [{alert: A, expr: up, form: 5m}]}]", "form"),
        ("groups: [{name: a, rules: [{alert: A, expr: up, for: 5}]}]", "for"),
    ],
)
def test_a_rule_file_that_is_none_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "broken.yml"
    path.write_text(content)
    given = environment() | {"ruleFiles": [str(path)]}
    with pytest.raises(SettingsError) as refusal:
        check(given)
    assert "ruleFiles" in str(refusal.value)
    assert complaint in str(refusal.value)


def test_every_problem_is_told_at_once() -> None:
    given = environment() | {"zone": "nonsense", "scrapeInterval": "soon"}
    with pytest.raises(SettingsError) as refusal:
        check(given)
    assert len(str(refusal.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("instance_type", "mib"),
    [("t3.nano", 512), ("t3.micro", 1024), ("m7i.large", 8192), ("c6i.2xlarge", 16384)],
)
def test_memory_follows_the_instance_type(instance_type: str, mib: int) -> None:
    chosen = check(environment() | {"instanceType": instance_type})
    assert chosen.memory_mib_of(chosen.slaves[0]) == mib
