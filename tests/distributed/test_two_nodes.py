"""Two nodes with addresses of their own: they train together, one is lost, and the same command goes on."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aroface.engine.checkpoint_layout import newest_valid
from shards.pack import PackOptions, pack
from shards.synthetic import write_synthetic
from tests.helpers.namespaces import two_nodes
from tests.helpers.needs import missing

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "smoke" / "tiny.yaml"
STEPS = 27
SETTINGS = ("schedule.epochs=6", "checkpoint.every_steps=5", "engine.zero_stage=2")
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    for seed, name in enumerate(("shards", "other")):
        write_synthetic(folder / f"faces-{name}", identities=12, images_per_identity=6, seed=seed)
        pack(folder / f"faces-{name}", folder / name, PackOptions())
    return folder / "shards"


@pytest.fixture
def hostfile(tmp_path, nodes):
    path = tmp_path / "hostfile"
    path.write_text("".join(f"{node.address} slots=1\n" for node in nodes))
    return path


def command(shards, run, *options, overrides=()):
    settings = [f"data.shards={shards}", *SETTINGS, *overrides]
    return [sys.executable, "-m", "launch", "launch", str(CONFIG), *settings, "--run", str(run), *options]


def start(node, words, log):
    with log.open("a") as file:
        return subprocess.Popen(
            node.words(*words), cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT
        )


def start_both(nodes, shards, run, hostfile, *options):
    return [
        start(
            node,
            command(
                shards, run, "--hostfile", str(hostfile), "--launcher", "no-ssh", "--node-rank", str(rank), *options
            ),
            hostfile.parent / f"node-{rank}.log",
        )
        for rank, node in enumerate(nodes)
    ]


def lines(run):
    path = run / "metrics.jsonl"
    found = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in found if line.endswith("}")]  # the last one may be half written


def wait_for(condition, seconds, processes):
    end = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), "a launcher ended early"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_lost_node_ends_the_job_and_the_same_command_goes_on(tmp_path, nodes, shards, hostfile):
    run = tmp_path / "run"
    processes = start_both(nodes, shards, run, hostfile)
    wait_for(lambda: len(lines(run)) >= 8, 120, processes)
    nodes[1].kill()
    assert processes[0].wait(timeout=60) not in (0, None)
    assert nodes[0].processes() == []
    assert 8 <= len(lines(run)) < STEPS

    processes = start_both(nodes, shards, run, hostfile, "--no-preflight")
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert f"finished step {STEPS} of {STEPS}" in (tmp_path / "node-0.log").read_text()
    assert "Resumed from" in (tmp_path / "node-0.log").read_text()
    steps = [line["step"] for line in lines(run)]
    assert steps == list(range(1, STEPS + 1))

    # The reference: both ranks on this machine, under torchrun, never interrupted.
    whole = subprocess.run(
        command(shards, tmp_path / "whole", "--gpus-per-node", "2", "--no-preflight"),
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"},
        timeout=120,
        check=True,
        capture_output=True,
    )
    assert b"finished" in whole.stdout
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(tmp_path / "whole")]


def test_torchrun_trains_on_both_nodes_and_a_cut_cable_ends_the_job(tmp_path, nodes, shards):
    """No hostfile: the nodes are told the master's address alone. The silent node is waited for no longer than set."""
    run, overrides = tmp_path / "run", ("schedule.epochs=100000", "engine.timeout_s=10")
    options = ("--launcher", "torchrun", "--nodes", "2", "--gpus-per-node", "1", "--master-addr", nodes[0].address)
    logs = [tmp_path / f"torchrun-{rank}.log" for rank in (0, 1)]
    processes = [
        start(node, command(shards, run, *options, "--node-rank", str(rank), overrides=overrides), logs[rank])
        for rank, node in enumerate(nodes)
    ]
    wait_for(lambda: len(lines(run)) >= 8, 120, processes)
    with nodes[1].unplugged():
        assert processes[0].wait(timeout=120) not in (0, None)
        nodes[1].kill()
        processes[1].wait(timeout=60)
    assert "2 node(s) ready" in logs[0].read_text()
    assert "engine.timeout_s = 10 s" in logs[0].read_text() or "2 x engine.timeout_s" in logs[0].read_text()
    assert nodes[0].processes() == []
    assert newest_valid(run) is not None


def check_both(nodes, commands, folder, seconds=90):
    """Exit codes and outputs of one command a node."""
    logs = [folder / f"check-{rank}.log" for rank in range(len(commands))]
    processes = [start(node, words, log) for node, words, log in zip(nodes, commands, logs, strict=False)]
    try:
        return [process.wait(timeout=seconds) for process in processes], [log.read_text() for log in logs]
    finally:
        for process in processes:
            process.kill()


