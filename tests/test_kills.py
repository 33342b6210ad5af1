"""Every command killed before its n-th change of the file system, and at random moments; then run again.

A kill never leaves a final name with half of a file; what reads an output takes it whole or refuses it in one line;
inputs stay as they were; a second run ends with the bytes of an undisturbed one. ``make kills`` tries every moment.
"""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import pytest
from forked import Ended, run
from kill_scenarios import (
    SCENARIOS,
    Scenario,
    all_or_quick,
    fill,
    final,
    make_inputs,
    number_of_kills,
    quick_kills,
    snapshot,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class Course:
    """A scenario's undisturbed run, and the checks of what a disturbed one left."""

    def __init__(self, scenario: Scenario, folder: Path, inputs: dict[str, str]) -> None:
        self.scenario, self.inputs, self.folder = scenario, inputs, folder
        self.start = folder / "start"
        self.start.mkdir()
        if scenario.older:
            assert run(fill(scenario.older, inputs), self.start).code == 0
        self.words = [*fill(scenario.words, inputs), *(["--force"] if scenario.older else [])]
        self.given = snapshot(Path(inputs["base"]).parent)
        self.before = snapshot(self.start)
        whole = self.place("whole")
        self.undisturbed = run(self.words, whole)
        assert self.undisturbed.code == 0, self.undisturbed.stderr
        self.expected = snapshot(whole)
        assert set(self.expected) == set(final(self.expected, scenario.outputs))

    def place(self, name: str) -> Path:
        """A copy of the folder that the scenario starts from."""
        return Path(shutil.copytree(self.start, self.folder / name))

    @cached_property
    def answers(self) -> list[str]:
        """What the reader may print: of the whole output, of the older one, and of a Fisher's tensors alone.

        A Fisher beside another's JSON is read from its tensors, and ``inspect`` says so: the same sums after rounding.
        """
        reader = self.scenario.reader
        places = [self.folder / "whole", *([self.start] if self.before else [])]
        for place in tuple(places) if self.scenario.words[0] == "extract" and "." in reader[1] else ():
            bare = self.folder / f"bare-{place.name}"
            bare.mkdir()
            shutil.copy(place / reader[1], bare)
            places.append(bare)
        return [run(reader, place).stdout for place in places]

    def disturb(self, name: str, **how: float) -> Ended:
        """Run the command in a place of its own, to be killed; then check what is left, and run it again."""
        place = self.place(name)
        done = run(self.words, place, **how)
        assert done.code in (0, -9), done.stderr
        if done.code == -9:
            self.check_left(place, name)
            self.check_again(place, name, [])
            self.check_again(place, name, ["--force"])
            if self.scenario.resumes:
                self.check_again(place, name, ["--resume"])
        shutil.rmtree(place)
        return done

    def check_left(self, place: Path, name: str) -> None:
        """No final name holds anything but what was there before, or what the undisturbed run made."""
        left = final(snapshot(place), self.scenario.outputs)
        for file, data in left.items():
            assert data in (self.before.get(file), self.expected.get(file)), f"{name}: {file} is neither old nor whole"
        folder = {file: data for file, data in left.items() if "/" in file}
        whole = [{file: data for file, data in one.items() if "/" in file} for one in (self.before, self.expected)]
        assert folder in ({}, *whole), f"{name}: a mixture of old and new"
        assert snapshot(Path(self.inputs["base"]).parent) == self.given, f"{name}: inputs have changed"
        if self.scenario.reader and left:
            read = run(self.scenario.reader, place)
            if read.code:
                check_refusal(read)
            else:
                assert read.stdout in self.answers, f"{name}: inspect read {sorted(left)} as something else"

    def check_again(self, place: Path, name: str, flags: list[str]) -> None:
        """A second run ends as the first would have, or refuses to replace what is there already."""
        again = Path(shutil.copytree(place, self.folder / f"{name}-again{''.join(flags)}"))
        done = run([*fill(self.scenario.words, self.inputs), *flags], again)
        got, left = snapshot(again), snapshot(place)
        if "--force" in flags and "--shard" in self.scenario.words:  # a share that is made anew waits for the others
            got = final(got, self.scenario.outputs)
        if done.code == 0:
            assert got == self.expected, f"{name} {flags}: {differences(got, self.expected)}"
        else:
            check_refusal(done)
            assert self.may_refuse(left, flags), f"{name} {flags}: {done.stderr}\nleft: {sorted(left)}"
            ours = self.scenario.outputs
            assert final(got, ours) == final(left, ours), f"{name} {flags}: refused, but changed something"
        shutil.rmtree(again)

    def may_refuse(self, left: dict[str, bytes], flags: list[str]) -> bool:
        """Nobody asked to replace what is whole, or what an older run left; what was under way goes on."""
        there = final(left, self.scenario.outputs)
        if "--force" in flags or not there:
            return False
        if there == self.expected or any(self.before.get(file) == data for file, data in there.items()):
            return "--resume" not in flags or not any(file.endswith(".partial/progress.json") for file in left)
        return self.scenario.resumes and not flags


def differences(got: dict[str, bytes], expected: dict[str, bytes]) -> str:
    """Names of the files that differ."""
    return ", ".join(sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name)))


