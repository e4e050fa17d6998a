"""What was found about each sample of a shard, in a Parquet file of the shard's name."""

import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megavlm.config.filters import FilterSettings
from megavlm.data.samples import texts_to_json
from megavlm.data.shards import ShardFolder
from megavlm.files.folder import Folder
from megavlm.filters.arrays import read_whole
from megavlm.filters.duplicates import SIGNATURE_BYTES, sign_captions
from megavlm.filters.evaluation import EvaluationSet
from megavlm.filters.judge import Verdict, caption_of, judge
from megavlm.filters.pictures import HASH_BYTES

if TYPE_CHECKING:
    import pyarrow

BATCH_SAMPLES = 64
BATCH_BYTES = 256 * 2**20
"""Of encoded samples; one may be as large."""


def judge_shard(
    shards: ShardFolder,
    shard: int,
    rules: FilterSettings,
    evaluation: EvaluationSet | None,
    verdict_folder: Folder,
) -> int:
    """Judge all samples of a shard and write what was found; returns how many there are."""
    rows: list[dict[str, Any]] = []
    for numbers in batches(shards, shard):
        contents = [*zip(numbers, shards.fetch(numbers), strict=True)]
        rows += _rows(judge(contents, shards.parse, rules, evaluation), rules)
    _write(verdict_folder, name_of(shards.name(shard)), rows)
    return len(rows)


def batches(shards: ShardFolder, shard: int) -> Iterator[range]:
    """A shard's samples, by number, cut by their sizes alone: whoever reads them finds the same."""
    numbers, members = shards.numbers_of(shard), shards.members_of(shard)
    sizes = np.bincount(members["sample"], members["size"], minlength=len(numbers))
    start, total = 0, 0.0
    for n, size in enumerate(sizes.tolist()):
        if n > start and (n - start == BATCH_SAMPLES or total + size > BATCH_BYTES):
            yield numbers[start:n]
            start, total = n, 0.0
        total += size
    if numbers:
        yield numbers[start:]


def name_of(shard: str) -> str:
    """Of a shard's file of verdicts."""
    return f"{shard.removesuffix('.tar')}.parquet"


def _rows(verdicts: Sequence[Verdict], rules: FilterSettings) -> list[dict[str, Any]]:
    signatures: list[bytes | None] = [None] * len(verdicts)
    if rules.duplicates and rules.duplicates.caption_similarity is not None:
        signatures = sign_captions([_captions(verdict, rules) for verdict in verdicts])
    return [
        {
            "key": v.sample.key if v.sample else "",
            "reason": v.reason,
            "detail": v.detail,
            "texts": (len(v.sample.texts) if v.sample else 0) + v.removed_texts.total(),
            "removed_texts": json.dumps(v.removed_texts),
            "masked_texts": v.masked_texts,
            "changed": json.dumps(texts_to_json(v.sample)) if v.sample and v.is_changed else None,
            "picture_hash": v.picture_hash,
            "caption_signature": signature,
        }
        for v, signature in zip(verdicts, signatures, strict=True)
    ]


def _captions(verdict: Verdict, rules: FilterSettings) -> str | None:
    if verdict.sample is None or verdict.reason is not None:
        return None
    captions = [caption_of(text, rules) for text in verdict.sample.texts]
    return "\n".join(caption for caption in captions if caption is not None) or None


def _write(folder: Folder, name: str, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("key", pa.string()),
            ("reason", pa.string()),
            ("detail", pa.string()),
            ("texts", pa.int32()),
            ("removed_texts", pa.string()),
            ("masked_texts", pa.int32()),
            ("changed", pa.string()),
            ("picture_hash", pa.binary(HASH_BYTES)),
            ("caption_signature", pa.binary(SIGNATURE_BYTES)),
        ]
    )
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema), content, compression="zstd")
    folder.write_atomically(name, content.getvalue())


def read_columns(folder: Folder, shard: str, columns: Sequence[str]) -> "pyarrow.Table":
    """Some columns of what was found about a shard's samples."""
    import pyarrow.parquet as pq

    # A local file is read as far as those columns; one in an object store comes whole.
    local, name = folder.local_path, name_of(shard)
    source = io.BytesIO(read_whole(folder, name)) if local is None else local / name
    return pq.ParquetFile(source).read(list(columns))


def read_hashes(
    folder: Folder, shard: str, column: str
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Places in its shard of the samples that no rule drops, and their hashes, one a row."""
    table = read_columns(folder, shard, ["reason", column])
    hashes, there = table[column].combine_chunks(), table["reason"].is_null()
    there = there.to_numpy() & hashes.is_valid().to_numpy(zero_copy_only=False)
    rows = np.frombuffer(hashes.buffers()[1] or b"", np.uint8).reshape(-1, hashes.type.byte_width)
    return np.flatnonzero(there), rows[hashes.offset :][: len(there)][there]
