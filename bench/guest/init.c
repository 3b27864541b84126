/* Init of the guests that bench/lab.sh measures: does what the kernel command
 * line's `bench=` says, and reports on the console, a line a figure:
 * "figure NAME VALUE". Times are the guest's clock, in nanoseconds. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define RANDOM_READS 1000
#define PINGS 1000
#define STREAM (32L << 20)
#define MIB (1L << 20)

static char buffer[MIB] __attribute__((aligned(4096)));

static long now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void fail(const char *what) {
	printf("failed %s: %m\n", what);
	fflush(stdout);
	tcdrain(1);
	reboot(RB_AUTOBOOT);
}

static void figure(const char *name, long value) {
	printf("figure %s %ld\n", name, value);
}

/* The first disk, read past the guest's page cache. */
static void block(void) {
	int fd = open("/dev/vda", O_RDONLY | O_DIRECT);
	if (fd < 0)
		fail("open /dev/vda");
	long size = lseek(fd, 0, SEEK_END);
	unsigned long seed = 88172645463325252UL;
	long start = now();
	for (int n = 0; n < RANDOM_READS; n++) {
		/* xorshift: the same places for every monitor. */
		seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
		if (pread(fd, buffer, 4096, (long)(seed % (size / 4096)) * 4096) != 4096)
			fail("read 4 KiB");
	}
	figure("block-4k-ns", (now() - start) / RANDOM_READS);
	start = now();
	for (long at = 0; at < size; at += MIB)
		if (pread(fd, buffer, MIB, at) != MIB)
			fail("read 1 MiB");
	figure("block-1m-ns", (now() - start) / (size / MIB));
}

/* A stream of 10.9.0.1:PORT. */
static int dial(int port) {
	struct sockaddr_in to = {AF_INET, htons(port), {inet_addr("10.9.0.1")}, {0}};
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to))
		fail("connect");
	return fd;
}

/* eth0, against an echo at port 1, a source at 2 and a sink at 3. */
static void net(void) {
	int control = socket(AF_INET, SOCK_DGRAM, 0);
	struct ifreq request = {0};
	struct sockaddr_in own = {AF_INET, 0, {inet_addr("10.9.0.2")}, {0}};
	strcpy(request.ifr_name, "eth0");
	memcpy(&request.ifr_addr, &own, sizeof own);
	if (ioctl(control, SIOCSIFADDR, &request))
		fail("set the address of eth0");
	own.sin_addr.s_addr = inet_addr("255.255.255.0");
	memcpy(&request.ifr_netmask, &own, sizeof own);
	if (ioctl(control, SIOCSIFNETMASK, &request))
		fail("set the netmask of eth0");
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	if (ioctl(control, SIOCSIFFLAGS, &request))
		fail("set eth0 up");

	struct sockaddr_in echo = {AF_INET, htons(1), {inet_addr("10.9.0.1")}, {0}};
	if (connect(control, (struct sockaddr *)&echo, sizeof echo))
		fail("connect to the echo");
	/* A lost packet is an error, and no wait without an end. */
	struct timeval patience = {10, 0};
	setsockopt(control, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	long start = 0;
	/* The first finds the peer's address, and is not counted. */
	for (int n = -1; n < PINGS; n++) {
		if (n == 0)
			start = now();
		if (send(control, "ping", 4, 0) != 4 || recv(control, buffer, 64, 0) != 4)
			fail("ping");
	}
	figure("net-ping-ns", (now() - start) / PINGS);

	int fd = dial(2);
	start = now();
	for (long left = STREAM; left > 0;) {
		long n = read(fd, buffer, sizeof buffer);
		if (n <= 0)
			fail("receive");
		left -= n;
	}
	figure("net-receive-ns", (now() - start) / (STREAM / MIB));
	close(fd);
	fd = dial(3);
	start = now();
	for (long left = STREAM; left > 0;) {
		long n = write(fd, buffer, left < MIB ? left : MIB);
		if (n <= 0)
			fail("send");
		left -= n;
	}
	shutdown(fd, SHUT_WR);
	/* The sink closes when it has all. */
	(void)!read(fd, buffer, 1);
	figure("net-send-ns", (now() - start) / (STREAM / MIB));
}

/* The kernel's log, without the starts of initcalls and the quick ones. */
static void kernel_log(void) {
	static char text[1 << 20];
	int n = klogctl(3 /* read all */, text, sizeof text - 1);
	if (n < 0)
		fail("read the kernel's log");
	for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
		long usecs = 100;
		char *after = strstr(line, " after ");
		if (strstr(line, "] calling "))
			continue;
		if (strstr(line, "] initcall ") && after)
			sscanf(after, " after %ld usecs", &usecs);
		/* Without the level: "<6>[    0.123456] text". */
		char *bracket = strchr(line, '[');
		if (usecs >= 100 && bracket)
			printf("log %s\n", bracket);
	}
}

int main(void) {
	const char *bench = getenv("bench");
	puts("up");
	fflush(stdout);
	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	if (bench && !strcmp(bench, "block"))
		block();
	if (bench && !strcmp(bench, "net"))
		net();
	if (bench && !strcmp(bench, "log"))
		kernel_log();
	fflush(stdout);
	tcdrain(1);
	reboot(RB_AUTOBOOT);
	for (;;)
		pause();
}
