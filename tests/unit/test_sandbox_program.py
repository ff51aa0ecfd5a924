"""Settings as the Pulumi CLI would read them, and answers as the providers would give them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox import cli, host, providers, stacks
from sandbox.host import SandboxError
from sandbox.plan import Plan
from sandbox.program import Project, Resource, read_project
from sandbox.proof import MasterApi, Sample, look
from sandbox.recorder import Recorder
from sandbox.tls import TlsProvider


def project(folder: Path, config: dict[str, Any]) -> Project:
    (folder / "Pulumi.yaml").write_text("name: tried\nruntime: python\n")
    (folder / "Pulumi.test.yaml").write_text(yaml.safe_dump({"config": config}))
    return read_project(folder, "test")


def test_an_encrypted_value_has_a_stand_in_that_changes_with_it(tmp_path: Path) -> None:
    def password(ciphertext: str) -> str:
        config = {"tried:slaves": [{}, {"password": {"secure": ciphertext}, "site": "x"}]}
        found = project(tmp_path, config)
        assert found.encrypted == ("tried:slaves[1].password",)
        assert found.config["tried:slaves"][1]["site"] == "x"
        return found.config["tried:slaves"][1]["password"]

    one = password("v1:one")
    assert len(one) == 48
    assert set(one) <= set("0123456789abcdef")
    assert password("v1:one") == one
    assert password("v1:two") != one


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("privateKey", "PRIVATE KEY"),
        ("key", "PRIVATE KEY"),
        ("sshPrivateKey", "PRIVATE KEY"),
        ("cert", "CERTIFICATE"),
        ("ca", "CERTIFICATE"),
        ("clientCertificate", "CERTIFICATE"),
    ],
)
def test_an_encrypted_key_or_certificate_looks_like_one(
    tmp_path: Path, key: str, label: str
) -> None:
    secret = {"secure": "v1:abc"}
    found = project(tmp_path, {f"tried:{key}": secret, "tried:host": {key: secret}})
    for value in (found.config[f"tried:{key}"], found.config["tried:host"][key]):
        first, digest, last = value.splitlines()
        assert (first, last) == (f"-----BEGIN {label}-----", f"-----END {label}-----")
        assert len(digest) == 48
    assert set(found.encrypted) == {f"tried:{key}", f"tried:host.{key}"}


def test_a_plain_setting_stays_as_it_is(tmp_path: Path) -> None:
    config = {"tried:a": {"secure": "x", "and": 1}, "tried:b": [1, "two", {"key": "three"}]}
    found = project(tmp_path, config)
    assert (found.config, found.encrypted) == (config, ())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("config: {'tried:zone': x, backup: {keep: 1}}", ["backup", "Write tried:backup."]),
        ("config: {zone: x, 1: y}", ["zone, 1", "Write tried:zone, tried:1."]),
        ("config: hunter2", ["config is no mapping", "`tried:zone: example.com`"]),
        ("config: [hunter2]", ["config is no mapping"]),
        ("hunter2", ["the file is no mapping"]),
        ("config:\n  tried:password: *hunter2\n", ["not YAML at line 2, column 19", "Correct"]),
        ("config: {tried:password: hunter2", ["not YAML at line 1"]),
        (b"config: \xff", ["not YAML", "Correct the file."]),
    ],
)
def test_a_stacks_file_that_the_cli_would_refuse_is_refused_by_name_and_shows_no_value(
    tmp_path: Path, content: str | bytes, said: list[str]
) -> None:
    (tmp_path / "Pulumi.yaml").write_text("name: tried\nruntime: python\n")
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SandboxError) as refusal:
        read_project(tmp_path, "test", stack_file=file)
    for part in (str(file), *said):
        assert part in str(refusal.value)
    assert "hunter2" not in str(refusal.value)


def test_a_missing_file_of_a_stack_is_told_with_the_ways_to_name_another(tmp_path: Path) -> None:
    (tmp_path / "Pulumi.yaml").write_text("name: tried\nruntime: python\n")
    with pytest.raises(SandboxError, match=r"There is no file .*/Pulumi\.test\.yaml") as refusal:
        read_project(tmp_path, "test")
    assert "CONFIG=<file>" in refusal.value.remedy
    assert "STACK=<stack>" in refusal.value.remedy
    with pytest.raises(SandboxError, match="cannot be read: Is a directory"):
        read_project(tmp_path, "test", stack_file=tmp_path)


@pytest.mark.parametrize("content", ["", "config:\n", "encryptionsalt: v1:x\n"])
def test_a_stacks_file_may_set_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "Pulumi.yaml").write_text("name: tried\nruntime: python\n")
    (tmp_path / "Pulumi.test.yaml").write_text(content)
    assert read_project(tmp_path, "test").config == {}


def test_up_refuses_what_only_the_cli_can_decrypt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "require_platform", lambda: None)
    monkeypatch.setattr(cli, "_become_root", lambda argv: None)
    config = tmp_path / "settings.yaml"
    config.write_text("config: {'prometheus-federation:master': {password: {secure: v1:abc}}}\n")
    state = tmp_path / "state"
    assert cli.main(["--state-dir", str(state), "up", "--config", str(config)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "prometheus-federation:master.password" in said
    assert "only the Pulumi CLI can" in said
    assert not Plan(0, state).state_dir.exists()


def resource(type_: str, **inputs: Any) -> Resource:
    return Resource(urn="u", type=type_, name="n", inputs=inputs, custom=True, parent="")


def test_the_recorder_answers_for_certificates_instances_and_roles() -> None:
    recorder = Recorder()
    for type_ in (providers.SELF_SIGNED_CERT, providers.LOCALLY_SIGNED_CERT):
        end = recorder.register(resource(type_))[1]["validityEndTime"]
        assert datetime.datetime.fromisoformat(end).tzinfo
    instance = recorder.register(resource(providers.INSTANCE, ami="a"))
    assert instance[1]["privateIp"].startswith("10.")
    assert Recorder().register(resource(providers.INSTANCE, ami="a")) == instance
    for type_ in (providers.ROLE, providers.INSTANCE_PROFILE):
        id_, outputs = recorder.register(resource(type_))
        assert outputs["name"] == id_
        assert outputs["arn"].startswith("arn:")


def test_another_profile_changes_an_instance_in_place() -> None:
    assert not providers.replaces(providers.INSTANCE, {"iamInstanceProfile"})


def test_certificates_tell_their_validity_in_rfc_3339() -> None:
    tls = TlsProvider()
    key = tls.create(resource(providers.PRIVATE_KEY), {"algorithm": "ED25519"})[1]
    _, made = tls.create(
        resource(providers.SELF_SIGNED_CERT),
        {
            "privateKeyPem": key["privateKeyPem"],
            "subject": {"commonName": "x"},
            "allowedUses": ["cert_signing"],
            "validityPeriodHours": 24,
        },
    )
    start, end = (
        datetime.datetime.strptime(made[name], "%Y-%m-%dT%H:%M:%S%z")
        for name in ("validityStartTime", "validityEndTime")
    )
    assert end - start == datetime.timedelta(hours=24)
    assert tls.outdated(providers.SELF_SIGNED_CERT, "", {**made, "earlyRenewalHours": 25})
    assert not tls.outdated(providers.SELF_SIGNED_CERT, "", {**made, "earlyRenewalHours": 1})


class Answers(MasterApi):
    """A master that has these series of `up`, each a second old."""

    def __init__(self, *series: tuple[str | None, str, str]) -> None:
        self.series = series

    def query(self, promql: str) -> list[Sample]:
        return [
            Sample(
                labels={"job": job, "instance": instance, **({"site": site} if site else {})},
                value=1,
                timestamp=0,
            )
            for site, job, instance in self.series
        ]


PROOF_CONFIG = {
    "p:scrapeInterval": "15s",
    "p:zone": "example.com",
    "p:master": {
        "host": "m",
        "jobs": [{"name": "own", "targets": ["nas:9100"], "hosts": [{"host": "hq01.internal"}]}],
    },
    "p:slaves": [
        {
            "site": "dublin",
            "host": "s",
            "jobs": [{"name": "Core", "hosts": [{"host": "core01.internal"}]}],
        }
    ],
}
FOUND = (
    (None, "prometheus", "m.example.com"),
    (None, "node", "m.example.com"),
    (None, "own", "nas:9100"),
    (None, "own", "hq01.internal:9100"),
    ("dublin", "federate", "s.example.com:9095"),
    ("dublin", "Core", "core01.internal:9100"),
)


def test_every_monitored_host_and_plain_target_belongs_to_the_proof() -> None:
    assert look(Answers(*FOUND), PROOF_CONFIG, "p").missing == []
    for absent in FOUND:
        rest = [row for row in FOUND if row != absent]
        (missing,) = look(Answers(*rest), PROOF_CONFIG, "p").missing
        assert f'job="{absent[1]}", instance="{absent[2]}"' in missing


def test_sites_of_other_stacks_belong_to_the_proof() -> None:
    master = {**PROOF_CONFIG["p:master"], "otherStacks": [{"stack": "west", "sites": ["cork"]}]}
    config = PROOF_CONFIG | {"p:master": master}
    (missing,) = look(Answers(*FOUND), config, "p").missing
    assert 'site="cork"} is not there' in missing
    assert look(Answers(*FOUND, ("cork", "federate", "c.example.com:9095")), config, "p").found


def test_a_stack_is_read_by_its_plain_and_its_full_name_and_only_if_it_is_there(
    tmp_path: Path,
) -> None:
    plan = Plan(0, tmp_path)
    west, main = stacks.load(plan, "west"), stacks.load(plan, stacks.MAIN)
    west.outputs, main.outputs = {"a": 1}, {"a": 2}
    assert stacks.every(plan) == {}
    west.save()
    main.save()
    assert list(stacks.every(plan)) == ["sandbox", "west"]
    for name in ("west", "organization/prometheus-federation/west"):
        assert stacks.outputs(plan, name) == {"a": 1}
    assert stacks.outputs(plan, "sandbox") == {"a": 2}
    assert stacks.outputs(plan, "organization/other/west") == {}
    with pytest.raises(SandboxError, match=r"'\.\./west'"):
        stacks.load(plan, "../west")
