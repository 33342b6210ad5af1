"""Options of ``inspect``."""

from typing import Literal

By = Literal["layer", "module", "tensor"]
"""One row of the table stands for all tensors of a block, for all of a module over the blocks, or for one tensor."""
Form = Literal["auto", "table", "tsv", "csv", "json", "jsonl"]
"""Form of the rows on stdout; ``auto`` is a table on a terminal and TSV anywhere else."""