def test_different_manifests_are_named_by_node_and_nothing_starts(tmp_path, nodes, shards, hostfile):
    options = ("--hostfile", str(hostfile), "--launcher", "no-ssh")
    words = [command(shards, tmp_path / "run", *options, "--node-rank", str(rank)) for rank in (0, 1)]
    # Each `ip netns exec` has mounts of its own: the second node sees other shards under the same path.
    words[1] = [
        "sh",
        "-c",
        'mount --bind "$0" "$1" && shift && exec "$@"',
        str(shards.parent / "other"),
        str(shards),
    ] + (words[1])
    codes, outputs = check_both(nodes, words, tmp_path)
    assert codes == [2, 2]
    for output in outputs:
        assert "manifest of the shards differs" in output
        assert "on node 0" in output
        assert "on node 1" in output
        assert "copy the shards again" in output
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_is_not_shared_is_refused(tmp_path, nodes, shards, hostfile):
    options = ("--hostfile", str(hostfile), "--launcher", "no-ssh", "--preflight-only")
    words = [command(shards, tmp_path / "runs" / "run", *options, "--node-rank", str(rank)) for rank in (0, 1)]
    (tmp_path / "runs").mkdir()
    words[1] = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path / "runs"), *words[1]]
    codes, outputs = check_both(nodes, words, tmp_path)
    assert codes == [2, 2]
    assert "--run has to lie on storage that all nodes share" in outputs[0]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.fixture(scope="module")
def ssh(nodes, tmp_path_factory):
    """Options of `aroface launch` that reach the sshd of each node."""
    packages = {"pdsh": "pdsh", "sshd": "openssh-server", "ssh": "openssh-client"}
    absent = [package for program, package in packages.items() if shutil.which(program) is None]
    if absent:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False}
        subprocess.run(["apt-get", "update"], timeout=120, **quiet)
        subprocess.run(["apt-get", "install", "--yes", *absent], timeout=240, **quiet)
        if any(shutil.which(program) is None for program in packages):
            missing(f"needs {', '.join(absent)}, which apt-get could not install")
    folder = tmp_path_factory.mktemp("ssh")
    folder.chmod(0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"Port 2222\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/user\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
        "  LogLevel ERROR\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    servers = [subprocess.Popen(node.words(sshd, "-D", "-f", str(folder / "sshd_config"))) for node in nodes]
    yield ("--ssh-port", "2222", "--ssh-config", str(folder / "ssh_config"))
    for server in servers:
        server.terminate()


def test_ssh_checks_trains_stops_and_goes_on(tmp_path, nodes, shards, hostfile, ssh):
    """From node 0 through pdsh; SIGTERM lets every rank save, and the launcher ends with 0."""
    options = ("--hostfile", str(hostfile), "--env", "DS_ACCELERATOR", "--env", "OMP_NUM_THREADS", *ssh)
    # A shell on the node must not take the first apart; with so many epochs the signal finds the run alive.
    odd = ("data.augment={flip: 0.5, grey: 0.25}", "schedule.epochs=20", "checkpoint.every_steps=40")
    steps = STEPS * 20 // 6
    words = command(shards, tmp_path / "my run", *options, overrides=odd)
    log = tmp_path / "ssh.log"
    process = start(nodes[0], words, log)
    wait_for(lambda: lines(tmp_path / "my run"), 150, [process])
    process.terminate()
    assert process.wait(timeout=90) == 0, log.read_text()
    assert "stopped at step" in log.read_text()
    assert "2 node(s) ready" in log.read_text()
    assert start(nodes[0], [*words, "--no-preflight"], log).wait(timeout=150) == 0, log.read_text()
    assert [line["step"] for line in lines(tmp_path / "my run")] == list(range(1, steps + 1))


def test_ssh_names_a_host_that_cannot_be_reached(tmp_path, nodes, shards, hostfile, ssh):
    hostfile.write_text(f"{nodes[0].address} slots=1\n10.77.0.9 slots=1\n")
    words = command(shards, tmp_path / "run", "--hostfile", str(hostfile), *ssh)
    codes, outputs = check_both(nodes, [words], tmp_path)
    assert codes == [2]
    assert "10.77.0.9 cannot be reached by ssh" in outputs[0]
    assert "take the host out of it" in outputs[0]
    assert not (tmp_path / "run").exists()
