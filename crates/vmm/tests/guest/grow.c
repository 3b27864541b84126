/* Init of the guests that grow and connect: does what the kernel command line's
 * `test=` says, and prints what it finds. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/ethtool.h>
#include <linux/fs.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* The end of a test that cannot go on. */
static void die(const char *format, ...) {
	va_list words;
	va_start(words, format);
	printf("FAILED: ");
	vprintf(format, words);
	printf(": %s\n", strerror(errno));
	va_end(words);
	fflush(stdout);
	tcdrain(1);
	reboot(RB_AUTOBOOT);
	for (;;)
		pause();
}

static long word(const char *name, long otherwise) {
	const char *value = getenv(name);
	return value ? atol(value) : otherwise;
}

static double now(void) {
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec + at.tv_nsec / 1e9;
}

/* ---- network */

static int on_link(int sock, const char *link, unsigned long call, struct ifreq *request) {
	memset(request->ifr_name, 0, sizeof request->ifr_name);
	strncpy(request->ifr_name, link, sizeof request->ifr_name - 1);
	return ioctl(sock, call, request);
}

static unsigned ethtool_value(int sock, const char *link, unsigned command) {
	struct ethtool_value value = {.cmd = command};
	struct ifreq request = {.ifr_data = (void *)&value};
	if (on_link(sock, link, SIOCETHTOOL, &request) < 0)
		die("ethtool %x of %s", command, link);
	return value.data;
}

/* Gives eth<n> the address 10.9.<n>.2/24, and says what it is like. */
static void bring_up(int n) {
	char link[16], text[32];
	snprintf(link, sizeof link, "eth%d", n);
	snprintf(text, sizeof text, "10.9.%d.2", n);
	int sock = socket(AF_INET, SOCK_DGRAM, 0);
	struct ifreq request = {0};
	struct sockaddr_in *address = (void *)&request.ifr_addr;
	address->sin_family = AF_INET;
	inet_pton(AF_INET, text, &address->sin_addr);
	if (on_link(sock, link, SIOCSIFADDR, &request) < 0)
		die("address of %s", link);
	address->sin_family = AF_INET;
	inet_pton(AF_INET, "255.255.255.0", &address->sin_addr);
	if (on_link(sock, link, SIOCSIFNETMASK, &request) < 0)
		die("netmask of %s", link);
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	if (on_link(sock, link, SIOCSIFFLAGS, &request) < 0)
		die("%s up", link);
	struct ethtool_channels channels = {.cmd = ETHTOOL_GCHANNELS};
	request.ifr_data = (void *)&channels;
	if (on_link(sock, link, SIOCETHTOOL, &request) < 0)
		die("channels of %s", link);
	unsigned char mac[6];
	if (on_link(sock, link, SIOCGIFHWADDR, &request) < 0)
		die("hardware address of %s", link);
	memcpy(mac, request.ifr_hwaddr.sa_data, 6);
	on_link(sock, link, SIOCGIFMTU, &request);
	printf("%s mac %02x:%02x:%02x:%02x:%02x:%02x mtu %d pairs %u tx-csum %u rx-csum %u tso %u\n",
	       link, mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], request.ifr_mtu,
	       channels.combined_count, ethtool_value(sock, link, ETHTOOL_GTXCSUM),
	       ethtool_value(sock, link, ETHTOOL_GRXCSUM), ethtool_value(sock, link, ETHTOOL_GTSO));
	close(sock);
}

static struct sockaddr_in host(int n) {
	char text[32];
	snprintf(text, sizeof text, "10.9.%d.1", n);
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(5000)};
	inet_pton(AF_INET, text, &address.sin_addr);
	return address;
}

static int dial(int n) {
	struct sockaddr_in address = host(n);
	int sock = socket(AF_INET, SOCK_STREAM, 0);
	int window = word("window", 0);
	if (window)
		setsockopt(sock, SOL_SOCKET, SO_RCVBUF, &window, sizeof window);
	if (connect(sock, (void *)&address, sizeof address) < 0)
		die("connect to the host");
	return sock;
}

/* The byte of a stream at a place. */
static unsigned char pattern(long at) {
	return at ^ at >> 8 ^ at >> 16;
}

