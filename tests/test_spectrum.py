"""Signal-to-noise ratios of weights: what they find, where they are kept, what is chosen by them."""

import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lorakit.atomic_io import cache_folder
from lorakit.checksums import decode_line
from lorakit.model.adapters.weight_init import dequantized_weight, signal_to_noise, signal_to_noise_ratios
from lorakit.model.resolve import resolve_base
from lorakit.model.targets import select_targets
from lorakit.progress import Silent
from lorakit.recipe.schema import Adapter


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class Counting(Silent):
    """A listener that knows how much work its bars were told of."""

    def __init__(self):
        self.work = 0

    def bar(self, label, total, done=0, unit=""):
        self.work += total
        return super().bar(label, total, done, unit)


@pytest.fixture
def base(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    return resolve_base(str(tiny_base), "main", Silent())


def test_of_matrices_of_equal_size_the_one_with_a_planted_signal_has_the_higher_ratio():
    pure = noise(96, 64) / torch.linalg.matrix_norm(noise(96, 64), 2)
    left, right = torch.linalg.qr(noise(96, 8))[0], torch.linalg.qr(noise(64, 8))[0]
    planted = left @ right.T + 0.1 * pure
    planted = planted / torch.linalg.matrix_norm(planted, 2)
    assert signal_to_noise(planted) > 1.5 * signal_to_noise(pure)


def test_the_ratio_is_the_formula_of_the_paper():
    values = torch.tensor([1.0, 1.1, 1.2, 1.3, 50.0, 70.0, 90.0, 3.0])
    sigma = (values.quantile(0.75) - values.quantile(0.25)) / 1.349
    threshold = sigma * (1 + math.sqrt(8 / 16))
    loud = values[values > threshold]
    expected = loud.sum() / values[values <= threshold].sum() / values.max()
    left, right = (torch.linalg.qr(noise(side, side))[0] for side in (8, 16))
    weight = left @ torch.cat([values.diag(), torch.zeros(8, 8)], 1) @ right
    assert 0 < len(loud) < 8
    assert signal_to_noise(weight) == pytest.approx(float(expected), rel=1e-4)
    assert signal_to_noise(weight.T) == pytest.approx(float(expected), rel=1e-4)


def test_a_matrix_without_noise_and_one_of_zeros_have_ratios_too():
    assert signal_to_noise(torch.eye(8)) == math.inf
    assert signal_to_noise(torch.zeros(8, 4)) == 0.0


def test_experts_have_the_mean_of_their_ratios():
    experts = torch.stack([noise(32, 16), noise(16, 32).T.contiguous()])
    apart = [signal_to_noise(expert) for expert in experts]
    assert signal_to_noise(experts) == pytest.approx(sum(apart) / 2)


def test_weights_are_read_as_the_model_holds_them():
    model = torch.nn.Module()
    model.plain, model.conv = torch.nn.Linear(64, 32, bias=False), Conv1D(8, 4)
    model.experts = torch.nn.Parameter(noise(2, 4, 6))
    model.int8, model.nf4 = Linear8bitLt(64, 32, False, has_fp16_weights=False), Linear4bit(64, 32, False)
    weight = model.plain.weight.detach()
    model.int8.load_state_dict({"weight": weight})
    model.nf4.load_state_dict({"weight": weight})
    model.to("cpu")
    assert (
        dequantized_weight(model, "experts") is model.experts and dequantized_weight(model, "conv") is model.conv.weight
    )
    for name, largest in (("plain", 0.0), ("int8", 0.01), ("nf4", 0.2)):
        held = dequantized_weight(model, name)
        assert held.shape == weight.shape and (held - weight).norm() <= largest * weight.norm()
    assert not torch.is_floating_point(model.int8.weight) and not torch.is_floating_point(model.nf4.weight)


def test_ratios_are_computed_once_for_a_base_and_a_quantization(base, tiny_base):
    model, counting = AutoModelForCausalLM.from_pretrained(tiny_base), Counting()
    q_proj, o_proj = (f"model.layers.0.self_attn.{name}" for name in ("q_proj", "o_proj"))
    first = signal_to_noise_ratios(model, [q_proj], base, "none", counting)
    assert first == {q_proj: signal_to_noise(model.get_submodule(q_proj).weight)} and counting.work == 1
    assert (
        signal_to_noise_ratios(model, [q_proj, o_proj], base, "none", counting)[q_proj] == first[q_proj]
        and counting.work == 2
    )
    signal_to_noise_ratios(model, [q_proj], base, "nf4", counting)
    assert counting.work == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": "b"}', '{"model.layers.0.mlp.up_proj": null}', "\udcff"])
def test_a_damaged_file_of_the_cache_is_made_anew(base, tiny_base, damage):
    model, path = AutoModelForCausalLM.from_pretrained(tiny_base), "model.layers.0.mlp.up_proj"
    ratios = signal_to_noise_ratios(model, [path], base, "none", Silent())
    (file,) = (cache_folder() / "spectrum").iterdir()
    file.write_bytes(damage.encode(errors="surrogateescape"))
    assert signal_to_noise_ratios(model, [path], base, "none", Silent()) == ratios == decode_line(file.read_text())


def test_a_figure_of_the_cache_that_changed_in_place_is_computed_again(base, tiny_base):
    model, path = AutoModelForCausalLM.from_pretrained(tiny_base), "model.layers.0.mlp.up_proj"
    ratios = signal_to_noise_ratios(model, [path], base, "none", Silent())
    (file,) = (cache_folder() / "spectrum").iterdir()
    text = file.read_text()
    digit = text.index(".", text.index(": ")) + 1
    file.write_text(text[:digit] + str(9 - int(text[digit])) + text[digit + 1 :])
    assert signal_to_noise_ratios(model, [path], base, "none", Silent()) == ratios


def test_layers_chosen_by_spectrum_are_those_of_a_direct_computation(base, tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    settings = Adapter(targets="mlp", layers={"spectrum": 0.5})
    chosen = select_targets(
        model, settings, lambda paths: signal_to_noise_ratios(model, paths, base, "none", Silent())
    ).modules
    expected = set()
    for name in ("gate_proj", "up_proj", "down_proj"):
        both = [f"model.layers.{number}.mlp.{name}" for number in (0, 1)]
        expected.add(max(both, key=lambda path: signal_to_noise(model.get_submodule(path).weight)))
    assert set(chosen) == expected
