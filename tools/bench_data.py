"""Training pictures per second and core: this project's loader beside what people write by hand.

    python tools/bench_data.py [--pictures 256] [--repetitions 7]

Makes shards of pictures that compress as photographs do, and reads them with worker processes:
decoded, cropped to 224 x 224 (at least nine tenths of the area), RandAugment(2, 9). Peers use this
project's own RandAugment, so that only the rest differs; they leave text as it is, where the loader
tokenises and packs it. All take turns in one run, with as many cores as workers, which the loop
that they feed shares. Start of workers is not timed. A rate per core is of seconds that worker and
loop were computing: what else runs on the machine hardly moves it.
"""

import argparse
import io
import math
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw
from timing import machine, markdown_table, write_results
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate
from webdataset.compat import WebDataset, WebLoader

from megavlm.config.data import DataSettings, SourceSettings
from megavlm.config.presets import PRESETS
from megavlm.config.run import CheckpointSettings, OptimizerSettings, RunSettings, TrainSettings
from megavlm.data.augment import rand_augment
from megavlm.data.collate import texts_alone
from megavlm.data.image import CROP_ASPECTS
from megavlm.data.loader import AUGMENT_FILL, MicroBatches, Share, load
from megavlm.data.samples import Sample, text
from megavlm.data.shards import write_shards
from megavlm.data.sources import Sources
from megavlm.data.tokenizer import Tokenizer, train_tokenizer

SIDE = 224
MINIMUM_AREA = 0.9
SIZES = ((1024, 768), (500, 375))
QUALITY = 85
BATCH = 16
SHARD_SAMPLES = 64
LARGEST_CROP_SOURCE = math.ceil(SIDE / math.sqrt(MINIMUM_AREA * min(CROP_ASPECTS)))
OURS = "megavlm"
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


class Speed(NamedTuple):
    """Of one repetition."""

    images_per_second: float
    """By the clock."""
    images_per_core_second: float
    """By the processor time of the workers and of the loop that takes their batches."""


