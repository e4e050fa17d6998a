"""`megavlm serve`: answers questions about pictures over HTTP."""

import argparse
import importlib.util
from dataclasses import fields
from pathlib import Path

from megavlm.commands.options import Commands, add_execution, add_run_command, positive
from megavlm.config.plan import Plan
from megavlm.errors import ConfigError
from megavlm.serve.limits import ServeLimits


def add_command(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add its options."""
    serve = add_run_command(
        commands, "serve", _serve, "answer over HTTP, as OpenAI's chat completions"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=int, default=8_000, help="0: any that is free (8000)")
    serve.add_argument("--model-name", help="that requests must give (the run folder's name)")
    serve.add_argument(
        "--api-key-file",
        type=Path,
        help="file with the key that requests must show (else MEGAVLM_API_KEY, else none)",
    )
    add_execution(serve)
    limits = serve.add_argument_group("limits")
    for field in fields(ServeLimits):
        limits.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=positive,
            default=field.default,
            metavar="N",
            help=f"{field.metadata['meaning']} ({field.default:,})",
        )


def _serve(plan: Plan, options: argparse.Namespace) -> None:
    needed = ("fastapi", "uvicorn", "prometheus_client")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}; run `pip install 'megavlm[serve]'`")
    limits = ServeLimits(**{f.name: getattr(options, f.name) for f in fields(ServeLimits)})
    from megavlm.serve.server import read_key, serve_run

    serve_run(
        plan,
        limits,
        quantization=options.quantization,
        compiled=options.compile,
        host=options.host,
        port=options.port,
        model_name=options.model_name or plan.first.run_folder.resolve().name,
        api_key=read_key(options.api_key_file),
    )
