"""On a device of its own, extract gives what it gives on the CPU, and hardly ever waits for the device."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pretend
import pretend_streams
import pytest
import safetensors.torch
import tiny
import torch
from kills import Killed, killed_after
from torch import Tensor

import fisherkit
from fisherkit.engine.fisher.sink import FisherSink
from fisherkit.engine.model import copies, residence
from fisherkit.engine.model.residence import check_resident, weight_bytes
from fisherkit.errors import OptionError, UnsupportedModelError
from fisherkit.kernels import devices
from fisherkit.kernels import fisher as kernels
from fisherkit.methods.extract.prepare import Prepared, prepare
from fisherkit.options import ExtractOptions

Checkpoint = Callable[[str], Path]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The pretend accelerator, which ``--device auto`` finds."""
    with pretend.plugged_in(monkeypatch):
        yield pretend.DEVICE


def extract(model: Path, prompts: Path, out: Path, **changes: Any) -> dict[str, Tensor]:
    options = {"store": "fp32", "batch_tokens": 40, "group_size": 1, "force": True, **changes}
    fisherkit.extract(model, prompts, out, ExtractOptions(**options))
    found: dict[str, Tensor] = torch.load(out)
    return found


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-12, name


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"group_size": 2, "dtype": "bfloat16"}),
        ("llama", {"labels": "sampled"}),
        ("llama-tied", {"targets": "all"}),
        ("llama", {"engine": "resident"}),
        ("gemma4-e2b", {}),
        ("gemma4-31b", {"targets": "all"}),
        ("qwen3-moe", {}),
        ("gpt2", {"targets": "all"}),
    ],
)
def test_fisher_on_a_device_is_that_on_the_cpu(
    architecture: str, changes: dict[str, Any], checkpoint: Checkpoint, prompts: Path, tmp_path: Path, device: Any
) -> None:
    found = extract(checkpoint(architecture), prompts, tmp_path / "found.pt", **changes)
    wanted = extract(checkpoint(architecture), prompts, tmp_path / "wanted.pt", **changes, device="cpu")
    if changes.get("dtype") == "bfloat16":  # attention is another on the two devices, and rounds otherwise
        relative = {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()}
        assert max(relative.values()) < 0.1
    else:
        assert_close(found, wanted)


@pytest.mark.parametrize("without", [[], [torch.float64]], ids=["", "without float64"])
def test_activations_on_a_device_are_those_on_the_cpu(
    without: list[torch.dtype],
    checkpoint: Checkpoint,
    prompts: Path,
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", (device.type,) if without else ())
    monkeypatch.setattr("fisherkit.kernels.covariance.SKETCH_ABOVE", 40)
    monkeypatch.setattr("fisherkit.kernels.covariance.SKETCH_RANK", 8)
    model = checkpoint("llama")
    for name, changes in (("found", {}), ("wanted", {"device": "cpu"})):
        with pretend.watching(lacking=without):
            extract(model, prompts, tmp_path / f"{name}.pt", statistics="activations", labels="sampled", **changes)
    found, wanted = (
        safetensors.torch.load_file(tmp_path / f"{name}.activations.safetensors") for name in ("found", "wanted")
    )
    for name, value in wanted.items():  # of a sketch, columns have either sign
        square, other = (one if one.ndim == 1 else one @ one.T for one in (found[name], value))  # or a whole triangle
        torch.testing.assert_close(square, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()), msg=name)
    assert_close(torch.load(tmp_path / "found.pt"), torch.load(tmp_path / "wanted.pt"))


@pytest.mark.parametrize("engine", ["auto", "resident"])
def test_inputs_on_a_device_are_those_on_the_cpu(
    engine: Any, checkpoint: Checkpoint, prompts: Path, tmp_path: Path, device: torch.device
) -> None:
    for name in ("auto", "cpu"):
        options = ExtractOptions(statistics="inputs", group_size=1, batch_tokens=40, engine=engine, device=name)
        fisherkit.extract(checkpoint("qwen3-moe"), prompts, tmp_path / f"{name}.safetensors", options)
    found, wanted = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("auto", "cpu"))
    assert_close(found, wanted)


