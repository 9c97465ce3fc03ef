"""Planning for several devices: what each holds and sends, what auto takes, and what more of them are worth."""

import json
import re
from dataclasses import replace

import pytest
from conftest import rows_of, write_rows
from test_auto import LLAMA_8B, recipe

from lorakit.errors import UserError
from lorakit.hardware.devices import Devices, device_here, devices_of
from lorakit.hardware.gpus import GPUS, find_gpu, split_count
from lorakit.hardware.links import LINKS, default_link, find_link
from lorakit.hardware.machine import Machine, machine_with
from lorakit.model.quantization_config import CheckpointQuantization
from lorakit.plan.advice import collect_advice
from lorakit.plan.auto import resolve_auto
from lorakit.plan.changes import memory_uses
from lorakit.plan.estimate import RowEstimate, plan_run
from lorakit.plan.memory import size_run
from lorakit.recipe.schema import Adapter, Model, Train

GIB = 1 << 30
PCIE = find_link("pcie-4")
SETTLED = {"micro_batch": 2, "gradient_checkpointing": True, "learning_rate": 1e-4, "optimizer": "adamw"}
# Llama 3.1 8B: 32 blocks of 4,096 with 1,024 wide keys and values and 14,336 in between; embeddings and head apart.
BLOCK = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096
ROOT = 2 * 128256 * 4096 + 4096
TRAINED = 41_943_040  # LoRA of rank 16 on all linear layers, as PEFT counts it
ROWS = RowEstimate(2000, 200, 1024, 300.0, 0.5, 0.0, "as the test says")


def sized(count: int, sharding: str, adapter: Adapter | None = None, model: Model | None = None, **train):
    settings = recipe(
        Train(**SETTLED | train | {"sharding": sharding}), adapter, model or Model(base="a/b", dtype="bfloat16")
    )
    return size_run(settings, LLAMA_8B, LLAMA_8B.spec, True, Devices(count, PCIE if count > 1 else None))


def memory(count: int, sharding: str, **changes):
    return sized(count, sharding, **changes).memory(2, 1024, True)


def sent(count: int, sharding: str, micro: int = 2, **changes) -> dict[str, int]:
    return {one.collective: one.bytes for one in sized(count, sharding, **changes).transfers(micro, 1024, True)}


def test_a_device_under_fsdp_holds_its_part_of_the_base_and_a_few_blocks_whole():
    one, four = memory(1, "none"), memory(4, "fsdp")
    assert one.weights == 2 * (32 * BLOCK + ROOT) and four.weights == one.weights / 4
    assert four.gathered == 2 * ROOT + 2 * 2 * BLOCK and one.gathered == 0
    for component in ("adapter", "gradients", "optimizer", "activations", "logits"):
        assert getattr(four, component) == getattr(one, component), component


def test_the_scales_of_quantized_weights_are_whole_on_every_device():
    nf4 = Model(base="a/b", dtype="bfloat16", quantization="nf4", double_quant=False)
    linear = 32 * (BLOCK - 2 * 4096)
    scales, rest = 4 * linear / 64, 2 * (ROOT + 32 * 2 * 4096)
    found = memory(4, "fsdp", model=nf4)
    assert found.weights == pytest.approx((linear / 2 + rest) / 4 + scales, rel=1e-6)
    assert found.gathered == pytest.approx(2 * ROOT + 2 * (linear / 2 / 32 + 2 * 2 * 4096), rel=1e-6)


def test_one_device_holds_the_same_whatever_is_shared_out():
    for words in ({}, {"adapter": Adapter(kind="none")}):
        alike = {tuple(memory(1, word, **words).components.values()) for word in ("none", "fsdp", "zero-2", "zero-3")}
        assert len(alike) == 1
        assert sent(1, "fsdp", **words) == {}


@pytest.mark.parametrize("sharding", ["none", "fsdp", "zero-2", "zero-3"])
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_more_devices_hold_no_more_each_and_what_is_shared_out_holds_less(sharding, kind):
    adapter = Adapter(kind=kind)
    totals = [memory(count, sharding, adapter=adapter).total for count in (2, 3, 4, 8, 64)]
    assert totals == sorted(totals, reverse=True)
    whole = memory(8, "none", adapter=adapter).total
    assert memory(8, sharding, adapter=adapter).total <= whole
    rows = {count: {"batch_size": 2 * count, "adapter": adapter} for count in (2, 4, 8, 64)}  # 2 rows on each
    sizes = [sum(sent(count, sharding, **some).values()) for count, some in rows.items()]
    assert sizes == sorted(sizes)


