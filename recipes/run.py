"""run(): from settings to a trained model.

The main loop is Driver.run (controllers/recovery.py); what it runs on is a Session (session.py).
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from controllers import QUESTIONS
from controllers.loop import Outcome
from hybridflow.checkpoint import CheckpointStore
from hybridflow.tracing import to_mermaid
from recipes.config import RunConfig
from recipes.finished_run import finished, newest_model
from recipes.forecast import MAPPING, predicted_vs_measured
from recipes.placing import place
from recipes.preparation import check_dataflow, dry_run_report, predicted_mapping, prepare
from recipes.session import Session

LOGGER = logging.getLogger(__name__)


def run(config: RunConfig) -> Outcome | None:
    """The whole run; None for graph=true and dry_run=true, which start nothing."""
    if config.algorithm.name in QUESTIONS:
        raise ValueError(
            f"algorithm.name is {config.algorithm.name!r}, which trains nothing; run python -m "
            f"recipes.{config.algorithm.name}"
        )
    if config.graph:
        print(to_mermaid(check_dataflow(place(config))))
        return None
    prepared = prepare(config)
    if config.dry_run:
        print(dry_run_report(prepared))
        return None
    outcome = finished(prepared)
    if outcome is not None:
        say_where_the_model_is(config)
        return outcome
    mapping = predicted_mapping(prepared)
    with Session(prepared) as session:
        if mapping is not None:
            mapping.save(session.directory / MAPPING)
        outcome = session.run()
        session.loop.tracker.summary(asdict(outcome))
    if mapping is not None and outcome.median_s:
        LOGGER.info("predicted and measured\n%s", predicted_vs_measured(mapping, outcome))
    say_where_the_model_is(config)
    return outcome


def say_where_the_model_is(config: RunConfig) -> None:
    """A last line: the Hugging Face directory of the newest checkpoint."""
    output = Path(config.output_dir)
    model = newest_model(CheckpointStore(output / "checkpoints"))
    if model is not None:
        LOGGER.info("model: %s", model)
