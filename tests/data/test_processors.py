"""How many processors may be used, against files as kernels write them in containers and outside.

Lines of `proc` are those of Docker, systemd and Kubernetes on either version of control groups.
"""

import os
from pathlib import Path

import pytest

from data.processors import available_processors, own_processors

AFFINITY = 64

SYSTEMD = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
DOCKER = "612 611 0:26 /docker/f00 /sys/fs/cgroup ro,nosuid - cgroup2 cgroup ro"
VERSION_1 = "33 25 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
DOCKER_1 = "701 699 0:29 /docker/f00 /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct"
CPUSET_1 = "34 25 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"
HYBRID = "41 25 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
GROUPS_1 = "9:name=systemd:/x\n4:cpuset:/\n3:cpu,cpuacct:{}\n0::/"


@pytest.fixture(autouse=True)
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(AFFINITY)), raising=False)


def write(root: Path, name: str, content: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content + "\n", encoding="utf-8")


def processors(root: Path, mounts: list[str], groups: str, quotas: dict[str, str]) -> int:
    write(root, "proc/self/mountinfo", "\n".join(["22 1 8:1 / / rw - ext4 /dev/vda1 rw", *mounts]))
    write(root, "proc/self/cgroup", groups)
    for name, content in quotas.items():
        write(root, f"sys/fs/cgroup/{name}", content)
    return available_processors(root)


@pytest.mark.parametrize(
    ("mount", "group", "quotas", "expected"),
    [
        (SYSTEMD, "/", {"cpu.max": "400000 100000"}, 4),
        (SYSTEMD, "/", {"cpu.max": "max 100000"}, AFFINITY),
        (SYSTEMD, "/a/b", {"a/b/cpu.max": "300000 100000"}, 3),
        (SYSTEMD, "/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        (SYSTEMD, "/a/b", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        (SYSTEMD, "/a/b", {"a/b/cpu.max": "700000 100000", "a/cpu.max": "50000 10000"}, 5),
        (SYSTEMD, "/a", {"b/cpu.max": "200000 100000"}, AFFINITY),
        (DOCKER, "/docker/f00", {"cpu.max": "200000 100000"}, 2),
        (DOCKER, "/docker/f00/c", {"c/cpu.max": "200000 100000", "cpu.max": "max 100000"}, 2),
        (DOCKER, "/../elsewhere", {"cpu.max": "200000 100000"}, 2),
    ],
)
def test_the_quotas_of_a_group_and_of_those_around_it_count(
    tmp_path: Path, mount: str, group: str, quotas: dict[str, str], expected: int
) -> None:
    assert processors(tmp_path, [mount], f"0::{group}", quotas) == expected


@pytest.mark.parametrize(("quota", "expected"), [(1, 1), (99_999, 1), (199_999, 1), (250_000, 2)])
def test_a_fraction_of_a_processor_gives_no_thread_but_the_first(
    tmp_path: Path, quota: int, expected: int
) -> None:
    assert processors(tmp_path, [SYSTEMD], "0::/", {"cpu.max": f"{quota} 100000"}) == expected


@pytest.mark.parametrize(
    ("mount", "group", "folder", "quota", "expected"),
    [
        (VERSION_1, "/", "", "300000", 3),
        (VERSION_1, "/", "", "-1", AFFINITY),
        (VERSION_1, "/system.slice/job", "/system.slice/job", "150000", 1),
        (VERSION_1, "/system.slice/job", "/system.slice", "300000", 3),
        (DOCKER_1, "/docker/f00", "", "300000", 3),
    ],
)
def test_the_first_version_of_control_groups_counts_too(
    tmp_path: Path, mount: str, group: str, folder: str, quota: str, expected: int
) -> None:
    quotas = {
        f"cpu,cpuacct{folder}/cpu.cfs_quota_us": quota,
        f"cpu,cpuacct{folder}/cpu.cfs_period_us": "100000",
        "cpuset/cpu.cfs_quota_us": "100000",  # of another controller
        "cpuset/cpu.cfs_period_us": "100000",
    }
    mounts = [CPUSET_1, mount, HYBRID]
    assert processors(tmp_path, mounts, GROUPS_1.format(group), quotas) == expected


def test_a_quota_of_more_than_the_affinity_adds_none(tmp_path: Path) -> None:
    quotas = {"cpu.max": "9900000 100000"}
    assert processors(tmp_path, [SYSTEMD], "0::/", quotas) == AFFINITY


def test_without_control_groups_the_affinity_stands(tmp_path: Path) -> None:
    assert available_processors(tmp_path) == AFFINITY


def test_here_there_are_some() -> None:
    assert 1 <= available_processors() <= AFFINITY


@pytest.mark.parametrize("change", ["affinity", "machine"])
def test_processes_of_other_processors_or_machines_do_not_share_them(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    mine = own_processors()
    assert own_processors() == mine
    if change == "affinity":
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    else:
        monkeypatch.setattr("platform.node", lambda: "another")
    assert own_processors() != mine
