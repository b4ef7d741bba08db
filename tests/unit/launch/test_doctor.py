"""The doctor finds what works here, and says what to do about the rest."""

import json

from launch import doctor
from launch.cli import main
from launch.doctor import Finding


def test_this_machine_can_run_the_quick_start(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is True
    found = {finding["subject"]: finding for finding in report["findings"]}
    assert found["packages"]["status"] == "ok"
    assert found["torch"]["status"] == "ok"
    assert all(finding["fix"] for finding in report["findings"] if finding["status"] != "ok")


def test_missing_package_blocks_and_is_told_how_to_mend(monkeypatch, capsys):
    missing = Finding("deepspeed", "absent", "training", "make setup", True)
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [missing],))
    assert main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert "make setup" in out
    assert "The quick start cannot run: deepspeed." in out


def test_check_that_fails_is_a_finding(monkeypatch):
    def _check_something():
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "CHECKS", (_check_something,))
    (finding,) = doctor.examine()
    assert (finding.subject, finding.status) == ("something", "broken")
    assert "no such device" in finding.detail
