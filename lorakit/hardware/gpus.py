"""The GPUs that people train on: memory, bandwidth and dense arithmetic rates, each with its source. Of Apple's and
Intel's memory alone: Apple publishes no arithmetic rates."""

import dataclasses
import re
from dataclasses import dataclass

from lorakit.errors import UserError
from lorakit.hardware.drivers import METAL_SHARE
from lorakit.recipe.did_you_mean import nearest

# Dense tensor operations that a multiprocessor does a clock with float32 accumulation, from Turing to Ada and RTX
# Blackwell: workstation and data-centre cards 1,024, GeForce half of it (NVIDIA's architecture white papers: the RTX
# 4090 has 330.3 TFLOP/s with float16 accumulation and 165.2 with float32).
_TENSOR, _GEFORCE_TENSOR = 1024, 512
_TURING, _AMPERE, _ADA, _BLACKWELL = 7.5, 8.6, 8.9, 12.0
_BFLOAT16_FROM = 8.0  # compute capability


@dataclass(frozen=True)
class Gpu:
    """A GPU. Rates are peaks: dense, not sparse; tensor cores where it has them, with float32 accumulation; 0 where
    they are not known."""

    name: str
    memory: int  # bytes: what the driver's tool shows as the total where that is known, else the nominal size
    bandwidth: float  # bytes a second
    bfloat16: float | None  # FLOP/s; None: the card has no bfloat16
    float16: float
    float32: float  # FLOP/s of torch's float32 products, which on NVIDIA's cards do not use the tensor cores
    capability: float  # CUDA's compute capability; 0 for those of other makers
    source: str
    aliases: tuple[str, ...] = ()  # other names, as the driver's tool and people write them
    device: str = "cuda"  # as torch calls it


def _gpu(
    name: str, mib: int, bandwidth: float, tensor: float, float32: float, capability: float, source: str, *aliases: str
) -> Gpu:
    """A card by its rates: `bandwidth` in GB/s, `tensor` and `float32` in TFLOP/s."""
    bfloat16 = tensor * 1e12 if capability >= _BFLOAT16_FROM else None
    return Gpu(name, mib << 20, bandwidth * 1e9, bfloat16, tensor * 1e12, float32 * 1e12, capability, source, aliases)


def _by_clock(
    name: str, mib: int, bandwidth: float, multiprocessors: int, megahertz: int, capability: float, tensor: int
) -> Gpu:
    """A card whose rates are its multiprocessors x boost clock x operations a clock, as its maker computes them."""
    teraclocks = multiprocessors * megahertz / 1e6
    lanes = 64 if capability == _TURING else 128  # of a multiprocessor, in float32
    operations = f"{tensor} dense tensor operations each a clock (architecture white paper)"
    source = f"NVIDIA's specifications: {multiprocessors} multiprocessors at {megahertz:,} MHz, {operations}"
    return _gpu(name, mib, bandwidth, teraclocks * tensor, teraclocks * lanes * 2, capability, source)


_GEFORCE = (
    # name, MiB, GB/s, multiprocessors, boost MHz, capability
    ("RTX 2060", 6144, 336, 30, 1680, _TURING),
    ("RTX 2070", 8192, 448, 36, 1620, _TURING),
    ("RTX 2080 Ti", 11264, 616, 68, 1545, _TURING),
    ("RTX 3050 8GB", 8192, 224, 20, 1777, _AMPERE),
    ("RTX 3060 12GB", 12288, 360, 28, 1777, _AMPERE),
    ("RTX 3070", 8192, 448, 46, 1725, _AMPERE),
    ("RTX 3080 10GB", 10240, 760, 68, 1710, _AMPERE),
    ("RTX 3090", 24576, 936, 82, 1695, _AMPERE),
    ("RTX 3090 Ti", 24564, 1008, 84, 1860, _AMPERE),
    ("RTX 4060", 8188, 272, 24, 2460, _ADA),
    ("RTX 4060 Ti 16GB", 16380, 288, 34, 2535, _ADA),
    ("RTX 4070", 12282, 504, 46, 2475, _ADA),
    ("RTX 4070 Ti", 12282, 504, 60, 2610, _ADA),
    ("RTX 4070 Ti SUPER", 16376, 672, 66, 2610, _ADA),
    ("RTX 4080", 16376, 717, 76, 2505, _ADA),
    ("RTX 4080 SUPER", 16376, 736, 80, 2550, _ADA),
    ("RTX 4090", 24564, 1008, 128, 2520, _ADA),
    ("RTX 5060 Ti 16GB", 16311, 448, 36, 2572, _BLACKWELL),
    ("RTX 5070", 12227, 672, 48, 2512, _BLACKWELL),
    ("RTX 5070 Ti", 16303, 896, 70, 2452, _BLACKWELL),
    ("RTX 5080", 16303, 960, 84, 2617, _BLACKWELL),
    ("RTX 5090", 32607, 1792, 170, 2407, _BLACKWELL),
)
_WORKSTATION = (
    ("RTX A4000", 16376, 448, 48, 1560, _AMPERE),
    ("RTX A5000", 24564, 768, 64, 1695, _AMPERE),
    ("RTX A6000", 49140, 768, 84, 1800, _AMPERE),
    ("RTX 6000 Ada", 49140, 960, 142, 2505, _ADA),
    ("RTX PRO 6000 Blackwell", 97887, 1792, 188, 2617, _BLACKWELL),
)

