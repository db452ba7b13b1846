# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of a head without CPUs and two nodes of one CPU each, all on this machine and on loopback.

Writes its address, then obeys lines: ``kill PID`` kills, without warning, the node that the process belongs to. Ends
with stdin.
"""

import os
import sys

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

from ray.cluster_utils import Cluster

LOOPBACK = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
QUICK = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}


def parent(process_id):
    with open(f"/proc/{process_id}/stat") as file:  # noqa: PTH123
        return int(file.read().rpartition(")")[2].split()[1])


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, _system_config=QUICK, **LOOPBACK)
        nodes = [cluster.add_node(num_cpus=1, wait=False, **LOOPBACK) for _ in range(2)]
        cluster.wait_for_nodes()
        print(cluster.address, file=answers, flush=True)
        for line in sys.stdin:
            raylet = parent(int(line.removeprefix("kill ")))
            (node,) = (node for node in nodes if raylet in [info.process.pid for info in node.all_processes["raylet"]])
            cluster.remove_node(node, allow_graceful=False)
            nodes.remove(node)
            print("killed", file=answers, flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
