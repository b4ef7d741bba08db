"""Typed configuration: strict YAML in, frozen models out. Imports no torch."""

from aroface.config.load import apply_overrides, dump_config, load_config, parse_config
from aroface.config.schema import TrainConfig

__all__ = ["TrainConfig", "apply_overrides", "dump_config", "load_config", "parse_config"]
