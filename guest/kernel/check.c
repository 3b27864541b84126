/* Init of check.sh's guest: asks the running kernel for what config.d/ promises.
 * One line per promise, "ok NAME" or "FAIL NAME: why"; then "CHECK-DONE". */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/vm_sockets.h>
#include <mqueue.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/fanotify.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static void report(const char *name, int good) {
    int error = errno;
    if (good) printf("ok %s\n", name);
    else printf("FAIL %s: %s\n", name, strerror(error));
    fflush(stdout);
}

static char *text_of(const char *path) {
    static char text[65536];
    int fd = open(path, O_RDONLY);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 2);
    if (fd >= 0) close(fd);
    text[n < 0 ? 0 : n] = 0;
    return text;
}

static int has_word(const char *path, const char *word) {
    char *text = text_of(path), *save = NULL;
    for (char *at = strtok_r(text, " \t\n", &save); at; at = strtok_r(NULL, " \t\n", &save))
        if (!strcmp(at, word)) return 1;
    errno = ENOENT;
    return 0;
}

static void words(const char *path, const char *kind, const char *const *list) {
    char name[128];
    for (; *list; list++) {
        snprintf(name, sizeof name, "%s %s", kind, *list);
        report(name, has_word(path, *list));
    }
}

/* Runs in a child, so that what it takes on does not stay. */
static void in_child(const char *name, int (*test)(void)) {
    int status;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) _exit(test() == 0 ? 0 : errno ? errno : 1);
    waitpid(pid, &status, 0);
    errno = WIFEXITED(status) ? WEXITSTATUS(status) : EINTR;
    report(name, errno == 0);
}

static int seccomp_filter(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 42),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return -1;
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return -1;
    return syscall(SYS_getppid) == -1 && errno == 42 ? 0 : -1;
}

static int every_namespace(void) {
    return unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS |
                   CLONE_NEWCGROUP | 0x80 /* CLONE_NEWTIME */);
}

/* A container must not reach the agent's ports: neither by CID 1 nor by its own CID. */
static int no_vsock_loopback(void) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = 1024};
    int server = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (server < 0) return -1;
    if (bind(server, (void *)&address, sizeof address) == 0) listen(server, 1);
    int client = socket(AF_VSOCK, SOCK_STREAM, 0);
    address.svm_cid = VMADDR_CID_LOCAL;
    if (connect(client, (void *)&address, sizeof address) == 0) {
        errno = EISCONN;
        return -1;
    }
    return 0;
}

static int system_v(void) {
    return syscall(SYS_shmget, 0, 4096, 01600) < 0 || syscall(SYS_semget, 0, 1, 01600) < 0 ||
                   syscall(SYS_msgget, 0, 01600) < 0 ? -1 : 0;
}

