"""Promise 3 where the processes share out the base model: FSDP2 trains what one process trains."""

import pytest
from distributed_runs import train_on
from runs_of_tests import run_recipe
from test_data_parallel import STEPS, assert_same_training

KINDS = {
    "lora": {},
    "nf4": {"adapter": {"kind": "dora"}, "model": {"quantization": "nf4"}},
    "full": {"adapter": {"kind": "none", "rank": ..., "alpha": ...}},
}


@pytest.mark.parametrize("case", KINDS)
def test_two_processes_that_share_out_the_base_train_what_one_does(case, recipe_file, tmp_path):
    path = recipe_file(**KINDS[case], train={**STEPS, "batch_size": 5})
    one, _ = run_recipe(path, tmp_path / "one")
    sharded, _ = train_on(2, path, tmp_path / "fsdp", "train.sharding=fsdp")
    assert_same_training(one, sharded)
