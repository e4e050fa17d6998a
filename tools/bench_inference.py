"""Latency and throughput of generation beside Hugging Face `generate`, on the same weights.

    python tools/bench_inference.py [--model demo small] [--threads 1] [--rounds 5]

Random weights, one picture and a short question, greedy, fp32 on a CPU and bf16 on a GPU. The first
token's time has the picture's encoding in it; `known picture` is that of one that was asked about
before. A token's time is that of the others, divided by their number. The floor is the time to read
the decoder's weights once, at the speed at which this machine adds up a large tensor. All take
turns in one run, and answer the same tokens.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timing import machine, markdown_table, write_results
from transformers import MllamaForConditionalGeneration
from transformers.utils import logging

from megavlm.checkpoint.lazy import in_memory
from megavlm.config.presets import PRESETS
from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes
from megavlm.convert.mllama import mllama_config, to_hugging_face
from megavlm.data.tokenizer import BEGIN, END, PADDING
from megavlm.dist.groups import device, process_groups
from megavlm.infer.engine import Engine, Limits
from megavlm.infer.prompts import Prompt, Request
from megavlm.model.initial import materialise
from megavlm.model.vit import normalise
from megavlm.model.vlm import VisionLanguageModel

MODELS = {
    "demo": PRESETS["vlm-demo"],
    "small": ModelSizes(
        encoder=EncoderSizes(patch_pixels=16, width=384, layers=12, heads=6, mlp_width=1_536),
        decoder=DecoderSizes(
            vocabulary=16_000,
            width=768,
            self_layers=12,
            cross_every=4,
            heads=12,
            kv_heads=4,
            mlp_width=2_048,
            initial_gate=1.0,
        ),
    ),
}
IMAGE, PROMPT_TOKENS = 4, 24
BATCHES = (4, 16)

Answer = Callable[[int, int], list[list[int]]]
"""(rows, tokens) -> greedy tokens of each row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stem", type=Path, default=Path("docs/benchmarks/inference-cpu"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parts: list[str] = []
    records: list[dict[str, Any]] = []
    with process_groups(seed=1):
        speed = bytes_per_second()
        for name in options.model:
            rows = measure(MODELS[name], options.tokens, options.rounds, speed)
            millions = sum(p.numel() for p in built(MODELS[name]).parameters()) / 1e6
            parts.append(f"## {name}, {millions:.0f} million parameters\n\n{markdown_table(rows)}")
            records += [{"model": name, **row} for row in rows]
            print(parts[-1], flush=True)
        about = machine(device()) | {
            "threads": options.threads,
            "reading memory": f"{speed / 1e9:.1f} GB/s",
            "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end",
        }
    write_results(options.stem, "Latency of generation", about, "\n".join(parts), records)


def measure(sizes: ModelSizes, tokens: int, rounds: int, speed: float) -> list[dict[str, Any]]:
    model = built(sizes)
    pixels = torch.randint(0, 256, (16, 3, *[sizes.encoder.image_pixels] * 2), dtype=torch.uint8)
    prompt = [IMAGE, BEGIN, *torch.randint(10, 500, (PROMPT_TOKENS - 2,)).tolist()]
    limits = Limits(rows=max(BATCHES), tokens=PROMPT_TOKENS + tokens + 1, pictures=1)
    contenders: dict[str, Answer] = {}
    engines = {
        "megavlm": Engine(model, limits),
        "megavlm, compiled": Engine(model, limits, compiled=True),
    }
    started = time.perf_counter()
    engines["megavlm, compiled"].warm_up()
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    for name, engine in engines.items():
        contenders[name] = ours(engine, prompt, pixels, keep=False)
    contenders["transformers"] = theirs(model, sizes, prompt, pixels)
    known = ours(engines["megavlm, compiled"], prompt, pixels, keep=True)
    answers = [answer(2, tokens) for answer in contenders.values()]
    assert all(answer == answers[0] for answer in answers), "the contenders disagree"
    seconds: dict[tuple[str, int, int], list[float]] = {}
    for _ in range(rounds):
        for name, answer in [*contenders.items(), ("known picture", known)]:
            for rows, count in [(1, 1), (1, tokens), *((rows, tokens) for rows in BATCHES)]:
                if name == "known picture" and (rows, count) != (1, 1):
                    continue
                if name == "known picture":
                    answer(1, 1)  # now it is
                started = time.perf_counter()
                answer(rows, count)
                elapsed = time.perf_counter() - started
                seconds.setdefault((name, rows, count), []).append(elapsed)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    # The embedding is looked up, not read.
    weights = sum(p.nbytes for n, p in model.language.named_parameters() if "embedding" not in n)
    rows = [row_of(name, median, tokens) for name in contenders]
    first = 1e3 * median["known picture", 1, 1]
    rows.append(
        {"contender": "megavlm, compiled, known picture", "first token, ms": f"{first:.1f}"}
    )
    rows.append({"contender": "floor", "a token, ms": f"{1e3 * weights / speed:.2f}"})
    peer = next(row for row in rows if row["contender"] == "transformers")
    for row in rows:
        for column in ("first token", "a token"):
            if value := row.get(f"{column}, ms"):
                row[f"{column}, ratio"] = f"{float(value) / float(peer[f'{column}, ms']):.2f}"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column, "") for column in columns} for row in rows]


