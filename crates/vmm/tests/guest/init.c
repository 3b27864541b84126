/* Init of the test guests: does what the kernel command line's `test=` says. */
#include "plug.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

/* "serial, first byte, writable?" of every disk. */
static void disks(void) {
	for (char c = 'a'; c <= 'z'; c++) {
		char path[64], serial[32] = "";
		snprintf(path, sizeof path, "/sys/block/vd%c/serial", c);
		FILE *f = fopen(path, "r");
		if (!f)
			break;
		(void)!fread(serial, 1, sizeof serial - 1, f);
		fclose(f);
		snprintf(path, sizeof path, "/dev/vd%c", c);
		/* A read-only disk opens for writing, and refuses to. */
		int fd = open(path, O_RDWR);
		char first = '?';
		(void)!pread(fd, &first, 1, 0);
		int written = pwrite(fd, "W", 1, 0) == 1 && fsync(fd) == 0;
		printf("%s %c %d\n", serial, first, written);
		close(fd);
	}
}

/* Counts for ever, a line a step, each with what should differ between clones and
   what should go on: random bytes, a timer, a disk that keeps the count. */
static void ticks(void) {
	int disk = open("/dev/vda", O_RDWR | O_SYNC);
	for (unsigned long n = 0;; n++) {
		unsigned long random = 0, kept = 0;
		(void)!getrandom(&random, sizeof random, 0);
		if (disk >= 0) {
			(void)!pwrite(disk, &n, sizeof n, 512);
			posix_fadvise(disk, 0, 0, POSIX_FADV_DONTNEED);
			(void)!pread(disk, &kept, sizeof kept, 512);
		}
		printf("tick %lu random=%016lx disk=%d\n", n, random, disk >= 0 && kept == n);
		fflush(stdout);
		usleep(20000);
	}
}

int main(void) {
	const char *test = getenv("test");
	if (!test)
		test = "hello";
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	if (!strcmp(test, "hello")) {
		puts("hello from init");
		printf("vcpus %ld\n", sysconf(_SC_NPROCESSORS_ONLN));
	}
	if (!strcmp(test, "disks"))
		disks();
	if (!strcmp(test, "ticks"))
		ticks();
	if (!strcmp(test, "plug"))
		plug();
	if (!strcmp(test, "eject"))
		eject();
	if (!strcmp(test, "busy"))
		busy();
	fflush(stdout);
	tcdrain(1);
	reboot(RB_AUTOBOOT);
	for (;;)
		pause();
}
