"""`aroface train` as one task of srun: `python -m launch.cluster.slurm_rank MASTER_ADDR MASTER_PORT train ...`.

Gives the process the environment that PyTorch expects; a signal that Slurm sends reaches the trainer itself.
"""

import os
import sys
from collections.abc import Mapping

from aroface.errors import ConfigError
from launch.cli import main

__all__ = ["rank_environment"]


def rank_environment(slurm: Mapping[str, str], master_addr: str, master_port: str) -> dict[str, str]:
    """RANK and its companions from the environment of a Slurm task.

    Raises:
        ConfigError: this is no task of srun.
    """
    try:
        tasks, nodes = int(slurm["SLURM_NTASKS"]), int(slurm["SLURM_NNODES"])
        return {
            "RANK": slurm["SLURM_PROCID"],
            "LOCAL_RANK": slurm["SLURM_LOCALID"],
            "WORLD_SIZE": str(tasks),
            "LOCAL_WORLD_SIZE": str(tasks // nodes),
            "MASTER_ADDR": master_addr,
            "MASTER_PORT": master_port,
        }
    except KeyError as error:
        raise ConfigError(f"{error.args[0]} is not set: this is to be started by srun (aroface launch).") from error


if __name__ == "__main__":
    os.environ.update(rank_environment(os.environ, sys.argv[1], sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
