"""Train over one or several nodes: check every node, then start one `aroface train` per GPU on all of them.

  once, from any machine, through ssh
      aroface launch CONFIG --run DIR --hostfile F
  on every node, without ssh
      aroface launch CONFIG --run DIR --hostfile F --launcher no-ssh --node-rank I
  on every node, with torchrun
      aroface launch CONFIG --run DIR --launcher torchrun --nodes N
        --gpus-per-node G --node-rank I --master-addr HOST
  in a Slurm allocation
      aroface launch CONFIG --run DIR
  on this machine alone
      aroface launch CONFIG --run DIR --gpus-per-node G

--dry-run prints the exact commands. The same command continues a run that was stopped or lost a node.
"""

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file with the whole configuration")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings to change; values are YAML")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory, shared by all nodes")
    parser.add_argument("--resume", metavar="auto|never|PATH", help="as in aroface train")
    nodes = parser.add_argument_group("nodes")
    nodes.add_argument(
        "--hostfile", type=Path, metavar="F", help="one `HOST slots=GPUS` a line; the first is the master"
    )
    nodes.add_argument(
        "--nodes", type=int, metavar="N", help="the first N hosts; without a hostfile: how many there are"
    )
    nodes.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="ranks on each node (default: slots, or GPUs here)"
    )
    nodes.add_argument(
        "--launcher",
        choices=("ssh", "no-ssh", "torchrun", "slurm"),
        help="default: slurm inside an allocation, ssh with a hostfile, else torchrun on this machine",
    )
    nodes.add_argument("--node-rank", type=int, metavar="I", help="which node this is: no-ssh and torchrun")
    nodes.add_argument("--master-addr", metavar="HOST", help="address of the first node (default: its name)")
    nodes.add_argument("--master-port", type=int, default=29500, metavar="P", help="free port on it")
    nodes.add_argument("--ssh-port", type=int, metavar="P", help="port of sshd on the nodes")
    nodes.add_argument("--ssh-config", type=Path, metavar="F", help="configuration file of ssh")
    nodes.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="set on every node; NCCL_* and GLOO_* of this shell always are",
    )
    checks = parser.add_argument_group("checks")
    checks.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    checks.add_argument("--preflight-only", action="store_true", help="check the nodes and stop")
    checks.add_argument("--no-preflight", action="store_true", help="start without checking the nodes")
    checks.add_argument("--timeout", type=int, default=60, metavar="S", help="seconds that the check may take")


def run(args: argparse.Namespace) -> int:
    """Check and start, or print."""
    from launch.cluster.launchers import choose_launcher

    launcher = choose_launcher(args, os.environ)
    if args.dry_run:
        for comment, command in launcher.commands():
            print(f"# {comment}\n{command.printable()}")
        return 0
    if not args.no_preflight:
        launcher.preflight()
    return 0 if args.preflight_only else launcher.start()
