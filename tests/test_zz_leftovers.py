"""Runs last: what all the other tests started is gone."""

import tempfile
import unittest
from pathlib import Path

import support


class Leftovers(unittest.TestCase):
    def test_no_process(self):
        self.assertEqual(support.processes(), [])

    def test_no_mount(self):
        self.assertEqual(support.mounts(), [])

    def test_no_cgroup(self):
        self.assertEqual(support.cgroup_directories(), [])

    def test_no_address(self):
        self.assertEqual(support.addresses(), [])

    def test_no_network(self):
        self.assertEqual(support.networks(), [])

    def test_no_guard(self):
        self.assertEqual([run_dir for run_dir in support.RUN_DIRS if support.guards(run_dir)], [])

    def test_no_directory(self):
        left = [path for top in (tempfile.gettempdir(), "/var/tmp") for path in Path(top).glob(f"{support.PREFIX}*")]
        self.assertEqual(left, [])


if __name__ == "__main__":
    unittest.main()
