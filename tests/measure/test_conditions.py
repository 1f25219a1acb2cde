"""Conditions of a measurement, read from a made-up machine and from this one."""

import json

from offramp.measure.conditions import conditions, surroundings
from offramp.measure.hardware import environment


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_a_machine_that_tells_everything(tmp_path):
    cpu = "sys/devices/system/cpu/cpu0/"
    for number, (level, kind, size) in enumerate([("1", "Data", "32K"), ("2", "Unified", "2048K")]):
        for name, text in (("level", level), ("type", kind), ("size", size)):
            write(tmp_path, f"{cpu}cache/index{number}/{name}", text)
    write(tmp_path, f"{cpu}cpufreq/scaling_cur_freq", "1479000")
    write(tmp_path, f"{cpu}cpufreq/scaling_governor", "schedutil")
    write(tmp_path, f"{cpu}thermal_throttle/core_throttle_count", "7")
    write(tmp_path, "proc/loadavg", "1.25 0.50 0.10 2/300 4000")
    write(tmp_path, "proc/meminfo", "MemAvailable: 1000 kB")
    found = conditions(tmp_path, tmp_path)
    assert found["caches"] == {"L1 Data": "32K", "L2 Unified": "2048K"}
    assert (found["frequency_khz"], found["governor"], found["throttle_count"]) == (1479000, "schedutil", 7)
    assert (found["load_1min"], found["available_memory_bytes"]) == (1.25, 1000 << 10)


def test_a_machine_that_tells_nothing(tmp_path):
    found = conditions(tmp_path, tmp_path)
    assert found["caches"] == {} and found["load_1min"] is found["governor"] is found["memory_limit_bytes"] is None
    assert found["free_disk_bytes"] > 0 and json.dumps(conditions(tmp_path))


def test_of_a_folder_that_is_not_there_no_disk_is_described(tmp_path):
    """A failure may be that the folder is missing: its record describes the machine all the same."""
    there, missing = surroundings(tmp_path), surroundings(tmp_path / "none")
    assert there.keys() == environment(tmp_path).keys() | conditions(tmp_path).keys()
    assert there.keys() - missing.keys() == {"storage"} and there["free_disk_bytes"] > 0
    assert missing["free_disk_bytes"] is surroundings()["free_disk_bytes"] is None
