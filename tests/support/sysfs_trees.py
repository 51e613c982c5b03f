"""The kernel files of several machines, as tables: path → contents. `build` makes a root of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

Tree: TypeAlias = Mapping[str, str]


def build(folder: Path, *trees: Tree) -> Path:
    """Write the files of all ``trees`` below ``folder``, later ones over earlier; return it."""
    for tree in trees:
        for path, contents in tree.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(contents)
    return folder


def process(*, cgroup: str = "0::/\n", cpus: str = "0-7", environment: str = "") -> Tree:
    """Return what /proc says of the agent itself: 700 MiB, of which 200 MiB are of files."""
    return {
        "proc/self/cgroup": cgroup,
        "proc/self/environ": environment,
        "proc/self/status": (
            "Name:\tpython\nVmHWM:\t  800000 kB\nVmRSS:\t  716800 kB\nRssAnon:\t  506880 kB\n"
            f"RssFile:\t  204800 kB\nRssShmem:\t    5120 kB\nCpus_allowed_list:\t{cpus}\n"
        ),
    }


def meminfo(*, total_mib: int, available_mib: int) -> Tree:
    """Return /proc/meminfo."""
    return {
        "proc/meminfo": (
            f"MemTotal:       {total_mib * 1024} kB\nMemFree:          204800 kB\n"
            f"MemAvailable:   {available_mib * 1024} kB\nBuffers:           51200 kB\n"
            "Cached:          2097152 kB\nSwapTotal:       4194304 kB\n"
        )
    }


def stat(*, busy: int, idle: int) -> Tree:
    """Return /proc/stat with that many ticks in all: half user, half system; idle and iowait."""
    user, waiting = busy // 2, idle // 4
    return {
        "proc/stat": (
            f"cpu  {user} 0 {busy - user} {idle - waiting} {waiting} 0 0 0 0 0\n"
            "cpu0 1 0 1 1 1 0 0 0 0 0\nintr 12345 0 0\nctxt 99\n"
        )
    }


def zones(*found: tuple[str, str]) -> Tree:
    """Return thermal zones: type and millidegrees each."""
    files: dict[str, str] = {}
    for number, (kind, value) in enumerate(found):
        folder = f"sys/class/thermal/thermal_zone{number}"
        files |= {f"{folder}/type": f"{kind}\n", f"{folder}/temp": f"{value}\n"}
    return files


def cooling(*found: tuple[str, int]) -> Tree:
    """Return cooling devices: type and current state each."""
    files: dict[str, str] = {}
    for number, (kind, state) in enumerate(found):
        folder = f"sys/class/thermal/cooling_device{number}"
        files |= {f"{folder}/type": f"{kind}\n", f"{folder}/cur_state": f"{state}\n"}
    return files


def ina3221(chip: int, *rails: tuple[str, int, int]) -> Tree:
    """Return a power monitor: label, millivolts and milliamperes of each channel."""
    folder = f"sys/class/hwmon/hwmon{chip}"
    files = {f"{folder}/name": "ina3221\n"}
    for channel, (label, millivolts, milliamperes) in enumerate(rails, start=1):
        files |= {
            f"{folder}/in{channel}_label": f"{label}\n",
            f"{folder}/in{channel}_input": f"{millivolts}\n",
            f"{folder}/curr{channel}_input": f"{milliamperes}\n",
        }
    return files


ORIN_NANO: Tree = {
    **process(cpus="0-5"),
    **meminfo(total_mib=7620, available_mib=5200),
    **stat(busy=4000, idle=16000),
    **zones(
        ("cpu-thermal", "63625"),
        ("gpu-thermal", "61500"),
        ("cv0-thermal", "-256000"),  # switched off
        ("soc0-thermal", "60125"),
        ("tj-thermal", "63875"),
    ),
    **cooling(
        ("pwm-fan", 3),
        ("cpu-throttle-alert", 0),
        ("gpu-throttle-alert", 0),
        ("hot-surface-alert", 0),
        ("devfreq-17000000.gpu", 2),
    ),
    **ina3221(1, ("VDD_IN", 4984, 1856), ("VDD_CPU_GPU_CV", 4984, 600), ("VDD_SOC", 4984, 400)),
    "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages\n",
    "sys/class/hwmon/hwmon1/in7_input": "3200\n",
    "sys/class/hwmon/hwmon2/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon2/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon2/oc2_event_cnt": "15\n",
    "sys/class/hwmon/hwmon2/oc3_event_cnt": "37\n",
    "sys/devices/platform/gpu.0/load": "873\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "624750000\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "729600000\n",
    "sys/devices/system/cpu/online": "0-5\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
    "etc/nv_tegra_release": (
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: now\n"
    ),
    "etc/nvpmodel.conf": (
        "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n"
        "< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
        "# mandatory section to configure the default power mode\n< PM_CONFIG DEFAULT=1 >\n"
    ),
    "var/lib/nvpmodel/status": "pmode:0002\n",
}

AGX_ORIN: Tree = {
    **process(cpus="0-11"),
    **meminfo(total_mib=62780, available_mib=48000),
    **stat(busy=9000, idle=1000),
    **zones(("CPU-therm", "77281"), ("GPU-therm", "69125"), ("tj-therm", "77300")),
    **cooling(("pwm-fan", 1), ("cpu-throttle-alert", 0), ("gpu-throttle-alert", 1)),
    **ina3221(
        3, ("VDD_GPU_SOC", 20000, 500), ("VDD_CPU_CV", 20000, 250), ("VIN_SYS_5V0", 5000, 1000)
    ),
    **ina3221(4, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 200)),
    "sys/devices/platform/17000000.ga10b/load": "140\n",  # a place that nobody knows
    "sys/class/devfreq/17000000.ga10b/cur_freq": "1300500000\n",
    "sys/class/devfreq/17000000.ga10b/device/load": "140\n",
    # Mode 15W switches CPUs off; the affinity still names them.
    "sys/devices/system/cpu/online": "0-3\n",
    "proc/device-tree/model": "Jetson AGX Orin Developer Kit\0",
    "etc/nv_tegra_release": "# R35 (release), REVISION: 6.0, GCID: 37391689\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< PM_CONFIG DEFAULT=0 >\n",
}

NANO: Tree = {
    **process(cpus="0-3"),
    **meminfo(total_mib=3956, available_mib=2500),
    **stat(busy=1, idle=1),
    **zones(
        ("AO-therm", "41500"),
        ("CPU-therm", "34000"),
        ("GPU-therm", "31000"),
        ("PMIC-Die", "100000"),
        ("thermal-fan-est", "33000"),
        ("iwlwifi", "39000"),
    ),
    "sys/devices/gpu.0/load": "0\n",
    "sys/class/devfreq/57000000.gpu/cur_freq": "76800000\n",
    "proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0",
    "etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 29818004\n",
    "var/lib/nvpmodel/status": "pmode:0001 fmode:fanNull\n",
}

JETSON_IN_A_CONTAINER: Tree = {
    # Docker hides /sys/firmware, where the device tree is, and /etc is the image's.
    **process(cpus="0-5"),
    **meminfo(total_mib=7620, available_mib=5200),
    "sys/devices/soc0/family": "Tegra\n",
    "sys/devices/soc0/machine": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\n",
    "sys/devices/platform/bus@0/17000000.gpu/load": "5\n",
    "sys/fs/cgroup/memory.max": str(4096 * 2**20),
    "sys/fs/cgroup/memory.current": str(1024 * 2**20),
}

LAPTOP: Tree = {
    **process(cpus="0-7"),
    **meminfo(total_mib=15900, available_mib=9000),
    **stat(busy=5000, idle=5000),
    **zones(
        ("acpitz", "27800"),
        ("INT3400 Thermal", "20000"),
        ("x86_pkg_temp", "66000"),
        ("iwlwifi_1", "81000"),
    ),
    **cooling(("Processor", 0), ("Processor", 0), ("intel_powerclamp", -1), ("TCC Offset", 7)),
    "sys/devices/system/cpu/online": "0-7\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "120\n",
    "sys/fs/cgroup/user.slice/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/memory.current": "6000000000\n",
    "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
}

AMD_DESKTOP: Tree = {
    **process(cpus="0-15"),
    **meminfo(total_mib=31900, available_mib=28000),
    **zones(("acpitz", "16800")),
    "sys/class/hwmon/hwmon0/name": "nvme\n",
    "sys/class/hwmon/hwmon0/temp1_input": "90000\n",
    "sys/class/hwmon/hwmon1/name": "k10temp\n",
    "sys/class/hwmon/hwmon1/temp1_input": "58250\n",
}

_SERVER: Tree = {
    **meminfo(total_mib=64000, available_mib=50000),
    **stat(busy=100, idle=900),
    "sys/devices/system/cpu/online": "0-31\n",
}

CONTAINER_V2: Tree = {
    # docker run --memory 4g --cpus 1.5: the group is the root of what the container sees.
    **_SERVER,
    **process(cpus="0-31", cgroup="0::/\n"),
    "sys/fs/cgroup/memory.max": str(4096 * 2**20),
    "sys/fs/cgroup/memory.high": "max\n",
    "sys/fs/cgroup/memory.current": str(3072 * 2**20),
    "sys/fs/cgroup/memory.stat": (
        f"anon {500 * 2**20}\nfile {2400 * 2**20}\n"
        f"inactive_file {2000 * 2**20}\nactive_file {400 * 2**20}\n"
    ),
    "sys/fs/cgroup/cpu.max": "150000 100000\n",
}

SERVICE_V2: Tree = {
    # A systemd service whose soft limit is tighter than its hard one and than its slice's.
    **_SERVER,
    **process(cpus="0-31", cgroup="0::/edge.slice/hsplit.service\n"),
    "sys/fs/cgroup/edge.slice/memory.max": str(6144 * 2**20),
    "sys/fs/cgroup/edge.slice/memory.current": str(5120 * 2**20),
    "sys/fs/cgroup/edge.slice/cpu.max": "400000 100000\n",
    "sys/fs/cgroup/edge.slice/hsplit.service/memory.max": str(8192 * 2**20),
    "sys/fs/cgroup/edge.slice/hsplit.service/memory.high": str(1536 * 2**20),
    "sys/fs/cgroup/edge.slice/hsplit.service/memory.current": str(1024 * 2**20),
    "sys/fs/cgroup/edge.slice/hsplit.service/cpu.max": "max 100000\n",
}

CONTAINER_V1: Tree = {
    # The path is the host's, and what is mounted is the container's own group.
    **_SERVER,
    **process(
        cpus="0-31",
        cgroup=(
            "11:memory:/docker/0a1b2c\n10:cpu,cpuacct:/docker/0a1b2c\n"
            "1:name=systemd:/docker/0a1b2c\n0::/system.slice/containerd.service\n"
        ),
    ),
    "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2048 * 2**20),
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(1536 * 2**20),
    "sys/fs/cgroup/memory/memory.stat": (
        f"inactive_file 4096\nactive_file 4096\nhierarchical_memory_limit {2048 * 2**20}\n"
        f"total_inactive_file {512 * 2**20}\ntotal_active_file {256 * 2**20}\n"
    ),
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}

SLICE_V2: Tree = {
    # The same, but the slice is nearly full with others' work.
    **SERVICE_V2,
    "sys/fs/cgroup/edge.slice/memory.current": str(5888 * 2**20),
}

NESTED_V1: Tree = {
    **_SERVER,
    **process(cpus="0-31", cgroup="4:memory:/pods/pod1/agent\n3:cpu:/pods/pod1/agent\n0::/\n"),
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(40000 * 2**20),
    "sys/fs/cgroup/memory/pods/pod1/memory.limit_in_bytes": str(3072 * 2**20),
    "sys/fs/cgroup/memory/pods/pod1/memory.usage_in_bytes": str(2560 * 2**20),
    "sys/fs/cgroup/memory/pods/pod1/agent/memory.limit_in_bytes": str(8192 * 2**20),
    "sys/fs/cgroup/memory/pods/pod1/agent/memory.usage_in_bytes": str(1024 * 2**20),
    "sys/fs/cgroup/cpu/pods/pod1/agent/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/pods/pod1/agent/cpu.cfs_period_us": "100000\n",
}

TREES: dict[str, Tree] = {
    "orin_nano": ORIN_NANO,
    "agx_orin": AGX_ORIN,
    "nano": NANO,
    "jetson_in_a_container": JETSON_IN_A_CONTAINER,
    "laptop": LAPTOP,
    "amd_desktop": AMD_DESKTOP,
    "container_v2": CONTAINER_V2,
    "service_v2": SERVICE_V2,
    "slice_v2": SLICE_V2,
    "container_v1": CONTAINER_V1,
    "nested_v1": NESTED_V1,
}
