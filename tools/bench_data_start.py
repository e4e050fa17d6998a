"""What 1.8 billion pairs cost before and while a node reads them: seconds, memory, state.

    python tools/bench_data_start.py --shards 180000 --samples 10000 --workers 64

Writes the `shards.json` of so many shards, and indices, real ones, which all lead to a few files,
and no pictures. Then it opens the folder as training does, deals steps in so many forked loader
workers as a node has (8 GPUs x `data.workers`), and reads from the kernel what they take together.
Memory is proportional set size: what processes share counts once. What as many workers take for a
folder of a few samples, Python and torch, is measured, too, and subtracted.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megavlm.config.data import DataSettings, SourceSettings
from megavlm.data.cursor import Numbers
from megavlm.data.index import CAPTION, MANIFEST, MEMBER, PICTURE, Members, index_name
from megavlm.data.sources import Sources

FILES = 64
"""Of indices: as many as are open at once, so that none is read from the cache for another."""
CAPTION_BYTES = 60
PICTURE_BYTES = 40_000
BLOCK_BYTES = 512


def members_of_shard(samples: int) -> Members:
    """Of a shard of pictures with captions, such as img2dataset writes."""
    members = np.empty(2 * samples, MEMBER)
    members["sample"] = np.repeat(np.arange(samples), 2)
    members["kind"] = [CAPTION, PICTURE] * samples
    members["number"] = 0
    members["size"] = [CAPTION_BYTES, PICTURE_BYTES] * samples
    padded = -(-members["size"].astype(np.int64) // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES
    members["offset"] = np.cumsum(padded) - padded + BLOCK_BYTES
    return members


def write_folder(folder: Path, shards: int, samples: int) -> None:
    members = members_of_shard(samples)
    size = int(members["offset"][-1] + members["size"][-1])
    for number in range(FILES):
        np.save(folder / f"shared-{number}.npy", members)
    names = [f"{number:06}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        (folder / index_name(name)).symlink_to(f"shared-{number % FILES}.npy")
    record = {"shards": {name: [samples, size] for name in names}}
    (folder / MANIFEST).write_text(json.dumps(record))


def proportional_bytes(pid: int) -> int:
    """What a process takes of memory, its part of what it shares with others included."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no Pss")


def bytes_of_workers(workers: int, work: Callable[[], object]) -> int:
    """Memory of this process and so many forks of it that have done their work."""
    children: list[int] = []
    pipes = [os.pipe() for _ in range(workers)]
    for _, done in pipes:
        child = os.fork()
        if child == 0:
            work()
            os.write(done, b"1")
            while True:
                time.sleep(1)
        children.append(child)
    for ready, done in pipes:
        os.read(ready, 1)
        os.close(ready)
        os.close(done)
    total = sum(proportional_bytes(pid) for pid in (os.getpid(), *children))
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return total


def open_sources(folder: Path, shuffle_shards: int) -> Sources:
    return Sources([SourceSettings(folder=str(folder))], 1, group_shards=shuffle_shards)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=180_000)
    parser.add_argument("--samples", type=int, default=10_000, help="of a shard")
    parser.add_argument("--workers", type=int, default=64, help="loader processes of a node")
    parser.add_argument("--steps", type=int, default=320, help="that each of them deals")
    parser.add_argument("--samples-per-step", type=int, default=2048)
    options = parser.parse_args()
    shuffle_shards = DataSettings.shuffle_shards

    def step(sources: Sources, number: int) -> Numbers:
        first = number * options.samples_per_step
        places = sources.shuffled(np.arange(first, first + options.samples_per_step))
        return sources.sizes_of(places).text_bytes_n

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder, options.shards, options.samples)
        started = time.perf_counter()
        sources = open_sources(folder, shuffle_shards)
        opened = time.perf_counter()
        middle = len(sources) // 2 // options.samples_per_step
        sources.shuffled(np.array([middle * options.samples_per_step]))
        found = time.perf_counter()
        times: list[float] = []
        for number in range(middle, middle + 50):
            begun = time.perf_counter()
            step(sources, number)
            times.append(time.perf_counter() - begun)
        del sources

        def bytes_of_dealing(folder: Path) -> int:
            """In all workers: through a group of shards, and on into the next one."""
            sources = open_sources(folder, shuffle_shards)
            group = options.samples * shuffle_shards // options.samples_per_step
            numbers = range(middle, middle + group + options.steps, group // 16)
            return bytes_of_workers(
                options.workers, lambda: [step(sources, number) for number in numbers]
            )

        small = folder / "small"
        small.mkdir()
        write_folder(small, FILES, samples=100)
        taken = bytes_of_dealing(folder) - bytes_of_dealing(small)
    print("| what | figure |\n|---|---|")
    print(f"| samples | {options.shards * options.samples:,} in {options.shards:,} shards |")
    print(f"| opening the folder, s | {opened - started:.2f} |")
    print(f"| finding the first position after a resume, s | {found - opened:.3f} |")
    print(f"| a step of {options.samples_per_step:,}, first, ms | {times[0] * 1e3:.1f} |")
    print(f"| a step of {options.samples_per_step:,}, median, ms | {np.median(times) * 1e3:.2f} |")
    print(f"| memory of data in {options.workers} workers, MB | {taken / 1e6:,.0f} |")
    print("| state, bytes | 8 (one position) |")


if __name__ == "__main__":
    main()
