"""Wall clocks that jump, one program's at a time.

A few lines of C in front of libc's clock add an offset to CLOCK_REALTIME, and to nothing else,
which is what NTP or an operator does; libfaketime (0.9.10) breaks Python's sleep. What the kernel
itself stamps, such as the times of files, does not jump.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long ahead_s(void) {
    const char *path = getenv("CHAOS_CLOCK");
    char text[24];
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    ssize_t size = file < 0 ? 0 : read(file, text, sizeof text - 1);
    if (file >= 0) close(file);
    text[size > 0 ? size : 0] = 0;
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += ahead_s();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *result) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (result) *result = exact.tv_sec;
    return exact.tv_sec;
}
"""
VARIABLE = "CHAOS_CLOCK"


@dataclass(frozen=True)
class WallClock:
    """The clock of the programs whose environment names ``file``."""

    file: Path

    @property
    def environment(self) -> dict[str, str]:
        return {VARIABLE: str(self.file)}

    def set_ahead(self, seconds: int) -> None:
        """Let it be this far from the machine's clock."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.replace(self.file)


@functools.cache
def preloaded() -> str | None:
    """Return what LD_PRELOAD must be for clocks to jump; None where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = Path(tempfile.gettempdir()) / "hsplit-chaos-clock.so"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        source, fresh = Path(folder) / "clock.c", Path(folder) / "clock.so"
        source.write_text(SOURCE)
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(fresh), str(source)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        fresh.replace(library)
    return str(library)