def test_full_fine_tuning_under_fsdp_shares_out_gradients_and_states_too():
    full, numbers = Adapter(kind="none"), 32 * BLOCK + ROOT
    found = memory(4, "fsdp", adapter=full)
    assert found.weights == numbers and found.optimizer == 2 * numbers
    assert found.gradients == numbers + 2 * 4 * ROOT  # those of embeddings and head are whole until the pass ends
    whole = memory(4, "none", adapter=full)
    assert (whole.weights, whole.optimizer) == (4 * numbers, 8 * numbers)


def test_what_is_sent_is_what_a_ring_sends():
    gradients = 4 * TRAINED
    assert sent(4, "none") == {"all-reduce": round(2 * 3 / 4 * gradients)}
    assert sent(2, "none") == {"all-reduce": gradients}
    # 16 rows on 4 devices are 4 each, in 2 micro-batches: blocks are gathered forward and backward, the rest once.
    assert sent(4, "fsdp")["all-gather"] == round(2 * 3 / 4 * 2 * (ROOT + 2 * 32 * BLOCK))
    assert sent(4, "fsdp", micro=4)["all-gather"] == round(3 / 4 * 2 * (ROOT + 2 * 32 * BLOCK))
    assert sent(4, "fsdp")["all-reduce"] == round(2 * 3 / 4 * gradients)
    # DeepSpeed sums after each of the two micro-batches, and brings the new weights together after the step.
    assert sent(4, "zero-2") == {"reduce-scatter": round(3 / 2 * gradients), "all-gather": round(3 / 4 * gradients)}


def test_blocks_below_the_first_trained_one_are_gathered_once():
    upper = Adapter(layers="16-31")
    assert sent(4, "fsdp", adapter=upper)["all-gather"] == round(2 * 3 / 4 * 2 * (ROOT + 1.5 * 32 * BLOCK))


def test_a_device_has_no_more_rows_than_its_part_of_the_step():
    train = Train(batch_size=18)
    settled, choices = resolve_auto(recipe(train), machine_with(find_gpu("H200")), LLAMA_8B, devices=Devices(4, PCIE))
    reasons = {choice.path: choice.reason for choice in choices}
    assert settled.train.micro_batch == 5 and "a device's part of the batch fits" in reasons["train.micro_batch"]


@pytest.mark.parametrize(
    ("gibibytes", "count", "word", "said"),
    [
        (24, 1, "none", "one device"),
        (24, 4, "none", "every device holds the whole base: at least 17.0 GiB, of 22.1 GiB"),
        (16, 4, "fsdp", "with the whole base on every device at least 17.0 GiB, of 14.7 GiB"),
        (16, 2, "fsdp", "with a part on each 12."),
        (8, 2, "fsdp", "with a part on each"),
    ],
)
def test_the_base_is_shared_out_only_where_it_has_to_be(gibibytes, count, word, said):
    machine = Machine("cuda", "a GPU", gibibytes * GIB, bfloat16=True)
    settled, choices = resolve_auto(recipe(), machine, LLAMA_8B, devices=devices_of(machine, count))
    assert settled.train.sharding == word
    assert said in {choice.path: choice.reason for choice in choices}["train.sharding"]


def test_weights_that_are_buffers_are_not_shared_out():
    stored = CheckpointQuantization("gptq", "kept", reversible=False, bits=4)
    facts, machine = replace(LLAMA_8B, stored=stored), Machine("cuda", "a GPU", 4 * GIB, bfloat16=True)
    settled, _ = resolve_auto(recipe(), machine, facts, devices=Devices(4, PCIE))
    assert settled.train.sharding == "none"
    with pytest.raises(UserError, match="weights of a GPTQ or AWQ checkpoint are buffers"):
        resolve_auto(recipe(Train(sharding="fsdp")), machine, facts, devices=Devices(4, PCIE))


def planned(count: int, link: str = "pcie-4", card: str = "RTX 4090", **train):
    machine = machine_with(find_gpu(card))
    settings = recipe(Train(**{"sharding": "none"} | train), model=Model(base="a/b", quantization="nf4"))
    return plan_run(settings, LLAMA_8B, ROWS, machine, 1.0, devices_of(machine, count, find_link(link)))


