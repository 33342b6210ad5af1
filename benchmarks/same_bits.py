"""Print a hash of everything that the commands make of one pair of checkpoints, for comparing two commits.

    python -m benchmarks.same_bits demo/model demo/tuned > before.txt    # on one commit
    python -m benchmarks.same_bits demo/model demo/tuned > after.txt     # on the other
    diff before.txt after.txt                                            # nothing: no result changed

Hashed are the tensor files and what ``inspect`` prints in a pipe. JSON beside them carries times and versions, and is
left out. Only the command line is used, so the script runs on any commit that has the commands.
"""

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

EXTRACT = (
    "fisher.pt",
    "again.safetensors",
    "whole.pt --targets all --limit 6",
    "seen.safetensors --statistics activations",
)
MASKS = (
    "fggm.safetensors --preset fggm",
    "fish.safetensors --preset fish",
    "ssu.safetensors --preset ssu",
    "entries.safetensors --protect top --keep 0.1 --aggregate none --scope global",
    "layers.safetensors --train top --keep 0.3 --scope layer",
    "random.safetensors --train top --score random --seed 1",
    "contrast.safetensors --train top --against again.safetensors --contrast relu-difference",
    "svd.safetensors --svd-rank 4",
    "energy.safetensors --svd-energy 0.9 --basis sqrt-fisher",
    "weight.safetensors --svd-rank 4 --basis weight --weights {base}",
    "delta.safetensors --svd-rank 4 --basis delta --weights {base} --delta {tuned}",
)
ACTIVATION_MASKS = (
    "inputs.safetensors --basis activation --svd-energy 0.9",
    "kron.safetensors --basis kron --svd-rank 4",
    "shield.safetensors --preset shield",
)
FAPM = (
    "kept",
    "half --sparsity 0.5 --only matrices",
    "by-layer --scope layer --density 0.3",
    "global --scope global",
    "magnitude --metric magnitude --rest base",
    "relative --metric relative",
    "by-chance --metric random --seed 1",
    "wise --metric wise-ft --density 0.4",
    "dare --metric dare --density 0.5",
    "della --metric della --density 0.5",
    "--sparse sparse.safetensors",
)
MERGE = (
    "masked --mask fggm.safetensors",
    "by-entries --mask entries.safetensors --rest base",
    "outside --subspace svd.safetensors",
    "right --subspace weight.safetensors --side right",
    "pulled --subspace shield.safetensors",
    "scaled --layer-scale layer_importance.json",
    "alpha --alpha 0.5",
)
INSPECT = (
    "fisher.pt",
    "fisher.pt --by module",
    "whole.pt --by tensor",
    "fggm.safetensors",
    "svd.safetensors --by tensor",
    "fisher.pt seen.safetensors",
    "{base} --by module",
)


def main() -> None:
    """Run every command in a folder of its own, and print ``hash  file`` lines in a fixed order."""
    base, tuned = (str(Path(word).resolve()) for word in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(command: str) -> bytes:
            words = shlex.split(command.format(base=base, tuned=tuned))
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
            done = subprocess.run(
                [sys.executable, "-m", "fisherkit", *words],
                cwd=folder,
                env=environment,
                capture_output=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"fisherkit {command}: {done.stderr.decode()}")
            return done.stdout

        for one in EXTRACT:
            run(f"extract {{base}} builtin --limit 16 -o {one} --quiet")
        for one in MASKS:
            run(f"mask fisher.pt -o {one} --quiet")
        for one in ACTIVATION_MASKS:
            run(f"mask seen.safetensors -o {one} --quiet")
        for one in FAPM:
            run(f"fapm {{base}} {{tuned}} {one} --quiet")
        for one in MERGE:
            run(f"merge {{base}} {{tuned}} {one} --quiet")
        run("merge {base} sparse.safetensors whole --quiet")
        for one in INSPECT:
            print(hashlib.sha256(run(f"inspect {one}")).hexdigest()[:16], f"inspect {one}")
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".pt", ".safetensors"):
                print(hashlib.sha256(path.read_bytes()).hexdigest()[:16], path.relative_to(folder))


if __name__ == "__main__":
    main()
