"""faas export: what it prints is what other engines take, by their own schemas; test_docker has one of them run it.

packaging/kubernetes is checked by the same schemas.
"""

import json
import re
import runpy
import subprocess
import unittest
from pathlib import Path

import faasd
import support

FAAS = runpy.run_path(str(support.TOP / "faas"))
SCHEMAS = Path("/var/cache/faasd-ci/schemas.venv/bin/python")       # of tests/ci/schemas.sh
# A model of cloudcoil leaves out what it does not know, so that must not be anything.
KNATIVE = """
import sys, yaml
from cloudcoil.models.knative_serving.serving.v1 import Service
for path in sys.argv[1:]:
    print(path)
    document = yaml.safe_load(open(path))
    assert Service.model_validate(document).model_dump(by_alias=True, exclude_unset=True, mode="json") == document
"""
COMMANDS = {"kubernetes": ["-m", "kubernetes_validate", "--strict"], "knative": ["-c", KNATIVE],
            "compose": ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]}
SERVER = """
import os, socket
listener = socket.create_server(("", int(os.environ["PORT"])))
while True:
    listener.accept()[0].close()
"""
ODD = '$HOME is ${x} $(x) "quoted" \x7f\u2028 ü: #\n'
FULL = ("--memory", "96m", "--cpus", "0.25", "--pids", "20", "--timeout", "44.5", "--concurrency", "41", "--share", "4",
        "--reuse", "0", "--queue", "7", "-e", f"ODD={ODD}", "-e", "PORT=8081", "--read-only", "true", "--user", "7:8",
        "--workdir", "/tmp/a $b", "--hostname", "Host.example", "--publish", "127.0.0.1:8080,81",
        "--shm-size", "1m", "--warm", "0", "--cmd", "-S", "--cmd", "/handler.py", "--cmd", "$x")


class ExportTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = support.Daemon().start()
        cls.addClassCleanup(cls.daemon.close)
        volume = cls.daemon.directory / "volume"
        volume.mkdir()
        (cls.daemon.directory / "secret").write_text("x")
        image = support.handler_image(SERVER)
        cls.daemon.deploy("full", image, *FULL, "--entrypoint", support.PYTHON, "--volume", f"{volume}:/data:ro")
        cls.daemon.faas("set", "full", "--secret", f"pass.word={cls.daemon.directory}/secret")
        cls.daemon.deploy("plain", image, "--timeout", "0")
        # In another userland it is there, but its Python is not.
        cls.has_schemas = SCHEMAS.exists() and subprocess.run(
            [SCHEMAS, "-c", "import kubernetes_validate"], check=False, capture_output=True).returncode == 0

    def export(self, engine: str, name: str, *options: str) -> dict:
        return json.loads(self.daemon.faas("--json", "export", engine, name, *options).stdout)

    def check(self, engine: str, *paths: Path, refused: str = "") -> None:
        """Have the engine's schema checked, for which another program is called."""
        if not self.has_schemas:
            self.skipTest(f"no {SCHEMAS.parent.parent}; tests/ci/schemas.sh makes it")
        done = subprocess.run([SCHEMAS, *COMMANDS[engine], *paths], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode == 0, not refused, done)
        self.assertIn(refused, done.stdout + done.stderr)

    def test_schemas(self):
        """What is printed for people is what each schema takes; and the schema refuses what is wrong."""
        wrong = {"kubernetes": ("Port: 8081", "Port: x"), "knative": ("volumes:", "wolumes:"),
                 "compose": ("read_only: true", "read_only: 2")}
        for engine in COMMANDS:
            with self.subTest(engine):
                paths = [self.daemon.directory / f"{engine}-{name}.yaml" for name in ("full", "plain", "bad")]
                for path, name in zip(paths, ("full", "plain", "full"), strict=True):
                    path.write_text(self.daemon.faas("export", engine, name).stdout)
                self.assertIn(wrong[engine][0], paths[2].read_text())
                paths[2].write_text(paths[2].read_text().replace(*wrong[engine]))
                self.check(engine, *paths[:2])
                self.check(engine, paths[2], refused="bad.yaml")

    def test_the_daemonset(self):
        self.check("kubernetes", support.TOP / "packaging/kubernetes/faasd.yaml")

    def test_text_and_json_are_the_same(self):
        if not self.has_schemas:
            self.skipTest(f"no {SCHEMAS.parent.parent}; tests/ci/schemas.sh makes it")
        read = "import json, sys, yaml; print(json.dumps([*yaml.safe_load_all(sys.stdin)]))"
        texts = [self.daemon.faas("export", engine, "full").stdout for engine in COMMANDS]
        documents = [self.export(engine, "full") for engine in COMMANDS]
        done = subprocess.run([SCHEMAS, "-c", read], input="---\n".join(texts), capture_output=True, text=True,
                              check=True)
        self.assertEqual(json.loads(done.stdout),
                         [one for document in documents for one in document.get("items", [document])])

    def test_kubernetes(self):
        deployment, service, policy, claim = self.export("kubernetes", "full", "--image", "r.example/full:1")["items"]
        pod = deployment["spec"]["template"]["spec"]
        container, = pod["containers"]
        self.assertEqual((container["image"], container["ports"]), ("r.example/full:1", [{"containerPort": 8081}]))
        self.assertEqual((container["command"], "args" in container, container["workingDir"]),
                         ([support.PYTHON, "-S", "/handler.py", "$$x"], False, "/tmp/a $b"))
        self.assertEqual(container["resources"], {"limits": {"cpu": "250m", "memory": "96Mi"}})
        self.assertEqual({entry["name"]: entry["value"] for entry in container["env"]},
                         {"PORT": "8081", "ODD": ODD.replace("$", "$$")})
        security = container["securityContext"]
        self.assertEqual((security["runAsUser"], security["runAsGroup"], security["capabilities"]),
                         (7, 8, {"drop": ["ALL"]}))
        self.assertEqual((security["readOnlyRootFilesystem"], pod["hostname"]), (True, "host"))
        secret, data = pod["volumes"]
        self.assertEqual(secret["secret"], {"secretName": "full", "items": [{"key": "pass.word", "path": "pass.word"}]})
        self.assertEqual(data["persistentVolumeClaim"]["claimName"], claim["metadata"]["name"])
        self.assertEqual([mount["mountPath"] for mount in container["volumeMounts"]], ["/run/secrets", "/data"])
        self.assertEqual({port["port"]: port["targetPort"] for port in service["spec"]["ports"]},
                         dict.fromkeys((80, 81, 8080), 8081))
        self.assertEqual((service["spec"]["type"], policy["kind"]), ("LoadBalancer", "NetworkPolicy"))

    def test_knative(self):
        service = self.export("knative", "full")
        revision = service["spec"]["template"]
        self.assertEqual((revision["spec"]["containerConcurrency"], revision["spec"]["timeoutSeconds"]), (4, 45))
        scale = {key.partition("/")[2]: value for key, value in revision["metadata"]["annotations"].items()}
        self.assertEqual(scale, {"max-scale": "11", "min-scale": "0"})
        self.assertEqual([entry["name"] for entry in revision["spec"]["containers"][0]["env"]], ["ODD"])
        self.assertNotIn("labels", service["metadata"])
        self.assertEqual(self.export("knative", "plain")["metadata"]["labels"],
                         {"networking.knative.dev/visibility": "cluster-local"})

        # More containers than may be are refused by Knative.
        options = faasd.Options().changed({"warm": ["9"], "concurrency": ["64"], "share": ["32"]})
        service, = FAAS["knative"](FAAS["Server"](
            {"name": "f", "image": "", "user": "9:9", "command": [], "port": 80, "options": options.to_json(),
             "server_port": 80}, "i"))
        scale = service["spec"]["template"]["metadata"]["annotations"]
        self.assertEqual(scale["autoscaling.knative.dev/min-scale"], "2")

    def test_what_is_left_out_is_said(self):
        for engine, expected in (
                ("kubernetes", "pids 20, timeout 44500ms, concurrency 41, queue 7, share 4 and shm-size 1m"),
                ("knative", f"pids 20, queue 7, shm-size 1m, hostname Host.example and volume "
                            f"{self.daemon.directory}/volume:/data:ro"),
                ("compose", "timeout 44500ms, concurrency 41, queue 7, warm 0 and share 4")):
            self.assertEqual(self.daemon.faas("export", engine, "full").stdout.split("\n")[0],
                             f"# Left out, as {engine.title()} has no equivalent: {expected}")
        text = self.daemon.faas("export", "compose", "plain").stdout
        self.assertRegex(text, r"\n# load the image with: faas save plain \| docker load\nservices:\n")
        text = self.daemon.faas("export", "kubernetes", "plain").stdout
        self.assertRegex(text, r"\A# [^\n]* Docker Hub, [^\n]* --image\napiVersion(?s:.*) plain:latest\n")
        text = self.daemon.faas("export", "kubernetes", "plain", "--image", "r.example/plain:1").stdout
        self.assertRegex(text, r"\AapiVersion(?s:.*) r\.example/plain:1\n")

    def test_capabilities(self):
        """Those that the daemon gives to a server with the same options, and no others."""
        for uid, *texts in ((0, "", ""), (0, "", "CHOWN,KILL"), (0, "NET_RAW", ""), (0, "", "ALL"), (0, "ALL", "MKNOD"),
                            (0, "SYS_CHROOT,CHOWN", "ALL"), (0, "CHOWN", "CHOWN,KILL"), (0, "ALL,KILL", "KILL"),
                            (9, "", ""), (9, "CHOWN", "")):
            with self.subTest(uid=uid, texts=texts):
                options = faasd.Options().changed({"cap_add": texts[:1], "cap_drop": texts[1:]})
                held = faasd.capabilities(options, {"uid": uid}, "server")["effective"]
                dropped = {*FAAS["Server"]({"name": "f", "image": "", "user": f"{uid}:1", "command": [], "port": 80,
                                            "options": options.to_json(), "server_port": 80}, "i").dropped()}
                dropped = {*faasd.CAPABILITIES} if "ALL" in dropped else dropped
                self.assertEqual({name.removeprefix("CAP_") for name in held}, {*faasd.CAPABILITIES} - dropped)

    def test_what_only_faasd_runs_is_refused(self):
        self.daemon.deploy("handler")
        self.daemon.deploy("stdio", support.handler_image(SERVER), "--contract", "stdio")
        self.daemon.deploy("1st", support.handler_image(SERVER), "--speaks-first", "true")
        for engine, name, why in (("compose", "handler", "contract handler"), ("knative", "stdio", "contract stdio"),
                                  ("kubernetes", "1st", "begin with a letter"), ("compose", "nosuch", "no function")):
            done = self.daemon.faas("export", engine, name, check=False)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertRegex(done.stderr, rf"^faas: [^\n]*{re.escape(why)}[^\n]*\n$")
        self.daemon.set("plain", "--speaks-first", "true")
        self.addCleanup(self.daemon.set, "plain", "--speaks-first", "false")
        done = self.daemon.faas("export", "knative", "plain", check=False)
        self.assertRegex(done.stderr, r"^faas: function plain speaks first, [^\n]*\n$")
        self.daemon.remove("handler", "stdio", "1st")


if __name__ == "__main__":
    unittest.main()
