"""Train a model from one configuration file.

The run directory keeps the resolved configuration, metrics.jsonl, TensorBoard events and checkpoints. Started again
with the same command it continues where it stopped; SIGTERM and Ctrl-C finish the step, save, and exit with 0.
"""

import argparse
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from aroface.config import TrainConfig, load_config
from aroface.devices import local_ranks
from launch.outputs import output_folder
from launch.threads import free_cores

if TYPE_CHECKING:
    from aroface.engine.trainer import Resume
    from aroface.types import TrainingData

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file with the whole configuration")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings to change; values are YAML")
    parser.add_argument("--run", type=output_folder, required=True, metavar="DIR", help="run directory")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: from the newest whole checkpoint in DIR if there is one (default); never: DIR must be new; "
        "PATH: from that checkpoint or run directory",
    )
    parser.add_argument(
        "--check", action="store_true", help="build everything, make one step, evaluate, and keep nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Train."""
    config = load_config(args.config, TrainConfig, args.overrides)
    from aroface.engine.trainer import Trainer
    from launch.training_data import open_training_data
    from launch.training_evaluators import open_evaluators

    if config.engine.threads is None:
        threads = max(1, free_cores() // local_ranks())
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"threads": threads})})
    data = open_training_data(config.data, image_size=config.model.image_size)
    resume: Resume = args.resume if args.resume in ("auto", "never") else Path(args.resume)
    evaluators = open_evaluators(config.evaluate)
    trainer = Trainer(config, data, args.run, resume=resume, overrides=args.overrides, evaluators=evaluators)
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        _warn(config, data)
        print(trainer.describe(), flush=True)
    if args.check:
        loss = trainer.check()
        if is_main:
            print(f"check passed: loss of an untrained batch {loss:.3f}")
        return 0
    handlers = {n: signal.signal(n, lambda *_: trainer.request_stop()) for n in (signal.SIGTERM, signal.SIGINT)}
    result = trainer.train()
    for number, handler in handlers.items():
        # Launchers may send it twice: the second must not turn a run that was saved into one that was killed.
        signal.signal(number, signal.SIG_IGN if result.was_interrupted else handler)
    if is_main:
        state = "stopped at" if result.was_interrupted else "finished"
        loss_text = "" if result.loss is None else f", loss {result.loss:.3f}"
        print(f"{state} step {result.position.step} of {result.total_steps}{loss_text}; checkpoints in {args.run}")
    return 0


def _warn(config: TrainConfig, data: "TrainingData") -> None:
    """Tell what can be trained, but to no purpose."""
    if data.num_classes == 1:
        _log.warning(
            "data.shards has one identity: there is nobody to tell it from, the loss is 0 and nothing is learnt. Name "
            "shards of two identities at least."
        )
    batch, samples = config.batch.global_batch, data.num_samples
    if batch > samples:
        _log.warning(
            "batch.global_batch = %d is more than the %d images of data.shards: a step is %.3g epochs, with images "
            "more than once. Set it to %d at most, or name more images.",
            batch,
            samples,
            batch / samples,
            samples,
        )
