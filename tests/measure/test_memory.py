import mmap
import os
import subprocess
import sys
import time

import pytest

from offramp.measure import MemorySampler, PeakMeter, memory, read_memory, reset_peak

MIB = 1 << 20


def resident_block(size_bytes):
    block = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block[:: mmap.PAGESIZE] = b"x" * len(range(0, size_bytes, mmap.PAGESIZE))
    return block


def wait_until(condition):
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


@pytest.fixture
def system_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_STATUS", str(tmp_path / "absent"))
    monkeypatch.setattr(memory, "_CLEAR_REFS", str(tmp_path / "absent"))


def test_memory_follows_an_allocation():
    before = read_memory()
    block = resident_block(32 * MIB)
    during = read_memory()
    block.close()
    after = read_memory()
    assert during.anon_bytes - before.anon_bytes >= 31 * MIB
    assert during.rss_bytes - before.rss_bytes >= 31 * MIB
    assert during.rss_bytes - after.rss_bytes >= 31 * MIB
    assert after.peak_bytes == pytest.approx(during.rss_bytes, abs=MIB) or after.peak_bytes > during.rss_bytes


def test_parts_make_up_the_resident_set():
    now = read_memory()
    assert now.rss_bytes == now.anon_bytes + now.file_bytes
    assert now.peak_bytes >= now.rss_bytes


