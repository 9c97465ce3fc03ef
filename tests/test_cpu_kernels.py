"""Kernels of a processor: what the models' own code gives, forward and backward, in every family that has kernels."""

import pytest
import torch
from test_kernels import CONFIGS, COVERED, adapted, assert_same, loss_and_gradients, made

from lorakit.model.cpu_kernels import cpu_kernels
from lorakit.model.kernels import use_kernels


@pytest.mark.parametrize("name", COVERED)
def test_a_processors_kernels_are_the_models_own_forward_and_backward(name):
    model = adapted(made(CONFIGS[name]))
    own = loss_and_gradients(model)
    with use_kernels(model, cpu_kernels()) as replaced:
        assert replaced["rms_norm"]
        assert_same(own, loss_and_gradients(model), tolerance=3e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_weights_of_norms_may_be_trained(name):
    model = made(CONFIGS[name])  # every weight is
    own = loss_and_gradients(model)
    with use_kernels(model, cpu_kernels()):
        assert_same(own, loss_and_gradients(model), tolerance=3e-5)


def test_a_gated_layer_keeps_its_two_inputs_alone():
    kept = []
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        cpu_kernels().swiglu(gate, up)
    assert [tensor.data_ptr() for tensor in kept] == [gate.data_ptr(), up.data_ptr()]
