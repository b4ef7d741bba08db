"""`aroface launch`: the commands it prints are those that the launchers and `aroface train` understand."""

import argparse
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from aroface.errors import ConfigError
from launch import cmd_launch, cmd_train
from launch.cli import main
from launch.cluster.commands import SshOptions, deepspeed_over_ssh
from launch.cluster.hosts import Host, choose_hosts, read_hostfile
from launch.cluster.job import Job
from launch.cluster.slurm_rank import rank_environment

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "smoke" / "tiny.yaml")


#: Two images a rank, of which a quarter could not be attacked.
START = ("launch", CONFIG, "batch.micro_batch=2", "alignment.share=1")


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# nodes\nalpha slots=2\n\nbeta slots=2  # the second\n")
    return path


def printed(capsys, *arguments):
    """Comment -> words of each command of a dry run."""
    words = [*START, "--run", "runs/my run", "--dry-run", *map(str, arguments)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    return {
        comment.removeprefix("# "): shlex.split(line) for comment, line in zip(lines[::2], lines[1::2], strict=True)
    }


def parsed(module, words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    return parser.parse_args(words)


def train_arguments(words):
    return parsed(cmd_train, words[words.index("train") + 1 :])


def test_hostfile_is_read_in_order(hostfile):
    assert read_hostfile(hostfile) == (Host("alpha", 2), Host("beta", 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha\n", r"line 1: 'alpha' is not a host. Write one"),
        ("alpha slots=0\n", "line 1: .* is not a host"),
        ("alpha slots=1\nalpha slots=2\n", "line 2: alpha stands twice; add up its slots"),
        ("# nobody\n", "names no host"),
    ],
)
def test_hostfile_faults_are_named(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_a_missing_hostfile_says_what_to_write(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read.*slots=GPUS"):
        read_hostfile(tmp_path / "none")


def test_a_world_size_that_does_not_fit_the_hostfile_is_refused(hostfile, capsys):
    for options, message in (
        (("--nodes", "3"), "--nodes 3 does not fit the hostfile, which names 2 (alpha, beta). Lower --nodes"),
        (("--gpus-per-node", "4"), "--gpus-per-node 4 does not fit the hostfile: alpha has slots=2, beta has slots=2"),
        (("--nodes", "0"), "--nodes 0 does not fit"),
        (("--master-port", "80"), "--master-port 80 is not a free port's number"),
    ):
        assert main(["launch", CONFIG, "--run", "r", "--hostfile", str(hostfile), "--dry-run", *options]) == 2
        assert message in capsys.readouterr().err


def test_batches_that_do_not_multiply_out_over_the_nodes_name_all_four_numbers(hostfile, capsys):
    hostfile.write_text("alpha slots=2\nbeta slots=1\n")
    assert main(["launch", CONFIG, "--run", "r", "--hostfile", str(hostfile), "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert "micro_batch 8 x accumulation 0.6667 x 3 ranks = batch.global_batch 16" in message
    assert "those of 2 node(s): 2 + 1" in message


def test_a_share_that_cannot_be_attacked_is_refused_before_any_node_is_asked(hostfile, capsys):
    words = ["launch", CONFIG, "batch.micro_batch=4", "--run", "r", "--hostfile", str(hostfile), "--dry-run"]
    assert main(words) == 2
    assert "alignment.share = 0.25 of 4 images per rank and micro-batch is one image" in capsys.readouterr().err
    assert main([*words, "alignment.batch_statistics=running"]) == 0


def test_choosing_takes_the_first_hosts():
    hosts = (Host("a", 4), Host("b", 4), Host("c", 4))
    assert choose_hosts(hosts, nodes=2, gpus_per_node=3) == (Host("a", 3), Host("b", 3))


def test_ssh_runs_deepspeed_once_and_a_check_for_every_node(capsys, hostfile):
    commands = printed(capsys, "--hostfile", hostfile, "--ssh-port", 2222, "--resume", "never")
    assert list(commands) == ["check, for alpha", "check, for beta", "training, once"]
    words = commands["training, once"]
    assert words[0].startswith("PDSH_SSH_ARGS_APPEND=-o BatchMode=yes -o ConnectTimeout=10")
    assert words[0].endswith("-p 2222")
    from deepspeed.launcher.runner import parse_args

    ours = parse_args(words[4:])
    assert (ours.hostfile, ours.num_nodes, ours.num_gpus, ours.master_addr) == (str(hostfile), 2, 2, "alpha")
    assert ours.user_script == "env"
    assert ours.no_python
    assert ours.no_ssh_check
    train = train_arguments(ours.user_args)
    assert (train.resume, str(train.config)) == ("never", CONFIG)
    for rank, host in enumerate(("alpha", "beta")):
        check = commands[f"check, for {host}"]
        assert check[0] == "ssh"
        assert check[-2] == host
        assert f"--node-rank {rank} " in check[-1]
        assert f"cd {shlex.quote(os.getcwd())} && " in check[-1]


@pytest.mark.parametrize(
    "word",
    [
        "a=b",
        "data.augment={flip: 0.5, grey: 1}",
        "x=[1,2]",
        'a="b c"',
        "a='q r'",
        "c=$HOME `id` \\n",
        "d=$HOME;ls",
        "e=#",
    ],
)
def test_arguments_survive_deepspeed_pdsh_and_the_shell_of_the_node(word):
    """As DeepSpeed treats them: its own quoting, then one line for a shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    job = Job(Path("c.yaml"), (word,), Path("run"), (Host("a", 1), Host("b", 1)), "a", 29500, "token")
    args = parse_args(list(deepspeed_over_ssh(job, Path("hosts"), SshOptions()).words[3:]))
    runner = PDSHRunner(args, "world")
    line = " ".join([runner.user_script, *runner.user_arguments])
    script = re.sub(r"^env AROFACE_JOB=token \S+ -u -m launch", "printf '%s\\\\0'", line)
    seen = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")
    assert seen[:3] == ["train", "c.yaml", word]


def test_a_percent_sign_is_refused_for_pdsh():
    job = Job(Path("c.yaml"), ("a=50%h",), Path("run"), (Host("a", 1), Host("b", 1)), "a", 29500, "token")
    with pytest.raises(ConfigError, match="percent sign.*--launcher no-ssh"):
        deepspeed_over_ssh(job, Path("hosts"), SshOptions())


def test_no_ssh_prints_one_command_a_node(capsys, hostfile):
    from deepspeed.launcher.runner import parse_args

    commands = printed(capsys, "--hostfile", hostfile, "--launcher", "no-ssh")
    for rank, host in enumerate(("alpha", "beta")):
        args = parse_args(commands[f"training, on node {rank} ({host})"][3:])
        assert (args.no_ssh, args.node_rank, args.master_addr, args.num_gpus) == (True, rank, "alpha", 2)
        assert train_arguments(args.user_args).run == Path("runs/my run")


def test_torchrun_understands_its_command(capsys):
    from torch.distributed.run import parse_args

    options = ("--nodes", 2, "--gpus-per-node", 2, "--launcher", "torchrun", "--master-addr", "alpha")
    commands = printed(capsys, *options, "--env", "NAME=two words")
    args = parse_args(commands["training, on node 1"][3:])
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "2", 1)
    assert (args.master_addr, args.master_port, args.training_script) == ("alpha", 29500, "env")
    assert "NAME=two words" in args.training_script_args
    assert train_arguments(args.training_script_args).run == Path("runs/my run")


def test_options_that_are_missing_are_asked_for(capsys, hostfile, monkeypatch):
    for options, message in (
        (("--launcher", "ssh"), "--launcher ssh needs --hostfile"),
        (("--nodes", "2"), "needs --gpus-per-node and the --master-addr of node 0"),
        (("--launcher", "slurm"), "works inside an allocation; submit launch/slurm/train.sbatch"),
        (("--hostfile", str(hostfile), "--env", "NOT_SET_ANYWHERE"), "write --env NOT_SET_ANYWHERE=VALUE"),
    ):
        assert main([*START, "--run", "r", "--dry-run", *options]) == 2
        assert message in capsys.readouterr().err
    words = [*START, "--run", "r", "--launcher", "no-ssh", "--hostfile", str(hostfile)]
    assert main([*words, "--node-rank", "2"]) == 2
    assert "give each node its own, from 0 to 1" in capsys.readouterr().err


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """An allocation of two nodes: srun and scontrol as far as they matter here."""
    programs = {
        "scontrol": '#!/bin/sh\n[ "$2" = hostnames ] && printf "n1\\nn2\\n"\n',
        "srun": "#!/bin/sh\nexit 3\n",
        "scancel": "#!/bin/sh\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {"JOB_ID": "7", "JOB_NUM_NODES": "2", "JOB_NODELIST": "n[1-2]", "GPUS_ON_NODE": "4"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_slurm_starts_every_rank_with_srun(capsys, slurm):
    commands = printed(capsys)
    words = commands["training, inside the allocation"]
    assert words[:7] == ["srun", "--nodes", "2", "--ntasks", "8", "--ntasks-per-node", "4"]
    assert "--kill-on-bad-exit=1" in words
    assert words[words.index("launch.cluster.slurm_rank") + 1 :][:3] == ["n1", "29500", "train"]
    assert train_arguments(words).overrides == ["batch.micro_batch=2", "alignment.share=1"]
    check = commands["check, inside the allocation"]
    assert check[:7] == ["srun", "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1"]
    assert "--node-rank" not in check
    assert check[check.index("--hosts") + 1] == "n1:4,n2:4"


def test_slurm_refuses_other_nodes_and_passes_on_a_failed_check(capsys, slurm):
    assert main([*START, "--run", "r", "--nodes", "3"]) == 2
    assert "--nodes 3 does not fit the allocation, which has 2" in capsys.readouterr().err
    assert main([*START, "--run", "r"]) == 2
    assert "Nothing was started" in capsys.readouterr().err
    assert main([*START, "--run", "r", "--no-preflight"]) == 3


def test_slurm_tasks_get_the_environment_of_pytorch():
    task = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    assert rank_environment(task, "n1", "29500") == {
        **{"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
        **{"MASTER_ADDR": "n1", "MASTER_PORT": "29500"},
    }
    with pytest.raises(ConfigError, match="started by srun"):
        rank_environment({}, "n1", "29500")


def test_the_hostfile_example_is_one():
    assert read_hostfile(ROOT / "launch" / "hostfile.example") == (Host("gpu-01", 8), Host("gpu-02", 8))


@pytest.fixture
def batch_script(tmp_path):
    """Start launch/slurm/train.sbatch with a `python` that writes its arguments down and waits for SIGTERM."""
    programs = {
        "activate": "",
        "python": f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{tmp_path}/arguments\ntrap 'exit 0' TERM\n"
        f"echo $SRUN_CPUS_PER_TASK >{tmp_path}/cores\n[ -e {tmp_path}/ends ] && exit 5\n"
        f"touch {tmp_path}/is-ready\nwhile :; do sleep 0.1; done\n",
        "scontrol": f'#!/bin/sh\necho "$@" >{tmp_path}/scontrol\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "12345"}
    environment |= {"SLURM_CPUS_PER_TASK": "6"}

    def begin():
        script = ROOT / "launch" / "slurm" / "train.sbatch"
        words = ["bash", script, "c.yaml", "data.shards=a b", "--run", "r"]
        return subprocess.Popen(words, env=environment | {"AROFACE_VENV": str(tmp_path)}, cwd=tmp_path)

    return begin


def test_the_slurm_script_is_queued_again_after_a_signal(tmp_path, batch_script):
    text = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
    assert "\n#SBATCH --signal=B:TERM@300\n" in text
    assert "\n#SBATCH --requeue\n" in text
    process = batch_script()
    while not (tmp_path / "is-ready").exists():
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=20) == 0
    assert (tmp_path / "scontrol").read_text() == "requeue 12345\n"
    assert (tmp_path / "cores").read_text() == "6\n", "srun no longer takes them over from sbatch"
    words = (tmp_path / "arguments").read_text().splitlines()
    assert words[:3] == ["-m", "launch", "launch"]
    args = parsed(cmd_launch, words[3:])
    assert (args.run, args.overrides, args.master_port) == (Path("r"), ["data.shards=a b"], 15000 + 2345)


def test_the_slurm_script_hands_on_a_failure_and_does_not_try_again(tmp_path, batch_script):
    (tmp_path / "ends").touch()
    assert batch_script().wait(timeout=20) == 5
    assert not (tmp_path / "scontrol").exists()


def test_the_kubernetes_manifest_starts_our_command_on_every_pod():
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "train.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    args = parsed(cmd_launch, [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]])
    assert container["command"] == ["python", "-m", "launch", "launch"]
    assert args.nodes == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert args.gpus_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
    assert args.master_addr == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" or service["spec"]["clusterIP"] is None
    assert service["spec"]["ports"][0]["port"] == args.master_port
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_an_unreachable_host_is_named_and_nothing_waits(tmp_path, hostfile, monkeypatch, capsys):
    """ssh says 255 for one host while the other never answers."""
    (tmp_path / "ssh").write_text(
        '#!/bin/sh\ncase " $* " in *" beta "*) echo "ssh: connect to host beta: No route" >&2; exit 255;; esac\n'
        f"for i in $(seq 600); do sleep 0.1; done\ntouch {tmp_path}/was-waited-for\n"
    )
    (tmp_path / "pdsh").write_text("#!/bin/sh\nexit 9\n")
    for name in ("ssh", "pdsh"):
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    words = [*START, "--run", str(tmp_path / "run"), "--hostfile", str(hostfile)]
    assert main(words) == 2
    assert not (tmp_path / "was-waited-for").exists()
    message = capsys.readouterr().err
    assert "beta cannot be reached by ssh: ssh: connect to host beta: No route" in message
    assert "take the host out" in message
    assert "alpha" not in message


def test_a_port_in_use_is_named_before_anything_starts(tmp_path, capfd):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        words = ["launch", CONFIG, "--run", str(tmp_path / "run"), "--gpus-per-node", "1", "--master-port", str(port)]
        assert main(words) == 2
    message = capfd.readouterr().err
    assert f"Port {port} of node 0" in message
    assert "Choose another --master-port" in message
    assert not (tmp_path / "run").exists()


def test_stop_touches_only_the_ranks_of_its_job():
    from launch.cluster.stop import main as stop

    def sleeper(**extra):
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ | extra)

    mine = sleeper(AROFACE_JOB="this", RANK="0")
    others = [sleeper(AROFACE_JOB="that", RANK="0"), sleeper(AROFACE_JOB="this"), sleeper(RANK="0")]
    try:
        assert stop(["this"]) == 0
        assert mine.wait(timeout=20) == -signal.SIGTERM
        assert [process.poll() for process in others] == [None] * 3
    finally:
        for process in (mine, *others):
            process.kill()
            process.wait()
