"""faas export: what it prints is what other engines take, by their own schemas, and runs under one of them."""

import importlib.util
import json
import shutil
import subprocess
import unittest

import support

SERVER = """
import os, socket
listener = socket.create_server(("", int(os.environ["PORT"])))
while True:
    client, _ = listener.accept()
    with client:
        client.recv(1000)
        body = os.environ["GREETING"]
        client.sendall(f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
"""
OPTIONS = ("--memory", "96m", "--cpus", "0.5", "--pids", "20", "--timeout", "45", "--concurrency", "40", "--share", "4",
           "--reuse", "0", "-e", "GREETING=$HOME is ${x} \"quoted\"", "--read-only", "true", "--cap-drop", "CHOWN",
           "--user", "7:8", "--workdir", "/tmp", "--hostname", "Host.example")


def need(test: unittest.TestCase, module: str):
    if not importlib.util.find_spec(module):
        test.skipTest(f"no Python module {module}, which has the schemas")
    return importlib.import_module(module)


class ExportTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)
        image = support.handler_image(SERVER)
        cls.daemon.deploy("full", image, *OPTIONS)
        cls.daemon.deploy("plain", image, "-e", "GREETING=hello", "--timeout", "0")

    def export(self, engine: str, name: str) -> dict:
        return json.loads(self.daemon.faas("export", engine, name).stdout)

    def test_kubernetes(self):
        for name in ("full", "plain"):
            with self.subTest(name):
                deployment, service = self.export("kubernetes", name)["items"]
                container, = deployment["spec"]["template"]["spec"]["containers"]
                self.assertEqual(container["image"], f"{name}:latest")
                self.assertEqual((container["ports"], service["spec"]["ports"]),
                                 ([{"containerPort": 8080}], [{"port": 80, "targetPort": 8080}]))
        deployment = self.export("kubernetes", "full")["items"][0]
        container, = deployment["spec"]["template"]["spec"]["containers"]
        self.assertEqual(container["resources"]["limits"], {"cpu": "0.5", "memory": str(96 << 20)})
        self.assertIn({"name": "GREETING", "value": '$HOME is ${x} "quoted"'}, container["env"])
        self.assertIn({"name": "PORT", "value": "8080"}, container["env"])
        self.assertEqual(container["securityContext"], {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsUser": 7, "runAsGroup": 8,
            "capabilities": {"drop": ["ALL"]}})

    def test_kubernetes_schema(self):
        validate = need(self, "kubernetes_validate")
        for name in ("full", "plain"):
            for document in (self.export("kubernetes", name), *self.export("kubernetes", name)["items"]):
                validate.validate(document, validate.latest_version(), strict=True)
        document["spec"]["ports"] = 80
        with self.assertRaises(validate.ValidationError):
            validate.validate(document, validate.latest_version(), strict=True)

    def test_knative(self):
        revision = self.export("knative", "full")["spec"]["template"]
        self.assertEqual((revision["spec"]["containerConcurrency"], revision["spec"]["timeoutSeconds"]), (4, 45))
        self.assertEqual(revision["metadata"]["annotations"]["autoscaling.knative.dev/max-scale"], "10")
        self.assertNotIn("PORT", [entry["name"] for entry in revision["spec"]["containers"][0]["env"]])

    def test_knative_schema(self):
        for name in ("full", "plain"):
            document = self.export("knative", name)
            models = need(self, "cloudcoil.models.knative_serving.v1" if importlib.util.find_spec("cloudcoil") else "cloudcoil")
            self.assertEqual(models.Service.model_validate(document).metadata.name, name)

    def test_compose(self):
        service = self.export("compose", "full")["services"]["full"]
        self.assertEqual((service["mem_limit"], service["memswap_limit"], service["cpus"], service["pids_limit"]),
                         (96 << 20, 96 << 20, 0.5, 20))
        self.assertEqual((service["user"], service["read_only"], service["cap_drop"]), ("7:8", True, ["ALL"]))
        if not shutil.which("docker-compose"):
            self.skipTest("not installed: docker-compose")
        for name in ("full", "plain"):
            path = self.daemon.directory / "compose.json"
            path.write_text(json.dumps({"version": "2.4", **self.export("compose", name)}))
            done = subprocess.run(["docker-compose", "-f", path, "config"], capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("GREETING: hello", done.stdout)

    def test_what_only_faasd_runs_is_refused(self):
        self.daemon.deploy("handler")
        self.addCleanup(self.daemon.remove, "handler")
        for name in ("handler", "nosuch"):
            done = self.daemon.faas("export", "kubernetes", name, check=False)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertRegex(done.stderr, rf"^faas: [^\n]*{name}[^\n]*\n$")


if __name__ == "__main__":
    unittest.main()
