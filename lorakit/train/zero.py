"""ZeRO (Rajbhandari et al., arXiv 1910.02054), by DeepSpeed, called directly and not through accelerate.

zero-2: every process holds the whole model. Of the sums of the gradients, of a second copy of the trained weights and
of the optimizer's states each keeps a part; it computes its part of a step, and all gather the new weights.

zero-3: each holds a part of the base's weights too. A module's are gathered when it computes and given back after it;
embedding and head stay gathered for the whole pass, however often it calls them. What belongs to an adapter stays
whole, as under fsdp, since it is small and read outside of its modules' forward.

DeepSpeed makes a trained weight's parts as soon as it has an optimizer: until then its engine only gathers weights.
Types stay those of the recipe: its fp16 and bf16 modes, which round the trained weights, are off, and half precision is
torch's autocast as everywhere in lorakit.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorakit.distributed.processes import is_first, rank, refuse, world_size
from lorakit.errors import UserError
from lorakit.model.fsdp import Root, adapter_parameters
from lorakit.model.loss import causal_of

# Numbers of gradients that are added up in one message; DeepSpeed reserves the memory for it.
_BUCKET = 1 << 24
# Weights of at most so many numbers, such as those of norms, stay whole in stage 3: DeepSpeed's own default.
_SMALL = 100_000
_MOMENTS = ("exp_avg", "exp_avg_sq")  # what torch's AdamW keeps for each number


def _in_a_tuple(function: Any, *arguments: Any, **named: Any) -> tuple[Any]:
    """In a tuple, DeepSpeed's hooks bear a result that is no tensor."""
    return (function(*arguments, **named),)


class ZeroPass:
    """Runs the passes over a model through DeepSpeed. `linear`: torch's own function, of before."""

    def __init__(self, stage: int, model: nn.Module, device: torch.device) -> None:
        self.stage, self.model, self.device, self.linear = stage, model, device, nn.functional.linear
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # In stage 2 DeepSpeed has to do with the trained weights alone.
        self.root = Root(model if stage == 3 else nn.ParameterList(self.trained))
        self.whole = adapter_parameters(model) if stage == 3 else set()
        self.engine: Any = None
        self.optimizer: Any = None

    def __call__(self, function: Any, *arguments: Any, **named: Any) -> Any:
        through = self.engine if self.optimizer is not None and torch.is_grad_enabled() else self.root
        with _as_one_device():
            return through(_in_a_tuple, function, *arguments, **named)[0]

    def initialize(self, optimizer: Any = None, clip: float = 0.0) -> Any:
        """DeepSpeed's engine around the model; without an optimizer it only gathers weights."""
        import deepspeed

        if self.engine is not None:
            self.engine.destroy()  # takes its hooks off the modules
        self.optimizer = optimizer
        with _as_one_device():
            self.engine = deepspeed.initialize(model=self.root, optimizer=optimizer, config=_config(self.stage, clip))[
                0
            ]
        if self.stage == 3:
            _keep_gathered(self.engine, self.whole)
        return self.engine


def replicate(model: Any, device: torch.device) -> ZeroPass:
    """zero-2: the model is held whole; its passes are counted by DeepSpeed once there is an optimizer."""
    _prepare_deepspeed(device)
    return ZeroPass(2, model, device)


def shard(model: Any, device: torch.device) -> ZeroPass:
    """zero-3: leave to this process its part of the base's weights, on `device`, one after the other, and give the
    function through which every pass must run from now on. All processes call it."""
    import deepspeed

    _prepare_deepspeed(device)
    _refuse_buffers(model)
    through = ZeroPass(3, model, device)
    with _as_one_device():
        deepspeed.zero.Init(module=through.root, config_dict_or_path=_config(3, 0.0))
    through.root.to(device)  # buffers, and what bitsandbytes keeps beside its weights
    for parameter in _outside_of_blocks(causal_of(model)):
        deepspeed.zero.register_external_parameter(through.root, parameter)
    through.initialize()
    return through


def _outside_of_blocks(causal: Any) -> list[nn.Parameter]:
    """The weights of embedding and head, once where they are tied."""
    ends = (causal.get_input_embeddings(), causal.get_output_embeddings())
    return list(dict.fromkeys(parameter for end in ends if end is not None for parameter in end.parameters()))


def _refuse_buffers(model: Any) -> None:
    if any(hasattr(module, "qweight") for module in model.modules()):
        reason = "the weights of GPTQ and AWQ checkpoints are buffers, which DeepSpeed does not share out"
        refuse(UserError(f"train.sharding: {reason}. Write none or zero-2."))


def _prepare_deepspeed(device: torch.device) -> None:
    """Before it is imported: the device that the recipe trains on."""
    os.environ["DS_ACCELERATOR"] = device.type
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # functions that DeepSpeed calls
    from deepspeed.ops import __compatible_ops__

    # It would be compiled for a minute, to add up on processors by shared memory; torch.distributed does.
    __compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def _as_one_device() -> Iterator[None]:
    """DeepSpeed takes the device of this number, and every process sees one. Outside of this the variable is hidden:
    accelerate would join what it takes for a launcher's processes."""
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]


def _config(stage: int, clip: float) -> dict[str, Any]:
    shared: dict[str, Any] = {"stage": stage, "reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET}
    if stage == 3:
        shared["stage3_param_persistence_threshold"] = _SMALL
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for one; rows are ours
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": shared,
    }