def test_a_run_on_a_device_is_resumed_to_the_same_bits(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, device: torch.device
) -> None:
    def run(name: str, track: Any = lambda *_: None) -> None:
        options = ExtractOptions(store="fp32", group_size=1, statistics="activations", resume=True)
        fisherkit.extract(checkpoint("qwen3-moe"), prompts, tmp_path / name, options, track=track)

    run("whole.pt")
    for step in (12, 9):
        with pytest.raises(Killed):
            run("again.pt", killed_after(step))
    run("again.pt")
    for load, name in ((torch.load, "{}.pt"), (safetensors.torch.load_file, "{}.activations.safetensors")):
        found, wanted = load(tmp_path / name.format("again")), load(tmp_path / name.format("whole"))
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


# What the host waits for


def traffic_of(model: Path, folder: Path, count: int, **changes: Any) -> pretend.Traffic:
    """Traffic of a run with ``count`` batches of two samples."""
    prompts = tiny.write_prompts(folder / f"{count}.jsonl", ["Name three rivers.", "Good morning to you."] * count)
    with pretend.watching() as traffic:
        extract(model, prompts, folder / f"{count}.pt", **changes)
    return traffic


@pytest.mark.parametrize(
    ("changes", "copies_per_batch"), [({}, 26), ({"statistics": "activations"}, 26), ({"labels": "sampled"}, 28)]
)
def test_no_batch_waits_for_the_device_but_in_the_models_own_forward(
    changes: dict[str, Any], copies_per_batch: int, checkpoint: Checkpoint, tmp_path: Path, device: torch.device
) -> None:
    few, many = (traffic_of(checkpoint("llama"), tmp_path, count, **changes) for count in (2, 6))
    waits = many.syncs - few.syncs
    assert {line.split(":")[0] for line in waits} <= {"recorder.py", "loss.py"[: 7 if "labels" in changes else 0]}
    # transformers looks into the positions of every forward: one for the record, one for each sample's head.
    assert waits.total() <= 4 * 3
    assert (many.copies - few.copies).total() <= 4 * copies_per_batch


def test_weights_arrive_beside_the_computing(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prepared, "weights_fit", lambda prepared: False)
    with pretend.watching() as traffic:
        extract(checkpoint("llama"), prompts, tmp_path / "a.pt", group_size=1)
    # Nine weights in each of three blocks; of the last, the forward sweep reads none.
    assert sum(count for line, count in traffic.behind.items() if line.startswith("copies.py")) == (2 * 3 - 1) * 9
    assert not [line for line in traffic.copies if line.startswith("skeleton.py")]


def test_a_gradient_is_squared_whole_on_a_device(device: torch.device) -> None:
    gradient = torch.randn(3, 1 << 20).bfloat16()
    fisher = torch.ones(gradient.shape)
    on_device = pretend.to_pretend(fisher)
    with pretend.watching() as traffic:
        kernels.add_squares_(on_device, pretend.to_pretend(gradient))
    assert traffic.launches.total() == 1
    kernels.add_squares_(fisher, gradient)
    assert torch.equal(pretend.to_host(on_device), fisher)


# Copies


