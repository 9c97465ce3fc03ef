"""Exports of adapters: what llama.cpp and servers make of them is what PEFT makes of the adapter that was trained."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from eval_runs import edit_json, make_run
from gguf_models import spm_base
from llama_server import next_log_probs
from peft import PeftModel
from peft_adapters import KINDS, lora, save_peft_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

from lorakit.export.conversion import run_converter
from lorakit.export.folded_adapter import bfloat16_loss, distance, scale_into_b
from lorakit.export.lorax import LORAX
from lorakit.export.serving import allowed_rank
from lorakit.export.vllm import VLLM
from lorakit.model.low_rank import LowRankFactors

IDS = [5, 9, 40, 77, 120, 33]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OVERRIDES = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}}
SCALES = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "overrides": OVERRIDES,
    "rslora with overrides": {"use_rslora": True, **OVERRIDES},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return spm_base(tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def base_gguf(base):
    path = base.parent / "base.gguf"
    run_converter("model", base, path, None, "--outtype", "f32")
    return path


def adapter_of(base, folder, **settings):
    return save_peft_adapter(base, folder, lora(**{"target_modules": ALL, **settings}))


def logits(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


def logits_at_alpha_over_rank(base, adapter):
    """What a server computes that reads r and lora_alpha of the configuration and nothing else of it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        path = name.removeprefix("base_model.model.").replace(".lora_A", "")
        model.get_parameter(path).data += config["lora_alpha"] / config["r"] * b @ tensors[name]
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


def export(lorakit, source, targets, output):
    code, out, err = lorakit("export", source, "--to", targets, "--output", output, "--json")
    assert code == 0, err
    exports = json.loads(out)["exports"]
    return {one["target"]: one for one in exports}, err


def check_of(facts, name):
    return next(check for check in facts["checks"] if check["name"] == name)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow) if kind != "overrides" else kind for kind in SCALES],
)
def test_llama_cpp_with_the_gguf_lora_predicts_what_peft_predicts(base, base_gguf, lorakit, tmp_path, kind):
    adapter = adapter_of(base, tmp_path / "tiny", **SCALES[kind])
    facts, _ = export(lorakit, adapter, "gguf-lora", tmp_path / "out")
    expected = logits(base, adapter)[-1].log_softmax(-1).numpy()
    file = tmp_path / "out" / "gguf-lora" / facts["gguf-lora"]["file"]
    predicted = next_log_probs(base_gguf, file, IDS, len(expected))
    assert abs(predicted - expected).max() < 2e-5
    assert abs(logits(base)[-1].log_softmax(-1).numpy() - expected).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rslora", "overrides"])
def test_the_adapter_as_it_is_would_be_scaled_wrong_by_llama_cpp(base, base_gguf, tmp_path, kind):
    adapter = adapter_of(base, tmp_path / "tiny", **SCALES[kind])
    run_converter("lora", adapter, tmp_path / "wrong.gguf", None, "--base", str(base))
    expected = logits(base, adapter)[-1].log_softmax(-1).numpy()
    predicted = next_log_probs(base_gguf, tmp_path / "wrong.gguf", IDS, len(expected))
    assert abs(predicted - expected).max() > 0.01


@pytest.mark.parametrize("kind", SCALES)
def test_alpha_over_rank_alone_gives_the_logits_of_peft(base, lorakit, tmp_path, kind):
    adapter = adapter_of(base, tmp_path / "tiny", **SCALES[kind])
    facts, _ = export(lorakit, adapter, "vllm,sglang,lorax", tmp_path / "out")
    expected = logits(base, adapter)
    for target, one in facts.items():
        folder, config = (
            tmp_path / "out" / target,
            json.loads((tmp_path / "out" / target / "adapter_config.json").read_text()),
        )
        assert one["weights"] == "adapter" and check_of(one, "scale")["holds"]
        assert config["lora_alpha"] == config["r"] and not config["rank_pattern"] and not config["alpha_pattern"]
        assert not config["use_rslora"] and config["init_lora_weights"] is True
        assert sorted(config["target_modules"]) == sorted(ALL)
        assert {
            tensor.shape[0]
            for name, tensor in load_file(folder / "adapter_model.safetensors").items()
            if ".lora_A." in name
        } == {config["r"]}
        assert (logits_at_alpha_over_rank(base, folder) - expected).abs().max() < 2e-5
        assert (logits(base, folder) - expected).abs().max() < 2e-5
    if kind != "lora":
        assert (logits_at_alpha_over_rank(base, adapter) - expected).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pissa", "eva", "adalora"])
