"""A glance at the rows: the numbers that the run will have, in a fraction of a second and without torch."""

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
from data_families import FAMILIES

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.conversations import Conversation
from lorakit.data.glance import glance
from lorakit.data.glance.spread import longest_lines
from lorakit.data.glance.token_counts import estimate
from lorakit.data.glance.tokenizer_files import counter_of
from lorakit.data.rows import RowError
from lorakit.data.tokenize import encode
from lorakit.errors import UserError
from lorakit.recipe.load import load
from lorakit.recipe.schema import Data

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


def data(path, **settings):
    return Data(train=str(path), **settings)


@pytest.fixture(scope="module")
def counted(tiny_base):
    """The true lengths of many rows."""
    counter, rows = counter_of(tiny_base / "tokenizer.json"), alpaca(12_000)
    said = [
        Conversation([{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}])
        for row in rows
    ]
    return rows, [shape.length for row in counter.shapes([(one, None) for one in said], "assistant") for shape in row]


def test_a_small_file_is_counted_exactly_as_the_run_counts_it(recipe_file, tiny_base, lorakit_json):
    path = recipe_file()
    found = glance(load(path).recipe.data, tiny_base / "tokenizer.json")
    report = lorakit_json("data", path)
    assert found.exact and found.counted == "the model's own tokenizer on all 22 rows"
    assert (found.rows, found.held_out) == (22, 10)
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
    found = glance(data(path, max_length=8192), tiny_base / "tokenizer.json")
    assert found.rows == pytest.approx(len(rows), rel=0.1)
    assert found.mean == pytest.approx(sum(lengths) / len(lengths), rel=0.15)
    assert found.longest >= max(lengths)
    assert not found.exact and f"of {'' if ending in ('.jsonl', '.parquet', '.arrow') else 'about '}" in found.counted


def test_the_longest_lines_are_found_without_reading_all():
    chance = random.Random(5)
    lines = [b"x" * int(chance.lognormvariate(3, 1)) for _ in range(3000)]
    whole = b"\n".join(lines)
    assert sorted(length for length, _ in longest_lines(whole, 8)) == sorted(map(len, lines))[-8:]
    assert all(whole[start : start + length] in lines for length, start in longest_lines(whole, 8))


@pytest.mark.parametrize("kind", ["bytes", "pieces, space first"])
@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_are_those_of_every_family_within_five_percent(name, kind, tmp_path):
    family = FAMILIES[name]
    tokenizer = family.tokenizer(kind)
    tokenizer.save_pretrained(tmp_path)
    counter, template = (
        counter_of(tmp_path / "tokenizer.json"),
        ChatTemplate(tokenizer, "assistant", None, family.stops),
    )
    chance, true, ours = random.Random(2), [], []
    for number in range(12):
        turns = [("user", "assistant")] * (1 + number % 3)
        messages = [
            {"role": role, "content": " ".join(chance.sample(WORDS[100:400], 20))} for pair in turns for role in pair
        ]
        if number % 4 == 0 and family.system:
            messages.insert(0, {"role": "system", "content": "Answer in one line."})
        try:
            encoded = encode(render(Conversation(messages), template), tokenizer)
        except RowError:
            continue
        if not any(isinstance(one, RowError) for one in encoded):
            true.append([len(one.input_ids) for one in encoded])
            ours += [[shape.length for shape in counter.shapes([(Conversation(messages), None)], "assistant")[0]]]
    assert len(true) > 5
    assert [len(row) for row in ours] == [len(row) for row in true]
    assert sum(map(sum, ours)) == pytest.approx(sum(map(sum, true)), rel=0.05)


def test_overlong_rows_are_treated_as_the_recipe_says(tmp_path, tiny_base):
    rows = [{"prompt": "Say it.", "completion": "word " * many} for many in [5] * 30 + [500] * 10]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    dropped = glance(data(path, max_length=100), tiny_base / "tokenizer.json")
    assert dropped.overlong == 0.25 and dropped.rows == 30 and dropped.longest <= 100
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": row["completion"]} for row in rows])
    cut = glance(data(texts, max_length=100, overlong="truncate"), tiny_base / "tokenizer.json")
    split = glance(data(texts, max_length=100, overlong="split"), tiny_base / "tokenizer.json")
    assert cut.rows == 40 and cut.longest == 100
    assert split.rows > 60 and split.longest <= 100


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