def test_larger_micro_batches_are_advised_up_to_a_devices_part_of_the_step():
    advised = {change.key: change.value for change in memory_uses(planned(4, batch_size=8, micro_batch=1))}
    assert advised["train.micro_batch"] == 2
    assert "train.micro_batch" not in {change.key for change in memory_uses(planned(4, batch_size=8, micro_batch=2))}


def test_time_is_computing_and_what_of_sending_it_does_not_hide():
    whole, shared = planned(4), planned(4, sharding="fsdp")
    steps = whole.steps
    assert whole.time.likely == pytest.approx(whole.computing + steps * whole.sent[0].bytes / PCIE.bandwidth)
    reduced = shared.sent[-1].bytes / PCIE.bandwidth
    assert shared.time.likely == pytest.approx(shared.computing + steps * reduced)  # gathering hides behind computing
    slow = planned(4, "10gb", sharding="fsdp")
    seconds = sum(one.bytes for one in slow.sent) / find_link("10gb").bandwidth
    assert slow.time.likely == pytest.approx(steps * seconds) and slow.time.likely > 10 * shared.time.likely


def test_devices_share_out_computing_and_each_is_paid_for():
    one, four = planned(1), planned(4)
    assert 3.2 < one.time.likely / four.time.likely <= 4  # each dequantizes the whole base
    assert four.price.likely == pytest.approx(4 * four.time.likely / 3600)
    # 16 rows on 3 devices: one has 6 of them, and the others wait for it. All dequantize the weights once a step.
    assert planned(3).computing / planned(4).computing == pytest.approx(6 / 4, rel=0.1)


def test_processes_of_a_processor_share_its_cores_and_its_memory(monkeypatch):
    cpu = Machine("cpu", "a processor", 16 * GIB, bfloat16=False)
    monkeypatch.setattr("lorakit.hardware.devices.this_machine", lambda: cpu)
    assert device_here(2).memory == 8 * GIB and devices_of(cpu, 2).link.name == "processor"
    small = recipe(Train(batch_size=16, micro_batch=2, gradient_checkpointing=True, sharding="none"))
    alone, two = (
        plan_run(small, LLAMA_8B, replace(ROWS, held_out=0), cpu, devices=devices_of(cpu, count)) for count in (1, 2)
    )
    assert two.computing == pytest.approx(alone.computing, rel=0.02)


def test_links_are_found_as_people_write_them():
    names = {"NVLink 4": "nvlink-4", "pcie 5.0 x16": "pcie-5", "PCIe4": "pcie-4", "100 Gb/s InfiniBand": "100gb"}
    names |= {"25GbE": "25gb", "10 Gbit Ethernet": "10gb", "400Gb": "400gb", "pcie-5-x8": "pcie-5-x8"}
    for text, name in names.items():
        assert find_link(text).name == name, text
    assert find_link("nvlink", find_gpu("H200")).name == "nvlink-4"
    assert find_link("nvlink", find_gpu("RTX 3090")).name == "nvlink-bridge"
    assert find_link("pcie", find_gpu("RTX 5060 Ti")).name == "pcie-5-x8"
    with pytest.raises(UserError, match=r"--link: 'pcie-6' is not a known link. Did you mean pcie-\d"):
        find_link("pcie-6")
    assert all(link.source and link.bandwidth >= 1e9 for link in LINKS)


def test_every_card_has_a_link():
    found = {card.name: default_link(card).name for card in GPUS}
    assert (found["H100 SXM"], found["A100 80GB"], found["B200"]) == ("nvlink-4", "nvlink-3", "nvlink-5")
    assert (found["RTX 3090"], found["L40S"], found["RTX 5090"]) == ("pcie-4", "pcie-4", "pcie-5")
    assert (found["T4"], found["H100 PCIe"], found["RTX 4060"]) == ("pcie-3", "pcie-5", "pcie-4-x8")


def test_a_number_of_cards_is_read_before_the_name():
    for text, count, card in (("4x RTX 4090", 4, "RTX 4090"), ("2 x 24GB", 2, "24GB"), ("8×H100", 8, "H100")):
        assert split_count(text) == (count, card)
    for text in ("RTX 4090", "24GB", "4090", "0x T4"):
        assert split_count(text) == (None, text)


