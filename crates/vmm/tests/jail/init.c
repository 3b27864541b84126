/* Init of the guest of tests/jail.rs: uses every device, for ever, a process each. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static void put(const char *path, const char *text) {
	int fd = open(path, O_WRONLY | O_CREAT, 0644);
	(void)!write(fd, text, strlen(text));
	close(fd);
}

static void disk(const char *path) {
	static char buffer[4096] __attribute__((aligned(4096)));
	int fd = open(path, O_RDWR | O_DIRECT);
	uint64_t range[2] = {0, 4096};
	(void)!pread(fd, buffer, sizeof buffer, 4096);
	(void)!pwrite(fd, buffer, sizeof buffer, 8192);
	fsync(fd);
	ioctl(fd, BLKDISCARD, range);
	ioctl(fd, BLKZEROOUT, range);
	close(fd);
}

/* Sends, ends one direction, hears what comes back. */
static void vsock_out(void) {
	struct sockaddr_vm to = {.svm_family = AF_VSOCK, .svm_cid = 2, .svm_port = 5000};
	char buffer[4096] = "";
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (!connect(fd, (struct sockaddr *)&to, sizeof to)) {
		(void)!write(fd, buffer, sizeof buffer);
		shutdown(fd, SHUT_WR);
		while (read(fd, buffer, sizeof buffer) > 0) {
		}
	}
	close(fd);
}

static void vsock_in(int listener) {
	char buffer[4096];
	int fd = accept(listener, NULL, NULL);
	while (read(fd, buffer, sizeof buffer) > 0) {
	}
	(void)!write(fd, "bye", 3);
	close(fd);
}

static void network(void) {
	struct ifreq request = {.ifr_name = "eth0"};
	struct sockaddr_in address = {.sin_family = AF_INET};
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	inet_pton(AF_INET, "10.9.9.2", &address.sin_addr);
	memcpy(&request.ifr_addr, &address, sizeof address);
	ioctl(fd, SIOCSIFADDR, &request);
	ioctl(fd, SIOCGIFFLAGS, &request);
	request.ifr_flags |= IFF_UP;
	ioctl(fd, SIOCSIFFLAGS, &request);
	inet_pton(AF_INET, "10.9.9.1", &address.sin_addr);
	address.sin_port = htons(9);
	sendto(fd, "x", 1, 0, (struct sockaddr *)&address, sizeof address);
	close(fd);
}

/* A driver that takes no offload, which Linux's is not: it only says that it is
   ready. Then Linux's again. (virtio 1.3 §4.1.4.3: status at 0x14, driver features
   at 8, the common configuration at the BAR's start.) */
static void plain_driver(void) {
	char link[256], path[PATH_MAX + 16];
	ssize_t n = readlink("/sys/class/net/eth0/device", link, sizeof link - 1);
	if (n < 0)
		return;
	link[n] = 0;
	const char *virtio = strrchr(link, '/') + 1;
	char device[300];
	snprintf(device, sizeof device, "/sys/bus/virtio/devices/%s/..", virtio);
	char pci[PATH_MAX];
	if (!realpath(device, pci))
		return;
	const char *name = strrchr(pci, '/') + 1;
	put("/sys/bus/pci/drivers/virtio-pci/unbind", name);
	snprintf(path, sizeof path, "%s/enable", pci);
	put(path, "1");
	snprintf(path, sizeof path, "%s/resource0", pci);
	int fd = open(path, O_RDWR);
	volatile uint8_t *bar = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (bar != MAP_FAILED) {
		volatile uint32_t *select = (volatile uint32_t *)(bar + 8);
		bar[0x14] = 0;
		while (bar[0x14])
			usleep(1000);
		bar[0x14] = 1;
		bar[0x14] = 3;
		select[0] = 0;
		select[1] = 0;
		select[0] = 1;
		select[1] = 1; /* VIRTIO_F_VERSION_1 */
		bar[0x14] = 11;
		bar[0x14] = 15;
		usleep(100000);
		bar[0x14] = 0;
		while (bar[0x14])
			usleep(1000);
		munmap((void *)bar, 4096);
	}
	close(fd);
	put(path, "0");
	put("/sys/bus/pci/drivers/virtio-pci/bind", name);
}

static void memory(void) {
	size_t size = 48 << 20;
	char *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(bytes, 1, size);
	munmap(bytes, size);
	sleep(3);
}

static void entropy(void) {
	char buffer[64];
	int fd = open("/dev/hwrng", O_RDONLY);
	(void)!read(fd, buffer, sizeof buffer);
	close(fd);
}

static void files(void) {
	mkdir("/mnt", 0755);
	mount("shared", "/mnt", "virtiofs", 0, NULL);
	put("/mnt/file", "text");
	umount("/mnt");
}

#define FOREVER(...)                    \
	if (!fork())                    \
		for (;;) {              \
			__VA_ARGS__;    \
			usleep(200000); \
		}

int main(void) {
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	struct sockaddr_vm here = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = 6000};
	int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
	bind(listener, (struct sockaddr *)&here, sizeof here);
	listen(listener, 4);
	FOREVER(disk("/dev/vda"))
	FOREVER(disk("/dev/vdb"))
	FOREVER(vsock_out())
	FOREVER(vsock_in(listener))
	FOREVER(network(); sleep(1); plain_driver())
	FOREVER(memory())
	FOREVER(entropy())
	FOREVER(files())
	puts("at work");
	for (;;) {
		puts("still at work");
		sleep(1);
	}
}
