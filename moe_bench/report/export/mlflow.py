"""A record as a run of MLflow, on the tracking server that its client is set up for."""

from __future__ import annotations

from itertools import batched

from moe_bench.errors import MissingRequirementError
from moe_bench.report.export.points import points
from moe_bench.report.export.tracker import outcome, require_installed, settings
from moe_bench.results.record import Record

MAX_METRICS = 1000
MAX_PARAMS = 100
MAX_PARAM_LENGTH = 6000
"""Limits of one request and one value (MLflow, REST API, Log Batch)."""


def require_mlflow() -> None:
    """Raise MissingRequirementError without the package `mlflow` or `mlflow-skinny`."""
    require_installed("mlflow", package="'moe_bench[mlflow]'", name="MLflow")


def write_mlflow(record: Record, experiment: str, *, record_id: str) -> str:
    """Add `record` to `experiment`, which is made where it is not there, and return the new run's id.

    Raises MissingRequirementError with MLflow's own words where it cannot be reached.
    """
    require_mlflow()
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    found = list(points(record))
    last = found[-1]
    metrics = [Metric(one.tag, one.value, round(one.time_s * 1000), one.step) for one in found]
    metrics += [
        Metric(f"outcome/{name}", value, round(last.time_s * 1000), last.step)
        for name, value in outcome(record).items()
    ]
    params = [Param(name, value[:MAX_PARAM_LENGTH]) for name, value in settings(record).items()]
    try:
        client = MlflowClient()
        known = client.get_experiment_by_name(experiment)
        experiment_id = client.create_experiment(experiment) if known is None else known.experiment_id
        start_ms = round(found[0].time_s * 1000)
        run = client.create_run(experiment_id, start_time=start_ms, run_name=record_id)
        run_id = str(run.info.run_id)
        for some_metrics in batched(metrics, MAX_METRICS):
            client.log_batch(run_id, metrics=some_metrics)
        for some_params in batched(params, MAX_PARAMS):
            client.log_batch(run_id, params=some_params)
        client.set_terminated(run_id, end_time=round(last.time_s * 1000))
    except MlflowException as error:
        raise MissingRequirementError(f"MLflow: {str(error).splitlines()[0]}") from error
    return run_id
