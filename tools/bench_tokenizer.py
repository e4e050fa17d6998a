"""How many texts a core tokenises, against SentencePiece itself and Hugging Face's tokenizers.

    python tools/bench_tokenizer.py --out docs/benchmarks/tokenizer-cpu

The texts are the names and keywords that Unicode CLDR gives to emoji (Debian's unicode-cldr-core),
mixed at random; a vocabulary of 64,000 is trained on all of them unless there is a --model. All
contenders take the same texts in turns, on one thread, and every token is compared with what
SentencePiece says. Rates are per second of processor time, since others use the machine, too.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from timing import machine, markdown_table

from megavlm.data.tokenizer import CONTROL_SYMBOLS, Tokenizer, train_tokenizer

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for all

Tokens = list[list[int]]
Contenders = dict[str, Callable[[], Tokens]]

BASELINE = "sentencepiece, one call"
MICRO_BATCH = 128
LOOKALIKES = [f"a {s}{s}b" for s in (*CONTROL_SYMBOLS, "<s>", "</s>", "<unk>", "<pad>", "<0x0A>")]
# Debian's files have pictures where CLDR inherits a text.
INHERITED = "\u2191\u2191\u2191"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="SentencePiece model; trained if none")
    parser.add_argument("--cldr", type=Path, default=Path("/usr/share/unicode/cldr/common"))
    parser.add_argument("--texts", type=int, default=10_000, help="of each kind, at most")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="file to write, without .md")
    options = parser.parse_args()
    languages = sorted({path.stem for path in (options.cldr / "annotations").glob("*.xml")})
    of_language = {name: [*_texts(options.cldr, name)] for name in languages}
    everything = [text for texts in of_language.values() for text in texts]
    kinds = {
        f"{len(languages)} languages": everything,
        "English": of_language["en"],
        "Japanese": of_language["ja"],
    }
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or Path(folder) / "cldr.model"
        if not options.model:
            train_tokenizer(everything, model, 64_000)
        rows: list[dict[str, str]] = []
        for kind, texts in kinds.items():
            texts = random.Random(0).sample(texts, min(len(texts), options.texts)) + LOOKALIKES
            rows += _compared(kind, texts, model, options.rounds)
    text = _page(rows, options.rounds)
    print(text)
    if options.out:
        options.out.with_suffix(".md").write_text(text)


def _texts(cldr: Path, language: str) -> Iterator[str]:
    """What CLDR says of each emoji, followed by the emoji if it is its name."""
    for folder in ("annotations", "annotationsDerived"):
        path = cldr / folder / f"{language}.xml"
        for annotation in ET.parse(path).iter("annotation") if path.exists() else ():
            said = (annotation.text or "").strip()
            if said and said != INHERITED:
                is_name = annotation.get("type") == "tts"
                yield f"{said} {annotation.get('cp')}" if is_name else said.replace(" | ", ", ")


def _compared(kind: str, texts: list[str], model: Path, rounds: int) -> list[dict[str, str]]:
    tokenizer = Tokenizer(model)
    pieces: Any = sentencepiece.SentencePieceProcessor(model_file=str(model))
    batches = [texts[start : start + MICRO_BATCH] for start in range(0, len(texts), MICRO_BATCH)]
    contenders: Contenders = {
        "megavlm": lambda: [tokenizer.encode(text) for text in texts],
        "megavlm, no word known": lambda: [
            tokenizer.encode(text) for text in (tokenizer._words.clear() or texts)
        ],
        BASELINE: partial(pieces.encode, texts, num_threads=1),
        f"sentencepiece, {MICRO_BATCH} texts a call": lambda: [
            tokens for batch in batches for tokens in pieces.encode(batch, num_threads=1)
        ],
        "sentencepiece, one text a call": lambda: [pieces.encode(text) for text in texts],
    }
    fast = _hugging_face(model)
    if fast is not None:
        contenders["Hugging Face tokenizers, one call"] = lambda: [
            encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)
        ]
    expected = [pieces.encode(text) for text in texts]
    equal = {
        name: sum(a == b for a, b in zip(encode(), expected, strict=True)) / len(texts)
        for name, encode in contenders.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, encode in contenders.items():
            started = time.process_time()
            encode()
            seconds[name].append(time.process_time() - started)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    size = sum(len(text.encode()) for text in texts)
    return [
        {
            "texts": f"{kind}: {len(texts):,} of {size / len(texts):.0f} bytes",
            "tokenizer": name,
            "texts/s/core": f"{len(texts) / median[name]:,.0f}",
            "MB/s/core": f"{size / median[name] / 1e6:.1f}",
            "x sentencepiece": f"{median[BASELINE] / median[name]:.2f}",
            "equal": f"{equal[name]:.2%}",
        }
        for name in contenders
    ]


def _hugging_face(model: Path) -> Any:
    """The same vocabulary in the `tokenizers` library, or None where it is not installed."""
    try:
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers import models, pre_tokenizers
        from transformers.tokenization_utils_base import generate_merges
    except ImportError:
        return None
    vocabulary = {piece.text: n for n, piece in enumerate(Tokenizer(model).pieces())}
    merges = generate_merges(vocabulary)
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    fast = FastTokenizer(bpe)
    # As SentencePiece escapes spaces, and no piece reaches over one.
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    return fast


def _page(rows: list[dict[str, str]], rounds: int) -> str:
    about = machine(torch.device("cpu"))
    return (
        f"# Tokenising on a CPU\n\ndate: {about['date']}, device: {about['device']}, "
        f"sentencepiece: {sentencepiece.__version__}; `tools/bench_tokenizer.py`, medians of "
        f"{rounds} rounds of all contenders in turns, in processor time of one thread\n\n"
        "Equal: texts whose tokens are those of SentencePiece's own call for each text. With the "
        "texts are look-alikes of control symbols. megavlm takes one text a call and remembers "
        "words: in the rounds it knows them, as far as it keeps so many, which training comes near "
        "to; `no word known` forgets them before each round.\n\n"
    ) + markdown_table(rows)


if __name__ == "__main__":
    main()
