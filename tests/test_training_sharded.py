"""FSDP2: masks hold on weights that are spread over processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_masks_hold_on_what_fsdp2_spreads_over_two_processes(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(SUPPORT)))}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "sharded_worker.py"), str(tmp_path / "store")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("all held\n")