/* Sends `bytes` bytes, or takes as many, and checks them; how long it took. */
static double transfer(int sock, long bytes, int receive) {
	static unsigned char piece[64 << 10];
	double start = now();
	for (long done = 0; done < bytes;) {
		long want = bytes - done < (long)sizeof piece ? bytes - done : (long)sizeof piece;
		ssize_t n;
		if (receive) {
			n = read(sock, piece, want);
			for (ssize_t i = 0; i < n; i++)
				if (piece[i] != pattern(done + i))
					die("byte %ld is wrong", done + i);
		} else {
			for (long i = 0; i < want; i++)
				piece[i] = pattern(done + i);
			n = write(sock, piece, want);
		}
		if (n <= 0)
			die("stream after %ld of %ld bytes", done, bytes);
		done += n;
	}
	/* What was sent has arrived when the host says so. */
	char said;
	if (!receive && read(sock, &said, 1) != 1)
		die("no acknowledgement");
	return now() - start;
}

static void udp(int n) {
	struct sockaddr_in address = host(n);
	int sock = socket(AF_INET, SOCK_DGRAM, 0);
	char said[64] = "";
	/* A datagram may be lost: say it again until there is an answer. */
	struct timeval patience = {.tv_usec = 500000};
	setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	do
		sendto(sock, "marco", 5, 0, (void *)&address, sizeof address);
	while (recv(sock, said, sizeof said - 1, 0) < 0);
	printf("udp %s\n", said);
	close(sock);
}

/* Every link: a datagram there and back, a stream each way. */
static void net(void) {
	long links = word("links", 1), bytes = word("bytes", 1 << 20);
	for (int n = 0; n < links; n++) {
		bring_up(n);
		udp(n);
		int sock = dial(n);
		printf("link %d received %ld in %.3f\n", n, bytes, transfer(sock, bytes, 1));
		printf("link %d sent %ld in %.3f\n", n, bytes, transfer(sock, bytes, 0));
		close(sock);
	}
}

/* ---- memory */

/* A figure of /proc/meminfo, in KiB. */
static long meminfo(const char *name) {
	char line[128];
	long value = -1;
	FILE *f = fopen("/proc/meminfo", "r");
	while (f && fgets(line, sizeof line, f))
		if (!strncmp(line, name, strlen(name)))
			value = atol(line + strlen(name) + 1);
	if (f)
		fclose(f);
	return value;
}

/* Waits until a file's first byte, which the host writes, is `what`. */
static void wait_for_host(char what) {
	static char page[4096] __attribute__((aligned(4096)));
	do {
		usleep(20000);
		int fd = open("/dev/vda", O_RDONLY | O_DIRECT);
		if (fd < 0 || pread(fd, page, sizeof page, 0) != sizeof page)
			die("read what the host says");
		close(fd);
	} while (page[0] != what);
}

/* A piece of every MiB of memory to a file of the share and back, past the page cache: to
 * where it was, and to memory that the guest has always had. */
static void share(char *memory, size_t size) {
	static char piece[4096] __attribute__((aligned(4096)));
	int fd = open("/share/data", O_RDWR | O_CREAT | O_DIRECT, 0644);
	if (fd < 0)
		die("open a file of the share");
	for (size_t at = 0; at < size; at += 1 << 20) {
		if (pwrite(fd, memory + at, sizeof piece, at) != sizeof piece ||
		    pread(fd, piece, sizeof piece, at) != sizeof piece)
			die("write and read the share at %zu", at);
		if (memcmp(piece, memory + at, sizeof piece))
			die("the share at %zu is wrong", at);
		memset(memory + at, 0, sizeof piece);
		if (pread(fd, memory + at, sizeof piece, at) != sizeof piece)
			die("read the share at %zu", at);
		if (memcmp(piece, memory + at, sizeof piece))
			die("the share at %zu came back wrong", at);
	}
	close(fd);
}

