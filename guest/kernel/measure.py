#!/usr/bin/env python3
"""Times the sandbox kernel under QEMU: from exec of QEMU to the first line of init.

  guest/kernel/measure.py                       the variants that README.md quotes
  guest/kernel/measure.py -n 21 -v base -v ...  some of them, 21 rounds
  guest/kernel/measure.py --list
  guest/kernel/measure.py --dmesg base          one boot with all messages, to the terminal

Rounds interleave the variants, so that other load on the machine hits all alike. Per
variant: minimum and median wall time in ms, user+system CPU time of QEMU, and in the
guest the kernel's own clock at init, MemTotal, the memory in use (MemTotal-MemFree), and
how long a sleep of 200 us takes (4000: the clock events are as coarse as the tick).
"""

import argparse
import os
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "..", "..", "out", "lib", "walnut")

INIT = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <time.h>
#include <unistd.h>
int main(void) {
    struct timespec t;
    char text[4096] = "", line[256];
    long total = 0, available = 0;
    int fd;
    clock_gettime(CLOCK_MONOTONIC, &t);
    mount("proc", "/proc", "proc", 0, 0);
    fd = open("/proc/meminfo", O_RDONLY);
    if (fd >= 0 && read(fd, text, sizeof text - 1) > 0) {
        sscanf(text, "MemTotal: %ld kB\nMemFree: %ld", &total, &available);
    }
    struct timespec nap = {0, 200000}, t0, t1;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    for (int i = 0; i < 20; i++) nanosleep(&nap, 0);
    clock_gettime(CLOCK_MONOTONIC, &t1);
    long slept = ((t1.tv_sec - t0.tv_sec) * 1000000 + (t1.tv_nsec - t0.tv_nsec) / 1000) / 20;
    int n = snprintf(line, sizeof line, "\nWALNUT-INIT %ld %ld %ld %ld\n",
                     t.tv_sec * 1000 + t.tv_nsec / 1000000, total, total - available, slept);
    write(1, line, n);
    reboot(RB_AUTOBOOT);
    for (;;) pause();
}
"""

# Under emulation the guest's TSC is the host's; TSC in a command line is replaced by its kHz.
TSC_KHZ = r"""
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_RAW, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
int main(void) {
    double t0 = now();
    unsigned long long c0 = __rdtsc();
    while (now() - t0 < 50) {}
    printf("%.0f", (__rdtsc() - c0) / (now() - t0));
}
"""

MACHINE = "microvm,acpi=off,pcie=off,pic=on,pit=on,rtc=on,usb=off,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=on"
CMDLINE = "console=ttyS0 quiet panic=-1 reboot=t"
# The recommended set: what README.md explains option by option.
BEST = CMDLINE + " tsc=reliable no_timer_check tsc_early_khz=TSC nolapic_timer noreplace-smp"


def variant(machine=MACHINE, cmdline=BEST, accel="tcg,thread=multi", cpu="max", smp="1", memory="128M", extra=()):
    return dict(machine=machine, cmdline=cmdline, accel=accel, cpu=cpu, smp=smp, memory=memory, extra=list(extra))


VARIANTS = {
    "base": variant(),
    "plain": variant(cmdline=CMDLINE),
    "loud": variant(cmdline=BEST.replace(" quiet", "")),
    "mitigations-off": variant(cmdline=BEST + " mitigations=off"),
    "no-tsc-reliable": variant(cmdline=BEST.replace(" tsc=reliable", "")),
    "no-no_timer_check": variant(cmdline=BEST.replace(" no_timer_check", "")),
    "lpj": variant(cmdline=BEST + " lpj=4000000"),
    "nokaslr": variant(cmdline=BEST + " nokaslr"),
    "init_on_alloc": variant(cmdline=BEST + " init_on_alloc=1"),
    "replace-smp": variant(cmdline=BEST.replace(" noreplace-smp", "")),
    "rcu-expedited": variant(cmdline=BEST + " rcupdate.rcu_expedited=1"),
    "pci-off": variant(cmdline=BEST + " pci=off"),
    "clocksource-tsc": variant(cmdline=BEST + " clocksource=tsc"),
    "single": variant(accel="tcg,thread=single"),
    "tb-32": variant(accel="tcg,thread=multi,tb-size=32"),
    "tb-512": variant(accel="tcg,thread=multi,tb-size=512"),
    "cpu-qemu64": variant(cpu="qemu64"),
    "cpu-qemu64-rdrand": variant(cpu="qemu64,+rdrand,+invtsc"),
    "cpu-nehalem": variant(cpu="Nehalem"),
    "cpu-haswell": variant(cpu="Haswell-noTSX"),
    "cpu-epyc": variant(cpu="EPYC"),
    "cpu-max-nola57": variant(cpu="max,la57=off"),
    "cpu-max-nosmap": variant(cpu="max,la57=off,smap=off,smep=off"),
    "cpu-max-nopke": variant(cpu="max,la57=off,pku=off,pks=off"),
    "smp2": variant(smp="2"),
    "smp4": variant(smp="4"),
    "maxcpus32": variant(smp="1,maxcpus=32"),
    "mem256": variant(memory="256M"),
    "mem512": variant(memory="512M"),
    "mem2048": variant(memory="2G"),
        "rtc-off": variant(machine=MACHINE.replace("rtc=on", "rtc=off")),
    "pic-off": variant(machine=MACHINE.replace("pic=on", "pic=off")),
    "pit-off": variant(machine=MACHINE.replace("pit=on", "pit=off")),
    "lapic-timer": variant(cmdline=BEST.replace(" nolapic_timer", "")),
    "smp2-lapic-timer": variant(smp="2", cmdline=BEST.replace(" nolapic_timer", "")),
    "no-tsc_early_khz": variant(cmdline=BEST.replace(" tsc_early_khz=TSC", "")),
    "pcie-on": variant(machine=MACHINE.replace("pcie=off", "pcie=on")),
    "acpi-on": variant(machine=MACHINE.replace("acpi=off", "acpi=on").replace("pcie=off", "pcie=on")),
    "bios-microvm": variant(extra=["-bios", "bios-microvm.bin"]),
    "bios-qboot": variant(extra=["-bios", "qboot.rom"]),
    "option-roms": variant(machine=MACHINE.replace("x-option-roms=off", "x-option-roms=on")),
    "q35": variant(machine="q35,usb=off", extra=["-vga", "none", "-net", "none"]),
    "hvc": variant(
        machine=MACHINE.replace("isa-serial=on", "isa-serial=off"),
        cmdline=BEST.replace("ttyS0", "hvc0"),
        extra=["-device", "virtio-serial-device,max_ports=1", "-chardev", "stdio,id=c", "-device", "virtconsole,chardev=c"],
    ),
}
QUOTED = ["base", "plain", "no-tsc_early_khz", "lapic-timer", "smp2-lapic-timer", "loud", "mitigations-off", "no-tsc-reliable", "single", "cpu-qemu64", "rtc-off",
          "pcie-on", "bios-microvm", "option-roms", "smp2", "maxcpus32", "mem512", "init_on_alloc", "q35", "hvc", "replace-smp"]


def tsc_khz(directory):
    source, program = os.path.join(directory, "tsc.c"), os.path.join(directory, "tsc")
    with open(source, "w") as file:
        file.write(TSC_KHZ)
    subprocess.run(["gcc", "-O2", "-o", program, source], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


def make_initramfs(directory):
    source, init, archive = (os.path.join(directory, n) for n in ("init.c", "init", "initramfs"))
    with open(source, "w") as file:
        file.write(INIT)
    subprocess.run(["gcc", "-w", "-Os", "-static", "-s", "-o", init, source], check=True)
    tool = os.path.join(HERE, "../../target/release/walnut-initramfs")
    if not os.path.exists(tool):
        sys.exit("build walnut-initramfs first: cargo build --release -p walnut-initramfs")
    subprocess.run([tool, "--output", archive, "init=" + init], check=True)
    return archive


def command(v, kernel, initramfs):
    serial = [] if "isa-serial=off" in v["machine"] else ["-serial", "stdio"]
    return ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-M", v["machine"], "-accel", v["accel"], "-cpu", v["cpu"], "-smp", v["smp"], "-m", v["memory"],
            "-kernel", kernel, "-initrd", initramfs, "-append", v["cmdline"], *serial, *v["extra"]]


def boot(v, kernel, initramfs, deadline=60):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    child = subprocess.Popen(command(v, kernel, initramfs), stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = b""
    found = None
    while found is None and time.monotonic() - start < deadline:
        if not select.select([child.stdout], [], [], 1)[0]:
            continue
        piece = os.read(child.stdout.fileno(), 65536)
        if not piece:
            break
        output += piece
        at = output.find(b"WALNUT-INIT ")
        if at >= 0 and b"\n" in output[at:]:
            found = (time.monotonic() - start) * 1000
            numbers = [int(n) for n in output[at:].split(b"\n")[0].split()[1:]]
    if found is None:
        child.kill()
    child.wait()
    child.stdout.close()
    if found is None:
        return None, output
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) * 1000
    return (found, cpu, *numbers), output


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=11, help="rounds (default: 11)")
    parser.add_argument("-v", "--variant", action="append", choices=VARIANTS)
    parser.add_argument("--kernel", default=os.path.join(OUT, "vmlinux"))
    parser.add_argument("--append", default="", help="more words for every command line")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dmesg", choices=VARIANTS)
    arguments = parser.parse_args()
    for v in VARIANTS.values():
        v["cmdline"] = (v["cmdline"] + " " + arguments.append).strip()
    if arguments.list:
        for name, v in VARIANTS.items():
            print(name, *command(v, "vmlinux", "initramfs"))
        return
    with tempfile.TemporaryDirectory(prefix="walnut-measure-") as directory:
        initramfs = make_initramfs(directory)
        khz = tsc_khz(directory)
        for v in VARIANTS.values():
            v["cmdline"] = v["cmdline"].replace("TSC", khz)
        if arguments.dmesg:
            v = dict(VARIANTS[arguments.dmesg])
            v["cmdline"] = v["cmdline"].replace(" quiet", "")
            sys.stdout.buffer.write(boot(v, arguments.kernel, initramfs)[1])
            return
        names = arguments.variant or QUOTED
        results = {name: [] for name in names}
        for _ in range(arguments.n):
            for name in names:
                result, output = boot(VARIANTS[name], arguments.kernel, initramfs)
                if result:
                    results[name].append(result)
                elif not results[name]:
                    last = output.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
                    print(f"{name}: no init: {last[0][:120]}", file=sys.stderr)
        print(f"{'variant':20} {'n':>3} {'min ms':>7} {'median':>7} {'cpu ms':>7} {'kernel ms':>9} {'total kB':>9} {'used kB':>8} {'sleep us':>8}")
        for name, rows in results.items():
            if not rows:
                print(f"{name:20}   0")
                continue
            wall, cpu, kernel, total, used, slept = zip(*rows)
            print(f"{name:20} {len(rows):3} {min(wall):7.0f} {statistics.median(wall):7.0f} {min(cpu):7.0f} "
                  f"{min(kernel):9} {total[0]:9} {min(used):8} {min(slept):8}")


main()
