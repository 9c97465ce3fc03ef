"""What a plan says of the rows: the numbers that the run will have, from all of a small file or some of a large one."""

import csv
import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import rows_of, write_rows

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.rows import Conversation
from lorakit.data.tokenize import Encoder
from lorakit.errors import UserError
from lorakit.plan.model_info import find_template
from lorakit.plan.row_sample import estimate_rows
from lorakit.recipe.load import load
from lorakit.recipe.schema import Data, Model, Recipe

WORDS = Path(__file__).parent.parent.joinpath("docs", "data.md").read_text(encoding="utf-8").split()


def alpaca(count, seed=1):
    """Rows of very different lengths, with line breaks and quotes in them."""
    chance = random.Random(seed)

    def said(mean):
        start, many = chance.randrange(2000), int(chance.lognormvariate(mean, 0.9)) + 1
        return "\n".join([" ".join(WORDS[start : start + many]), '"so", it says']) if many > 9 else WORDS[start]

    return [{"instruction": said(2), "output": said(3)} for _ in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows as the ending says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif path.suffix in (".parquet", ".arrow"):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=500)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=500)
    else:
        write_rows(path, rows)
    return path


def estimate(base, train, **settings):
    """What a plan on a base model says of some rows."""
    source = str(train) if isinstance(train, Path) else train
    recipe = Recipe(name="rows", model=Model(base=str(base)), data=Data(train=source, **settings))
    return estimate_rows(recipe, lambda: find_template(recipe))


@pytest.fixture(scope="module")
def length_of(tokenizer):
    """The tokens of a row of `alpaca`."""
    template, encoder = ChatTemplate(tokenizer), Encoder(tokenizer)

    def count(row):
        messages = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        return len(encoder.encode(render(Conversation(messages), template))[0].input_ids)

    return count


@pytest.fixture(scope="module")
def counted(length_of):
    """Many rows and their true lengths."""
    rows = alpaca(12_000)
    return rows, [length_of(row) for row in rows]


def test_a_small_file_is_counted_exactly_as_the_run_counts_it(recipe_file, tiny_base, lorakit_json):
    path = recipe_file()
    recipe = load(path).recipe
    found = estimate_rows(recipe, lambda: find_template(recipe))
    report = lorakit_json("data", path)
    assert found.exact and found.counted == "the model's own tokenizer on all 22 rows"
    assert (found.count, found.held_out) == (22, 10)
    assert sum(found.lengths) == report["train"]["tokens"] and found.longest == report["train"]["longest"]
    assert found.trained == pytest.approx(report["train"]["trained_tokens"] / report["train"]["tokens"])


@pytest.fixture
def lorakit_json(capsys, monkeypatch):
    def run(*arguments):
        from lorakit.cli import main

        monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet", ".arrow"])
def test_large_files_are_sampled_from_their_whole_length(ending, counted, tiny_base, tmp_path):
    rows, lengths = counted
    # Sorted by length: whoever looks at the beginning only is far off.
    order = sorted(range(len(rows)), key=lambda at: lengths[at]) if ending != ".jsonl.gz" else range(len(rows))
    path = write(tmp_path / f"rows{ending}", [rows[at] for at in order])
    found = estimate(tiny_base, path, max_length=8192)
    assert found.count == pytest.approx(len(rows), rel=0.1)
    assert found.mean == pytest.approx(sum(lengths) / len(lengths), rel=0.15)
    assert found.longest >= max(lengths)
    assert not found.exact and "own tokenizer on 1,2" in found.counted and f" of {found.count:,} rows" in found.counted


def test_one_long_row_among_many_short_ones_is_found(counted, length_of, tiny_base, tmp_path):
    long = {"instruction": "Say it.", "output": " ".join(WORDS[:6000])}
    rows, lengths = counted
    path = write(tmp_path / "rows.jsonl", [*rows[:7000], long, *rows[7000:]])
    found = estimate(tiny_base, path, max_length=1 << 20)
    assert max(lengths) < length_of(long) <= found.longest <= 1.04 * length_of(long) and found.mean < 300


def test_overlong_rows_are_treated_as_the_recipe_says(tmp_path, tiny_base):
    rows = [{"prompt": "Say it.", "completion": "word " * many} for many in [5] * 30 + [500] * 10]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    dropped = estimate(tiny_base, path, max_length=100)
    assert dropped.overlong == 0.25 and dropped.count == 30 and dropped.longest <= 100
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": row["completion"]} for row in rows])
    cut = estimate(tiny_base, texts, max_length=100, overlong="truncate")
    split = estimate(tiny_base, texts, max_length=100, overlong="split")
    assert cut.count == 40 and cut.longest == 100
    assert split.count > 60 and split.longest <= 100


