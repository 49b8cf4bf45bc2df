# faasd on each node of a Nomad cluster, as a system job: nomad job run faasd.nomad.hcl
#
# NOT RUN HERE: there was no Nomad to run it with.
#
# On each node, install the package (packaging/build-deb) and disable its unit (systemctl disable --now faasd). The
# nodes need the driver raw_exec, for faasd is root's: it mounts, and makes namespaces, cgroups and addresses. Its
# containers are in cgroups of their own, so `resources` are the daemon's alone: keep memory for functions back with
# `reserved` of the client. Deploy with `faas` on each node, or with `faas --node`: see docs/SCALING.md.
job "faasd" {
  type = "system"

  group "faasd" {
    restart {
      attempts = 10
      interval = "10m"
      delay    = "5s"
      mode     = "delay"
    }

    task "faasd" {
      driver       = "raw_exec"
      user         = "root"
      kill_signal  = "SIGTERM"  # running invocations end first
      kill_timeout = "45s"      # longer than --drain-timeout; the client's max_kill_timeout must allow it

      config {
        command = "/usr/bin/python3"
        args    = ["/usr/sbin/faasd", "--subnet", "10.250.0.0/24"]
      }

      resources {
        cpu    = 200
        memory = 256
      }
    }
  }
}