_A100, _H100 = "A100 Tensor Core GPU", "H100 Tensor Core GPU"
_DATA_CENTRE = (
    # name, MiB, GB/s, tensor TFLOP/s (half of a sparse figure), float32 TFLOP/s, capability, sheet, other names
    ("T4", 15360, 320, 65, 8.1, 7.5, "T4 Tensor Core GPU", "Tesla T4"),
    ("V100 16GB", 16384, 900, 125, 15.7, 7.0, "V100 Tensor Core GPU (SXM2)", "V100", "V100-SXM2-16GB"),
    ("V100 32GB", 32768, 900, 125, 15.7, 7.0, "V100 Tensor Core GPU (SXM2)", "V100", "V100-SXM2-32GB"),
    ("L4", 23034, 300, 121, 30.3, 8.9, "L4 Tensor Core GPU"),
    ("A10", 23028, 600, 125, 31.2, 8.6, "A10 Tensor Core GPU"),
    ("A10G", 23028, 600, 70, 35, 8.6, "A10G Tensor Core GPU"),
    ("A30", 24576, 933, 165, 10.3, 8.0, "A30 Tensor Core GPU"),
    ("A40", 46068, 696, 149.7, 37.4, 8.6, "A40"),
    ("L40", 46068, 864, 181, 90.5, 8.9, "L40"),
    ("L40S", 46068, 864, 362, 91.6, 8.9, "L40S"),
    ("A100 40GB", 40960, 1555, 312, 19.5, 8.0, _A100, "A100", "A100-SXM4-40GB", "A100-PCIE-40GB"),
    ("A100 80GB", 81920, 2039, 312, 19.5, 8.0, f"{_A100} (SXM)", "A100", "A100-SXM4-80GB", "A100 80GB SXM"),
    ("A100 80GB PCIe", 81920, 1935, 312, 19.5, 8.0, f"{_A100} (PCIe)", "A100 PCIe"),
    ("H100 PCIe", 81559, 2000, 756, 51, 9.0, f"{_H100} (PCIe)", "H100", "H100 80GB"),
    ("H100 SXM", 81559, 3350, 989, 67, 9.0, f"{_H100} (SXM)", "H100", "H100 80GB", "H100 80GB HBM3", "H100 SXM5"),
    ("H100 NVL", 95830, 3900, 835, 60, 9.0, f"{_H100} (NVL)", "H100"),
    ("H200", 143771, 4800, 989, 67, 9.0, "H200 Tensor Core GPU (SXM)", "H200 SXM"),
    ("GH200 96GB", 97871, 4000, 990, 67, 9.0, "GH200 Grace Hopper Superchip", "GH200", "GH200 480GB"),
    ("B200", 183359, 8000, 2250, 75, 10.0, "HGX B200, an eighth", "B200 SXM"),
)