def _keep_gathered(engine: Any, parameters: set[nn.Parameter]) -> None:
    """Leave some weights whole on every process from now on, as DeepSpeed does with those under a size."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    persistent = offload.persistent_parameters
    listed = set(persistent)
    for parameter in offload.module.parameters():
        if parameter in parameters and parameter not in listed:
            parameter.ds_persist = True
            persistent.append(parameter)
    if persistent:
        persistent[0].all_gather(persistent)


def close(through: ZeroPass) -> None:
    """Undo what DeepSpeed has changed outside of the model."""
    nn.functional.linear = through.linear


class ZeroOptimizer(torch.optim.Optimizer):
    """What the trainer steps in place of AdamW, which DeepSpeed steps on this process's part. Its groups are AdamW's
    with the whole weights, its state dict is AdamW's with whole states, and `norm` is that of the step's gradient."""

    def __init__(self, adamw: Any, through: ZeroPass, clip: float, moves_ranks: bool) -> None:
        super().__init__([dict(group) for group in adamw.param_groups], adamw.defaults)
        self._adamw, self._through, self._moves_ranks = adamw, through, moves_ranks
        self._weights = [weight for group in self.param_groups for weight in group["params"]]
        self._stage = through.stage
        self.norm = torch.zeros(())
        self._engine = through.initialize(adamw, clip)
        self._engine.set_gradient_accumulation_boundary(False)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one pass to what this process has of their sum. DeepSpeed divides by the processes."""
        loss = loss * world_size()
        if self._stage == 2:
            loss = self._engine(_in_a_tuple, torch.clone, loss)[0]  # a pass to DeepSpeed, which hooks on to its result
        self._engine.backward(loss)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clip and step; all weights are whole again where they were. Afterwards a scheduler of ranks finds the whole
        gradients at the weights, and what it changes there counts from the next step on."""
        if self._moves_ranks:
            for weight in self._weights:
                put(weight, weight.data)
        for ours, theirs in zip(self._filled_groups(), self._adamw.param_groups, strict=True):
            theirs.update({name: value for name, value in ours.items() if name != "params"})
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.optimizer.finalize_gradient_accumulation_boundary()
        gradients = [_whole_gradient(weight) for weight in self._weights] if self._moves_ranks else []
        self._engine.step()
        self._engine.set_gradient_accumulation_boundary(False)
        self.norm.fill_(float(self._engine.get_global_grad_norm()))
        for weight, gradient in zip(self._weights, gradients, strict=False):
            weight.grad = gradient

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: DeepSpeed drops the gradients when it has stepped."""

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, with whole states, on the first process; all call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states: dict[int, dict[str, Any]] = {}
        own = self._own_states()
        if own:
            self._link_states()
            for number, weight in enumerate(self._weights):
                moments = {name: safe_get_full_optimizer_state(weight, name) for name in _MOMENTS}
                if is_first():
                    states[number] = {"step": own[0]["step"].clone()} | {n: m.cpu() for n, m in moments.items()}
        return super().state_dict() | {"state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from AdamW's own state dict, or another process's of this kind: each takes its parts."""
        super().load_state_dict(state_dict | {"state": {}})
        if not state_dict["state"]:
            return
        step = next(iter(state_dict["state"].values()))["step"]
        for flat in self._flat_weights():
            moments = {name: torch.zeros_like(flat) for name in _MOMENTS}
            self._adamw.state[flat] = {"step": step.to(flat.device, torch.float32, copy=True), **moments}
        self._link_states()
        for number, weight in enumerate(self._weights):
            for name in _MOMENTS:
                _put_moment(weight, name, state_dict["state"][number][name].to(self._through.device))

    def _filled_groups(self) -> list[dict[str, Any]]:
        """DeepSpeed leaves out groups without weights."""
        return [group for group in self.param_groups if group["params"]]

    def _flat_weights(self) -> list[Tensor]:
        optimizer = self._engine.optimizer
        if self._stage == 2:
            return list(optimizer.single_partition_of_fp32_groups)
        return list(optimizer.fp32_partitioned_groups_flat)

    def _own_states(self) -> list[dict[str, Any]]:
        states = self._adamw.state
        return [states[flat] for flat in self._flat_weights() if states.get(flat)]

    def _link_states(self) -> None:
        """DeepSpeed 0.19.8 finds the states of a weight in stage 2 only in the first group that has been stepped."""
        if self._stage == 2:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _whole_gradient(weight: nn.Parameter) -> Tensor:
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(weight).clone()


def _put_moment(weight: nn.Parameter, name: str, moment: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if hasattr(weight, "ds_id"):
        safe_set_local_optimizer_state(weight, _own_part(moment, weight), name)
    else:
        safe_set_full_optimizer_state(weight, moment, name)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a weight that is shared out; of others the weight itself."""
    return tensor.ds_tensor if hasattr(tensor, "ds_id") and not tensor.ds_persist else tensor


def whole(tensor: Tensor) -> Tensor:
    """The weight of which every process holds a part; itself where all hold it whole. All processes call it."""
    if local(tensor) is tensor:
        return tensor
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.data.clone()


@torch.no_grad()
def put(weight: nn.Parameter, value: Tensor) -> None:
    """Give a weight the numbers of a whole tensor, in all places where this process has them; nothing is sent."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    value = value.to(weight.device)
    if not hasattr(weight, "ds_id"):
        weight.data.copy_(value)
        safe_set_full_fp32_param(weight, weight.data)
        return
    part = _own_part(value, weight)
    weight.ds_tensor.data.copy_(part)
    if weight.numel():
        weight.data.copy_(value)
    if hasattr(weight, "_z3_optimizer"):
        safe_set_local_fp32_param(weight, part)


def _own_part(value: Tensor, weight: nn.Parameter) -> Tensor:
    """DeepSpeed cuts a weight's numbers into parts of one length, the last one filled up."""
    size = weight.ds_tensor.numel()
    flat = pad(value.detach().flatten(), (0, size * world_size() - value.numel()))
    return flat.narrow(0, size * rank(), size)