def row_of(name: str, median: dict[tuple[str, int, int], float], tokens: int) -> dict[str, Any]:
    first, whole = median[name, 1, 1], median[name, 1, tokens]
    row = {
        "contender": name,
        "first token, ms": f"{1e3 * first:.1f}",
        "a token, ms": f"{1e3 * (whole - first) / (tokens - 1):.2f}",
    }
    return row | {
        f"tokens/s, batch {rows}": f"{rows * tokens / median[name, rows, tokens]:.0f}"
        for rows in BATCHES
    }


def built(sizes: ModelSizes) -> VisionLanguageModel:
    """A model with initial weights that never ends an answer."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with torch.device("meta"):
        model = VisionLanguageModel(sizes, dtype=dtype)
    materialise(model, 1, device())
    with torch.no_grad():
        head: Any = model.language.output_layer
        head.weight[END] = 0  # others are above zero
    return model.eval()


def ours(engine: Engine, prompt: list[int], pixels: torch.Tensor, *, keep: bool) -> Answer:
    seen = [(0, 1)] * len(prompt)

    def answer(rows: int, tokens: int) -> list[list[int]]:
        if not keep:
            engine.pictures.forget()
        written: dict[int, list[int]] = {}
        for row in range(rows):
            request = Request(
                prompt=Prompt(prompt, seen), pixels=(pixels[row],), max_new_tokens=tokens
            )
            written[engine.add(request)] = []
        while engine.running or engine.waiting:
            for event in engine.step():
                written[event.request] += [] if event.token is None else [event.token]
        return [*written.values()]

    return answer


def theirs(
    model: VisionLanguageModel, sizes: ModelSizes, prompt: list[int], pixels: torch.Tensor
) -> Answer:
    weights = in_memory({name: p.detach().cpu() for name, p in model.named_parameters()})
    with tempfile.TemporaryDirectory() as folder:
        tensors = {n: t.read().clone() for n, t in to_hugging_face(weights, sizes).items()}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(mllama_config(sizes)))
        dtype = next(model.parameters()).dtype
        peer: Any = MllamaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    peer = peer.eval().to(device())

    def answer(rows: int, tokens: int) -> list[list[int]]:
        input_ids = torch.tensor([prompt] * rows, device=device())
        made = peer.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=normalise(pixels[:rows].to(device()))[:, None, None].to(peer.dtype),
            aspect_ratio_ids=torch.ones(rows, 1, dtype=torch.long, device=device()),
            aspect_ratio_mask=torch.ones(rows, 1, 1, dtype=torch.long, device=device()),
            cross_attention_mask=torch.ones(rows, len(prompt), 1, 1, device=device()),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PADDING,
        )
        return made[:, len(prompt) :].tolist()

    return answer


def bytes_per_second() -> float:
    """At which a large tensor is read."""
    tensor = torch.ones(2**27, device=device())
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        tensor.sum().item()
        best = min(best, time.perf_counter() - started)
    return tensor.nbytes / best


if __name__ == "__main__":
    main()
