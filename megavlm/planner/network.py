"""How long collectives take: rings over the links of a host and the network between hosts."""

from dataclasses import dataclass
from math import gcd

from megavlm.planner.hardware import Cluster

LAUNCH_SECONDS = 15e-6
"""Of a collective, whatever its size."""
LINK_HOP_SECONDS = 1.5e-6
NETWORK_HOP_SECONDS = 8e-6
"""From one rank of a ring to the next."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: as many on each of its hosts."""

    ranks: int
    per_host: int

    @property
    def hosts(self) -> int:
        return self.ranks // self.per_host


def neighbours(cluster: Cluster, ranks: int, stride: int = 1) -> Group:
    """The group of every stride-th rank from some rank on.

    One that fills a host and a part of another has as many on each as divide both.
    """
    span = max(1, cluster.gpus_per_host // stride)
    return Group(ranks, gcd(ranks, span))


def ring_seconds(cluster: Cluster, group: Group, whole_bytes: float) -> float:
    """To gather a tensor of which each rank has a part, or to reduce and scatter one.

    A ring enters and leaves each host once for every rank there, each by a network card of its own,
    so what limits it is the sum of the cards, or the links.
    """
    if group.ranks == 1 or whole_bytes == 0:
        return 0.0
    gpu = cluster.gpu
    bandwidth = gpu.link_bytes_per_second * gpu.link_efficiency
    hops = (group.ranks - group.hosts) * LINK_HOP_SECONDS
    if group.hosts > 1:
        network = gpu.network_bytes_per_second * gpu.network_efficiency * group.per_host
        bandwidth = min(bandwidth, network) if group.per_host > 1 else network
        hops += group.hosts * NETWORK_HOP_SECONDS
    sent = whole_bytes * (group.ranks - 1) / group.ranks
    return LAUNCH_SECONDS + hops + sent / bandwidth


def all_reduce_seconds(cluster: Cluster, group: Group, whole_bytes: float) -> float:
    """Reduce and scatter, then gather."""
    return 2 * ring_seconds(cluster, group, whole_bytes)


def send_seconds(cluster: Cluster, within_host: bool, sent_bytes: float) -> float:
    """From one pipeline rank to the next."""
    gpu = cluster.gpu
    if within_host:
        return LAUNCH_SECONDS + sent_bytes / (gpu.link_bytes_per_second * gpu.link_efficiency)
    network = gpu.network_bytes_per_second * gpu.network_efficiency
    return LAUNCH_SECONDS + NETWORK_HOP_SECONDS + sent_bytes / network
