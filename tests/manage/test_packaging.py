"""The systemd unit and the Grafana dashboard, as far as they can be tried without systemd and Grafana."""

import json
import re
import shutil
import subprocess
import unittest

import support

UNIT = support.TOP / "packaging" / "faasd.service"
DASHBOARD = support.TOP / "packaging" / "grafana-dashboard.json"


class Unit(unittest.TestCase):
    def test_systemd_finds_no_fault(self):
        if shutil.which("systemd-analyze") is None:
            self.skipTest("systemd-analyze is not installed: apt install systemd")
        result = subprocess.run(["systemd-analyze", "verify", UNIT], capture_output=True, text=True, check=False)
        self.assertEqual((result.returncode, result.stdout + result.stderr), (0, ""))

    def test_its_capabilities_are_enough(self):
        names = re.search(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)[1].lower().split()
        bounding = ",".join(["-all", *(f"+{name.removeprefix('cap_')}" for name in names)])
        wrapper = ("setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set={bounding}")
        with support.Daemon(wrapper=wrapper) as daemon:
            address = daemon.deploy("f")
            self.assertEqual(support.get(address)[0], 200)
            self.assertEqual(support.get(address, "/exit?1")[0], 502)


class Dashboard(unittest.TestCase):
    def test_every_metric_it_shows_is_there(self):
        with support.Daemon() as daemon:
            daemon.deploy("f")
            there = set(re.findall(r"^(\w+)", daemon.api("GET", "/metrics")[1].decode(), re.MULTILINE))
        shown = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
        used = set(re.findall(r"\b((?:faasd|process)_\w+)", " ".join(shown)))
        self.assertGreater(len(used), 8)
        self.assertEqual(used - there, set())


if __name__ == "__main__":
    unittest.main()
