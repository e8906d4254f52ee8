"""Published peak rates of GPUs and interconnects, and what part of them a plan counts on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Of one GPU, from its maker's data sheet, dense: bytes, operations and bytes per second, bytes per second each way
    to the other GPUs of its node.
    """

    memory: float
    bf16: float
    tf32: float
    bandwidth: float
    node: float


GPUS = {
    "A100-40GB": Gpu(40e9, 312e12, 156e12, 1.555e12, 300e9),
    "A100-80GB": Gpu(80e9, 312e12, 156e12, 2.039e12, 300e9),
    "L40S": Gpu(48e9, 362e12, 183e12, 0.864e12, 32e9),
    "H100": Gpu(80e9, 989e12, 494e12, 3.35e12, 450e9),
    "H200": Gpu(141e9, 989e12, 494e12, 4.8e12, 450e9),
    "B200": Gpu(180e9, 2250e12, 1100e12, 7.7e12, 900e9),
    "MI300X": Gpu(192e9, 1307e12, 653e12, 5.3e12, 448e9),
}

# Bytes per second each way that a GPU has to other nodes.
INTERCONNECTS = {"ndr400": 50e9, "hdr200": 25e9, "roce100": 12.5e9, "efa400": 50e9, "eth25": 3.125e9}

# What part of the peak a plan counts on. Not measured here: round numbers of the size that published runs report for
# training, memory-bound kernels and collectives. LoFT's float32 products are three of TF32 (kernels/README.md).
TRAINING_EFFICIENCY, KERNEL_EFFICIENCY, MEMORY_EFFICIENCY, WIRE_EFFICIENCY = 0.4, 0.4, 0.7, 0.7
TF32_PRODUCTS = 3
# Of a GPU's memory, what CUDA, NCCL and fragmentation leave.
USABLE = 0.92
# Seconds to start a collective, and for each further rank that a rank exchanges with in an all_to_all: assumed too.
LATENCY, LATENCY_PER_PEER = 20e-6, 2e-6
