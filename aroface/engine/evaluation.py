"""Evaluation every few steps: what the model is worth so far, and which checkpoint was the best."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aroface.config.evaluate import EvaluateConfig
from aroface.engine.best import Best
from aroface.errors import ConfigError
from aroface.types import Embedder, Evaluator

__all__ = ["EvaluationLine", "PeriodicEvaluation"]


@dataclass(frozen=True)
class EvaluationLine:
    """One line of metrics.jsonl of another form than the training's: one set at one step."""

    step: int  #: optimiser steps taken
    samples: int  #: images seen over all ranks
    evaluation: str  #: name of the set
    metrics: Mapping[str, float | None]  #: by name; null where a number does not exist
    is_best: bool  #: the best so far, by the number that selects; false for sets that do not select
    elapsed_s: float


class _Telling:
    """An embedder that tells after every batch that it is alive."""

    def __init__(self, embedder: Embedder, tell: Callable[[], None]) -> None:
        self._embedder, self._tell = embedder, tell
        self.contract, self.embedding_dim, self.model_id = embedder.contract, embedder.embedding_dim, embedder.model_id

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        embeddings = self._embedder.embed(images)
        self._tell()
        return embeddings


class PeriodicEvaluation:
    """Runs the evaluators and remembers the best.

    Args:
        config: what is evaluated and what selects.
        evaluators: one per set, in order; each is called on all ranks at once.
        best: the best of an earlier part of the run.

    Raises:
        ConfigError: `evaluate.best` names a number that its set does not give.
    """

    def __init__(self, config: EvaluateConfig, evaluators: Sequence[Evaluator], *, best: Best | None) -> None:
        self._config, self._evaluators, self.best = config, evaluators, best
        by = config.best
        for evaluator in evaluators:
            if by and by.set == evaluator.name and by.metric not in (names := evaluator.metric_names()):
                raise ConfigError(
                    f"evaluate.best.metric = {by.metric} is no number that the set {by.set} gives; choose from "
                    f"{', '.join(sorted(names)) or 'those of another set'}."
                )

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether the model is evaluated after `step`."""
        return is_last or step % self._config.every_steps == 0

    def run(
        self, embedder: Embedder, *, step: int, samples: int, on_progress: Callable[[], None] = lambda: None
    ) -> list[EvaluationLine]:
        """Evaluate on all sets; a collective. `best` is the new one afterwards where this is it.

        Args:
            embedder: the model.
            step: optimiser steps taken.
            samples: images seen.
            on_progress: called after every batch of images and after every set.
        """
        lines = []
        for evaluator in self._evaluators:
            started = time.perf_counter()
            metrics = evaluator.evaluate(_Telling(embedder, on_progress))
            on_progress()
            is_best = self._is_best(evaluator.name, metrics, step)
            elapsed_s = round(time.perf_counter() - started, 3)
            lines.append(EvaluationLine(step, samples, evaluator.name, metrics, is_best, elapsed_s))
        return lines

    def _is_best(self, name: str, metrics: Mapping[str, float | None], step: int) -> bool:
        by = self._config.best
        if by is None or by.set != name:
            return False
        value = metrics[by.metric]
        if value is None or not math.isfinite(value) or (self.best is not None and value <= self.best.value):
            return False
        self.best = Best(step, name, by.metric, value)
        return True
