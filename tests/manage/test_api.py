"""The control API on the wire: routes, bodies, errors. Raw sockets where a client library would be too polite."""

import json
import os
import socket
import subprocess
import unittest

import support
from clients import exchange


class ApiCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)

    def raw(self, data: bytes) -> bytes:
        return exchange(self.daemon.socket, data)

    def tearDown(self):
        self.assertNotIn("Traceback", self.daemon.log()[-3000:])
        self.assertEqual(self.daemon.api("GET", "/healthz"), (200, b'{"status": "ok"}\n'))


class Routes(ApiCase):
    def test_documents(self):
        status, body = self.daemon.api("GET", "/version")
        self.assertEqual((status, set(json.loads(body))), (200, {"faasd", "python", "runtime", "kernel"}))
        self.assertEqual(self.daemon.api("GET", "/functions"), (200, b'{"functions": []}\n'))

    def test_errors_are_one_line_of_json(self):
        for method, path, status, words in (
                ("GET", "/", 404, "no such resource"), ("GET", "/nope", 404, "no such resource"),
                ("GET", "/functions/a/b/c", 404, "no such resource"), ("GET", "/functions/", 200, "functions"),
                ("GET", "/functions/none", 404, "no function 'none'"),
                ("DELETE", "/functions/none", 404, "no function 'none'"),
                ("GET", "/functions/none/logs", 404, "no function 'none'"),
                ("GET", "/functions/Bad_Name", 400, "bad function name"),
                ("POST", "/functions/-a", 400, "bad function name"),
                ("POST", "/functions/" + "a" * 64, 400, "bad function name"),
                ("GET", "/functions/%2e%2e", 400, "bad function name"),
                ("GET", "/functions/..%2f..%2fetc", 400, "bad function name"),
                ("DELETE", "/functions", 405, "GET is"), ("POST", "/healthz", 405, "GET is"),
                ("PUT", "/functions/f", 501, "Unsupported method"), ("OPTIONS", "/functions/f", 405, "GET or"),
                ("POST", "/functions/f?memory", 400, "bad query"), ("POST", "/functions/f?x=1", 400, "unknown option")):
            with self.subTest(f"{method} {path}"):
                got, body = self.daemon.api(method, path)
                self.assertEqual(got, status, body)
                text = json.dumps(json.loads(body))
                self.assertIn(words, text)
                self.assertEqual(body.count(b"\n"), 1)

    def test_malformed_requests(self):
        post = b"POST /functions/f HTTP/1.1\r\nContent-Type: application/x-tar\r\n"
        get, chunked = b"GET /healthz HTTP/1.1\r\n", b"Transfer-Encoding: chunked\r\n"
        for data, status in (
                (b"nonsense\r\n\r\n", b"400"), (b"GET / HTTP/9.9\r\n\r\n", b"505"), (b"GET /\r\n\r\n", b"400"),
                (b"GET / HTTP/0.9\r\n\r\n", b"400"), (b"\r\n\r\n", b"400"), (b"GET", b"400"), (get, b"400"),
                (b"GET\t/healthz HTTP/1.1\r\n\r\n", b"400"), (b"GET /healthz\xa0x HTTP/1.1\r\n\r\n", b"400"),
                (b"GET http://faasd/healthz HTTP/1.1\r\n\r\n", b"400"), (b"OPTIONS * HTTP/1.1\r\n\r\n", b"400"),
                (b"GET /\xff HTTP/1.1\r\n\r\n", b"404"),
                (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n", b"431"),
                (b"GET / HTTP/1.1\r\nX: " + b"y" * 65_536 + b"\r\n\r\n", b"431"),
                (b"GET / HTTP/1.1\r\n" + (b"X: " + b"y" * 2048 + b"\r\n") * 33 + b"\r\n", b"431"),
                (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
                (get + b"Broken\r\n\r\n", b"400"), (get + b"X : y\r\n\r\n", b"400"),
                (get + b"X: y\r\n z\r\n\r\n", b"400"), (get + b"X: y\rOrigin: z\r\n\r\n", b"400"),
                (get + b"X: \0\r\n\r\n", b"400"), (get + b": y\r\n\r\n", b"400"),
                (post + b"\r\n", b"411"),
                (post + b"Content-Length: -1\r\n\r\n", b"400"), (post + b"Content-Length: +1\r\n\r\nx", b"400"),
                (post + b"Content-Length: 1, 1\r\n\r\nx", b"400"), (post + b"Content-Length: \r\n\r\nx", b"400"),
                (post + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx", b"400"),
                (post + b"Content-Length: 3\r\n" + chunked + b"\r\n0\r\n\r\n", b"400"),
                (post + chunked + chunked + b"\r\n0\r\n\r\n", b"501"),
                (post + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", b"501"),
                (post + b"Transfer-Encoding: identity\r\n\r\n", b"501"),
                (post.replace(b"1.1", b"1.0") + chunked + b"\r\n0\r\n\r\n", b"400"),
                (post + b"Content-Length: 0\r\n\r\n", b"400"),
                (post + b"Content-Length: 10\r\n\r\nabc", b"400"),
                (post + chunked + b"\r\nzz\r\n", b"400"), (post + chunked + b"\r\n-3\r\nabc\r\n", b"400"),
                (post + chunked + b"\r\n3;" + b"x" * 2000 + b"\r\nabc\r\n0\r\n\r\n", b"400"),
                (post + chunked + b"\r\n" + b"1" * 16 + b"\r\n", b"400"),
                (post + chunked + b"\r\n3\r\nabcd\r\n", b"400"),
                (post + chunked + b"\r\n3\r\nabc\r\n", b"400"),
                (post + chunked + b"\r\n0\r\n\r\n", b"400"),
                (post + chunked + b"\r\n0\r\n" + b"X: y\r\n" * 100 + b"\r\n", b"400"),
                (post + chunked + b"\r\n0\r\nbroken\r\n\r\n", b"400")):
            with self.subTest(data[:60]):
                answer = self.raw(data)
                self.assertEqual(answer.split(b" ")[1][:3], status, answer)
                document = json.loads(answer.partition(b"\r\n\r\n")[2])
                self.assertNotIn("\n", document["error"])
        self.assertEqual(list((self.daemon.state_dir / "tmp").iterdir()), [])
        self.assertEqual(self.daemon.api("GET", "/functions"), (200, b'{"functions": []}\n'))

    def test_connection_is_kept(self):
        answer = self.raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        self.assertEqual(answer.count(b"HTTP/1.1 200 OK"), 3)

    def test_client_that_leaves_in_the_middle(self):
        for data in (b"", b"GET", b"GET /functions HTTP/1.1\r\n",
                     b"POST /functions/f HTTP/1.1\r\nContent-Length: 9\r\n\r\n"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(self.daemon.socket))
                client.sendall(data)


class Deploy(ApiCase):
    def test_curl_deploys_too(self):
        """With a length, chunked, and with Expect: 100-continue: what curl does by itself, but for the Content-Type."""
        image = support.handler_image()
        for extra, status in ((["--data-binary", "@-"], 201), (["--upload-file", "-", "--request", "POST"], 200),
                              (["--data-binary", "@-", "--header", "Expect: 100-continue"], 200)):
            with self.subTest(extra):
                out = subprocess.run(["curl", "-sS", "--unix-socket", self.daemon.socket, *extra,
                                      "-w", "\n%{http_code}", "-H", "Content-Type: application/octet-stream",
                                      "http://faasd/functions/f?env=A%3D1&env=B%3D2"],
                                     input=image, capture_output=True, check=True).stdout
                body, _, code = out.rpartition(b"\n")
                self.assertEqual(int(code), status, body)
                document = json.loads(body)
                self.assertEqual((document["address"], document["port"]), ("10.0.0.10", 80))
                self.assertEqual(document["options"]["env"], ["A=1", "B=2"])
        self.assertEqual(support.get("10.0.0.10")[0], 200)

    def test_versions_whose_images_say_much(self):
        """Another thread than the loop's reads it, once for each image; here they say a megabyte."""
        labels = {f"l{number}": "\x01" * 7 for number in range(15_000)}
        self.daemon.deploy("v", support.handler_image(Labels=labels))
        for memory in ("100m", "101m", "102m", "103m"):
            self.daemon.set("v", "--memory", memory)
        loop = f"{self.daemon.process.pid}/task/{self.daemon.process.pid}"
        before = support.cpu_ticks(loop)
        for _ in range(100):
            self.assertEqual(self.daemon.versions("v"), [5, 4, 3, 2, 1])
        self.assertLess(support.cpu_ticks(loop) - before, os.sysconf("SC_CLK_TCK") // 2)

    def test_logs_are_streamed_as_text(self):
        self.daemon.deploy("g")
        answer = self.raw(b"GET /functions/g/logs?tail=1 HTTP/1.1\r\nConnection: close\r\n\r\n")
        self.assertIn(b"Transfer-Encoding: chunked", answer)
        self.assertTrue(answer.endswith(b"\r\n0\r\n\r\n"))
        for query in ("tail=0", "tail=x", "since=yesterday"):
            self.assertEqual(self.daemon.api("GET", f"/functions/g/logs?{query}")[0], 400)


if __name__ == "__main__":
    unittest.main()
