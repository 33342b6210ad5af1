"""A run is planned for the memory there is: groups shrink, then go in parts, and what does not fit is refused."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from tiny_tokenizers import tiny_tokenizer

import fisherkit
from fisherkit.engine.model.build import blocks_in_groups, build_skeleton
from fisherkit.engine.model.fitting import divide, fit_plan
from fisherkit.engine.model.needs import HEADROOM, Estimate, Load, Rooms
from fisherkit.engine.model.plan import Plan, choose_targets, inseparable, parts_of
from fisherkit.engine.model.skeleton import Skeleton
from fisherkit.errors import FisherkitError, OptionError
from fisherkit.methods.extract import fit, prepare
from fisherkit.options import ExtractOptions, parse_rate

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are no part of the package

from benchmarks.cgroups import limited

Checkpoint = Callable[[str], Path]
LOAD = Load(batch_tokens=256, longest=64, tokens=1000)


def make_skeleton(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Skeleton:
    return build_skeleton(tiny.CONFIGS[architecture](), None, dtype)


def planned(skeleton: Skeleton, rooms: Rooms, group_size: int = 8, targets: str = "matrices") -> tuple[Plan, Estimate]:
    wanted = Plan(blocks_in_groups(len(skeleton.blocks), group_size), choose_targets(skeleton, targets, None))
    estimate = Estimate(skeleton, wanted, LOAD, on_host=True)
    return fit_plan(estimate, skeleton, wanted, group_size, rooms), estimate


def narrow_rooms(skeleton: Skeleton) -> Iterator[tuple[Plan, bool]]:
    """Plans for less and less memory, and whether they fit it."""
    plan, estimate = planned(skeleton, Rooms(1 << 60))
    least = estimate.needs(dataclasses.replace(plan, groups=((0,), (1,), (2,)), read_ahead=False, sums_at_once=1)).host
    for share in range(100, -2, -1):
        room = least + (estimate.needs(plan).host - least) * share // 100
        rooms = Rooms(int(room / HEADROOM) + 1)
        made, _ = planned(skeleton, rooms)
        yield made, rooms.hold(estimate.needs(made))


def test_what_is_given_up_comes_in_order() -> None:
    plans = list(narrow_rooms(make_skeleton()))
    steps = [(-len(plan.groups), plan.read_ahead, plan.sums_at_once or 1 << 60) for plan, _ in plans]
    assert steps == sorted(steps, reverse=True)
    assert {len(plan.groups) for plan, _ in plans} == {1, 2, 3}
    assert [fits for _, fits in plans] == [True] * (len(plans) - 1) + [False]
    assert any(not plan.read_ahead and plan.sums_at_once is None for plan, _ in plans)
    parts = [plan.sums_at_once for plan, _ in plans if plan.sums_at_once]
    assert parts
    assert all(len(plan.groups) == 3 for plan, _ in plans if plan.sums_at_once)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma4-moe", "mixtral", "gpt2"])
def test_parts_hold_every_target_once_and_no_more_than_they_may(architecture: str) -> None:
    skeleton = make_skeleton(architecture)
    plan = Plan(blocks_in_groups(len(skeleton.blocks), 1), choose_targets(skeleton, "matrices", None))
    atoms = inseparable(skeleton, plan, [0, 1])
    for most in (None, 1, max(size for _, size in atoms), sum(size for _, size in atoms) // 2):
        parts = parts_of(skeleton, plan, [0, 1], most)
        assert sorted(name for part in parts for name in part) == sorted(plan.names([0, 1]))
        for part in parts:
            size = sum(skeleton.model.get_parameter(name).numel() for name in part)
            assert most is None or size <= most or part in [names for names, _ in atoms]
    assert len(parts_of(skeleton, plan, [0, 1], None)) == 1


def test_parameters_of_one_tensor_stay_together() -> None:
    plan = Plan(((0,),), choose_targets(make_skeleton(), "matrices", None))
    names = plan.names([0])
    shared = plan.targets[0][names[0]]
    merged = dataclasses.replace(plan, targets={0: dict(plan.targets[0]) | {names[3]: shared, names[1]: shared}})
    atoms = inseparable(make_skeleton(), merged, [0])
    assert [sorted(found) for found, _ in atoms if len(found) > 1] == [sorted([names[0], names[1], names[3]])]
    assert sorted(name for found, _ in atoms for name in found) == sorted(names)


def in_parts_of(weights: int, found: fit.Fit) -> fit.Fit:
    """Return the plan with parts of so many weights."""
    return dataclasses.replace(found, plan=dataclasses.replace(found.plan, sums_at_once=weights, read_ahead=False))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gemma4-e2b"])
@pytest.mark.parametrize("statistics", ["fisher", "activations"])
def test_a_fisher_measured_in_parts_is_the_same_to_the_bit(
    architecture: str,
    statistics: Any,
    checkpoint: Checkpoint,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ExtractOptions(store="fp32", group_size=2, batch_tokens=40, engine="stream", statistics=statistics)
    fisherkit.extract(checkpoint(architecture), prompts, tmp_path / "whole.pt", options)
    plain = prepare.fit

    monkeypatch.setattr(prepare, "fit", lambda *args: in_parts_of(2000, plain(*args)))
    stages: list[tuple[int, int]] = []
    report = fisherkit.extract(
        checkpoint(architecture),
        prompts,
        tmp_path / "parts.pt",
        options,
        track=lambda stage, done, total: stages.append((done, total)),
    )
    one, other = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "parts.pt")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    made = json.loads((tmp_path / "whole.json").read_text())
    assert made["loss"] == report.provenance["loss"]
    assert stages[-1][0] == stages[-1][1]
    assert [done for done, _ in stages] == sorted(done for done, _ in stages)
    if statistics == "activations":
        files = [tmp_path / f"{name}.activations.safetensors" for name in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_killed_run_in_parts_goes_on(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    def kill_late(stage: str, done: int, total: int) -> None:
        if done > 0.7 * total:
            raise Killed

    options = ExtractOptions(store="fp32", group_size=1, batch_tokens=40, resume=True)
    fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "whole.pt", options)
    plain = prepare.fit
    monkeypatch.setattr(prepare, "fit", lambda *args: in_parts_of(1, plain(*args)))
    with pytest.raises(Killed):
        fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "a.pt", options, track=kill_late)
    fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "a.pt", options)
    one, other = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "a.pt")
    assert all(torch.equal(one[name], other[name]) for name in one)


# What does not fit


def test_what_does_not_fit_is_refused_before_any_work(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(FisherkitError, match=r"one layer at a time.*needs \d+ MB.*there are 50 MB; no option"):
        fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "f.pt", ExtractOptions(memory=50_000_000))
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_names_an_option_that_helps(
    checkpoint: Checkpoint, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Estimate.needs

    def hungry(self: Estimate, plan: Plan) -> Any:
        need = plain(self, plan)
        return dataclasses.replace(need, host=need.host + self.load.batch_tokens * 10_000_000_000)

    monkeypatch.setattr(Estimate, "needs", hungry)
    options = ExtractOptions(memory=300_000_000_000, batch_tokens=1000)
    monkeypatch.setattr(fit, "available_bytes", lambda device: 1 << 50)
    with pytest.raises(FisherkitError, match=r"--batch-tokens (\d+) would fit") as refused:
        fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "f.pt", options)
    found = int(str(refused.value).split("--batch-tokens ")[1].split()[0])
    fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "f.pt", dataclasses.replace(options, batch_tokens=found))


def test_a_resumed_run_keeps_its_groups_and_divides_them_where_memory_has_shrunk() -> None:
    skeleton = make_skeleton()
    plan, estimate = planned(skeleton, Rooms(1 << 60))
    whole = estimate.needs(dataclasses.replace(plan, read_ahead=False)).host
    divided = divide(estimate, skeleton, dataclasses.replace(plan, read_ahead=False), Rooms(int(whole / HEADROOM) - 1))
    assert divided.groups == plan.groups
    assert divided.sums_at_once is not None
    assert estimate.needs(divided).host < whole


# Another machine


def gemma(folder: Path) -> Path:
    tiny.CONFIGS["gemma4-31b"]().save_pretrained(folder)
    return folder


def test_a_plan_for_another_machine_does_not_depend_on_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plans = gemma(tmp_path), []
    for here in (1 << 20, 1 << 50):
        monkeypatch.setattr(fit, "available_bytes", lambda device, here=here: here)
        options = ExtractOptions(memory=80_000_000_000, device_memory=24_000_000_000)
        plans.append(fisherkit.plan_extract(model, None, options, flops=4e14))
    memory_used = [plan.pop("peak_bytes") for plan in plans]
    assert plans[0] == plans[1]
    assert plans[0]["device"] == "cuda"
    assert plans[0]["memory_bytes"] == {"host": 80_000_000_000, "device": 24_000_000_000}
    assert plans[0]["fits"]
    assert plans[0]["seconds"] == round(plans[0]["flops"] / 4e14, 1)
    assert memory_used[0]["device"] == memory_used[1]["device"]


def test_less_memory_means_smaller_groups_and_says_what_does_not_fit(tmp_path: Path) -> None:
    model, said = gemma(tmp_path), list[str]()
    plan = fisherkit.plan_extract(model, None, ExtractOptions(memory=1000), flops=1e9, say=said.append)
    assert plan["group_size"] == 1
    assert not plan["read_ahead"]
    assert plan["replays"] > 1
    assert not plan["fits"]
    (line,) = said  # and not that smaller groups would help
    assert "one layer at a time, in as many parts as can be, needs " in line
    assert line.endswith("MB of memory, and there are 1 kB; no option would make it fit")


@pytest.mark.parametrize("group_size", [2, 8])
def test_smaller_groups_are_said_by_the_layers_that_there_are(group_size: int, wide: Path) -> None:
    said = list[str]()

    def plan(size: int, memory: int) -> dict[str, Any]:
        options = ExtractOptions(group_size=size, memory=memory, limit=1, max_length=16)
        return fisherkit.plan_extract(wide, None, options, flops=1e9, say=said.append)

    one, both = (plan(size, 1 << 40)["peak_bytes"]["host"] for size in (1, 2))
    assert not said
    assert plan(group_size, int((one + both) / 2 / HEADROOM))["fits"]
    assert said == ["group size lowered from 2 to 1: more would not fit the memory"]


def test_operations_are_four_forwards_of_the_matrices_less_one_group(tmp_path: Path) -> None:
    tiny.CONFIGS["llama"]().save_pretrained(tmp_path)
    options = ExtractOptions(limit=10, max_length=20, memory=1 << 40, group_size=1)
    plan = fisherkit.plan_extract(tmp_path, None, options, flops=1e9)
    config = tiny.CONFIGS["llama"]()
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    matrices = hidden * (2 * queries + 2 * keys) + 3 * hidden * inner
    attention = queries * 20
    assert plan["parameters"] == 3 * matrices
    per_token = (3 + 3 + 2) * (matrices + attention) + 3 * matrices + 2 * hidden * config.vocab_size
    assert plan["flops"] == 2 * 200 * per_token
    layers = plan["parameters"] * 4 + 3 * 2 * hidden * 4
    around = (2 * config.vocab_size * hidden + hidden) * 4
    assert plan["bytes_read"] == around + layers * 5 // 3  # the last group is read once
    assert plan["bytes_written"] == plan["output_bytes"] + 5 * 200 * hidden * 4


def test_the_time_is_reckoned_with_this_machines_rate_where_none_is_given(tmp_path: Path) -> None:
    tiny.CONFIGS["llama"]().save_pretrained(tmp_path)
    plan = fisherkit.plan_extract(tmp_path, None, ExtractOptions(limit=1_000_000))
    assert plan["seconds"] == pytest.approx(plan["flops"] / plan["flops_per_second"], abs=0.1)
    elsewhere = fisherkit.plan_extract(tmp_path, None, ExtractOptions(device_memory=1 << 35))
    assert elsewhere["flops_per_second"] is elsewhere["seconds"] is None


@pytest.mark.parametrize(("text", "rate"), [("400T", 4e14), ("1.2p", 1.2e15), ("5e3", None), ("0", None), ("-1", None)])
def test_rates_are_read_or_refused(text: str, rate: float | None) -> None:
    if rate is None:
        with pytest.raises(OptionError, match="--flops"):
            parse_rate("flops", text)
    else:
        assert parse_rate("flops", text) == rate


def test_memory_of_its_own_is_refused_for_a_cpu(checkpoint: Checkpoint, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--device-memory"):
        fisherkit.extract(checkpoint("llama"), prompts, tmp_path / "f.pt", ExtractOptions(device_memory=1 << 30))


@pytest.mark.parametrize(("device", "planned"), [("auto", "cuda"), ("cuda:1", "cuda:1"), ("xpu", "xpu"), ("cpu", None)])
def test_memory_of_its_own_is_planned_for_the_device_that_is_named(
    device: str, planned: str | None, tmp_path: Path
) -> None:
    tiny.CONFIGS["llama"]().save_pretrained(tmp_path)
    options = ExtractOptions(device=device, device_memory=1 << 30)
    if planned is None:
        with pytest.raises(OptionError, match="--device-memory: cpu computes in the host's memory; give --memory"):
            fisherkit.plan_extract(tmp_path, None, options)
    else:
        assert fisherkit.plan_extract(tmp_path, None, options)["device"] == planned


# Under a limit that the kernel enforces


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which one block's sums outweigh Python and torch themselves."""
    folder = tmp_path_factory.mktemp("wide")
    config = transformers.LlamaConfig(
        **{**tiny._BASE, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 2}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def peak_of(plan: dict[str, Any]) -> int:
    return int(plan["peak_bytes"]["host"])


@pytest.mark.parametrize("memory_limit", ["plenty", "least"])
def test_a_run_takes_no_more_than_was_planned(memory_limit: str, wide: Path, prompts: Path, tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--limit", "2", "-o", str(tmp_path / "f.pt"), "--force"]
    base = json.loads(_fisherkit(["extract", wide, prompts, *options, "--dry-run", "--json"], None).stdout)
    if memory_limit == "least":
        least = ["--memory", "1", "--dry-run", "--json"]
        base = json.loads(_fisherkit(["extract", wide, prompts, *options, *least], None).stdout)
        assert base["replays"] > 1
    limit = int(1.1 * peak_of(base))
    done = _fisherkit(["extract", wide, prompts, *options], limit)
    assert done.returncode == 0, done.stderr[-500:]
    if memory_limit == "least":
        refused = _fisherkit(["extract", wide, prompts, *options], int(0.9 * peak_of(base)))
        assert refused.returncode == 1
        assert "one layer at a time" in refused.stderr


def _fisherkit(arguments: list[Any], limit: int | None) -> subprocess.CompletedProcess[str]:
    """Run the command, in a memory cgroup of its own where a limit is given and root may make one.

    Elsewhere the process is told its memory by --memory, and its peak is not enforced.
    """
    command = [sys.executable, "-m", "fisherkit", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with limited(limit) if limit is not None else contextlib.nullcontext() as enter:
        if limit is not None and enter is None:
            command += ["--memory", str(limit)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, preexec_fn=enter)


# Batches


def test_tokens_per_batch_are_chosen_for_the_device_unless_given() -> None:
    assert [ExtractOptions().on(device).batch_tokens for device in ("cpu", "cuda", "xpu")] == [1024, 8192, 8192]
    assert ExtractOptions(batch_tokens=7).on("cuda").batch_tokens == 7


def test_batches_are_small_where_only_those_fit(checkpoint: Checkpoint) -> None:
    def plan(**changes: Any) -> dict[str, Any]:
        options = {"device_memory": 80_000_000_000, "group_size": 1, "max_length": 256, **changes}
        return fisherkit.plan_extract(checkpoint("llama"), None, ExtractOptions(**options))

    small, large = (plan(batch_tokens=tokens)["peak_bytes"]["device"] for tokens in (1024, 8192))
    assert plan()["peak_bytes"]["device"] == large
    between = plan(device_memory=int((small + large) / 2 / HEADROOM))
    assert between["fits"]
    assert between["peak_bytes"]["device"] == small