def test_a_split_that_keeps_near_duplicates_together_is_about_the_rows_own_sides(tmp_path, tiny_base):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(60))
    found, apart = (
        glance(data(path, eval=0.2, clean={"near_leakage": action}), tiny_base / "tokenizer.json")
        for action in ("report", "off")
    )
    assert (found.rows, found.held_out) == (apart.rows, apart.held_out) and found.rows + found.held_out == 60
    assert apart.split_exactly and not found.split_exactly


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"eval": 0.01}, "no row is held out"), ({"eval": 0.99}, "no row is left to train on"), ({"take": 1e-9}, "take")],
)
def test_a_split_that_leaves_no_row_is_refused_as_training_refuses_it(settings, said, tmp_path, tiny_base):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(3))
    source = {"path": str(path)} | {key: value for key, value in settings.items() if key == "take"}
    with pytest.raises(UserError, match=said):
        glance(Data(train=source, eval=settings.get("eval")), tiny_base / "tokenizer.json")


def test_broken_rows_are_counted_and_stop_nothing(tmp_path, tiny_base):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(20))
    path.write_text(path.read_text() + '{"messages": [}\n{"messages": []}\n\n')
    found = glance(data(path), tiny_base / "tokenizer.json")
    assert (found.rows, found.broken) == (20, 2)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        glance(data(tmp_path / "nowhere.jsonl"), None)


def test_without_a_tokenizer_tokens_are_estimated_and_that_is_said(tmp_path, tiny_base):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(50))
    found = glance(data(path), None)
    assert not found.exact and found.rows == 50
    assert "estimated" in found.counted and "±30 %" in found.counted
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{")
    assert "tokenizer.json cannot be read" in glance(data(path), broken).counted
    broken.write_bytes((tiny_base / "tokenizer.json").read_bytes())
    bare = glance(data(path), broken)
    assert not bare.exact and bare.counted.endswith("has no chat template")
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "a document"}])
    assert glance(data(texts), broken).exact


# Tokens by Qwen's vocabulary (152k) and by Mistral's Tekken (131k).
MEASURED = {
    "Fine-tuning changes how a model answers, and seldom what it knows.": (15, 15),
    '{"section": "utils", "interface": "text-mode", "language": "c"}': (19, 19),
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values) if values else 0.0\n": (27, 28),
    "On 2026-03-14 at 15:09 the order 271828 came to $1,618.03.": (40, 40),
    "Die Feinabstimmung ändert, wie ein Modell antwortet, und selten, was es weiß.": (27, 22),
    "Дообучение меняет то, как модель отвечает, и редко то, что она знает.": (25, 21),
    "微调改变模型的回答方式，很少改变它所知道的内容。": (14, 20),
    "微調整はモデルの答え方を変えるが、知っていることはほとんど変えない。": (19, 25),
    "파인튜닝은 모델이 답하는 방식을 바꾸지만, 아는 내용은 거의 바꾸지 않는다.": (27, 22),
    "يغيّر الضبط الدقيق طريقة إجابة النموذج، ونادراً ما يغيّر ما يعرفه.": (33, 23),
}


@pytest.mark.parametrize(("text", "counts"), MEASURED.items())
def test_estimates_are_near_what_large_vocabularies_count(text, counts):
    assert estimate(text) == pytest.approx(sum(counts) / 2, rel=0.3)


def test_a_hub_dataset_is_read_from_the_cache_and_else_not_known(tmp_path, monkeypatch, tiny_base):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    section = Data(train="someone/Small-Set")
    assert glance(section, None) is None
    folder = tmp_path / "someone___small-set" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    for shard in range(2):
        write(folder / f"small-set-train-0000{shard}-of-00002.arrow", rows_of(30))
    write(folder / "small-set-test.arrow", rows_of(5))
    assert glance(section, tiny_base / "tokenizer.json").rows == 60


def test_nothing_heavy_is_loaded_and_half_a_second_is_enough(recipe_file, tiny_base):
    path = recipe_file()
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from lorakit.recipe.load import load\n"
        f"data = load(Path({str(path)!r})).recipe.data\n"
        "from lorakit.data.glance import glance\n"
        f"assert glance(data, Path({str(tiny_base / 'tokenizer.json')!r})).rows == 22\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_of_half_a_gigabyte_is_a_matter_of_a_second(tmp_path, tiny_base):
    part = "".join(json.dumps(row) + "\n" for row in alpaca(6000)).encode()
    with (tmp_path / "rows.jsonl").open("wb") as file:
        for _ in range((1 << 29) // len(part)):
            file.write(part)
    start = time.process_time()
    found = glance(data(tmp_path / "rows.jsonl", max_length=4096), tiny_base / "tokenizer.json")
    assert time.process_time() - start < 2  # both processors' time, on a machine that does other things too
    assert found.rows == pytest.approx(6000 * ((1 << 29) // len(part)), rel=0.1)
