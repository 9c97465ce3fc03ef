"""What `lorakit plan` says of several devices: what each holds and sends, and what more of them are worth."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lorakit.amounts import decimal_bytes, duration, gibibytes, percent
from lorakit.plan.memory import DTYPE_BYTES, weight_bytes
from lorakit.plan.sharding import SHARED

if TYPE_CHECKING:
    from lorakit.plan.estimate import Plan

_OWN = {"gathered": "in turn", "activations": "own rows", "logits": "own rows", "buffers": "own", "overhead": "own"}


def shared_components(plan: "Plan") -> tuple[str, ...]:
    """The components of which each device holds its part."""
    return SHARED[plan.recipe.train.sharding, plan.trainable.full_fine_tuning]


def share_of_device(plan: "Plan", component: str) -> str:
    """How much of a component each device holds, in a cell of the table."""
    shared = f"1/{plan.devices.count}" if component in shared_components(plan) else "whole"
    return _OWN.get(component, shared)


def describe_devices(plan: "Plan", alone: "Plan | None") -> dict[str, str]:
    """The lines on several devices, by what they are about; none for one. `alone`: the same run on one of them."""
    devices, link = plan.devices, plan.devices.link
    if link is None:
        return {}
    joined = f"{link.words}, {link.bandwidth / 1e9:g} GB/s each way ({link.source})"
    lines = {"devices": f"{devices.count} x {plan.machine.name}, joined by {joined}"}
    sharding, shared = plan.recipe.train.sharding, shared_components(plan)
    rest = [name for name in ("weights", "adapter", "gradients", "optimizer") if name not in shared]
    whole = [name for name in rest if plan.longest.components[name]]
    parts = [f"1/{devices.count} of {_listed(shared)}"] if shared else []
    parts += [f"{_listed(whole)} whole"] if whole else []
    lines["sharding"] = f"{sharding}: each device holds {', '.join(parts)}"
    if loading := _loading(plan):
        lines["loading"] = f"{gibibytes(loading)} of main memory: each process reads the whole base there first"
    sent = "; ".join(f"{decimal_bytes(one.bytes)} {one.collective} of {one.what}" for one in plan.sent)
    seconds = f", {duration(_sending_seconds(plan))} over the link" if _sending_seconds(plan) else ""
    lines["communication"] = f"{decimal_bytes(_sent(plan))} a step from each device{seconds}: {sent}"
    if plan.time and plan.computing:
        waiting = percent(max(0.0, 1 - plan.computing / plan.time.likely))
        lines["computing"] = f"{duration(plan.computing)} on the busiest device, which waits for the link {waiting}"
    if speed_up := _speed_up(plan, alone):
        fits = "" if alone and alone.fits == "yes" else ", on which it does not fit"
        efficiency = percent(speed_up / devices.count)
        lines["speed-up"] = f"x {speed_up:.2f} against one device{fits}: {efficiency} of {devices.count} times"
    return lines


def devices_as_json(plan: "Plan", alone: "Plan | None") -> dict[str, Any]:
    """The same for programs: bytes, seconds, and shares of 1."""
    devices, speed_up = plan.devices, _speed_up(plan, alone)
    return {
        "count": devices.count,
        "link": asdict(devices.link) if devices.link else None,
        "sharding": plan.recipe.train.sharding,
        "shared": shared_components(plan) if devices.count > 1 else (),
        "loading": _loading(plan),
        "sent_a_step": _sent(plan),
        "transfers": [asdict(one) for one in plan.sent],
        "sending_seconds_a_step": _sending_seconds(plan),
        "computing_seconds": plan.computing,
        "alone": {"fits": alone.fits, "seconds": alone.time.likely if alone.time else None} if alone else None,
        "speed_up": speed_up,
        "efficiency": speed_up / devices.count if speed_up else None,
    }


def _loading(plan: "Plan") -> int:
    """Bytes of main memory in which the processes of GPUs hold the base before they share it out."""
    if not plan.machine.is_gpu or "weights" not in shared_components(plan):
        return 0
    model, full = plan.recipe.model, plan.trainable.full_fine_tuning
    width = 4 if full else DTYPE_BYTES[model.dtype]
    return plan.devices.count * weight_bytes(plan.spec, plan.load.quantization, model.double_quant, width)


def _sent(plan: "Plan") -> int:
    return sum(one.bytes for one in plan.sent)


def _sending_seconds(plan: "Plan") -> float:
    return _sent(plan) / plan.devices.link.bandwidth if plan.devices.link else 0.0


def _speed_up(plan: "Plan", alone: "Plan | None") -> float | None:
    return alone.time.likely / plan.time.likely if alone and alone.time and plan.time else None


def _listed(names: "list[str] | tuple[str, ...]") -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
