"""What is known of GPUs by their makers' data sheets, for the utilisation that a run tells and the plan of one.

Figures are of one GPU: memory as the driver shows it, less than the name says; dense bf16 without sparsity; the link is
NVLink in one direction, or PCIe where there is none.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: As a person types it.
        known_as: Part of the name by which the driver tells it.
        memory_bytes: That a process can use.
        bf16_flops: Dense peak, a second.
        memory_bandwidth: Bytes a second.
        link_bandwidth: Bytes a second to the other GPUs of its node, in one direction.
        link: What that is.
    """

    name: str
    known_as: str
    memory_bytes: int
    bf16_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    link: str


# In this order the first one counts whose `known_as` is part of the device's name.
GPUS = (
    Gpu("h200", "H200", 140 * GIB, 989e12, 4.8e12, 450e9, "NVLink"),
    Gpu("h100-pcie", "H100 PCIe", 79 * GIB, 756e12, 2.0e12, 64e9, "PCIe 5"),
    Gpu("h100", "H100", 79 * GIB, 989e12, 3.35e12, 450e9, "NVLink"),
    Gpu("h800", "H800", 79 * GIB, 989e12, 3.35e12, 200e9, "NVLink"),
    Gpu("b200", "B200", 178 * GIB, 2250e12, 7.7e12, 900e9, "NVLink"),
    Gpu("a100-40", "A100-SXM4-40GB", 39 * GIB, 312e12, 1.555e12, 300e9, "NVLink"),
    Gpu("a100-80", "A100", 79 * GIB, 312e12, 2.039e12, 300e9, "NVLink"),
    Gpu("a800", "A800", 79 * GIB, 312e12, 2.039e12, 200e9, "NVLink"),
    Gpu("l40s", "L40S", 44 * GIB, 362e12, 864e9, 32e9, "PCIe 4"),
    Gpu("l4", "L4", 22 * GIB, 121e12, 300e9, 32e9, "PCIe 4"),
    Gpu("a10", "A10", 22 * GIB, 125e12, 600e9, 32e9, "PCIe 4"),
    Gpu("rtx4090", "RTX 4090", 23 * GIB, 165e12, 1.008e12, 32e9, "PCIe 4"),
    Gpu("rtx3090", "RTX 3090", 23 * GIB, 71e12, 936e9, 32e9, "PCIe 4"),
)


def gpu_of_device(device_name: str) -> Gpu | None:
    """The kind that a driver's name for a device tells; None where it is not known."""
    return next((gpu for gpu in GPUS if gpu.known_as in device_name), None)


def gpu_by_name(name: str) -> Gpu | None:
    """The kind that a person means; None where it is not known."""
    return next((gpu for gpu in GPUS if gpu.name == name.lower()), None)