def test_kinds_that_are_saved_as_lora_are_exported_as_they_were_trained(base, base_gguf, lorakit, tmp_path, kind):
    run = make_run(tmp_path, base, adapter={"kind": kind, "rank": 4, "alpha": 8}, train={"learning_rate": 0.02})
    facts, _ = export(lorakit, run.folder, "gguf-lora,vllm,lorax", tmp_path / "out")
    expected = logits(base, run.adapter)
    assert (logits(base) - expected).abs().max() > 0.01
    for target in ("vllm", "lorax"):
        assert (logits(base, tmp_path / "out" / target) - expected).abs().max() < 5e-5
        assert (logits_at_alpha_over_rank(base, tmp_path / "out" / target) - expected).abs().max() < 5e-5
    file = tmp_path / "out" / "gguf-lora" / facts["gguf-lora"]["file"]
    expected = expected[-1].log_softmax(-1).numpy()
    assert abs(next_log_probs(base_gguf, file, IDS, len(expected)) - expected).max() < 5e-5


def test_layers_that_an_adapter_lacks_are_there_as_zeros(base, lorakit, tmp_path):
    adapter = adapter_of(base, tmp_path / "tiny", target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    facts, _ = export(lorakit, adapter, "lorax", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "lorax" / "adapter_model.safetensors")
    for path in ("self_attn.q_proj", "mlp.down_proj"):
        zero, trained = (tensors[f"base_model.model.model.layers.{layer}.{path}.lora_B.weight"] for layer in (0, 1))
        assert not zero.any() and trained.any()
    assert "2 of them zeros" in check_of(facts["lorax"], "layers")["detail"]
    assert (logits(base, tmp_path / "out" / "lorax") - logits(base, adapter)).abs().max() < 2e-5


REFUSED = {
    "dora": "is DoRA",
    "head": "trained whole (lm_head)",
    "bias all": "holds trained biases",
    "lora_bias": "holds trained biases",
    "tokens": "embeddings of single tokens",
    "lora on embeddings": "adapts the embeddings (model.embed_tokens)",
    "lora on the head": "adapts the output head (lm_head)",
    "ia3": "is of PEFT's kind IA3",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_gguf_lora_cannot_hold_is_merged_first(base, lorakit, tmp_path, kind):
    adapter = save_peft_adapter(base, tmp_path / "tiny", KINDS[kind]())
    code, _, err = lorakit("export", adapter, "--to", "gguf-lora", "--output", tmp_path / "out")
    assert code == 2 and REFUSED[kind] in err and "Merge first: export gguf:q8_0" in err
    assert not (tmp_path / "out" / "gguf-lora").exists()


def test_servers_get_the_merged_model_of_what_they_cannot_take(base, lorakit, tmp_path):
    adapter = save_peft_adapter(base, tmp_path / "tiny", KINDS["dora"]())
    facts, said = export(lorakit, adapter, "vllm,sglang,lorax", tmp_path / "out")
    expected = logits(base, adapter)
    for target, limit in (("vllm", VLLM.parts), ("lorax", LORAX.parts), ("sglang", "srt/lora/lora.py")):
        folder, detail = tmp_path / "out" / target, check_of(facts[target], "weights")["detail"]
        assert facts[target]["weights"] == "merged" and "is DoRA" in detail and limit in detail
        assert json.loads((folder / "export.json").read_text())["merge_proof"]["top1_agreement"] > 0.99
        assert (logits(folder) - expected).abs().max() < 1e-3
        assert "# tiny for" in (folder / "README.md").read_text()
    assert "vLLM gets the merged model, since the adapter is DoRA" in said
    assert 'vllm serve "$PWD" --served-model-name tiny' in (tmp_path / "out" / "vllm" / "README.md").read_text()
    assert not (adapter / "merged" / "README.md").read_text().startswith("# tiny for")  # files are links, this is not
    assert (folder / "model.safetensors").samefile(adapter / "merged" / "model.safetensors")


def test_a_rank_beyond_what_a_server_takes_leads_to_the_merged_model(base, lorakit, tmp_path):
    adapter = adapter_of(base, tmp_path / "tiny", r=200, target_modules=["q_proj"])
    facts, _ = export(lorakit, adapter, "vllm,sglang,lorax", tmp_path / "out")
    assert facts["vllm"]["max_lora_rank"] == 256 and facts["vllm"]["rank"] == 200
    assert facts["sglang"]["max_lora_rank"] == 200
    assert facts["lorax"]["weights"] == "merged"
    assert "has rank 200, and the largest is 128" in check_of(facts["lorax"], "weights")["detail"]


def test_modules_that_a_server_does_not_adapt_lead_to_the_merged_model(base, lorakit, tmp_path):
    phi = Path(shutil.copytree(base, tmp_path / "phi"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    Phi3ForCausalLM(Phi3Config(vocab_size=400, max_position_embeddings=256, **sizes, **ids)).save_pretrained(phi)
    adapter = adapter_of(phi, tmp_path / "tiny", target_modules=["qkv_proj"])
    facts, _ = export(lorakit, adapter, "vllm,lorax", tmp_path / "out")
    assert facts["vllm"]["weights"] == "adapter" and facts["lorax"]["weights"] == "merged"
    assert "the adapter adapts qkv_proj" in check_of(facts["lorax"], "weights")["detail"]


@pytest.mark.parametrize(
    ("rank", "vllm", "lorax"), [(1, 1, 16), (9, 16, 16), (64, 64, 64), (257, 320, None), (513, None, None)]
)
def test_ranks_are_rounded_up_to_what_a_server_takes(rank, vllm, lorax):
    assert allowed_rank(VLLM, rank) == vllm and allowed_rank(LORAX, rank) == lorax


@pytest.mark.slow
def test_commands_name_the_model_and_its_files(base, lorakit, tmp_path):
    adapter = adapter_of(base, tmp_path / "tiny")
    export(lorakit, adapter, "vllm,sglang,lorax,gguf-lora", tmp_path / "out")
    vllm, sglang, lorax, gguf = (
        (tmp_path / "out" / name / "README.md").read_text() for name in ("vllm", "sglang", "lorax", "gguf-lora")
    )
    assert (
        'BASE=...  # the folder of the base model, base\nvllm serve "$BASE"' in vllm
        and str(base) not in vllm
        and "--enable-lora --max-lora-rank 8" in vllm
    )
    assert '--lora-modules tiny="$PWD"' in vllm and '"model": "tiny"' in vllm
    assert "lorakit eval RUN http://127.0.0.1:8000/v1#tiny" in vllm
    assert (
        "--chat-template chat_template.jinja" in vllm and (tmp_path / "out" / "vllm" / "chat_template.jinja").is_file()
    )
    assert '--lora-paths tiny="$PWD"' in sglang and '"model": "base:tiny"' in sglang
    assert "--lora-target-modules down_proj gate_proj k_proj o_proj q_proj up_proj v_proj" in sglang
    assert 'lorax-launcher --model-id "$BASE"' in lorax and '"adapter_source": "local"' in lorax
    assert "--lora tiny-lora-F32.gguf" in gguf and "--chat-template-file chat_template.jinja" in gguf
    config = json.loads((tmp_path / "out" / "lorax" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (tmp_path / "out" / "lorax" / "chat_template.jinja").read_text()


def request_in(folder):
    """The body of the request in a README, as a shell hands it to curl."""
    body = (folder / "README.md").read_text().partition("  -d ")[2].partition("\n```")[0]
    return json.loads(subprocess.run(["bash", "-c", f"printf %s {body}"], cwd=folder, capture_output=True).stdout)


def test_requests_name_the_stop_tokens_that_the_base_does_not(base, lorakit, tmp_path):
    plain = Path(shutil.copytree(base, tmp_path / "plain"))
    for name in ("config.json", "generation_config.json"):
        edit_json(plain / name, eos_token_id=2)
    edit_json(plain / "tokenizer_config.json", eos_token="</s>")
    adapter = adapter_of(plain, tmp_path / "it's tiny", target_modules=["q_proj"])
    facts, said = export(lorakit, adapter, "vllm,lorax", tmp_path / "out")
    stop = check_of(facts["vllm"], "stop tokens")
    assert not stop["holds"] and "do not name <|im_end|>" in stop["detail"] and "do not name <|im_end|>" in said
    number = AutoTokenizer.from_pretrained(plain).convert_tokens_to_ids("<|im_end|>")
    vllm, lorax = (request_in(tmp_path / "out" / name) for name in ("vllm", "lorax"))
    assert vllm["model"] == "it-s-tiny" and vllm["stop_token_ids"] == [number]
    assert lorax["model"] == str(tmp_path / "out" / "lorax") and lorax["stop"] == ["<|im_end|>"]


def test_factors_that_cancel_are_written_so_that_bfloat16_loses_little():
    torch.manual_seed(0)
    a, b = torch.randn(4, 64), torch.randn(48, 4)
    moved_a, moved_b = a + 0.01 * torch.randn_like(a), b + 0.01 * torch.randn_like(b)
    pissa = LowRankFactors(torch.cat([moved_a, a]), torch.cat([moved_b, -b], dim=1), scale=0.5)
    assert bfloat16_loss(pissa) > 0.05
    written = scale_into_b(pissa)
    assert written.scale == 1 and written.rank == 8
    assert bfloat16_loss(written) < 0.005 and distance(pissa, written) < 1e-6


def test_numbers_that_are_not_finite_are_not_exported(base, lorakit, tmp_path):
    adapter = adapter_of(base, tmp_path / "tiny")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    for target in ("gguf-lora", "vllm"):
        code, _, err = lorakit("export", adapter, "--to", target, "--output", tmp_path / "out")
        assert code == 2 and "not finite" in err and not (tmp_path / "out" / target).exists()


def test_a_whole_model_is_served_whole_and_has_no_gguf_lora(base, lorakit, tmp_path):
    code, _, err = lorakit("export", base, "--to", "gguf-lora", "--output", tmp_path / "out")
    assert code == 2 and "takes an adapter, and this is a whole model" in err
    facts, _ = export(lorakit, base, "vllm", tmp_path / "out")
    assert facts["vllm"]["weights"] == "merged" and (logits(tmp_path / "out" / "vllm") - logits(base)).abs().max() == 0


def test_an_adapter_that_makes_up_for_quantization_stays_with_its_quantized_base(base, lorakit, tmp_path):
    run = make_run(tmp_path, base, adapter={"kind": "loftq", "rank": 4, "alpha": 8}, train={"steps": 2})
    code, _, err = lorakit("export", run.folder, "--to", "gguf-lora", "--output", tmp_path / "out")
    assert code == 2 and "makes up for what nf4 takes away" in err
    facts, _ = export(lorakit, run.folder, "vllm", tmp_path / "out")
    assert facts["vllm"]["weights"] == "merged"
