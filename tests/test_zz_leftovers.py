"""Runs last: what all the other tests started is gone."""

import os
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

    def test_no_directory(self):
        self.assertEqual([path.name for path in Path(tempfile.gettempdir()).glob(f"{support.PREFIX}*")], [])

    def test_no_change_of_the_machine(self):
        """Tests use directories of their own: the product's default ones are for quickstart.sh and the user."""
        self.assertFalse(os.path.exists("/run/faasd/faasd.sock"))


if __name__ == "__main__":
    unittest.main()
