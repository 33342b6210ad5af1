"""FSDP2: masks hold on weights that are spread over processes."""

from pathlib import Path

import fork_server
import pytest
import torch

WORKER = Path(__file__).parent / "support" / "sharded_worker.py"


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("size", [2, 3])
def test_masks_hold_on_what_fsdp2_spreads_over_processes(size: int, tmp_path: Path) -> None:
    done = fork_server.run([str(WORKER), str(size), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("all held\n")
