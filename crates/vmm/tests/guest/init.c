/* Init of the test guests: does what the kernel command line's `test=` says. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

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
		fflush(stdout);
	}
	reboot(RB_AUTOBOOT);
	for (;;)
		pause();
}
