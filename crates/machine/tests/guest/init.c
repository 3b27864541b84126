/* The tests' stand-in for the agent: init of a guest that does what the kernel
 * command line's `test=` says. Words the kernel does not know reach init as
 * environment. */
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/reboot.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void restart(void) {
	syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
		LINUX_REBOOT_CMD_RESTART, NULL);
}

static int vsock(void) { return socket(AF_VSOCK, SOCK_STREAM, 0); }

static void say(const char *line) {
	struct sockaddr_vm host = {.svm_family = AF_VSOCK,
				   .svm_cid = VMADDR_CID_HOST,
				   .svm_port = 1024};
	int fd = vsock();
	if (connect(fd, (struct sockaddr *)&host, sizeof host) < 0) {
		perror("connect to the host");
		return;
	}
	(void)!write(fd, line, strlen(line));
	close(fd);
}

/* "first sector's first byte, writable?" of every disk, by serial. */
static void disks(int out) {
	for (char c = 'a'; c <= 'z'; c++) {
		char path[64], serial[32] = "";
		snprintf(path, sizeof path, "/sys/block/vd%c/serial", c);
		FILE *f = fopen(path, "r");
		if (!f)
			break;
		(void)!fread(serial, 1, sizeof serial - 1, f);
		fclose(f);
		if (!*serial)
			continue;
		snprintf(path, sizeof path, "/dev/vd%c", c);
		/* A read-only disk opens for writing, and refuses to. */
		int fd = open(path, O_RDWR);
		/* Its node comes after what sysfs says of it. */
		for (int n = 0; fd < 0 && errno == ENOENT && n < 5000; n++) {
			usleep(1000);
			fd = open(path, O_RDWR);
		}
		char first = '?';
		(void)!pread(fd, &first, 1, 0);
		int written = pwrite(fd, "W", 1, 0) == 1 && fsync(fd) == 0;
		dprintf(out, "%s %c %d\n", serial, first, written);
		close(fd);
	}
}

static void put(const char *path, const char *text) {
	int fd = open(path, O_WRONLY);
	(void)!write(fd, text, strlen(text));
	close(fd);
}

/* Lets go of the disks that have no size, and takes them again. */
static void probe(void) {
	glob_t found;
	if (glob("/sys/block/vd*", 0, NULL, &found))
		return;
	for (size_t n = 0; n < found.gl_pathc; n++) {
		char path[256], size[32] = "", device[256] = "";
		snprintf(path, sizeof path, "%s/size", found.gl_pathv[n]);
		FILE *f = fopen(path, "r");
		if (f) {
			(void)!fgets(size, sizeof size, f);
			fclose(f);
		}
		snprintf(path, sizeof path, "%s/device", found.gl_pathv[n]);
		if (strcmp(size, "0\n") || readlink(path, device, sizeof device - 1) < 0)
			continue;
		put("/sys/bus/virtio/drivers/virtio_blk/unbind", strrchr(device, '/') + 1);
		put("/sys/bus/virtio/drivers/virtio_blk/bind", strrchr(device, '/') + 1);
	}
	globfree(&found);
}

/* Writes into the shared directory, and reads from it. */
static void share(int out) {
	mkdir("/mnt", 0755);
	if (mount("volumes", "/mnt", "virtiofs", 0, NULL) < 0) {
		dprintf(out, "mount: %m\n");
		return;
	}
	char text[64] = "";
	FILE *f = fopen("/mnt/0/file", "r");
	if (f) {
		(void)!fread(text, 1, sizeof text - 1, f);
		fclose(f);
	}
	f = fopen("/mnt/0/new", "w");
	dprintf(out, "%s ro:%s", text, f ? "written" : strerror(errno));
	f = fopen("/mnt/1/new", "w");
	if (f) {
		fputs("from the guest", f);
		fclose(f);
	}
	dprintf(out, " rw:%s\n", f ? "written" : strerror(errno));
}

static void serve(int listener) {
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		char byte = 0;
		while (read(fd, &byte, 1) == 1) {
			if (byte == 'd')
				disks(fd);
			else if (byte == 'p')
				probe();
			else if (byte == 's')
				share(fd);
			else if (byte == 'r')
				restart();
			else if (byte == 'c')
				dprintf(fd, "%ld\n", sysconf(_SC_NPROCESSORS_ONLN));
			else
				(void)!write(fd, &byte, 1);
		}
		close(fd);
	}
}

int main(void) {
	const char *test = getenv("test");
	if (!test)
		test = "serve";
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	if (!strcmp(test, "fatal")) {
		puts("walnut-agent: fatal: the test wants it so");
		return 1;
	}
	if (!strcmp(test, "panic"))
		return 7;
	if (!strcmp(test, "silent"))
		for (;;)
			pause();
	if (!strcmp(test, "flood"))
		for (;;)
			puts("the same line again and again");
	if (!strcmp(test, "restart"))
		restart();
	if (!strcmp(test, "liar")) {
		say("HTTP/1.1 200 OK\r\nendless endless endless endless endless endless endless");
		pause();
	}
	if (!strcmp(test, "mute")) {
		say("walnut-");
		pause();
	}
	struct sockaddr_vm any = {.svm_family = AF_VSOCK,
				  .svm_cid = VMADDR_CID_ANY,
				  .svm_port = 1024};
	int listener = vsock();
	bind(listener, (struct sockaddr *)&any, sizeof any);
	listen(listener, 16);
	say("walnut-agent 1\n");
	serve(listener);
}
