"""What devices that train together are joined by: how fast a collective sends over it, each with its source."""

import re
from dataclasses import dataclass

from lorakit.errors import UserError
from lorakit.hardware.gpus import Gpu
from lorakit.recipe.did_you_mean import nearest

_NCCL = "NCCL's src/graph/topo.h"


@dataclass(frozen=True)
class Link:
    """What joins devices."""

    name: str  # as `--link` takes it
    words: str
    bandwidth: float
    """Bytes a second that each device sends while it receives as many, as nccl-tests' bus bandwidth counts them."""
    source: str


def _link(name: str, words: str, gigabytes: float, source: str) -> Link:
    return Link(name, words, gigabytes * 1e9, source)


LINKS: tuple[Link, ...] = (
    _link("nvlink-2", "NVLink 2, 6 links", 120, f"6 x 20 GB/s: {_NCCL}"),
    _link("nvlink-3", "NVLink 3, 12 links", 240, f"12 x 20 GB/s: {_NCCL}; 208 measured (nccl-tests#178)"),
    _link("nvlink-4", "NVLink 4, 18 links", 370, f"18 x 20.6 GB/s: {_NCCL}; 370 a ring reaches (nccl-tests#212)"),
    _link("nvlink-5", "NVLink 5, 18 links", 721, f"18 x 40.1 GB/s: {_NCCL}"),
    _link("nvlink-bridge", "an NVLink bridge of 4 links", 48, f"4 x 12 GB/s: {_NCCL}"),
    _link("pcie-3", "PCIe 3.0 x16", 12, f"12 GB/s: {_NCCL}"),
    _link("pcie-4", "PCIe 4.0 x16", 24, f"twice PCIe 3.0: {_NCCL}"),
    _link("pcie-4-x8", "PCIe 4.0 x8", 12, f"half of 16 lanes: {_NCCL}"),
    _link("pcie-5", "PCIe 5.0 x16", 48, f"four times PCIe 3.0: {_NCCL}; 35 of four RTX 5090 (nccl#1639)"),
    _link("pcie-5-x8", "PCIe 5.0 x8", 24, f"half of 16 lanes: {_NCCL}"),
    _link("400gb", "400 Gb/s InfiniBand or RoCE", 48, "46 to 48 GB/s measured a card (nccl-tests#290)"),
    _link("200gb", "200 Gb/s InfiniBand or RoCE", 24, "24 GB/s (nccl#412)"),
    _link("100gb", "100 Gb/s InfiniBand or RoCE", 12, f"12 GB/s: {_NCCL}; 12.2 measured (nccl-tests#29)"),
    _link("25gb", "25 Gb/s Ethernet", 1.9, "60 % of the line, which NCCL reached over TCP (nccl#209)"),
    _link("10gb", "10 Gb/s Ethernet", 1.18, "the line less the headers of Ethernet, IP and TCP: 1,448 of 1,538 bytes"),
    _link("processor", "the memory of one machine", 1.0, "gloo's all-reduce of 16 and 64 MiB on two cores, measured"),
)
"""Of devices on several machines the network between them counts, which is the slowest part of the ring."""

# Those sold with NVLink between all cards of a machine. Others may have a bridge between two, which has to be named.
_NVLINK = {
    **dict.fromkeys(("V100 16GB", "V100 32GB"), "nvlink-2"),
    **dict.fromkeys(("A100 40GB", "A100 80GB"), "nvlink-3"),
    **dict.fromkeys(("H100 SXM", "H200"), "nvlink-4"),
    "B200": "nvlink-5",
}
# NVIDIA's specifications: these have 8 lanes.
_EIGHT_LANES = ("RTX 3050 8GB", "RTX 4060", "RTX 4060 Ti 16GB", "RTX 5060 Ti 16GB")
# By compute capability: Volta and Turing, Ampere and Ada, Hopper and Blackwell (NVIDIA's specifications).
_PCIE = ((9.0, "pcie-5"), (8.0, "pcie-4"), (0.0, "pcie-3"))


def default_link(card: Gpu | None, is_gpu: bool = True) -> Link:
    """What joins several of a card in one machine: NVLink where they are sold with it, else PCIe; and the processes
    of a processor. Of a card that is not in the table PCIe 4.0 is assumed."""
    if not is_gpu:
        return _by_name("processor")
    return _by_name((card and _NVLINK.get(card.name)) or _pcie(card))


def host_link(card: Gpu | None) -> Link:
    """What joins a card and main memory: PCIe."""
    return _by_name(_pcie(card))


def has_nvlink(card: Gpu | None) -> bool:
    """Whether a card is sold with NVLink between all cards of a machine."""
    return card is not None and card.name in _NVLINK


def find_link(text: str, card: Gpu | None = None) -> Link:
    """The link that a user names: `nvlink-4`, `NVLink 4`, `PCIe 4.0`, `100Gb`; `nvlink` and `pcie` alone mean the
    card's. UserError where there is none of that name."""
    key = _normalize(text)
    if key == "nvlink":
        key = _normalize(_NVLINK.get(card.name, "nvlink-bridge") if card else "nvlink-bridge")
    elif key == "pcie":
        key = _normalize(_pcie(card))
    for link in LINKS:
        if key == _normalize(link.name):
            return link
    names = [link.name for link in LINKS]
    hint = f" Did you mean {similar}?" if (similar := nearest(text.strip().lower(), names)) else ""
    raise UserError(f"--link: '{text}' is not a known link.{hint} Write one of: nvlink, pcie, {', '.join(names)}.")


def _pcie(card: Gpu | None) -> str:
    if card is None or not card.capability:  # of other makers: what AMD's cards reach over Infinity Fabric is not known
        return "pcie-4"
    name = next(name for capability, name in _PCIE if card.capability >= capability)
    return f"{name}-x8" if card.name in _EIGHT_LANES else name


def _by_name(name: str) -> Link:
    return next(link for link in LINKS if link.name == name)


def _normalize(text: str) -> str:
    """`PCIe 4.0 x16` and `pcie-4` are one, as are `100 Gb/s InfiniBand` and `100gb`."""
    words = re.sub(r"infiniband|roce|ethernet|x16|\.0\b|/s", "", text.strip().lower())
    return re.sub(r"(?<=\d)gb(it|e)$", "gb", re.sub(r"[^a-z0-9]", "", words))
