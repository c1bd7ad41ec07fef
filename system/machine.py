"""What the operating system tells of this machine and this process: CPU, memory that is free, memory that was used.

Linux tells it in text files of `field: value` lines; elsewhere each function says what it does instead.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

CGROUP = "/sys/fs/cgroup"  # of version 2, which a container sees as its own
BUSY = 0.5                 # load over the last minute, in programs
SHORT_WAIT = "3000"        # rounds of a loop, of 300 000


def fields(path: str) -> dict[str, str]:
    """Return field -> value of a system file, empty where there is no such file.

    A field that comes again, as those of each CPU do, has the value of its last line.
    """
    try:
        with open(path, encoding="ascii", errors="ignore") as file:
            return dict(map(str.strip, line.split(":", 1)) for line in file if ":" in line)
    except OSError:
        return {}


def nearest_existing(path: Path) -> Path:
    """Return a path, or the nearest one above it that is there: where it would be made.

    What cannot be looked at (a name that is too long, a folder without rights, a NUL) counts as not there.
    """
    return next((place for place in (path, *Path(os.path.abspath(path)).parents) if os.path.exists(place)), Path())


def processor() -> str:
    """Return the name of the CPU, as far as the system tells."""
    return fields("/proc/cpuinfo").get("model name") or platform.processor() or platform.machine()


def processor_has_bfloat16() -> bool:
    """Tell whether the CPU computes in bfloat16 at least as fast as in float32; False where the system does not tell.

    So it is with AMX, and with AMD's AVX512-BF16 (three to four times float32). Intel's AVX512-BF16 without AMX was
    measured at 0.7 times float32, in convolutions and matrix products alike; where it is emulated it is slower still.
    """
    cpu = fields("/proc/cpuinfo")
    flags = cpu.get("flags", "").split()
    return "amx_bf16" in flags or "avx512_bf16" in flags and cpu.get("vendor_id") != "GenuineIntel"


def content(path: str) -> str:
    """Return the text of a system file without its line end, empty where there is no such file."""
    try:
        with open(path, encoding="ascii", errors="ignore") as file:
            return file.read().strip()
    except OSError:
        return ""


def share_cores() -> None:
    """Let threads that wait for others sleep soon where other programs keep a core busy; to be called before torch.

    OpenMP's threads wait in a loop at first. That saves about 5 % of the time on a quiet machine, but keeps the core
    from the thread that is waited for where another program has taken that thread's place: with one such program on two
    cores, training was half as fast as with one thread (docs/experiments.md).
    """
    try:
        busy = os.getloadavg()[0] >= BUSY
    except (OSError, AttributeError):  # AttributeError: on Windows
        return
    if busy and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SHORT_WAIT)


def cpu_count() -> int:
    """Return how many CPUs this process may use: those of its affinity, and no more than its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = content(f"{CGROUP}/cpu.max").partition(" ")
    return max(1, min(count, int(quota) // int(period))) if quota.isdecimal() and period.isdecimal() else count


def free_memory() -> int:
    """Return the bytes of memory that can be had without swapping, in the container if its memory is limited.

    Where that is not told, it is half of all.
    """
    available = fields("/proc/meminfo").get("MemAvailable")
    if available:
        free = int(available.split()[0]) * 1024
        limit, used = content(f"{CGROUP}/memory.max"), content(f"{CGROUP}/memory.current")
        return max(0, min(free, int(limit) - int(used))) if limit.isdecimal() and used.isdecimal() else free
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        return 4 * 2 ** 30


def peak_memory() -> int:
    """Return the largest resident memory in bytes that this process has had."""
    # On Linux ru_maxrss is no less than what the process that started this one had, even after exec; VmHWM is not.
    peak = fields("/proc/self/status").get("VmHWM")
    if peak:
        return int(peak.split()[0]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Let the C library keep memory that was freed instead of handing it back and fetching it again at each step.

    Large tensors are otherwise new pages from the system every time; keeping them made a CPU training step 1.3 times
    as fast for a quarter more memory, and prediction 1.5 to 1.8 times for a fifth more at most. For the whole process,
    where the C library is glibc; elsewhere nothing happens.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