int main(void) {
    static const char *const filesystems[] = {"ext4", "erofs", "overlay", "tmpfs", "fuse", "virtiofs", "cgroup2",
                                              "hugetlbfs", "mqueue", "bpf", "binfmt_misc", "devpts", NULL};
    static const char *const controllers[] = {"cpuset", "cpu", "io", "memory", "hugetlb", "pids", "misc", NULL};
    static const char *const targets[] = {"MASQUERADE", "DNAT", "SNAT", "REDIRECT", "LOG", "MARK", "REJECT", NULL};
    static const char *const matches[] = {"conntrack", "comment", "multiport", "addrtype", "mark", "owner", "set",
                                          "statistic", "recent", NULL};
    char uring[256] = {0};
    long fd;

    mount("proc", "/proc", "proc", 0, 0);
    mount("sys", "/sys", "sysfs", 0, 0);
    mount("dev", "/dev", "devtmpfs", 0, 0);
    mount("run", "/run", "tmpfs", 0, 0);

    words("/proc/filesystems", "file system", filesystems);
    report("mount cgroup2", mount("cgroup", "/sys/fs/cgroup", "cgroup2", 0, 0) == 0);
    words("/sys/fs/cgroup/cgroup.controllers", "controller", controllers);
    mkdir("/sys/fs/cgroup/a", 0755);
    fd = open("/sys/fs/cgroup/cgroup.subtree_control", O_WRONLY);
    report("memory controller on", write(fd, "+memory +cpu +io", 16) == 16);
    report("memory.peak", access("/sys/fs/cgroup/a/memory.peak", R_OK) == 0);
    report("memory.swap.max", access("/sys/fs/cgroup/a/memory.swap.max", R_OK) == 0);
    report("cpu.max", access("/sys/fs/cgroup/a/cpu.max", R_OK) == 0);
    report("io.max", access("/sys/fs/cgroup/a/io.max", R_OK) == 0);
    report("cgroup.freeze", access("/sys/fs/cgroup/a/cgroup.freeze", R_OK) == 0);
    report("cgroup.kill", access("/sys/fs/cgroup/a/cgroup.kill", W_OK) == 0);
    report("memory.pressure", access("/sys/fs/cgroup/a/memory.pressure", R_OK) == 0);

    in_child("every namespace", every_namespace);
    in_child("seccomp filter", seccomp_filter);
    report("seccomp notification", strstr(text_of("/proc/sys/kernel/seccomp/actions_avail"), "user_notif") != NULL);
    report("bpf jit", text_of("/proc/sys/net/core/bpf_jit_enable")[0] == '1');
    report("no modules", access("/proc/modules", F_OK) != 0);
    report("io_uring", syscall(SYS_io_uring_setup, 4, uring) >= 0);
    report("userfaultfd", syscall(SYS_userfaultfd, O_CLOEXEC) >= 0);
    report("memfd", memfd_create("m", MFD_ALLOW_SEALING) >= 0);
    report("fanotify", fanotify_init(FAN_CLASS_NOTIF, O_RDONLY) >= 0);
    report("landlock", syscall(SYS_landlock_create_ruleset, NULL, 0, 1) >= 1);
    report("pidfd", syscall(SYS_pidfd_open, getpid(), 0) >= 0);
    report("openat2", syscall(SYS_openat2, AT_FDCWD, "/", (unsigned long[3]){0}, 24) >= 0);
    report("aio", syscall(SYS_io_setup, 4, &(unsigned long){0}) == 0);
    report("posix message queue", mq_open("/q", O_CREAT | O_RDWR, 0600, NULL) >= 0);
    in_child("System V IPC", system_v);
    report("tmpfs xattr", close(open("/run/f", O_CREAT | O_RDWR, 0600)) == 0 &&
                              setxattr("/run/f", "trusted.overlay.opaque", "y", 1, 0) == 0);
    mkdir("/run/l", 0755), mkdir("/run/u", 0755), mkdir("/run/w", 0755), mkdir("/run/m", 0755);
    report("overlay on tmpfs", mount("o", "/run/m", "overlay", 0, "lowerdir=/run/l,upperdir=/run/u,workdir=/run/w") == 0);
    report("tun", open("/dev/net/tun", O_RDWR) >= 0);
    report("fuse device", open("/dev/fuse", O_RDWR) >= 0);
    report("loop-control", open("/dev/loop-control", O_RDWR) >= 0);
    report("ptmx", open("/dev/ptmx", O_RDWR) >= 0 || access("/dev/ptmx", F_OK) == 0);
    in_child("vsock has no loopback", no_vsock_loopback);
    report("nf_tables", socket(AF_NETLINK, SOCK_RAW, 12) >= 0);
    /* The tables are listed once someone asks for them. */
    fd = socket(AF_INET, SOCK_RAW, 255);
    char info[84] = "nat";
    socklen_t size = sizeof info;
    report("iptables nat", getsockopt(fd, 0, 64, info, &size) == 0);
    words("/proc/net/ip_tables_targets", "iptables target", targets);
    words("/proc/net/ip_tables_matches", "iptables match", matches);
    report("ipv6", socket(AF_INET6, SOCK_STREAM, 0) >= 0);
    report("no /dev/mem", access("/dev/mem", F_OK) != 0);
    report("no debugfs", !has_word("/proc/filesystems", "debugfs"));
    report("random at once", syscall(SYS_getrandom, uring, 16, 1 /* GRND_NONBLOCK */) == 16);
    /* tsc-early becomes tsc a second later. */
    report("clock in nanoseconds", strstr(text_of("/sys/devices/system/clocksource/clocksource0/current_clocksource"), "tsc") ||
           has_word("/sys/devices/system/clocksource/clocksource0/current_clocksource", "kvm-clock"));
    printf("CHECK-DONE\n");
    fflush(stdout);
    sync();
    reboot(RB_AUTOBOOT);
    for (;;) pause();
}
