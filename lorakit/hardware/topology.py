"""How the GPUs of this machine are joined, as `nvidia-smi topo -m` shows it."""

import re

from lorakit.hardware.drivers import run_tool

_NVLINK = re.compile(r"NV(\d+)")
# The tool's own legend.
_PATHS = {
    "PIX": "one PCIe bridge",
    "PXB": "several PCIe bridges",
    "PHB": "the processor's PCIe bridge",
    "NODE": "PCIe bridges of one NUMA node",
    "SYS": "the link between processors",
}


def read_topology() -> dict[tuple[int, int], str]:
    """Each pair of GPUs -> the tool's word for what joins them; empty where it says nothing."""
    text, _ = run_tool("nvidia-smi", "topo", "-m")
    return parse_topology(text)


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """What `nvidia-smi topo -m` printed: a matrix with a row and a column for each GPU, beside network cards."""
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in text.splitlines()]
    rows = [[cell.strip() for cell in line.split("\t") if cell.strip()] for line in lines]
    header = next((row for row in rows if row and row[0] == "GPU0" and "X" not in row), [])
    pairs = {}
    for row in rows:
        own = re.fullmatch(r"GPU(\d+)", row[0]) if row and row is not header else None
        for name, word in zip(header, row[1:], strict=False) if own else ():
            other = re.fullmatch(r"GPU(\d+)", name)
            if own and other and int(own[1]) < int(other[1]):
                pairs[int(own[1]), int(other[1])] = word
    return pairs


def describe_path(word: str) -> str:
    """The tool's word in plain ones: `NV12` is NVLink with 12 links."""
    nvlink = _NVLINK.fullmatch(word)
    return f"NVLink, {nvlink[1]} links" if nvlink else _PATHS.get(word, word)
