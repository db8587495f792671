"""What a process may take, within the limits of containers, services and jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from delineate.core.limits import available_memory_bytes, total_memory_bytes, usable_cores

MACHINE_BYTES, CORES = total_memory_bytes(Path("/nowhere")), usable_cores(Path("/nowhere"))
GB = 10**9
NO_LIMIT = 2**63 - 4096
"""What version 1 says where there is none."""


def memory(version: int, limit: int | str, used: int, cached: int) -> dict[str, str]:
    """The files of a control group that limit memory."""
    if version == 2:
        stat = f"anon 5\nfile 9\ninactive_file {cached}\nactive_file 1"
        return {"memory.max": f"{limit}", "memory.current": f"{used}", "memory.stat": stat}
    stat = f"cache 5\ninactive_file 0\ntotal_inactive_file {cached}"
    return {"memory.limit_in_bytes": f"{limit}", "memory.usage_in_bytes": f"{used}", "memory.stat": stat}


def machine(root: Path, groups: str, files: dict[str, dict[str, str]]) -> Path:
    """The kernel's files of a machine: what it says of this process's groups, and what is in the groups' folders."""
    files = {
        "proc/self": {"cgroup": groups} if groups else {},
        **{f"sys/fs/cgroup/{place}": texts for place, texts in files.items()},
    }
    for folder, texts in files.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (root / folder / name).write_text(text + "\n", encoding="ascii")
    return root


LIMITED_TO_3_GB = {
    "a container": ("0::/", {"": memory(2, 3 * GB, 2 * GB, GB)}),
    "a service": ("0::/system.slice/d.service", {"system.slice/d.service": memory(2, 3 * GB, 2 * GB, GB)}),
    "a job within a limited slice": (
        "0::/slurm/job_7/step_0",
        {
            "slurm": memory(2, 3 * GB, 2 * GB, GB),
            "slurm/job_7": memory(2, 9 * GB, 0, 0),
            "slurm/job_7/step_0": memory(2, "max", 0, 0),
        },
    ),
    "a container, version 1": (
        "4:memory:/docker/ab12\n1:cpu,cpuacct:/docker/ab12",
        {"memory": memory(1, 3 * GB, 2 * GB, GB)},
    ),
    "a job, version 1 beside version 2": (
        "4:memory:/slurm/uid_5/job_7\n0::/init.scope",
        {
            "memory/slurm/uid_5/job_7": memory(1, 3 * GB, 2 * GB, GB),
            "memory": memory(1, NO_LIMIT, 0, 0),
            "unified/init.scope": {"cgroup.procs": "1"},
        },
    ),
}


@pytest.mark.parametrize("where", LIMITED_TO_3_GB)
def test_memory_is_what_the_least_limit_leaves_and_files_not_used_lately_are_no_burden(where: str, tmp_path) -> None:
    root = machine(tmp_path, *LIMITED_TO_3_GB[where])
    assert total_memory_bytes(root) == min(3 * GB, MACHINE_BYTES)
    assert available_memory_bytes(root) == min(2 * GB, available_memory_bytes(Path("/nowhere")))


@pytest.mark.parametrize("used", [3 * GB, 4 * GB])
def test_where_the_limit_is_reached_no_memory_is_left(used: int, tmp_path) -> None:
    assert available_memory_bytes(machine(tmp_path, "0::/", {"": memory(2, 3 * GB, used, 0)})) == 0


NO_LIMITS = {
    "no control groups": ("", {}),
    "none set": ("0::/a", {"a": {**memory(2, "max", GB, 0), "cpu.max": "max 100000"}}),
    "none set, version 1": (
        "2:cpu:/a\n4:memory:/a",
        {"memory/a": memory(1, NO_LIMIT, GB, 0), "cpu/a": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}},
    ),
    "the groups' folders cannot be seen": ("0::/a/b", {}),
}


@pytest.mark.parametrize("where", NO_LIMITS)
def test_without_limits_the_machine_is_all_ours(where: str, tmp_path) -> None:
    root = machine(tmp_path, *NO_LIMITS[where])
    assert (total_memory_bytes(root), usable_cores(root)) == (MACHINE_BYTES, CORES)
    assert 0 < available_memory_bytes(root) <= MACHINE_BYTES


@pytest.mark.parametrize(("quota", "cores"), [(50_000, 1), (100_000, 1), (150_000, 2), (100_000_000, CORES)])
@pytest.mark.parametrize("version", [1, 2])
def test_a_share_of_time_is_so_many_cores_rounded_up(quota: int, cores: int, version: int, tmp_path) -> None:
    old = {"cpu,cpuacct/d": {"cpu.cfs_quota_us": f"{quota}", "cpu.cfs_period_us": "100000"}}
    new = {"d": {"cpu.max": f"{quota} 100000"}}
    root = machine(tmp_path, "3:cpu,cpuacct:/d" if version == 1 else "0::/d", old if version == 1 else new)
    assert usable_cores(root) == min(cores, CORES)


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A control group of this machine's own whose processes may take 2 GB, if we may make one."""
    mounted = Path("/sys/fs/cgroup")
    version_1 = (mounted / "memory").is_dir()
    group = (mounted / "memory" if version_1 else mounted) / f"delineate-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(f"{2 * GB}", encoding="ascii")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def test_a_process_in_a_control_group_of_this_machine_knows_its_limit(real_group: Path) -> None:
    code = (
        f"from pathlib import Path; Path({str(real_group / 'cgroup.procs')!r}).write_text('0')\n"
        "from delineate.core.limits import *; print(total_memory_bytes(), available_memory_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, available = map(int, done.stdout.split())
    assert 2 * GB - os.sysconf("SC_PAGE_SIZE") <= total <= 2 * GB
    assert 0 < available < total
