import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from offramp.measure import hardware
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
    monkeypatch.setattr(hardware, "_text", lambda path: cpuinfo)
    assert hardware._cpu_model() == model


def test_without_proc_little_is_known(monkeypatch):
    monkeypatch.setattr(hardware, "_text", lambda path: None)
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
