/* What the network bench talks to: answers each datagram and each byte, takes a
 * stream or sends one, as the connection's first byte says. One child a connection. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PORT = 5000, PIECE = 64 << 10 };

static void check(int result, const char *what) {
	if (result < 0) {
		perror(what);
		exit(1);
	}
}

static int listen_on(int type) {
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	int sock = socket(AF_INET, type | SOCK_CLOEXEC, 0), one = 1;
	check(sock, "socket");
	check(setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one), "SO_REUSEADDR");
	check(bind(sock, (struct sockaddr *)&at, sizeof at), "bind");
	return sock;
}

/* A child that ends with its parent. */
static int child(void) {
	int pid = fork();
	check(pid, "fork");
	if (pid == 0)
		check(prctl(PR_SET_PDEATHSIG, SIGKILL), "PR_SET_PDEATHSIG");
	return pid;
}

/* A datagram of one byte is answered; longer ones are counted, and "?" asks how many
 * there have been. */
static void datagrams(void) {
	static char piece[PIECE];
	struct sockaddr_in from;
	uint64_t count = 0;
	for (int sock = listen_on(SOCK_DGRAM);;) {
		socklen_t len = sizeof from;
		ssize_t got = recvfrom(sock, piece, sizeof piece, 0, (struct sockaddr *)&from, &len);
		if (got == 1 && piece[0] == '?') {
			sendto(sock, &count, sizeof count, 0, (struct sockaddr *)&from, len);
		} else if (got == 1) {
			sendto(sock, piece, 1, 0, (struct sockaddr *)&from, len);
		} else if (got > 1) {
			count++;
		}
	}
}

static void connection(int sock) {
	static char piece[PIECE];
	uint64_t bytes;
	char what;
	int one = 1;
	setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (read(sock, &what, 1) != 1)
		return;
	if (what == 'e') {
		while (read(sock, piece, 1) == 1 && write(sock, piece, 1) == 1)
			;
		return;
	}
	if (recv(sock, &bytes, sizeof bytes, MSG_WAITALL) != sizeof bytes)
		return;
	while (bytes > 0) {
		size_t most = bytes < PIECE ? bytes : PIECE;
		ssize_t done = what == 't' ? read(sock, piece, most) : write(sock, piece, most);
		if (done <= 0)
			return;
		bytes -= (uint64_t)done;
	}
	if (what == 't')
		(void)!write(sock, "!", 1);
}

int main(void) {
	/* Children are nobody's to wait for. */
	signal(SIGCHLD, SIG_IGN);
	int sock = listen_on(SOCK_STREAM);
	check(listen(sock, 64), "listen");
	if (child() == 0)
		datagrams();
	for (;;) {
		int peer = accept4(sock, NULL, NULL, SOCK_CLOEXEC);
		if (peer < 0)
			continue;
		if (child() == 0) {
			connection(peer);
			_exit(0);
		}
		close(peer);
	}
}
