import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from offramp.measure import available_bytes, container_bytes, hardware, tightest_group
from offramp.measure.hardware import environment


def test_the_environment_is_json_and_knows_this_machine():
    facts = json.loads(json.dumps(environment()))
    assert facts["library_versions"]["numpy"] == np.__version__
    assert facts["num_cores"] == len(os.sched_getaffinity(0))
    assert facts["total_memory_bytes"] > 1 << 26
    assert facts["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["kernel"] == os.uname().release
    assert "storage" not in facts


def test_a_path_adds_its_storage(tmp_path):
    storage = environment(tmp_path)["storage"]
    assert set(storage) == {"file_system", "read_ahead_kb", "io_scheduler"}
    assert storage["file_system"]


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        environment(tmp_path / "absent")


def test_asking_for_versions_imports_no_library():
    code = (
        "import sys; from offramp.measure import hardware; hardware.environment('.')\n"
        "print(sorted({'numpy', 'onnxruntime', 'tokenizers', 'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"[]\n"


def test_control_characters_are_escaped(monkeypatch):
    monkeypatch.setattr(hardware, "_cpu_model", lambda: "chip\x1b[31m\n\x00 \udc80 é")
    assert environment()["cpu_model"] == "chip\\x1b[31m\\n\\x00 \\udc80 é"


@pytest.mark.parametrize(
    ("cpuinfo", "model"),
    [
        ("processor : 0\nmodel name : A\nHardware : B\n\nprocessor : 1\nmodel name : C\n", "A"),
        (
            "processor\t: 0\nCPU part\t: 0xd07\n\nHardware\t: Tegra\nModel\t\t: Jetson Nano\n",
            "Jetson Nano",
        ),
    ],
)
def test_the_processor_is_named_on_x86_and_arm(monkeypatch, cpuinfo, model):
    monkeypatch.setattr(hardware, "text_of", lambda path: cpuinfo)
    assert hardware._cpu_model() == model


def test_without_proc_little_is_known(monkeypatch):
    monkeypatch.setattr(hardware, "text_of", lambda path: "")
    storage = environment("/")["storage"]
    assert storage == {"file_system": None, "read_ahead_kb": None, "io_scheduler": None}


MOUNTS = """\
21 1 254:0 / / rw,relatime - ext4 /dev/vda rw
22 21 254:1 / /data rw,relatime shared:1 - xfs /dev/vdb rw
23 21 0:30 / /data\\040sets/é rw - tmpfs none rw
24 22 254:2 / /data rw - btrfs /dev/vdc rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "ext4"), ("/home/x", "ext4"), ("/data/store", "btrfs"), ("/database", "ext4"), ("/data sets/é", "tmpfs")],
)
def test_the_nearest_mount_tells_the_file_system(path, kind):
    assert hardware._file_system(Path(path), MOUNTS) == kind


MIB = 1 << 20
UNLIMITED_V1 = 9223372036854771712


def plant(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))


def meminfo(available_bytes):
    return f"MemTotal: 9999999 kB\nMemFree: 1 kB\nMemAvailable: {available_bytes // 1024} kB\n"


def v1(folder, limit, usage, stat=""):
    base = f"sys/fs/cgroup/memory{folder}"
    return {
        f"{base}/memory.limit_in_bytes": limit,
        f"{base}/memory.usage_in_bytes": usage,
        f"{base}/memory.stat": stat,
    }


def v2(folder, limit, usage, stat=""):
    base = f"sys/fs/cgroup{folder}"
    return {f"{base}/memory.max": limit, f"{base}/memory.current": usage, f"{base}/memory.stat": stat}


def test_this_machine_has_some_memory_left():
    assert 0 < available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_without_any_source_it_is_the_machines_memory(tmp_path):
    assert available_bytes(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_without_cgroups_it_is_what_the_machine_has_left(tmp_path):
    plant(tmp_path, {"proc/meminfo": meminfo(512 * MIB)})
    assert available_bytes(tmp_path) == 512 * MIB


def test_v1_limit_counts_unmapped_cache_as_free(tmp_path):
    stat = f"cache 1\ntotal_active_file {10 * MIB}\ntotal_inactive_file {30 * MIB}\ntotal_mapped_file {15 * MIB}\n"
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(4096 * MIB),
            "proc/self/cgroup": "9:cpu,cpuacct:/a\n4:hugetlb,memory:/a/b\n0::/\n",
            **v1("/a/b", 128 * MIB, 100 * MIB, stat),
            **v1("/a", UNLIMITED_V1, 100 * MIB),
            **v1("", UNLIMITED_V1, 300 * MIB),
        },
    )
    assert available_bytes(tmp_path) == (128 - 100 + 10 + 30 - 15) * MIB


def test_v2_limit_counts_unmapped_cache_as_free(tmp_path):
    stat = f"anon 5\nactive_file {10 * MIB}\ninactive_file {30 * MIB}\nfile_mapped {15 * MIB}\n"
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(4096 * MIB),
            "proc/self/cgroup": "0::/user.slice/run.scope\n",
            **v2("/user.slice/run.scope", 128 * MIB, 100 * MIB, stat),
            **v2("/user.slice", "max", 100 * MIB),
        },
    )
    assert available_bytes(tmp_path) == (128 - 100 + 10 + 30 - 15) * MIB


def test_a_tighter_group_above_decides(tmp_path):
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/run.scope\n",
            **v2("/user.slice/run.scope", 512 * MIB, 100 * MIB),
            **v2("/user.slice", 256 * MIB, 200 * MIB),
        },
    )
    assert available_bytes(tmp_path) == 56 * MIB


def test_memory_high_is_a_limit_too(tmp_path):
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/run\n",
            **v2("/run", "max", 40 * MIB),
            "sys/fs/cgroup/run/memory.high": 100 * MIB,
        },
    )
    assert available_bytes(tmp_path) == 60 * MIB


@pytest.mark.parametrize("group", ["/docker/3f1c", "/../other", "/"])
def test_a_container_finds_its_own_group_at_the_mount_point(tmp_path, group):
    plant(tmp_path, {"proc/self/cgroup": f"4:memory:{group}\n", **v1("", 128 * MIB, 100 * MIB)})
    assert available_bytes(tmp_path) == 28 * MIB


def test_the_machine_may_have_less_than_the_group_allows(tmp_path):
    plant(
        tmp_path,
        {"proc/meminfo": meminfo(20 * MIB), "proc/self/cgroup": "0::/run\n", **v2("/run", 512 * MIB, 100 * MIB)},
    )
    assert available_bytes(tmp_path) == 20 * MIB


def test_a_group_above_its_limit_leaves_nothing(tmp_path):
    plant(tmp_path, {"proc/self/cgroup": "0::/run\n", **v2("/run", 64 * MIB, 100 * MIB)})
    assert available_bytes(tmp_path) == 0


def cpu_v1(folder, quota, period=100000):
    base = f"sys/fs/cgroup/cpu{folder}"
    return {f"{base}/cpu.cfs_quota_us": quota, f"{base}/cpu.cfs_period_us": period}


def cpu_v2(folder, text):
    return {f"sys/fs/cgroup{folder}/cpu.max": text}


@pytest.mark.parametrize(
    ("groups", "cores"),
    [
        ({}, 8),
        (cpu_v1("/a", 50000), 1),
        (cpu_v1("/a", 100000), 1),
        (cpu_v1("/a", 250000), 3),
        (cpu_v1("/a", -1), 8),
        (cpu_v1("/a", 1600000), 8),
        (cpu_v1("/a", 400000) | cpu_v1("", 200000), 2),
        (cpu_v1("", 200000) | cpu_v1("/b", 100000), 2),
        (cpu_v2("/a", "50000 100000"), 1),
        (cpu_v2("/a", "150000 100000"), 2),
        (cpu_v2("/a", "max 100000"), 8),
        (cpu_v2("/a", "100000 0"), 8),
        (cpu_v2("", "300000 100000"), 3),
    ],
)
def test_a_quota_of_processors_limits_the_cores(tmp_path, monkeypatch, groups, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    is_v1 = any("cfs" in name for name in groups)
    plant(tmp_path, {"proc/self/cgroup": "4:cpu,cpuacct:/a\n3:memory:/c\n" if is_v1 else "0::/a\n", **groups})
    assert hardware.num_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("variable", "threads"),
    [
        (None, (3, "cpu quota")),
        ("", (3, "cpu quota")),
        ("2", (2, "OMP_NUM_THREADS")),
        (" 1, 4", (1, "OMP_NUM_THREADS")),
        ("3", (3, "cpu quota")),
        ("64", (3, "cpu quota")),
        ("0", (3, "cpu quota")),
        ("-1", (3, "cpu quota")),
        ("many", (3, "cpu quota")),
        ("\u00b2", (3, "cpu quota")),
    ],
)
def test_the_default_of_threads_is_the_least_limit_and_says_which(tmp_path, monkeypatch, variable, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert hardware.default_threads(tmp_path) == (8, "affinity")
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    plant(tmp_path, {"proc/self/cgroup": "0::/a\n", **cpu_v2("/a", "250000 100000")})
    assert hardware.default_threads(tmp_path) == threads
    assert hardware.num_cores(tmp_path) == 3


def test_a_sandbox_without_affinity(monkeypatch, tmp_path):
    def refuse(_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "sched_getaffinity", refuse)
    assert hardware.num_cores(tmp_path) == os.cpu_count()


@pytest.mark.parametrize("text", ["", "nothing of the kind\n", "MemAvailable: many kB\n", "0\n:::\n"])
def test_files_of_the_kernel_in_another_form_are_skipped(tmp_path, text):
    plant(tmp_path, {"proc/meminfo": text, "proc/self/cgroup": text})
    assert available_bytes(tmp_path) > 0
    assert hardware.num_cores(tmp_path) >= 1


@pytest.mark.parametrize("make", [v1, v2])
def test_the_least_limit_of_all_groups_is_that_of_the_container(tmp_path, make):
    line = "4:memory:/a/b" if make is v1 else "0::/a/b"
    limits = {"": 3000 * MIB, "/a": 128 * MIB, "/a/b": 256 * MIB}
    files = {}
    for folder, limit in limits.items():
        files.update(make(folder, limit, 10 * MIB))
    plant(tmp_path, {"proc/self/cgroup": line + "\n", **files})
    assert container_bytes(tmp_path) == 128 * MIB


@pytest.mark.parametrize(("make", "peak"), [(v1, "memory.max_usage_in_bytes"), (v2, "memory.peak")])
def test_the_tightest_group_says_the_most_that_was_charged(tmp_path, make, peak):
    line = "4:memory:/a/b" if make is v1 else "0::/a/b"
    plant(tmp_path, {"proc/self/cgroup": line + "\n", **make("/a/b", 256 * MIB, MIB), **make("/a", 128 * MIB, 2 * MIB)})
    group = tightest_group(tmp_path)
    assert (group.limit_bytes, group.usage_bytes, group.peak_bytes) == (128 * MIB, 2 * MIB, None)  # an older kernel
    (group.folder / peak).write_text(f"{99 * MIB}\n")
    assert tightest_group(tmp_path).peak_bytes == 99 * MIB


def test_a_limit_that_the_machine_cannot_reach_is_none(tmp_path):
    assert container_bytes(tmp_path) is None
    plant(tmp_path, {"proc/self/cgroup": "4:memory:/a\n", **v1("/a", UNLIMITED_V1, MIB)})
    assert container_bytes(tmp_path) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_of_a_limited_address_space_the_rest_can_be_mapped():
    code = """
import mmap, resource
from offramp.measure import address_space_bytes
assert address_space_bytes() is None
resource.setrlimit(resource.RLIMIT_AS, (1 << 31, resource.RLIM_INFINITY))
left = address_space_bytes()
kept = mmap.mmap(-1, left - (1 << 20))
assert 0 <= left - len(kept) - address_space_bytes() <= 1 << 20
try:
    mmap.mmap(-1, 2 << 20)
except OSError:
    print("full")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "full\n"