def test_sent_tensors_are_whole_once_they_are_received(device: torch.device) -> None:
    tensors = {
        "long": torch.randn(7, 100),
        "short": torch.tensor(3.0, dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
        "numbers": torch.arange(50).view(5, 10).T,
    }
    sender = copies.Sender(device, staging_bytes=64)
    for _ in range(2):
        sent = sender.send(tensors)
        assert not torch.equal(pretend.to_host(sent.tensors["numbers"]), tensors["numbers"]), "nobody waited for it yet"
        for name, found in sent.receive().items():
            assert found.device == device
            assert torch.equal(pretend.to_host(found), tensors[name]), name


def test_host_copies_are_whole_once_they_are_waited_for(device: torch.device) -> None:
    value = torch.randn(4, 6)
    on_device = pretend.to_pretend(value)
    copy = copies.to_host([on_device.mT])
    on_device.zero_()  # the device is told to change it after the copy
    assert not torch.equal(copy.tensors[0], value.mT)
    assert torch.equal(copy.wait()[0], value.mT)
    assert copy.tensors[0].is_contiguous()


def test_small_numbers_are_sent_without_waiting(device: torch.device) -> None:
    with pretend.watching() as traffic:
        found = copies.send_small([[1, 2], [3, 4]], device)
    assert not traffic.syncs
    assert found.tolist() == [[1, 2], [3, 4]]


# The pretend device itself


def test_a_tensor_of_the_cpu_does_not_meet_one_of_the_device(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="meets one of lazy:0"):
        torch.ones(3, device=device) + torch.ones(3)
    assert (torch.ones(3, device=device) + torch.tensor(1.0)).tolist() == [2.0] * 3


def test_copies_and_waits_are_counted(device: torch.device) -> None:
    with pretend.watching() as traffic:
        value = torch.ones(3).to(device)
        assert value.sum().item() == 3
        assert len(value.nonzero()) == 3
    assert traffic.copies.total() == 1
    assert traffic.syncs.total() == 3


def test_a_stream_copies_when_an_event_is_waited_for(device: torch.device) -> None:
    target, side = torch.zeros(3, device=device), pretend_streams.Stream()
    with pretend_streams.stream(side):
        target.copy_(torch.ones(3), non_blocking=True)
        event = side.record_event()
    assert target.tolist() != [1.0] * 3
    pretend_streams.current_stream().wait_event(event)
    assert target.tolist() == [1.0] * 3


# Memory


def test_the_plan_counts_what_is_sent_ahead(checkpoint: Checkpoint, prompts: Path, device: torch.device) -> None:
    options = ExtractOptions(group_size=1)
    found = prepare(str(checkpoint("llama")), prompts, options, lambda line: None).fit
    less = dataclasses.replace(found.plan, read_ahead=False)
    with_, without = (found.estimate.needs(plan).device for plan in (found.plan, less))
    assert with_ - without == found.estimate.stored_bytes(found.plan.groups[0])


def test_a_model_that_is_kept_whole_needs_room_for_sums_and_activations(
    checkpoint: Checkpoint, prompts: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prepare(str(checkpoint("llama")), prompts, ExtractOptions(), lambda line: None)
    skeleton, plan, weights = found.skeleton, found.plan, weight_bytes(found.skeleton)
    needed = found.fit.estimate.resident_bytes(plan)
    assert needed > weights + (4 + 4) * plan.parameters  # sums, and the gradients of one sample
    monkeypatch.setattr(residence, "available_bytes", lambda device: needed)
    check_resident("m", skeleton, device, "auto", "it is odd", needed=needed)
    monkeypatch.setattr(residence, "available_bytes", lambda device: needed - 1)
    with pytest.raises(UnsupportedModelError, match="weights with sums, gradients and activations need"):
        check_resident("m", skeleton, device, "auto", "it is odd", needed=needed)


def test_values_on_their_way_to_the_file_are_bounded(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = []
    send = FisherSink._send

    def watched(sink: FisherSink, name: str, value: Tensor) -> None:
        sink._most_coming = 20_000
        send(sink, name, value)
        most.append(sum(size for _, size in sink._on_their_way()))

    monkeypatch.setattr(FisherSink, "_send", watched)
    extract(checkpoint("llama"), prompts, tmp_path / "a.pt")
    assert len(most) == 3 * 7
    assert max(most) <= 20_000


# Refused


def test_a_dtype_that_the_device_lacks_is_refused(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, device: torch.device
) -> None:
    with (
        pretend.watching(lacking=[torch.bfloat16]),
        pytest.raises(OptionError, match=r"--dtype bfloat16: lazy:0 does not compute in it .*; use --dtype float32"),
    ):
        extract(checkpoint("llama"), prompts, tmp_path / "a.pt", dtype="bfloat16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cuda:99", "mps", "xpu"])
def test_a_device_that_is_not_there_is_refused_in_one_line(
    name: str, checkpoint: Checkpoint, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=rf"--device {name}: not available here .*; use .*cpu") as caught:
        extract(checkpoint("llama"), prompts, tmp_path / "a.pt", device=name)
    assert len(str(caught.value)) <= 300
