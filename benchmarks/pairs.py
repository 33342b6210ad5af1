"""Pairs to prune: a Llama with random weights and what a fine-tune might have made of it, tensor by tensor, any size.

    python benchmarks/pairs.py FOLDER 12 768 2048 float32      makes FOLDER/base and FOLDER/tuned
    python benchmarks/pairs.py --check BASE TUNED OUT          prints how an output relates to the two sides

Commands of their own, because the process that measures others must stay small: a child's peak memory counts from
its parent's at the fork.
"""

import json
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fisherkit.checkpoint.array_reader import ArrayReader
from fisherkit.checkpoint.index import open_index
from fisherkit.checkpoint.writer import StreamedWriter, TensorSpec
from fisherkit.floats import narrow, widen

STEP = 5e-4
"""Standard deviation of a fine-tune's step; that of the weights is 0.02. In bfloat16 some 8 % of entries stay put."""
_BLOCK = 1 << 22
_VOCABULARY = 512  # so that blocks, not embeddings, are what is measured


def main() -> None:
    """Make a pair, or check an output."""
    if sys.argv[1] == "--check":
        print(json.dumps(check(*(Path(argument) for argument in sys.argv[2:]))))
        return
    folder, (blocks, hidden, intermediate), dtype = Path(sys.argv[1]), map(int, sys.argv[2:5]), sys.argv[5]
    print(json.dumps(make(folder, blocks, hidden, intermediate, dtype)))


def make(folder: Path, blocks: int, hidden: int, intermediate: int, dtype: str) -> dict[str, int]:
    """Write both sides unless they are there; counts of weights and bytes, and the largest tensor's bytes."""
    import checkpoints

    base, tuned = folder / "base", folder / "tuned"
    checkpoints.make(base, blocks=blocks, hidden=hidden, intermediate=intermediate, dtype=dtype, vocabulary=_VOCABULARY)
    if not tuned.is_dir():
        tune(base, tuned)
    tensors = open_index(base).tensors.values()
    return {
        "weights": sum(info.numel for info in tensors),
        "bytes": sum(info.nbytes for info in tensors),
        "largest": max(info.nbytes for info in tensors),
    }


def tune(base: Path, tuned: Path) -> None:
    """Write ``tuned``: every entry of ``base`` moved by a normal step of STEP."""
    index = open_index(base)
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in index.tensors.values()]
    work = tuned.with_name(tuned.name + ".partial")
    with (
        ArrayReader(index) as reader,
        StreamedWriter.create(tuned, specs, work=work, shard_bytes=500_000_000) as writer,
    ):
        for spec in specs:
            random = np.random.default_rng(zlib.crc32(spec.name.encode()))
            for start, block in _blocks(reader, spec.name):
                step = random.standard_normal(block.size, dtype=np.float32) * np.float32(STEP)
                writer.write_stored(spec.name, narrow(widen(block, spec.dtype) + step, spec.dtype), start)
            writer.mark_written([spec.name])
        for file in base.iterdir():
            if ".safetensors" not in file.name:
                shutil.copy(file, writer.staged / file.name)
        writer.finish()
    work.rmdir()


def check(base: Path, tuned: Path, out: Path) -> dict[str, float]:
    """Shares over the second block: entries of ``out`` that are not the base's, and those that are on neither side."""
    changed = strange = count = 0
    with ArrayReader(open_index(base)) as w, ArrayReader(open_index(tuned)) as f, ArrayReader(open_index(out)) as o:
        for name in w.index.tensors:
            if ".layers.1." in name:
                ours, theirs, made = w.read(name), f.read(name), o.read(name)
                count += made.size
                changed += int((made != ours).sum())
                strange += int(((made != ours) & (made != theirs)).sum())
    return {"changed": changed / count, "strange": strange / count}


def _blocks(reader: ArrayReader, name: str) -> Iterator[tuple[int, "np.ndarray"]]:
    stored = reader.read(name).reshape(-1)
    for start in range(0, stored.size, _BLOCK):
        yield start, stored[start : start + _BLOCK]


if __name__ == "__main__":
    main()