def check_refusal(done: Ended) -> None:
    """One line on stderr that begins with Error, nothing on stdout, exit code 1 or 2."""
    assert done.code in (1, 2), done.stderr
    lines = done.stderr.splitlines()
    assert lines, done.words
    assert lines[-1].startswith("Error: "), done.stderr
    assert sum(line.startswith("Error: ") for line in lines) == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not lines[-1].startswith("Error: unexpected "), done.stderr
    assert not done.stdout, done.stdout


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_kill_before_any_change_of_the_file_system_loses_nothing(
    scenario: Scenario, tmp_path: Path, inputs: dict[str, str]
) -> None:
    course = Course(scenario, tmp_path, inputs)
    changes = len(course.undisturbed.changes)
    most = number_of_kills(full=changes, small=quick_kills(scenario))
    # Where files get their final names all kinds of harm are possible, so a short course has most of its kills there.
    late, early = range(changes, 0, -1)[: (most + 1) // 2], range(changes, 0, -max(1, 2 * changes // most))[1:]
    for at in range(changes, 0, -1) if most >= changes else sorted({*late, *early}):
        assert course.disturb(f"before-{at}", kill_at=at).code == -9


@pytest.mark.parametrize("scenario", all_or_quick(), ids=lambda scenario: scenario.name)
def test_a_kill_at_any_moment_loses_nothing(scenario: Scenario, tmp_path: Path, inputs: dict[str, str]) -> None:
    course = Course(scenario, tmp_path, inputs)
    for number in range(number_of_kills(full=12, small=1)):
        moment = random.Random(f"{scenario.name} {number}").uniform(0.1, 1.0)  # noqa: S311 - a draw, not a secret
        course.disturb(f"after-{number}", kill_after_seconds=moment * course.undisturbed.seconds)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Give a file system of so many KiB, at the same place every time; only root can have one."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kibibytes: int) -> Path:
        how = "remount," if os.path.ismount(place) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={kibibytes}k", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("file systems of one's own are for root")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


@pytest.mark.parametrize("scenario", all_or_quick(), ids=lambda scenario: scenario.name)
def test_a_full_disk_loses_nothing_and_says_so(
    scenario: Scenario, tmp_path: Path, inputs: dict[str, str], small_disk: Callable[[int], Path]
) -> None:
    course = Course(scenario, tmp_path, inputs)
    least, most = (
        sum(-(-len(data) // 4096) * 4 for data in files.values()) for files in (course.before, course.expected)
    )
    for number in range(1, tries := 1 + number_of_kills(full=10, small=1)):
        disk = small_disk(least + max(4, (most + 64) * number // tries))
        shutil.copytree(course.start, disk, dirs_exist_ok=True)
        done = run(course.words, disk)
        if done.code:
            check_refusal(done)
            course.check_left(disk, f"disk-{number}")
            small_disk(1 << 16)
            again = [*course.words, *(["--resume"] if scenario.resumes else [])]
            done = run(again, disk)
        assert done.code == 0, done.stderr
        assert snapshot(disk) == course.expected, differences(snapshot(disk), course.expected)
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
