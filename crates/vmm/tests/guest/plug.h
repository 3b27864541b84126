#define _GNU_SOURCE
/* Devices that come and go: says what has come, uses it, and says what has gone.
   Nothing here asks the kernel to look for devices. */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define VIRTIO "/sys/bus/virtio/devices"
#define DEVICES 512

static void say(const char *what, const char *name, const char *more) {
	printf("%s %s %s\n", what, name, more);
	fflush(stdout);
}

static void first_line(const char *path, char *line, size_t size) {
	FILE *f = fopen(path, "r");
	line[0] = 0;
	if (!f)
		return;
	if (!fgets(line, size, f))
		line[0] = 0;
	fclose(f);
	line[strcspn(line, "\n")] = 0;
}

/* The name of what is in a directory; false if nothing is. */
static int child(const char *path, char *name, size_t size) {
	DIR *dir = opendir(path);
	int found = 0;
	if (!dir)
		return 0;
	for (struct dirent *entry; !found && (entry = readdir(dir));)
		if (entry->d_name[0] != '.') {
			snprintf(name, size, "%s", entry->d_name);
			found = 1;
		}
	closedir(dir);
	return found;
}

/* Each returns false if the device is not ready yet. */
static int use_disk(const char *device) {
	char path[PATH_MAX], disk[256], serial[64], first = '?', more[64];
	snprintf(path, sizeof path, VIRTIO "/%s/block", device);
	if (!child(path, disk, sizeof disk))
		return 0;
	/* The kernel shows a disk before the files that describe it. */
	snprintf(path, sizeof path, "/sys/block/%s/serial", disk);
	if (access(path, F_OK))
		return 0;
	first_line(path, serial, sizeof serial);
	snprintf(path, sizeof path, "/dev/%s", disk);
	int fd = open(path, O_RDWR);
	if (fd < 0)
		return 0;
	(void)!pread(fd, &first, 1, 0);
	int written = pwrite(fd, "W", 1, 0) == 1 && fsync(fd) == 0;
	close(fd);
	snprintf(more, sizeof more, "%c %d", first, written);
	say("disk", serial, more);
	return 1;
}

/* A datagram to everybody on the link. */
static int use_network(const char *device) {
	char path[PATH_MAX], link[256];
	snprintf(path, sizeof path, VIRTIO "/%s/net", device);
	if (!child(path, link, sizeof link))
		return 0;
	snprintf(path, sizeof path, "/sys/class/net/%s/address", link);
	if (access(path, F_OK))
		return 0;
	char mac[64];
	first_line(path, mac, sizeof mac);
	int fd = socket(AF_INET, SOCK_DGRAM, 0), yes = 1;
	struct ifreq request = {0};
	struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
	strncpy(request.ifr_name, link, IFNAMSIZ - 1);
	address->sin_family = AF_INET;
	inet_pton(AF_INET, "10.99.0.2", &address->sin_addr);
	int failed = ioctl(fd, SIOCSIFADDR, &request);
	request.ifr_flags = IFF_UP;
	failed |= ioctl(fd, SIOCSIFFLAGS, &request);
	struct sockaddr_in all = {.sin_family = AF_INET, .sin_port = htons(9)};
	inet_pton(AF_INET, "10.255.255.255", &all.sin_addr);
	setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &yes, sizeof yes);
	failed |= sendto(fd, "walnut", 6, 0, (void *)&all, sizeof all) != 6;
	close(fd);
	say("network", mac, failed ? strerror(errno) : "sent");
	return 1;
}

static int use_share(const char *device) {
	char path[PATH_MAX], line[64];
	snprintf(path, sizeof path, VIRTIO "/%s/driver", device);
	mkdir("/mnt", 0755);
	if (access(path, F_OK) || mount("share", "/mnt", "virtiofs", 0, NULL))
		return 0;
	first_line("/mnt/greeting", line, sizeof line);
	umount("/mnt");
	say("share", "share", line);
	return 1;
}

static int use(const char *device) {
	char path[PATH_MAX], id[64];
	snprintf(path, sizeof path, VIRTIO "/%s/device", device);
	first_line(path, id, sizeof id);
	switch (strtol(id, NULL, 16)) {
	case 1:
		return use_network(device);
	case 2:
		return use_disk(device);
	case 26:
		return use_share(device);
	default:
		return 1;
	}
}

static void plug(void) {
	static char known[DEVICES];
	say("ready", "for", "devices");
	for (;; usleep(2000)) {
		for (int n = 0; n < DEVICES; n++) {
			char path[PATH_MAX], device[32];
			snprintf(device, sizeof device, "virtio%d", n);
			snprintf(path, sizeof path, VIRTIO "/%s", device);
			int there = access(path, F_OK) == 0;
			if (there && !known[n])
				known[n] = use(device);
			else if (!there && known[n]) {
				known[n] = 0;
				say("gone", device, "");
			}
		}
	}
}

/* A guest without a driver for hot-plug, which ejects every slot all the time. */
static void eject(void) {
	char byte;
	ioperm(0xae00, 12, 1);
	for (int n = 0; n < 100; n++)
		outl(0xffffffff, 0xae08);
	/* Of no width that there is. */
	outb(0xff, 0xae08);
	outw(0xffff, 0xae0a);
	int narrow = inb(0xae04);
	int fd = open("/dev/vda", O_RDONLY);
	int well = pread(fd, &byte, 1, 0) == 1 && narrow == 0xff;
	say("ejects", "and reads", well ? "well" : "badly");
	for (;; usleep(100))
		outl(0xffffffff, 0xae08);
}

/* Reads and writes each new disk until that fails. */
static void busy(void) {
	static char page[4096] __attribute__((aligned(4096)));
	say("ready", "for", "devices");
	for (;;) {
		int fd = open("/dev/vda", O_RDWR | O_DIRECT | O_EXCL);
		if (fd < 0) {
			usleep(2000);
			continue;
		}
		for (long n = 0;; n++) {
			off_t at = n % 128 * sizeof page;
			if (pwrite(fd, page, sizeof page, at) != sizeof page ||
			    pread(fd, page, sizeof page, at) != sizeof page)
				break;
			if (n == 10)
				say("busy", "with", "vda");
		}
		say("broke off", "vda", strerror(errno));
		close(fd);
	}
}
