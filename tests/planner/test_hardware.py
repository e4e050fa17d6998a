"""GPUs are known by torch's name of them and by their memory."""

import pytest

from megavlm.planner.hardware import A100_40, A100_80, H100_80, H200, gpu_named

MIB = 1024**2


@pytest.mark.parametrize(
    ("device_name", "memory_mib", "gpu"),
    [
        # As drivers report them.
        ("NVIDIA A100-SXM4-40GB", 40_338, A100_40),
        ("NVIDIA A100-SXM4-80GB", 81_038, A100_80),
        ("NVIDIA H100 80GB HBM3", 81_090, H100_80),
        ("NVIDIA H200", 143_167, H200),
        ("NVIDIA GH200 480GB", 97_280, None),
        ("NVIDIA GH200 144G HBM3e", 143_167, None),
        ("NVIDIA H100 NVL", 95_320, None),
        ("NVIDIA H100 PCIe", 81_008, None),
        ("NVIDIA A100-SXM-64GB", 65_248, None),
        ("NVIDIA A10", 23_028, None),
        ("NVIDIA GeForce RTX 4090", 24_217, None),
    ],
)
def test_a_known_gpu_has_its_name_and_its_memory(device_name, memory_mib, gpu):
    assert gpu_named(device_name, memory_mib * MIB) is gpu
