"""Machines with round figures."""

from megavlm.planner.hardware import Cluster, Gpu

ROUND = Gpu(
    name="round",
    memory_bytes=10**12,
    matmul_flops_per_second=1e12,
    fp32_matmul_flops_per_second=1e12,
    memory_bytes_per_second=1e30,
    multiprocessors=1,
    link_bytes_per_second=1e11,
    network_bytes_per_second=1e10,
    matmul_efficiency=0.5,
    attention_efficiency=0.25,
    memory_efficiency=0.5,
    link_efficiency=0.5,
    network_efficiency=0.5,
    launch_seconds=1e-30,
    host_link_bytes_per_second=1e10,
    host_memory_bytes_per_second=2e10,
)
"""Its memory is so fast that matrix products and attention take all the time."""


def of_round(hosts: int, gpus_per_host: int) -> Cluster:
    return Cluster(gpu=ROUND, hosts=hosts, gpus_per_host=gpus_per_host)