@pytest.mark.parametrize("share", [0.2, None])
def test_take_weight_and_split_are_counted_as_the_run_counts_them(share, tmp_path, recipe_file, lorakit_json):
    paths = [write_rows(tmp_path / f"{name}.jsonl", rows_of(count)) for name, count in (("a", 40), ("b", 37))]
    sources = [{"path": str(paths[0]), "take": 20, "weight": 1.3}, {"path": str(paths[1]), "take": 0.5}]
    clean = {"near_leakage": "off", "leakage": "off"}
    path = recipe_file(data={"train": sources, "eval": share or "eval.jsonl", "clean": clean})
    planned = lorakit_json("plan", path)
    run = lorakit_json("train", path, "--dry-run", "--quiet")
    assert planned["rows"]["exact"] and planned["steps"] == run["steps"]
    assert planned["rows"]["held_out"] == run["eval"]["examples"]
    assert planned["rows"]["count"] != sum(source["kept"] for source in run["train"]["sources"])  # it has weights


def test_a_split_that_keeps_near_duplicates_together_is_the_runs_own(recipe_file, tmp_path, lorakit_json):
    write_rows(tmp_path / "train.jsonl", rows_of(60))
    path = recipe_file(data={"train": "train.jsonl", "eval": 0.2, "clean": {"near_leakage": "report"}})
    planned, run = lorakit_json("plan", path)["rows"], lorakit_json("data", path)
    assert planned["exact"]
    assert (planned["count"], planned["held_out"]) == (run["train"]["examples"], run["held_out"]["examples"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"eval": 0.01}, "no row is held out"), ({"eval": 0.99}, "no row is left to train on"), ({"take": 1e-9}, "take")],
)
def test_a_split_that_leaves_no_row_is_refused_as_training_refuses_it(settings, said, tmp_path, tiny_base):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(3))
    source = {"path": str(path)} | {key: value for key, value in settings.items() if key == "take"}
    with pytest.raises(UserError, match=said):
        estimate(tiny_base, source, eval=settings.get("eval"))


def test_broken_rows_are_counted_and_stop_nothing(tmp_path, tiny_base):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(20))
    path.write_text(path.read_text() + '{"messages": [}\n{"messages": []}\n\n')
    found = estimate(tiny_base, path)
    assert (found.count, found.broken) == (20, 2)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        estimate("nobody/model", tmp_path / "nowhere.jsonl")


def test_without_a_tokenizer_rows_are_counted_and_taken_to_be_as_long_as_they_may_be(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(50))
    found = estimate("nobody/model", path, eval=0.2, max_length=700)
    assert (found.count, found.held_out, found.longest, found.mean) == (40, 10, 700, 700) and not found.exact
    assert found.counted == (
        "no tokenizer of nobody/model is on this machine: every row is taken to be 700 tokens long (data.max_length)"
    )


def test_a_hub_dataset_is_read_from_the_cache_and_else_not_known(tmp_path, monkeypatch, tiny_base):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    unknown = estimate(tiny_base, "someone/Small-Set", max_length=700)
    assert unknown.count is None and unknown.longest == 700 and "not on this machine" in unknown.counted
    folder = tmp_path / "someone___small-set" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    for shard in range(2):
        write(folder / f"small-set-train-0000{shard}-of-00002.arrow", rows_of(30))
    write(folder / "small-set-test.arrow", rows_of(5))
    assert estimate(tiny_base, "someone/Small-Set").count == 60


@pytest.mark.parametrize("train", ["train.jsonl", "somebody/rows"])
def test_where_rows_cannot_be_measured_nothing_heavy_is_loaded(recipe_file, train):
    path = recipe_file(model={"base": "nobody/model"}, data={"train": train, "eval": 0.2})
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lorakit.recipe.load import load\n"
        f"recipe = load(Path({str(path)!r})).recipe\n"
        "from lorakit.plan.row_sample import estimate_rows\n"
        "assert 'every row is taken to be' in estimate_rows(recipe, lambda: None).counted\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_of_half_a_gigabyte_is_a_matter_of_seconds(tmp_path, tiny_base):
    part = "".join(json.dumps(row) + "\n" for row in alpaca(6000)).encode()
    with (tmp_path / "rows.jsonl").open("wb") as file:
        for _ in range((1 << 29) // len(part)):
            file.write(part)
    estimate(tiny_base, write_rows(tmp_path / "few.jsonl", rows_of(3)))  # loads the libraries
    start = time.process_time()
    found = estimate(tiny_base, tmp_path / "rows.jsonl", max_length=4096)
    assert time.process_time() - start < 4  # both processors' time, on a machine that does other things too
    assert found.count == pytest.approx(6000 * ((1 << 29) // len(part)), rel=0.1)