# AMD's, each as the device that torch sees: an MI250 or MI250X is two of them (ROCm's MI250 page), and has half of the
# figures that AMD prints. float32 is that of the matrix cores, which rocBLAS uses.
_CDNA2, _CDNA3 = (
    "AMD's data sheet of the MI200 series and CDNA 2 white paper",
    "AMD's data sheet and CDNA 3 white paper",
)
_AMD = (
    # name, MiB, GB/s, bfloat16 and float16 TFLOP/s, float32 TFLOP/s, source, other names
    ("RX 7900 XTX", 24560, 960, 123, 61.4, "AMD's product page: FP16 matrix, FP32", "7900 XTX"),
    ("MI210", 65536, 1638.4, 181.0, 45.3, _CDNA2),
    ("MI250 (one die)", 65520, 1638.4, 181.05, 45.25, _CDNA2, "MI250", "MI250 (MCM) OAM AC MBA"),
    ("MI250X (one die)", 65520, 1638.4, 191.5, 47.85, _CDNA2, "MI250X"),
    ("MI300X", 196592, 5325, 1307.4, 163.4, _CDNA3, "MI300X OAM", "MI300X VF"),
    ("MI325X", 262144, 6000, 1307.4, 163.4, "AMD's data sheet", "MI325X OAM", "MI325X VF"),
)


def _amd(name: str, mib: int, bandwidth: float, tensor: float, float32: float, source: str, *aliases: str) -> Gpu:
    flops = tensor * 1e12
    return Gpu(name, mib << 20, bandwidth * 1e9, flops, flops, float32 * 1e12, 0.0, source, aliases)


GPUS: tuple[Gpu, ...] = (
    *(_by_clock(*row, _GEFORCE_TENSOR) for row in _GEFORCE),
    *(_by_clock(*row, _TENSOR) for row in _WORKSTATION),
    *(_gpu(*row[:6], f"NVIDIA data sheet: {row[6]}", *row[7:]) for row in _DATA_CENTRE),
    *(_amd(*row) for row in _AMD),
)

# Intel's cards, whose memory is known, not what they reach; of a Max 1550 torch sees two stacks, each as a device.
_INTEL_MEMORY = (
    *(("Arc A750", 8), ("Arc A770 16GB", 16), ("Arc B570", 10), ("Arc B580", 12), ("Arc Pro B50", 16)),
    *(("Arc Pro B60", 24), ("Arc Pro B70", 32), ("Max 1100", 48), ("Max 1550 (one stack)", 64)),
)
_APPLE = re.compile(r"(?:apple )?(m\d+(?: (?:pro|max|ultra))?)(?:,? (\d+) ?g(?:i?b)?)?", re.IGNORECASE)
_MOST_APPLE = 1024  # GB

# Cards sold as one size differ by this share in what they show: 22.5 to 24 GiB are 24 GB.
_SAME_SIZE = 0.07
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([mgt]i?b|[mgt])", re.IGNORECASE)
_SEVERAL = re.compile(r"([1-9]\d{0,3}) ?[x×] ?(\S.*)", re.IGNORECASE)
# Gibibytes of a unit, as cards are sold: 24,000 MB and 24 GB are one size.
_UNITS = {"m": 1e-3, "mb": 1e-3, "mib": 1 / 1024, "g": 1, "gb": 1, "gib": 1, "t": 1e3, "tb": 1e3, "tib": 1024}
# Words that drivers' tools and people write around a card's name.
_AROUND_NAMES = re.compile(
    r"nvidia|geforce|tesla|quadro|generation|workstation edition|server edition|graphics card|graphics|"
    r"\bamd\b|radeon|instinct|\bintel\b|\((?:r|tm)\)|data center gpu"
)


def split_count(text: str) -> tuple[int | None, str]:
    """How many of a card are meant, None where no number is written, and the card: `4x RTX 4090`, `2 x 24GB`."""
    several = _SEVERAL.fullmatch(text.strip())
    return (int(several[1]), several[2]) if several else (None, text.strip())


