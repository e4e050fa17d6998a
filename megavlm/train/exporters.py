"""Figures for other programs: an endpoint for Prometheus, and Weights & Biases."""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from megavlm.config.load import plan_as_tree
from megavlm.config.metrics import MetricsSettings
from megavlm.config.plan import Plan
from megavlm.errors import ConfigError
from megavlm.redact import tree_without_secrets

Sink = Callable[[Mapping[str, Any]], None]
"""Takes the figures of one line of metrics."""
WANDB_ID_FILE = "wandb-id"
"""What makes a run that goes on the same run at Weights & Biases."""


@contextmanager
def exporters(plan: Plan, *, enabled: bool) -> Iterator[dict[str, Sink]]:
    """Open those that the settings name; raises ConfigError for what cannot be opened."""
    settings, sinks = plan.first.metrics, dict[str, Sink]()
    with ExitStack() as stack:
        if enabled and settings.prometheus_port is not None:
            sinks["Prometheus"] = stack.enter_context(_prometheus(settings))
        if enabled and settings.wandb_project is not None:
            sinks["Weights & Biases"] = stack.enter_context(_wandb(plan))
        yield sinks


@contextmanager
def _prometheus(settings: MetricsSettings) -> Iterator[Sink]:
    try:
        from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, start_http_server
    except ImportError as error:
        raise ConfigError(
            f"metrics.prometheus_port={settings.prometheus_port} takes the package "
            "prometheus-client; `pip install megavlm[monitoring]`"
        ) from error
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    host, port = settings.prometheus_host, settings.prometheus_port
    assert port is not None
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on metrics.prometheus_host={host}, prometheus_port={port}: "
            f"{error.strerror}; choose others"
        ) from error
    gauges: dict[str, Gauge] = {}

    def record(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if value is not None and not isinstance(value, int | float):
                continue
            if name not in gauges:
                gauges[name] = Gauge(
                    f"megavlm_training_{name}", "As in metrics.jsonl", registry=registry
                )
            gauges[name].set(float("nan") if value is None else value)

    try:
        yield record
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def _wandb(plan: Plan) -> Iterator[Sink]:
    run_folder, project = plan.first.run_folder, plan.first.metrics.wandb_project
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"metrics.wandb_project={project} takes the package wandb; "
            "`pip install megavlm[monitoring]`"
        ) from error
    # It would tell command line, program, git remote and environment, where credentials may stand.
    private: dict[str, Any] = {
        "disable_git": True,
        "disable_code": True,
        "disable_job_creation": True,
        "save_code": False,
        "console": "off",
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "silent": True,
    }
    try:
        run = wandb.init(
            project=project,
            name=run_folder.name,
            id=_wandb_id(run_folder),
            resume="allow",
            dir=run_folder,
            config=tree_without_secrets(plan_as_tree(plan)),
            settings=wandb.Settings(**private),
        )
    except (wandb.Error, OSError) as error:
        raise ConfigError(
            f"metrics.wandb_project={project}: Weights & Biases cannot be reached ({error}); log "
            "in with `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
        ) from error
    run.define_metric("*", step_metric="step")  # its own steps cannot go back

    def record(values: Mapping[str, Any]) -> None:
        run.log({name: value for name, value in values.items() if value is not None})

    done = False
    try:
        yield record
        done = True
    finally:
        with suppress(Exception):  # W&B's own process may be gone, which is told before
            run.finish(exit_code=0 if done else 1)


def _wandb_id(run_folder: Path) -> str:
    path = run_folder / WANDB_ID_FILE
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