/* Grows by `more` KiB, uses it all, and shrinks. */
static void memory(void) {
	long before = meminfo("MemTotal"), more = word("more", 0);
	int shares = word("share", 0);
	if (shares && (mkdir("/share", 0755) < 0 || mount("share", "/share", "virtiofs", 0, NULL) < 0))
		die("mount the share");
	printf("boots with %ld KiB\n", before);
	/* A page's own books take 1/64 of it. */
	while (meminfo("MemTotal") < before + more - more / 50)
		usleep(20000);
	printf("grown to %ld KiB\n", meminfo("MemTotal"));
	/* All of it, and of what was there before, if it is told so. */
	size_t size = (size_t)word("use", more) << 10;
	unsigned long *words = mmap(NULL, size, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (words == MAP_FAILED)
		die("have %zu bytes", size);
	for (size_t i = 0; i < size / sizeof *words; i += 64)
		words[i] = i * 0x9e3779b97f4a7c15;
	for (size_t i = 0; i < size / sizeof *words; i += 64)
		if (words[i] != i * 0x9e3779b97f4a7c15)
			die("word %zu is wrong", i);
	if (shares)
		share((char *)words, size);
	puts("used it");
	wait_for_host('f');
	/* In a clone it is another host that has kept it. */
	for (size_t i = 0; i < size / sizeof *words; i += 64)
		if (words[i] != i * 0x9e3779b97f4a7c15)
			die("word %zu is wrong now", i);
	munmap(words, size);
	puts("let go");
	while (meminfo("MemTotal") > before + more / 50)
		usleep(20000);
	printf("shrunk to %ld KiB\n", meminfo("MemTotal"));
	if (shares) {
		static char few[2 << 20] __attribute__((aligned(4096)));
		strcpy(few, "still here");
		share(few, sizeof few);
	}
	wait_for_host('e');
}

/* ---- processors */

static void cpus(void) {
	printf("%ld of %ld online\n", sysconf(_SC_NPROCESSORS_ONLN), sysconf(_SC_NPROCESSORS_CONF));
	wait_for_host('w');
	for (double start = now(); now() < start + 1;)
		;
	puts("worked");
	wait_for_host('g');
	for (long n = word("from", 1); n < sysconf(_SC_NPROCESSORS_CONF); n++) {
		char path[64];
		snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%ld/online", n);
		int fd = open(path, O_WRONLY);
		if (fd < 0 || write(fd, "1", 1) != 1)
			die("bring processor %ld online", n);
		close(fd);
	}
	printf("grown to %ld\n", sysconf(_SC_NPROCESSORS_ONLN));
	for (long n = 0; n < sysconf(_SC_NPROCESSORS_CONF); n++) {
		cpu_set_t set;
		CPU_ZERO(&set);
		CPU_SET(n, &set);
		if (sched_setaffinity(0, sizeof set, &set) < 0 || sched_getcpu() != n)
			die("run on processor %ld", n);
	}
	puts("ran on all");
}

/* Whether the balloon's driver reports free pages, and then nothing for ever. */
static void balloon(void) {
	/* Each feature of a device is a digit. */
	char bits[80] = "";
	for (int n = 0; n < 32 && !bits[0]; n++) {
		char path[80], id[16] = "";
		snprintf(path, sizeof path, "/sys/bus/virtio/devices/virtio%d/device", n);
		FILE *f = fopen(path, "r");
		if (!f)
			continue;
		(void)!fgets(id, sizeof id, f);
		fclose(f);
		if (strtol(id, NULL, 0) != 5)
			continue;
		snprintf(path, sizeof path, "/sys/bus/virtio/devices/virtio%d/features", n);
		f = fopen(path, "r");
		(void)!fgets(bits, sizeof bits, f);
		fclose(f);
	}
	printf("balloon with%s reporting\n", bits[5] == '1' ? "" : "out");
	for (;;)
		pause();
}

/* ---- disks */

/* The device with a serial number: its letter. */
static char disk(const char *wanted) {
	for (char c = 'a'; c <= 'z'; c++) {
		char path[64], serial[32] = "";
		snprintf(path, sizeof path, "/sys/block/vd%c/serial", c);
		FILE *f = fopen(path, "r");
		if (!f)
			continue;
		(void)!fread(serial, 1, sizeof serial - 1, f);
		fclose(f);
		if (!strcmp(serial, wanted))
			return c;
	}
	die("no disk %s", wanted);
	return 0;
}

static long block_number(char c, const char *name) {
	char path[64];
	long value = -1;
	snprintf(path, sizeof path, "/sys/block/vd%c/%s", c, name);
	FILE *f = fopen(path, "r");
	if (f && fscanf(f, "%ld", &value) != 1)
		value = -1;
	if (f)
		fclose(f);
	return value;
}

static int queues(char c) {
	int n = 0;
	for (;; n++) {
		char path[64];
		snprintf(path, sizeof path, "/sys/block/vd%c/mq/%d", c, n);
		if (access(path, F_OK) < 0)
			return n;
	}
}

static int open_disk(char c, int mode) {
	char path[16];
	snprintf(path, sizeof path, "/dev/vd%c", c);
	int fd = open(path, mode);
	if (fd < 0)
		die("open %s", path);
	return fd;
}

/* Writes `bytes` of the pattern, past the page cache, or reads and checks them. */
static double direct(int fd, long bytes, int reading) {
	static unsigned char piece[64 << 10] __attribute__((aligned(4096)));
	double start = now();
	for (long at = 0; at < bytes; at += sizeof piece) {
		if (!reading)
			for (size_t i = 0; i < sizeof piece; i++)
				piece[i] = pattern(at + i);
		ssize_t n = reading ? pread(fd, piece, sizeof piece, at)
				    : pwrite(fd, piece, sizeof piece, at);
		if (n != sizeof piece)
			die("%s at %ld", reading ? "read" : "write", at);
		if (reading)
			for (size_t i = 0; i < sizeof piece; i++)
				if (piece[i] != pattern(at + i))
					die("byte %ld is wrong", at + (long)i);
	}
	return now() - start;
}

/* A disk `data` to write, to read and to discard; others as they are there. */
static void disks(void) {
	long bytes = word("bytes", 1 << 20);
	char data = word("first", 0) ? 'b' : disk("data");
	printf("data has %d queues, %ld sectors, discards %d\n", queues(data),
	       block_number(data, "size"), block_number(data, "queue/discard_max_bytes") > 0);
	int fd = open_disk(data, O_RDWR | O_DIRECT);
	printf("written in %.3f\n", direct(fd, bytes, 0));
	printf("read in %.3f\n", direct(fd, bytes, 1));
	if (fsync(fd) < 0)
		die("flush");
	puts("flushed");
	wait_for_host('d');
	unsigned long range[2] = {0, bytes / 2};
	if (ioctl(fd, BLKDISCARD, range) < 0)
		die("discard");
	puts("discarded");
	wait_for_host('m');
	if (word("fixed", 0)) {
		char fixed = disk("fixed");
		int ro = open_disk(fixed, O_RDONLY | O_DIRECT);
		direct(ro, bytes, 1);
		char path[16];
		snprintf(path, sizeof path, "/dev/vd%c", fixed);
		int rw = open(path, O_RDWR);
		printf("fixed is read-only %ld, writes %d\n", block_number(fixed, "ro"),
		       rw >= 0 && pwrite(rw, "W", 1, 0) == 1 && fsync(rw) == 0);
	}
	if (word("slow", 0)) {
		int slow = open_disk(disk("slow"), O_RDWR | O_DIRECT);
		long some = word("slow", 0);
		printf("slow wrote %ld in %.3f\n", some, direct(slow, some, 0));
		printf("free wrote %ld in %.3f\n", some, direct(fd, some, 0));
	}
}

int main(void) {
	const char *test = getenv("test");
	if (!test)
		test = "hello";
	setvbuf(stdout, NULL, _IOLBF, 0);
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	if (!strcmp(test, "hello"))
		printf("hello, %ld online\n", sysconf(_SC_NPROCESSORS_ONLN));
	else if (!strcmp(test, "net"))
		net();
	else if (!strcmp(test, "memory"))
		memory();
	else if (!strcmp(test, "cpus"))
		cpus();
	else if (!strcmp(test, "balloon"))
		balloon();
	else if (!strcmp(test, "disks"))
		disks();
	else
		die("no test %s", test);
	puts("done");
	fflush(stdout);
	tcdrain(1);
	reboot(RB_AUTOBOOT);
	for (;;)
		pause();
}
