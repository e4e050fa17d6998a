"""Writes what starts a chosen layout, and pictures of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megavlm.config.load import load_plan
from megavlm.dist.launch import hostfile_text, read_hostfile, sbatch_script
from megavlm.errors import ConfigError
from megavlm.planner.memory_picture import draw_memory, labels_of
from megavlm.planner.predict import predict
from megavlm.planner.report import deepspeed_json
from megavlm.planner.search import Candidate
from megavlm.planner.step_picture import draw_step

HOSTFILE = "hostfile"
DEEPSPEED_JSON = "deepspeed.json"


def make_folder(folder: Path) -> None:
    """Raises ConfigError where it cannot be made."""
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_choice(
    best: Candidate,
    tokens_per_text: float,
    hosts: dict[str, int] | None,
    run_file: Path,
    changes: Sequence[str],
    folder: Path,
) -> list[Path]:
    """Write pictures and files of a layout; their paths.

    hosts: slots by host, for a hostfile, if one is wanted; what has as many slots stays, since
    names may have been filled in. changes: overrides of the run file that give the layout.
    Raises ConfigError where they cannot be written.
    """
    run, cluster = best.run, best.cluster
    step, memory = folder / "step.svg", folder / "memory.svg"
    texts = {
        "run.sbatch": sbatch_script(
            load_plan(run_file, changes), cluster.hosts, cluster.gpus_per_host, run_file, changes
        )
    }
    if hosts is not None and not _has_slots(folder / HOSTFILE, hosts):
        texts[HOSTFILE] = hostfile_text(hosts)
    if run.engine == "zero3":
        texts[DEEPSPEED_JSON] = deepspeed_json(run)
    with _told(folder):
        (folder / DEEPSPEED_JSON).unlink(missing_ok=True)  # of an earlier choice
        draw_step(predict(run, cluster, tokens_per_text), run, cluster, step)
        draw_memory(best.memory, labels_of(run, cluster), cluster, memory)
        for name, text in texts.items():
            (folder / name).write_text(text)
    return [step, memory, *(folder / name for name in texts)]


def _has_slots(hostfile: Path, hosts: dict[str, int]) -> bool:
    """Whether a hostfile is there that has as many slots on as many hosts."""
    return hostfile.exists() and [*read_hostfile(hostfile).values()] == [*hosts.values()]


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error}; choose another --out") from error
