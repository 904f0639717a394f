"""Tells Ray that this pod is about to go, so that training saves a checkpoint while it still can.

The preStop hook of the Ray pods. Kubernetes runs it before it sends SIGTERM, at which a Ray node dies at once, and with it
what was not saved. Here the node is drained first: Ray Train hears of it through `get_preemption_info()`, on all ranks. The
hook returns when the node has left the cluster, which it does as soon as nothing runs on it, or at the deadline.

python drain.py --deadline 240          # this node
python drain.py --deadline 240 --all    # the whole cluster, which does not outlive its head
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2, gcs_pb2


def main() -> int:
    """Drains this pod's node, or all nodes, and waits until they have gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, required=True, help="seconds; less than terminationGracePeriodSeconds")
    parser.add_argument("--all", action="store_true", help="drain every node that is not the head")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), help="of GCS (default: $RAY_ADDRESS)")
    parser.add_argument("--node-ip", default=os.environ.get("POD_IP"), help="this node's (default: $POD_IP)")
    arguments = parser.parse_args()
    if not arguments.address or not (arguments.all or arguments.node_ip):
        parser.error("--address (or RAY_ADDRESS) is needed, and --node-ip (or POD_IP) where not all nodes are drained")
    until = time.time() + arguments.deadline
    client = GcsClient(address=arguments.address)
    leaving = [
        node for node, (ip, is_head) in alive(client).items() if (not is_head if arguments.all else ip == arguments.node_ip)
    ]
    for node in leaving:
        accepted, refusal = client.drain_node(
            node, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "Kubernetes stops this pod", int(until * 1000)
        )
        print(f"drain.py: node {node}: {'told to leave' if accepted else f'refused to leave: {refusal}'}", flush=True)
    while time.time() < until and alive(client).keys() & set(leaving):
        time.sleep(1)
    return 0


def alive(client: GcsClient) -> dict[str, tuple[str, bool]]:
    """Returns the nodes that are in the cluster: by ID, their address and whether they are the head."""
    return {
        identifier.hex(): (node.node_manager_address, node.is_head_node)
        for identifier, node in client.get_all_node_info().items()
        if node.state == gcs_pb2.GcsNodeInfo.ALIVE
    }


if __name__ == "__main__":
    sys.exit(main())