def test_shared_memory_counts_as_file():
    before = read_memory()
    with mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as shared:
        shared[:: mmap.PAGESIZE] = b"x" * (len(shared) // mmap.PAGESIZE)
        assert read_memory().file_bytes - before.file_bytes >= 7 * MIB


def test_memory_agrees_with_the_status_of_a_fresh_process():
    code = (
        "from offramp.measure import read_memory; m = read_memory(); s = open('/proc/self/status').read()\n"
        "kib = int(s.split('VmHWM:')[1].split()[0]); print(abs(m.peak_bytes / 1024 - kib) < 512)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"True\n"


def test_a_kernel_that_does_not_split_the_resident_set(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t    2000 kB\nVmRSS:\t    1000 kB\nVmData:\t  10 kB\n")
    monkeypatch.setattr(memory, "_STATUS", str(status))
    assert read_memory() == memory.Memory(1000 * 1024, 2000 * 1024, None, None)


def test_a_status_without_a_peak_falls_back(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmSize:\t    2000 kB\nVmRSS:\t    1000 kB\n")
    monkeypatch.setattr(memory, "_STATUS", str(status))
    assert read_memory().peak_bytes > 4 * MIB


def test_without_proc_the_peak_stands_for_the_resident_set(system_without_proc):
    now = read_memory()
    assert now.rss_bytes == now.peak_bytes > 4 * MIB
    assert now.anon_bytes is None and now.file_bytes is None


def test_on_macos_rusage_counts_bytes(system_without_proc, monkeypatch):
    kib_taken_for_bytes = read_memory().peak_bytes // 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert read_memory().peak_bytes == pytest.approx(kib_taken_for_bytes, rel=0.1)


def test_a_peak_can_be_reset():
    resident_block(64 * MIB).close()
    before = read_memory().peak_bytes
    if not reset_peak():
        pytest.skip("clear_refs is not allowed here")
    assert read_memory().peak_bytes <= before - 32 * MIB


def test_a_reset_that_is_refused_is_reported(system_without_proc):
    assert not reset_peak()


@pytest.mark.parametrize("method", ["sampled", "clear_refs"])
def test_a_meter_sees_a_phase_below_an_earlier_peak(method):
    resident_block(96 * MIB).close()
    earlier = read_memory()
    with PeakMeter(method) as meter:
        block = resident_block(32 * MIB)
        wait_until(lambda: meter.peak_bytes >= earlier.rss_bytes + 31 * MIB)
        block.close()
    assert earlier.rss_bytes + 31 * MIB <= meter.peak_bytes <= earlier.rss_bytes + 64 * MIB
    assert meter.method == method


def test_the_thread_sees_what_the_caller_does_not_ask_for():
    resident_block(96 * MIB).close()
    before = read_memory().rss_bytes
    with PeakMeter(interval_seconds=0.001) as meter:
        block = resident_block(32 * MIB)
        wait_until(lambda: meter._peak_bytes >= before + 31 * MIB)
        block.close()
    assert meter.peak_bytes >= before + 31 * MIB


def test_a_sampled_phase_that_sets_a_new_peak_misses_nothing():
    with PeakMeter(interval_seconds=3600) as meter:
        block = resident_block(read_memory().peak_bytes + 8 * MIB)
        size = len(block)
        block.close()
    assert meter.method == "sampled"
    assert meter.peak_bytes >= size
    assert meter.peak_bytes == pytest.approx(read_memory().peak_bytes, abs=MIB)


def test_hwm_is_the_peak_of_the_whole_process():
    resident_block(64 * MIB).close()
    with PeakMeter("hwm") as meter:
        pass
    assert meter.peak_bytes == pytest.approx(read_memory().peak_bytes, abs=MIB)
    assert meter.peak_bytes >= read_memory().rss_bytes + 32 * MIB


def test_an_ended_phase_does_not_change():
    with PeakMeter("clear_refs") as meter:
        pass
    peak_bytes = meter.peak_bytes
    resident_block(peak_bytes).close()
    assert meter.peak_bytes == peak_bytes


def test_a_meter_falls_back_where_a_reset_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CLEAR_REFS", str(tmp_path / "absent"))
    with PeakMeter("clear_refs") as meter:
        pass
    assert meter.method == "sampled"


def test_without_proc_a_meter_knows_the_whole_process_only(system_without_proc):
    with PeakMeter("clear_refs") as meter:
        pass
    assert meter.method == "hwm"
    assert meter.peak_bytes == read_memory().peak_bytes


@pytest.mark.parametrize("wrong", [{"method": "guess"}, {"interval_seconds": 0}, {"interval_seconds": float("nan")}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be .*, got"):
        PeakMeter(**wrong)


def test_an_exception_of_the_thread_surfaces(monkeypatch):
    caller, started = os.getpid(), []

    def fail_later():
        started.append(caller)
        if len(started) > 2:
            raise OSError("too many open files")
        return memory.Memory(1, 1, None, None)

    meter = PeakMeter(interval_seconds=0.001)
    monkeypatch.setattr(memory, "read_memory", fail_later)
    meter.start()
    wait_until(lambda: meter._error is not None)
    with pytest.raises(OSError, match="too many open files"):
        meter.stop()


def test_a_sampler_records_memory_over_time():
    begin = time.perf_counter()
    with MemorySampler(interval_seconds=0.001) as sampler:
        wait_until(lambda: len(sampler.samples) > 5)
        block = resident_block(16 * MIB)
        seen = len(sampler.samples)
        wait_until(lambda: len(sampler.samples) > seen + 1)
        block.close()
    end = time.perf_counter()
    seconds = [sample.seconds for sample in sampler.samples]
    assert seconds == sorted(seconds)
    assert begin <= seconds[0] and seconds[-1] <= end
    rss_bytes = [sample.rss_bytes for sample in sampler.samples]
    assert max(rss_bytes) - rss_bytes[0] >= 15 * MIB
    assert max(rss_bytes) - rss_bytes[-1] >= 15 * MIB
    assert all(sample.anon_bytes + sample.file_bytes == sample.rss_bytes for sample in sampler.samples)


def test_a_sampler_without_proc_leaves_the_parts_open(system_without_proc):
    with MemorySampler() as sampler:
        pass
    assert {(sample.anon_bytes, sample.file_bytes) for sample in sampler.samples} == {(None, None)}


def test_a_meter_that_was_not_started_or_was_stopped_stops():
    meter = PeakMeter()
    meter.stop()
    assert meter.peak_bytes == 0
    with meter:
        pass
    peak_bytes = meter.peak_bytes
    meter.stop()
    assert meter.peak_bytes == peak_bytes > 0
