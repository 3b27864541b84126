"""10,000 requests to an HTTP server on loopback, eight at a time: each must be answered
with 200 and the same body."""

import http.client
import sys
import threading

REQUESTS, CLIENTS = 10_000, 8
port = int(sys.argv[1])


def get():
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/")
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


expected = get()
assert expected[0] == 200 and expected[1], expected
wrong = []


def client():
    for _ in range(REQUESTS // CLIENTS):
        try:
            answer = get()
        except OSError as e:
            answer = repr(e)
        if answer != expected:
            wrong.append(answer)


clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
for it in clients:
    it.start()
for it in clients:
    it.join()
print(f"{REQUESTS} requests, {len(wrong)} not answered as they should be", *wrong[:3])
sys.exit(bool(wrong))