Loader = Callable[[Path, int], Iterator[Any]]
"""(folder of shards, workers) -> batches without end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=256, help="of each size")
    parser.add_argument("--batches", type=int, default=12, help=f"of {BATCH}, in a repetition")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--stem", type=Path, default=Path("docs/benchmarks/data-cpu"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts: list[str] = []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for size in SIZES:
            folder = Path(name) / f"{size[0]}x{size[1]}"
            picture_bytes = write_photographs(folder, size, options.pictures)
            contest = {(name, 1): loader for name, loader in LOADERS.items()}
            contest |= {(name, 2): LOADERS[name] for name in (OURS, THREADS)}
            speeds = race(contest, folder, options.batches, options.repetitions)
            heading = (
                f"## {size[0]} x {size[1]}, JPEG of quality {QUALITY}\n\n"
                f"{picture_bytes / 1000:.0f} kB a picture.\n\n"
            )
            parts.append(heading + quickest(folder, options.repetitions) + "\n" + report(speeds))
            print(parts[-1], flush=True)
            for (contender, workers), measured in speeds.items():
                rows += [
                    {"size": size, "contender": contender, "workers": workers, **speed._asdict()}
                    for speed in measured
                ]
    about = machine(torch.device("cpu")) | {
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end"
    }
    write_results(options.stem, "Training pictures per second", about, "\n".join(parts), rows)


def write_photographs(folder: Path, size: tuple[int, int], count: int) -> float:
    """Shards of pictures with captions, and a tokenizer; returns the mean bytes of a picture."""
    folder.mkdir()
    captions = [f"picture {n} of {n % 7} discs and {n % 5} boxes" for n in range(count)]
    samples = [
        Sample(
            key=f"{n:06}",
            pictures=(photograph(size, n),),
            texts=(text("Caption:", caption, task="caption"),),
        )
        for n, caption in enumerate(captions)
    ]
    write_shards(folder, samples, SHARD_SAMPLES)
    # Words enough for the vocabulary.
    words = ["".join(letters) for letters in product("aeioubdgklmnprst", repeat=3)]
    train_tokenizer(
        [*captions, *words], folder / "tokenizer.model", PRESETS["vlm-tiny"].decoder.vocabulary
    )
    return statistics.mean(len(sample.pictures[0]) for sample in samples)


def photograph(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG of shades, discs, boxes and grain of several sizes."""
    width, height = size
    generator = np.random.default_rng(seed)
    shades = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = shades.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        x, y, reach = generator.integers((width, height, width // 5))
        shape = draw.ellipse if generator.integers(2) else draw.rectangle
        colour = tuple(int(level) for level in generator.integers(256, size=3))
        shape((x - reach, y - reach // 2, x + reach, y + reach // 2), fill=colour)
    levels = np.asarray(image).astype(np.float32)
    sharpness = generator.uniform(0.5, 1.1)
    for grain, strength in ((1, 6), (2, 8), (4, 10), (8, 12)):
        coarse = generator.normal(0, strength * sharpness, (height // grain, width // grain))
        fine = Image.fromarray(coarse.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        levels += np.asarray(fine)[..., None]
    file = io.BytesIO()
    Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def ours(folder: Path, workers: int) -> Iterator[Any]:
    return load(micro_batches(folder), range(10**9), workers)


def ours_in_threads(folder: Path, workers: int) -> Iterator[Any]:
    """As many batches ahead as the worker processes have."""
    batches = micro_batches(folder)
    with ThreadPoolExecutor(workers) as pool:
        ahead: list[Future[Any]] = []
        for number in range(10**9):
            ahead.append(pool.submit(batches.__getitem__, number))
            if number >= 2 * workers:
                yield ahead.pop(0).result()


def micro_batches(folder: Path) -> MicroBatches:
    source = SourceSettings(folder=str(folder))
    run = RunSettings(
        run_folder=folder / "run",
        model=PRESETS["vlm-30b"],
        data=DataSettings(
            train=(source,), heldout=source, tokenizer=folder / "tokenizer.model", row_tokens=256
        ),
        optimizer=OptimizerSettings(learning_rate=1e-4),
        train=TrainSettings(steps=1, samples_per_step=8 * BATCH, micro_batches=8),
        checkpoint=CheckpointSettings(every=1),
    )
    assert run.model.encoder.image_pixels == SIDE
    assert run.data.augment.minimum_area == MINIMUM_AREA
    return MicroBatches(
        Sources(run.data.train, run.seed),
        Tokenizer(run.data.tokenizer),
        run,
        Share(rank=0, ranks=1),
        texts_alone,
        training=True,
    )


class TarPictures(Dataset[tuple[Tensor, bytes]]):
    """Pictures and captions of shards, by tarfile and Pillow."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image, int], Tensor]) -> None:
        self.shards = sorted(folder.glob("*.tar"))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.shards) * SHARD_SAMPLES

    def __getitem__(self, number: int) -> tuple[Tensor, bytes]:
        shard, place = divmod(number, SHARD_SAMPLES)
        tar, members = opened(self.shards[shard])
        picture, record = (tar.extractfile(m) for m in members[2 * place : 2 * place + 2])
        assert picture is not None
        assert record is not None
        return self.transform(Image.open(picture), number), record.read()


@cache
def opened(path: Path) -> tuple[tarfile.TarFile, list[tarfile.TarInfo]]:
    tar = tarfile.open(path)
    return tar, tar.getmembers()


def pillow(folder: Path, workers: int, draft: bool, resample: Image.Resampling) -> Iterator[Any]:
    data = tar_pictures(folder, draft, resample)
    sampler = RandomSampler(data, replacement=True, num_samples=10**9)
    return iter(DataLoader(data, BATCH, sampler=sampler, num_workers=workers))


def tar_pictures(folder: Path, draft: bool, resample: Image.Resampling) -> TarPictures:
    return TarPictures(folder, partial(transformed, draft=draft, resample=resample))


def web_dataset(folder: Path, workers: int) -> Iterator[Any]:
    data = web_samples(folder).repeat().shuffle(SHARD_SAMPLES).batched(BATCH)
    return iter(WebLoader(data, batch_size=None, num_workers=workers))


def web_samples(folder: Path) -> Any:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    data: Any = WebDataset(shards, shardshuffle=False, nodesplitter=None, empty_check=False)
    return data.decode("pil").to_tuple("jpg", "json", "__key__").map(web_sample)


def web_sample(sample: tuple[Image.Image, Any, str]) -> tuple[Tensor, str]:
    picture, record, key = sample
    return transformed(picture, int(key), draft=False, resample=BICUBIC), str(record)


def transformed(image: Image.Image, seed: int, draft: bool, resample: Image.Resampling) -> Tensor:
    """Crop, RandAugment and tensor, as with torchvision on Pillow."""
    if draft:
        image.draft("RGB", (LARGEST_CROP_SOURCE, LARGEST_CROP_SOURCE))
    image = image.convert("RGB")
    generator = np.random.default_rng(seed)
    image = image.resize((SIDE, SIDE), resample, crop_box(image.size, generator))
    image = rand_augment(
        image, generator, operations=2, magnitude=9, colour_operations=True, fill=AUGMENT_FILL
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def crop_box(size: tuple[int, int], generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Torchvision's RandomResizedCrop.get_params."""
    narrowest, widest = map(math.log, CROP_ASPECTS)
    for _ in range(10):
        area = size[0] * size[1] * generator.uniform(MINIMUM_AREA, 1)
        aspect = math.exp(generator.uniform(narrowest, widest))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if width <= size[0] and height <= size[1]:
            left = int(generator.integers(size[0] - width + 1))
            top = int(generator.integers(size[1] - height + 1))
            return left, top, left + width, top + height
    return 0, 0, *size


THREADS = f"{OURS}, threads"
LOADERS: dict[str, Loader] = {
    OURS: ours,
    THREADS: ours_in_threads,
    "Pillow": partial(pillow, draft=False, resample=BICUBIC),
    "Pillow, draft": partial(pillow, draft=True, resample=BICUBIC),
    "Pillow, draft, bilinear": partial(pillow, draft=True, resample=BILINEAR),
    "webdataset": web_dataset,
}


def race(
    contest: dict[tuple[str, int], Loader], folder: Path, batches: int, repetitions: int
) -> dict[tuple[str, int], list[Speed]]:
    """Speeds of all, in turns; the workers of those that wait sleep."""
    speeds: dict[tuple[str, int], list[Speed]] = {key: [] for key in contest}
    for _ in range(repetitions):
        for (name, workers), loader in contest.items():
            speeds[name, workers].append(measure(loader, folder, workers, batches))
    return speeds


def quickest(folder: Path, repetitions: int, batches: int = 2) -> str:
    """Images per second of processor time in one process, each batch at its quickest repetition.

    What other processes do to a core's caches spoils some repetitions, not all.
    """
    loaders: dict[str, Callable[[int], Any]] = {
        OURS: micro_batches(folder).__getitem__,
        "Pillow": partial(batch_of, tar_pictures(folder, False, BICUBIC)),
        "Pillow, draft": partial(batch_of, tar_pictures(folder, True, BICUBIC)),
        "Pillow, draft, bilinear": partial(batch_of, tar_pictures(folder, True, BILINEAR)),
    }
    seconds = {name: [math.inf] * batches for name in loaders}
    for _ in range(repetitions):
        for number in range(batches):
            for name, load_batch in loaders.items():
                started = time.process_time()
                load_batch(number)
                elapsed = time.process_time() - started
                seconds[name][number] = min(seconds[name][number], elapsed)
    rates = {name: batches * BATCH / sum(best) for name, best in seconds.items()}
    rows = [
        {
            "one process": name,
            "images/s/core": f"{rate:.0f}",
            f"{OURS}'s lead": f"{rates[OURS] / rate:.2f}",
        }
        for name, rate in rates.items()
    ]
    return markdown_table(rows)


def batch_of(data: TarPictures, number: int) -> Any:
    return default_collate([data[number * BATCH + place] for place in range(BATCH)])


def measure(loader: Loader, folder: Path, workers: int, batches: int) -> Speed:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:workers])  # which the workers inherit
    iterator = loader(folder, workers)
    for _ in range(2 * workers + 2):
        next(iterator)
    started, processor_started = time.perf_counter(), processor_seconds()
    for _ in range(batches):
        next(iterator)
    seconds, processor = time.perf_counter() - started, processor_seconds() - processor_started
    os.sched_setaffinity(0, cores)
    return Speed(batches * BATCH / seconds, batches * BATCH / processor)


def processor_seconds() -> float:
    """Of this process and its workers, so far."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(each.user + each.system for each in times)


def report(speeds: dict[tuple[str, int], list[Speed]]) -> str:
    mine = speeds[OURS, 1]
    table: list[dict[str, str]] = []
    for (name, workers), measured in speeds.items():
        ratios = [
            a.images_per_core_second / b.images_per_core_second
            for a, b in zip(mine, measured, strict=True)
        ]
        table.append(
            {
                "loader": name,
                "workers": str(workers),
                "images/s/core": spread([s.images_per_core_second for s in measured], ".0f"),
                "images/s": spread([s.images_per_second for s in measured], ".0f"),
                f"{OURS}'s lead by core": spread(ratios, ".2f"),
            }
        )
    lines = [markdown_table(table)]
    for name in (OURS, THREADS):
        by_clock = [
            two.images_per_second / one.images_per_second
            for one, two in zip(speeds[name, 1], speeds[name, 2], strict=True)
        ]
        lines.append(f"{name}: two cores are {spread(by_clock, '.2f')} times as fast as one.\n")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    low, middle, high = (f(values) for f in (min, statistics.median, max))
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
