"""Whether a saved adapter changes anything at all."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

# The parts of a low-rank change, of which one that is all zero makes the whole of it zero (AdaLoRA's E between them).
_PARTS = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
_NO_CHANGE = ("ranknum",)


def is_no_op(folder: Path) -> bool:
    """Whether every change of an adapter's file is zero. One that holds other weights besides, or DoRA's magnitudes, is
    not judged."""
    found: dict[str, bool] = {}
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                parts = name.split(".")
                at = next((number for number, part in enumerate(parts) if part in _PARTS), None)
                if at is None and parts[-1] in _NO_CHANGE:
                    continue
                if at is None or "bias" in parts[at:]:
                    return False
                module = ".".join(parts[:at])
                found[module] = found.get(module, False) or not bool(file.get_tensor(name).any())
    except (OSError, SafetensorError):
        return False  # what loads it says what is wrong
    return bool(found) and all(found.values())