def test_devices_without_rows_and_devices_that_wait_are_told():
    def notes(plan, fewer=()):
        return {note.about: note.text for note in collect_advice(plan, [], LLAMA_8B, fewer)}

    few = notes(planned(4, batch_size=2))
    assert "a step of 2 rows leaves 2 of 4 devices without one" in few["train.batch_size"]
    assert "16 rows a step on 3 devices: some have 6" in notes(planned(3))["train.batch_size"]
    slow = planned(4, "10gb", sharding="fsdp")
    told = notes(slow, [planned(1), planned(2, "10gb", sharding="fsdp")])["devices"]
    assert "4 devices are 0." in told and "one device takes" in told and "of the device hours" in told
    assert "devices" not in notes(planned(4), [planned(1), planned(2)])


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_rows(tmp_path / "train.jsonl", rows_of(600))
    sections = "model: {base: meta-llama/Llama-3.1-8B}\ndata: {train: train.jsonl, eval: 0.25, format: messages}\n"
    (tmp_path / "recipe.yaml").write_text(sections)
    return tmp_path / "recipe.yaml"


def test_the_plan_of_four_cards_says_what_each_holds_and_sends(path, lorakit_plan):
    code, out, _ = lorakit_plan(path, "--gpu", "4x RTX 4090", "--sharding", "fsdp", "--price", "0.5")
    assert code == 0
    for said in (
        "on 4 x RTX 4090, 24.0 GiB each",
        "GiB on each device",
        "│          1/4 │",
        "of 24.0 GiB on each card",
        "joined by PCIe 4.0 x16, 24 GB/s each way",
        "fsdp: each device holds 1/4 of weights, adapter, gradients and optimizer whole",
        "all-gather of weights, forward and backward",
        "251.7 MB all-reduce of gradients",
        "against one device",
        "59.8 GiB of main memory: each process reads the whole base there first",
        ", for all 4 devices",
    ):
        assert said in out, said


def test_the_facts_of_several_devices_are_in_the_document(path, lorakit_plan):
    code, out, _ = lorakit_plan(path, "--gpu", "RTX 4090", "--devices", "4", "--link", "100gb", "--json")
    found = json.loads(out)
    devices = found["devices"]
    assert code == 0 and devices["count"] == 4 and devices["link"]["name"] == "100gb"
    assert devices["sharding"] == "none" and devices["shared"] == [] and devices["alone"]["fits"] == "yes"
    assert devices["sent_a_step"] == sum(one["bytes"] for one in devices["transfers"]) == 251_658_240
    assert devices["sending_seconds_a_step"] == pytest.approx(251_658_240 / 12e9)
    assert devices["efficiency"] == pytest.approx(devices["speed_up"] / 4) and 0.6 < devices["efficiency"] <= 1.01
    assert json.loads(lorakit_plan(path, "--gpu", "4x RTX 4090", "--link", "100 Gb/s", "--json")[1]) == found
    alone = json.loads(lorakit_plan(path, "--gpu", "RTX 4090", "--json")[1])
    assert alone["devices"]["count"] == 1 and alone["devices"]["link"] is None and not alone["devices"]["transfers"]


def test_all_cards_are_planned_by_fours(path, lorakit_plan):
    code, out, _ = lorakit_plan(path, "--gpu", "all", "--devices", "4", "--set", "train.sharding=fsdp")
    alone = lorakit_plan(path, "--gpu", "all")[1]
    four, one = (int(re.search(r"(\d+) of \d+ known cards", text)[1]) for text in (out, alone))
    assert code == 0 and "known cards can train it, 4 together, the smallest:" in out and four > one


def test_sharing_out_the_base_is_named_where_it_makes_it_fit(path, lorakit_plan):
    code, out, _ = lorakit_plan(path, "--gpu", "4x 16GB", "--sharding", "none", "--json")
    options = [change["options"] for change in json.loads(out)["changes"]]
    assert code == 1 and options[0] == "--set train.sharding=fsdp"
    assert lorakit_plan(path, "--gpu", "4x 16GB", "--sharding", "fsdp")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "4x RTX 4090", "--devices", "2"], "--gpu says 4 devices and --devices 2"),
        (["--gpu", "4x RTX 4090", "--link", "string"], "is not a known link"),
        (["--sharding", "ddp"], "train.sharding"),
        (["--devices", "2", "--probe"], "--probe runs on one device"),
        (["--devices", "0"], "--devices"),
    ],
)
def test_what_cannot_be_planned_is_refused(path, lorakit_plan, arguments, said):
    code, _, err = lorakit_plan(path, *arguments)
    assert code == 2 and said in err
