"""What several test files share: checkpoints and prompt sets that are made once, offline."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")

import fork_server
import pairs
import tiny
import transformers

import fisherkit
from fisherkit.options import ExtractOptions

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def pytest_configure(config: pytest.Config) -> None:
    """One process that has imported torch serves all workers of a session; see fork_server."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="fisherkit")  # socket paths must be short
        server = fork_server.start(Path(folder.name))
        config.add_cleanup(lambda: (server.communicate(), folder.cleanup()))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small sharded checkpoint of an architecture, float32; tests must not change it."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tiny.save(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts of different lengths."""
    return tiny.write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="session")
def measured(
    checkpoint: Callable[[str], Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A Fisher of an architecture with moments beside it; ask for it before anything is patched."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("measured") / "fisher.pt"
            options = ExtractOptions(statistics="activations", batch_tokens=40)
            fisherkit.extract(checkpoint(architecture), prompts, made[architecture], options)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> pairs.Pair:
    """A bf16 llama in three shards and its fine-tune; tests must not change them."""
    return pairs.make(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def adapter(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A plain adapter of llama, to be changed."""
    from peft_adapters import LINEAR, train

    return train(checkpoint("llama"), tmp_path / "adapter", target_modules=LINEAR)


@pytest.fixture
def experts(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """An adapter of the experts of qwen3-moe, to be changed."""
    from peft_adapters import EXPERTS, train

    return train(checkpoint("qwen3-moe"), tmp_path / "adapter", target_modules=["q_proj"], target_parameters=EXPERTS)


@pytest.fixture(params=["at once", "in turns"])
def turns(request: pytest.FixtureRequest) -> int | None:
    """Bytes that are remembered at a time during a step: all, or TURN_BYTES of the test's module, which is small."""
    return int(request.module.TURN_BYTES) if request.param == "in turns" else None
