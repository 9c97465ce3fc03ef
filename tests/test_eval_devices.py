"""Promises of evaluation and merging on several processes: the figures of one, every row computed once, one writer."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import write_rows
from doubles_of_servers import double
from eval_runs import Remembers, labelled_rows, make_run, score
from rank_processes import outcomes_on, run_on
from test_tasks import ANSWERS, CHOICE, TEXTS, harness, task_folder  # noqa: F401 (fixtures)

from lorakit.atomic_io import files_in
from lorakit.cli import main
from lorakit.distributed.processes import rank
from lorakit.distributed.sharing import own_share, share_out
from lorakit.evaluate import forward, inference
from lorakit.evaluate.benchmarks.run import run_benchmark
from lorakit.evaluate.benchmarks.settings import BenchmarkSettings
from lorakit.evaluate.diagnosis.examination import create_examination
from lorakit.evaluate.models import resolve_models
from lorakit.evaluate.run import EvalSettings, score_models
from lorakit.merge import run as merge_run
from lorakit.merge.combine import Combination, combine_runs
from lorakit.merge.inputs import input_of_run
from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.run_dir import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base):
    return make_run(tmp_path_factory.mktemp("devices"), tiny_base).folder


def _shared(cases):
    def share(costs, without):
        takes_part = rank() not in without
        return own_share(costs, takes_part), share_out(costs, lambda numbers: [10 * at for at in numbers], takes_part)

    return [share(*case) for case in cases]


@pytest.mark.slow
def test_every_item_is_computed_once_and_all_get_it():
    rows = ([], [5.0], [1.0, 9.0], [3.0, 1.0, 2.0, 8.0, 8.0, 1.0, 4.0])
    cases = [(costs, without) for costs in rows for without in ((), (1,))]
    for (costs, without), outcomes in zip(cases, zip(*run_on(3, _shared, cases), strict=True), strict=True):
        shares = [share for share, _ in outcomes]
        assert sorted(number for share in shares for number in share) == list(range(len(costs)))
        assert all(shares[number] == [] for number in without)
        assert [values for _, values in outcomes] == [[10 * number for number in range(len(costs))]] * 3
        sums = [sum(costs[number] for number in share) for at, share in enumerate(shares) if at not in without]
        assert max(sums) - min(sums) <= max(costs, default=0.0), "shares cost alike"


def _figures(evaluation):
    return {
        model.name: {
            "nats": model.nats.tolist(),
            "answers": list(zip(model.answers, model.ended, strict=True)),
            "labels": {task: values.tolist() for task, values in model.likelihoods.items()},
            "general": model.examined["nats"].tolist() if model.examined else [],
            "scores": model.scores,
        }
        for model in evaluation.models
    }


def _examined(folder, file, texts):
    model_set = resolve_models([str(folder)], Silent())
    settings = EvalSettings(("exact-match",), 8, cache=False)
    return _figures(score_models(model_set, file, settings, Silent(), create_examination(model_set, texts)))


def _assert_alike(several, one):
    assert several.keys() == one.keys()
    for name, figures in one.items():
        assert several[name]["answers"] == figures["answers"]
        for kind in ("nats", "general"):
            np.testing.assert_allclose(several[name][kind], figures[kind], rtol=1e-6)
        for task, values in figures["labels"].items():
            np.testing.assert_allclose(several[name]["labels"][task], values, rtol=1e-6)
        assert several[name]["scores"] == pytest.approx(figures["scores"], rel=1e-6)


@pytest.mark.slow
def test_scores_of_several_processes_are_those_of_one(run, tmp_path):
    """Losses, answers, likelihoods of labels, and the losses of --diagnose."""
    file = write_rows(tmp_path / "rows.jsonl", labelled_rows(13))
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"The river runs {'far ' * at}away."} for at in range(7)])
    one = _examined(run, file, texts)
    assert one["adapter"]["labels"][""] and one["adapter"]["answers"] and one["adapter"]["general"]
    for count in (2, 3):
        for several in run_on(count, _examined, run, file, texts):
            _assert_alike(several, one)


def _counted(folder, request):
    """The figures, the rows that this process computed by bar, and how many models it loaded."""
    loaded, load_model, progress = [], inference.load_model, Remembers()
    inference.load_model = lambda *given: loaded.append(given) or load_model(*given)
    try:
        figures = _figures(score(folder, progress=progress, **request))
    finally:
        inference.load_model = load_model
    return figures, dict(progress.bars), len(loaded)


def test_a_process_without_a_row_loads_no_model(run):
    one = _figures(score(run, rows=1))
    outcomes = run_on(3, _counted, run, {"rows": 1})
    assert sorted(loaded for _, _, loaded in outcomes) == [0, 0, 1]
    for figures, _, _ in outcomes:
        _assert_alike(figures, one)


def test_rows_in_the_cache_are_not_computed_again_and_the_first_process_alone_writes(run, tmp_path, monkeypatch):
    caches = [str(tmp_path / name) for name in ("one", "other")]
    monkeypatch.setenv("LORAKIT_CACHE", caches[0])
    score(run, rows=4, cache=True)
    one = _figures(score(run))
    for expected in (6, 0):
        outcomes = run_on(2, _cached, run, caches)
        for figures, _, _ in outcomes:
            _assert_alike(figures, one)
        for note in ("base: loss", "adapter: loss", "base: answers", "adapter: answers"):
            assert sum(bars.get(note, 0) for _, bars, _ in outcomes) == expected
    assert not list((tmp_path / "other").rglob("*.jsonl"))
    for file in (tmp_path / "one").rglob("*.jsonl"):
        lines = [json.loads(line)[0][0] for line in file.read_text().splitlines()]
        assert len(lines) == len(set(lines)) == 10
    assert _counted(run, {"cache": True})[2] == 0


def _cached(folder, caches):
    import os

    os.environ["LORAKIT_CACHE"] = caches[rank()]  # as on machines of their own
    return _counted(folder, {"cache": True})


@pytest.mark.slow
def test_rows_are_stored_in_rounds_while_others_are_computed(run, tmp_path):
    one = _figures(score(run))
    for figures, bars in run_on(2, _in_rounds, run, LORAKIT_CACHE=str(tmp_path)):
        _assert_alike(figures, one)
        assert bars.count(("base: loss", 2)) == 2 and bars.count(("base: loss", 1)) == 1


def _in_rounds(folder):
    inference._ROUND, progress = 2, Remembers()
    return _figures(score(folder, progress=progress, cache=True)), progress.bars


def _memory_runs_out(folder):
    """On the second process with more than one row at once."""
    collate, tried = forward.collate, []

    def scarce(rows, pad):
        tried.append(len(rows))
        if rank() == 1 and len(rows) > 1:
            raise torch.OutOfMemoryError("can't allocate memory")
        return collate(rows, pad)

    forward.collate = scarce
    return _figures(score(folder, metrics=())), tried


def test_a_process_without_memory_takes_smaller_batches_and_the_others_do_not(run):
    one = _figures(score(run, metrics=()))
    (first, wide), (second, narrow) = run_on(2, _memory_runs_out, run)
    assert min(wide) > 1 == min(narrow)
    _assert_alike(first, one)
    _assert_alike(second, one)


def _weights_are_broken(folder):
    load_model = inference.load_model

    def broken(*given):
        model = load_model(*given)
        model.get_output_embeddings().weight.data.fill_(torch.nan)
        return model

    if rank() == 1:
        inference.load_model = broken
    score(folder)


def test_an_error_of_one_process_ends_all_with_one_message(run):
    first, second, third = outcomes_on(3, _weights_are_broken, run)
    assert (first[0], second[0], third[0]) == ("FailedElsewhere", "LorakitError", "FailedElsewhere")
    assert "this model gives no numbers" in second[1] and "Its weights are broken" in first[1]


def _served_answers(folder, url):
    evaluation = score(folder, url)
    return evaluation.models[1].answers, evaluation.models[1].examined.endpoint.address.key


def test_a_server_is_asked_once_whatever_the_number_of_processes(run):
    with double() as server:
        outcomes = run_on(2, _served_answers, run, server.url, LORAKIT_API_KEY="secret")
        assert len(server.requests) == 10
    assert outcomes[0] == outcomes[1] and len(outcomes[0][0]) == 10 and outcomes[0][1] == "secret"


def _merged(folder, output, onto, breaks=False):
    """What a merge measured, what --verify measures of it, and the rows that this process computed for both."""
    run, prepared = reopen_run(folder, Silent())
    given, progress = input_of_run(run, prepared, Silent()), Remembers()
    if breaks:
        write = merge_run.write_weights
        merge_run.write_weights = lambda weights, precision, deltas, *more: write(weights, precision, {}, *more)
    merged = merge_run.merge(given, output, progress, onto)
    verified = merge_run.verify(given, output, progress)
    return merged, verified.facts(), sum(total for label, total in progress.bars if label.endswith("model on the rows"))


def _assert_same_figures(several, one):
    figures = ("proof", "drift")
    for name in (name for name in figures if one.get(name)):
        ours, expected = ({**facts[name], "better": facts[name].get("better")} for facts in (several, one))
        assert ours.pop("better") == expected.pop("better")
        assert ours == pytest.approx(expected, rel=1e-5, abs=1e-9)
    ours, expected = ({**facts, **dict.fromkeys([*figures, "merged"])} for facts in (several, one))
    assert ours == expected


@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_merge_is_written_once_and_its_proof_is_that_of_one_process(quantization, run, tmp_path, tiny_base):
    onto = "trained"
    if quantization != "none":
        onto, run = "original", make_run(tmp_path / "quantized", tiny_base, model={"quantization": quantization}).folder
    one, verified, rows = _merged(run, tmp_path / "one", onto)
    assert rows == 2 * 10 * (2 if one.drift is None else 3)
    for count in (2, 3):
        output = tmp_path / f"of {count}"
        outcomes = run_on(count, _merged, run, output, onto)
        assert sum(computed for _, _, computed in outcomes) == rows
        for several, again, _ in outcomes:
            _assert_same_figures(several.facts(), one.facts())
            _assert_same_figures(again, verified)
            assert several.proof.row_positions == one.proof.row_positions
            assert several.proof.row_merged_losses == pytest.approx(one.proof.row_merged_losses, rel=1e-5)
        assert files_in(output) == files_in(tmp_path / "one")
        weights = [(folder / "model.safetensors").read_bytes() for folder in (output, tmp_path / "one")]
        assert weights[0] == weights[1]


def test_a_merge_that_fails_its_proof_is_put_in_place_by_nobody(run, tmp_path):
    outcomes = outcomes_on(2, _merged, run, tmp_path / "merged", "trained", True)
    assert [error for error, _ in outcomes] == ["LorakitError", "FailedElsewhere"]
    assert "It was not put in place" in outcomes[0][1]
    assert not list(tmp_path.iterdir())


def _combined(folders, output, into_base):
    runs, how = [Run(folder) for folder in folders], Combination("cat", [0.5, 0.5])
    facts, merged = combine_runs(runs, how, output, Silent(), into_base={} if into_base else None)
    return facts["scores"], merged and merged.proof.figures()


@pytest.mark.parametrize("into_base", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_combination_scores_as_on_one_process(into_base, run, tmp_path, tiny_base):
    folders = [run, make_run(tmp_path / "other", tiny_base, train={"seed": 3}).folder]
    one, proof = _combined(folders, tmp_path / "one", into_base)
    for several, of_merge in run_on(3, _combined, folders, tmp_path / "several", into_base):
        for ours, expected in zip(several, one, strict=True):
            assert (ours["run"], ours["rows"]) == (expected["run"], 10)
            for name in ("base", "own", "combined"):
                assert ours[name] == pytest.approx(expected[name], rel=1e-6)
        assert of_merge == (pytest.approx(proof, rel=1e-5, abs=1e-9) if into_base else None)
    assert files_in(tmp_path / "several") == files_in(tmp_path / "one")


def _benchmarked(folder, tasks):
    settings, progress = BenchmarkSettings(("choice", "texts", "answers"), tasks), Remembers()
    document, _ = run_benchmark(resolve_models([str(folder)], Silent()), settings, "base", progress)
    return document["models"], document["comparisons"], sum(total for _, total in progress.bars)


@pytest.mark.slow
def test_a_benchmark_has_the_figures_of_one_process(run, task_folder):  # noqa: F811
    tasks = task_folder(rows=5, choice=CHOICE, texts=TEXTS, answers=ANSWERS)
    models, comparisons, requests = _benchmarked(run, tasks)
    outcomes = run_on(2, _benchmarked, run, tasks)
    assert sum(computed for _, _, computed in outcomes) == requests
    for several, compared, _ in outcomes:
        for name, scores in models.items():
            values = {(one["task"], one["metric"]): (one["value"], one["low"], one["high"]) for one in scores}
            for one in several[name]:
                assert (one["value"], one["low"], one["high"]) == pytest.approx(values[one["task"], one["metric"]])
        assert {name: one["verdict"] for name, one in compared["adapter"].items()} == {
            name: one["verdict"] for name, one in comparisons["adapter"].items()
        }


def _commanded(folder, *arguments):
    """What `lorakit` prints and its exit code, of this process."""
    printed = folder / f"printed-{rank()}"
    with printed.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["lorakit", *map(str, arguments)]
    with pytest.raises(SystemExit) as ended:
        main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return ended.value.code or 0, printed.read_text()


def test_the_first_process_alone_prints_and_writes(run, tmp_path):
    (code, text), (other, nothing) = run_on(2, _commanded, tmp_path, "eval", run, "--no-cache", "-o", tmp_path / "eval")
    assert code == other == 0 and nothing == ""
    assert text.count("adapter against base") == 1 and text.count("every answer") == 1
    assert [path.suffix for path in sorted((tmp_path / "eval").iterdir())] == [".json", ".jsonl"]

    outcomes = run_on(2, _commanded, tmp_path, "merge", run, "-o", tmp_path / "merged")
    assert [code for code, _ in outcomes] == [0, 0] and outcomes[1][1] == ""
    assert "proved on" in outcomes[0][1] and (tmp_path / "merged" / "merge.json").is_file()

    outcomes = run_on(2, _commanded, tmp_path, "merge", run, "-o", tmp_path / "merged")
    assert outcomes[0][0] == 2 and "already exists" in outcomes[0][1]