def find_gpu(text: str) -> Gpu:
    """The GPU that a user names: `RTX 4090`, `4090`, `NVIDIA GeForce RTX 4090`, or by its memory alone: `24GB`.
    UserError where no such GPU is known, or several are meant."""
    text = text.strip()
    if size := _SIZE.fullmatch(text):
        gibibytes = float(size[1]) * _UNITS[size[2].lower()]
        if not 0 < gibibytes <= 1024:
            reason = f"'{text}' is not a memory size"
            raise UserError(f"--gpu: {reason}. Write a size such as 24GB, or a name such as RTX 4090.")
        slowest = slowest_gpu(memory := int(gibibytes * 2**30))
        source = f"memory as given; as fast as the {slowest.name}, the slowest known card of about that memory"
        name, source = f"{gibibytes:g} GB GPU", f"{source} ({slowest.source})"
        return dataclasses.replace(slowest, name=name, memory=memory, source=source, aliases=())
    if apple := _APPLE.fullmatch(text):
        return _apple_gpu(apple[1], int(apple[2] or 0))
    matches = _by_name(text) or [gpu for gpu in _INTEL if _normalize(text) in _keys(gpu)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(gpu.name for gpu in matches)
        raise UserError(f"--gpu: '{text}' is more than one GPU. Write one of: {names}.")
    if re.fullmatch(r"[1-9]\d*(\.\d+)?", text):
        raise UserError(f"--gpu: '{text}' is neither a card's name nor a memory. Did you mean {text}GB?")
    similar = nearest(_AROUND_NAMES.sub("", text.lower()).strip(), [gpu.name for gpu in (*GPUS, *_INTEL)])
    # A laptop's card is another one than the desktop's of that name, mostly a smaller one.
    hint = f" Did you mean {similar}?" if similar and "laptop" not in text.lower() else ""
    raise UserError(f"--gpu: '{text}' is not a known GPU.{hint} For another card write its memory: 24GB.")


def match_gpu(name: str, memory: int) -> Gpu | None:
    """The GPU that its driver names so, with the memory in bytes that it shows; None for one that is not known. Where a
    name is sold in several sizes, the one of the nearest memory is taken."""
    matches = [gpu for gpu in _by_name(name) if abs(gpu.memory - memory) < 0.1 * memory]
    nearest_size = min(matches, key=lambda gpu: abs(gpu.memory - memory), default=None)
    return nearest_size and dataclasses.replace(nearest_size, memory=memory)


def slowest_gpu(memory: int) -> Gpu:
    """The slowest known card of NVIDIA's of about so many bytes; of one size those with bfloat16 count."""
    cards = [gpu for gpu in GPUS if gpu.capability]
    distance = max(_SAME_SIZE * memory, min(abs(gpu.memory - memory) for gpu in cards))
    alike = [gpu for gpu in cards if abs(gpu.memory - memory) <= distance]
    return min([gpu for gpu in alike if gpu.bfloat16] or alike, key=lambda gpu: gpu.float16)


def _apple_gpu(chip: str, gigabytes: int) -> Gpu:
    """The GPU of one of Apple's chips on a Mac with so much memory, of which it may take what Metal recommends."""
    chip = chip.title()
    if not 0 < gigabytes <= _MOST_APPLE:
        raise UserError(f"--gpu: Macs with the {chip} have different memory. Write it too: {chip} 64GB.")
    name, memory = f"Apple {chip} {gigabytes}GB", int((gigabytes << 30) * METAL_SHARE)
    return _of_memory(name, memory, "mps", "Apple publishes no rates")


def _of_memory(name: str, memory: int, device: str, source: str, *aliases: str) -> Gpu:
    """A GPU whose rates are not known. It has bfloat16 all the same."""
    return Gpu(name, memory, 0.0, 0.0, 0.0, 0.0, 0.0, source, aliases, device)


_INTEL = tuple(
    _of_memory(name, size << 30, "xpu", "the memory that the card is sold with", name.partition(" (")[0])
    for name, size in _INTEL_MEMORY
)


def _by_name(text: str) -> list[Gpu]:
    """The cards of this name; else those of which it is an alias, with or without RTX and the size."""
    key = _normalize(text)
    exact = [gpu for gpu in GPUS if key == _normalize(gpu.name)]
    return exact or [gpu for gpu in GPUS if key in _keys(gpu)]


def _keys(gpu: Gpu) -> set[str]:
    names = {gpu.name, *gpu.aliases}
    names |= {re.sub(r" ?\d+GB\b", "", name) for name in names if name.startswith(("RTX", "Arc"))}
    keys = {_normalize(name) for name in names}
    return (keys | {re.sub("^(rtx|arc)", "", key) for key in keys}) - {""}


def _normalize(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _AROUND_NAMES.sub("", text.lower()))
