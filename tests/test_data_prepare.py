"""Examples are cached by content, split by what rows say, and every row that is left out is counted."""

import json
import multiprocessing
import os
import shutil
from collections import Counter
from contextlib import contextmanager

import pytest
from data_families import FAMILIES

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.examples import examples_of, file_sha256s, tokenizer_sha256
from lorakit.data.mixture import Mixture
from lorakit.errors import LorakitError, UserError
from lorakit.progress import Silent
from lorakit.recipe.schema import Data

CHATML = FAMILIES["chatml"]


class Listener(Silent):
    """Counts how often rows were read, and keeps what was said."""

    def __init__(self):
        self.readings, self.said = 0, []

    def say(self, text):
        self.said.append(text)

    warn = say

    @contextmanager
    def bar(self, label, total, done=0, unit=""):
        self.readings += 1
        with super().bar(label, total, done, unit) as bar:
            yield bar


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [{"prompt": f"Say {number}", "completion": f"It is {number}."} for number in range(20)])
    return tmp_path


def write(folder, rows, name="a.jsonl"):
    (folder / name).write_text("\n".join(map(json.dumps, rows)))


def made(folder, listener=None, tokenizer=None, template=None, **settings):
    template = {"train_on": settings.get("train_on", "assistant"), "system": settings.get("system"), **(template or {})}
    settings = Data(**{"train": str(folder / "a.jsonl"), **settings})
    chat = ChatTemplate(tokenizer or CHATML.tokenizer(), **template)
    return examples_of(settings, chat, listener or Listener())[0]


def readings(folder, **changes):
    """How often the rows are read once the same examples without `changes` are cached."""
    made(folder)
    listener = Listener()
    made(folder, listener, **changes)
    return listener.readings


def test_unchanged_examples_are_loaded_and_not_rendered_again(folder):
    first, listener = made(folder), Listener()
    second = made(folder, listener)
    assert listener.readings == 0
    assert (second.key, second.report) == (first.key, first.report)
    assert second.rows.to_list() == first.rows.to_list()
    assert second.lengths().tolist() == [len(row["input_ids"]) for row in first.rows.to_list()]
    assert second.report.used == 20 and second.report.tokens == sum(second.lengths())


@pytest.mark.parametrize(
    "changes",
    [
        {"train_on": "last"},
        {"train_on": "all"},
        {"system": "Speak French."},
        {"max_length": 512},
        {"overlong": "truncate"},
        {"broken": "drop"},
        {"eval": 0.25},
        {"format": "prompt-completion"},
        {"columns": {"prompt": "prompt"}},
        {"template": {"stop_words": ("<|endoftext|>",)}},
        {"tokenizer": FAMILIES["chatml, another eos"].tokenizer()},
        {"tokenizer": FAMILIES["chatml, generation marks"].tokenizer()},
        {"tokenizer": CHATML.tokenizer("bytes, GPT-2 words")},
    ],
    ids=str,
)
def test_what_could_change_the_examples_makes_them_anew(folder, changes):
    assert readings(folder, **changes) == 1


def test_changed_and_moved_files_are_read_anew(folder):
    before = made(folder)
    write(folder, [{"prompt": "Say 1", "completion": "It is 2."}])
    assert made(folder).key != before.key
    shutil.copy(folder / "a.jsonl", folder / "b.jsonl")
    assert made(folder, train=str(folder / "b.jsonl")).rows["where"][:] == ["b.jsonl:1"]


def test_places_are_shown_from_the_working_directory(folder, monkeypatch):
    assert made(folder).rows["where"][0] == "a.jsonl:1"
    (folder / "runs").mkdir()
    monkeypatch.chdir(folder / "runs")
    assert made(folder).rows["where"][0] == "../a.jsonl:1"
    monkeypatch.chdir("/")
    assert made(folder).rows["where"][0] == f"{folder}/a.jsonl:1".removeprefix("/")


def test_a_tokenizer_keeps_its_fingerprint(tmp_path):
    tokenizer = CHATML.tokenizer()
    before = tokenizer_sha256(tokenizer)
    tokenizer("some text", truncation=True, max_length=5)  # which the tokenizer keeps as its setting
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_sha256(type(tokenizer).from_pretrained(tmp_path / "saved")) == before


def test_rows_are_fingerprinted_for_the_manifest(folder):
    write(folder, [{"prompt": "a", "completion": "b"}], "b.jsonl")
    named = file_sha256s(Data(train=str(folder / "a.jsonl"), eval=str(folder / "b.jsonl")))
    assert list(named) == [str(folder / "a.jsonl"), str(folder / "b.jsonl")] and len(set(named.values())) == 2
    assert list(file_sha256s(Data(train=str(folder / "a.jsonl"), eval=0.5))) == [str(folder / "a.jsonl")]


def cut(entry, fraction):
    table = entry / "train.arrow"
    os.truncate(table, int(table.stat().st_size * fraction))


def flip(path):
    """Change a few bits in the middle of a file, whose size and dates stay."""
    times, whole = path.stat(), bytearray(path.read_bytes())
    for at in range(len(whole) // 2, len(whole) // 2 + 8):
        whole[at] ^= 1
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def damage_of(entry):
    return {
        "no report": lambda: (entry / "train.json").unlink(),
        "half a report": lambda: os.truncate(entry / "train.json", 10),
        "another report": lambda: (entry / "train.json").write_text('{"lines": 3}'),
        "no numbers": lambda: (entry / "train.npz").unlink(),
        "half the numbers": lambda: os.truncate(entry / "train.npz", 100),
        "no table": lambda: (entry / "train.arrow").unlink(),
        "an empty table": lambda: cut(entry, 0),
        "half a table": lambda: cut(entry, 0.5),
        "a table without end": lambda: cut(entry, 0.9),
        "flipped bits in the table": lambda: flip(entry / "train.arrow"),
        "flipped bits in the numbers": lambda: flip(entry / "train.npz"),
        "a digit of the report": lambda: flip(entry / "train.json"),
        "flipped bits in the shapes": lambda: flip(entry / "shapes.npz"),
        "no shapes": lambda: (entry / "shapes.npz").unlink(),
        "no checksums": lambda: (entry / ".checksums").unlink(),
        "half the checksums": lambda: os.truncate(entry / ".checksums", 30),
        "a file": lambda: (shutil.rmtree(entry), entry.write_text("x")),
        "nothing": lambda: (shutil.rmtree(entry), entry.mkdir()),
    }  # fmt: skip


@pytest.mark.parametrize("damage", damage_of(None))
def test_a_damaged_cache_is_made_again(folder, damage):
    whole = made(folder).rows.to_list()
    (entry,) = (path for path in (folder / "cache" / "examples").iterdir() if path.suffix != ".lock")
    damage_of(entry)[damage]()
    listener = Listener()
    assert made(folder, listener).rows.to_list() == whole
    assert listener.readings == 1 and "damaged" in listener.said[0]


def test_a_cache_that_cannot_be_written_is_an_error(folder, monkeypatch):
    (folder / "cache").write_text("a file")
    with pytest.raises(LorakitError, match=r"the cache cannot be written: .*Set LORAKIT_CACHE"):
        made(folder)


def test_a_failed_preparation_leaves_nothing_behind(folder):
    write(folder, [{"prompt": "a", "completion": None}])
    with pytest.raises(UserError):
        made(folder, format="prompt-completion")
    assert [path.suffix for path in (folder / "cache" / "examples").iterdir()] == [".lock"]


def test_what_a_killed_process_left_behind_is_removed(folder):
    key = made(folder).key
    draft = folder / "cache" / "examples" / f".lorakit-draft.{key}.abc"
    draft.mkdir()
    made(folder)
    assert not draft.exists()


def _prepare_at_once(folder, start, results):
    start.wait()
    listener = Listener()
    examples = made(folder, listener)
    results.put((listener.readings, examples.rows.to_list()))


def test_processes_that_need_the_same_examples_make_them_once(folder, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_prepare_at_once, args=(folder, start, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(count for count, _ in found) == 1
    assert all(rows == found[0][1] for _, rows in found)


def both_sides(folder, **settings):
    settings = Data(train=str(folder / "a.jsonl"), **{"eval": 0.3, **settings})
    return examples_of(settings, ChatTemplate(CHATML.tokenizer()), Silent())


def test_the_split_takes_about_the_fraction_and_every_row_once(folder):
    write(folder, [{"prompt": f"Say {number}", "completion": "yes"} for number in range(1000)])
    train, held_out = both_sides(folder)
    assert 250 < held_out.report.used < 350
    assert sorted([*train.rows["where"], *held_out.rows["where"]]) == sorted(
        f"a.jsonl:{line}" for line in range(1, 1001)
    )


def test_the_split_never_moves_rows_when_others_are_added(folder):
    rows = [{"prompt": f"Say {number}", "completion": "yes"} for number in range(200)]
    write(folder, rows[50:150])
    before = {place_of(rows[50:150], where) for where in both_sides(folder)[1].rows["where"]}
    write(folder, rows)
    after = {place_of(rows, where) for where in both_sides(folder)[1].rows["where"]}
    assert before and before < after


def place_of(rows, where):
    return rows[int(where.split(":")[1]) - 1]["prompt"]


def test_rows_that_say_the_same_are_on_one_side(folder):
    said = [{"prompt": f"Say {number % 50}", "completion": "yes"} for number in range(150)]
    rows = [{"id": number, **row, "note": None} for number, row in enumerate(said)]
    write(folder, rows)
    train, held_out = (Counter(place_of(rows, where) for where in side.rows["where"]) for side in both_sides(folder))
    assert held_out and not train.keys() & held_out.keys()
    assert set(train.values()) == set(held_out.values()) == {3}
    messages = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "yes"}]}
        for row in rows
    ]
    write(folder, messages)
    assert len(both_sides(folder)[1].rows) == held_out.total()


def test_rows_that_cannot_be_read_are_counted_on_the_trained_side_only(folder):
    with (folder / "a.jsonl").open("a") as file:
        file.write('\n{\n{"prompt": "a", "completion": null}')
    train, held_out = both_sides(folder, broken="drop")
    assert train.report.read + held_out.report.read == 22
    assert train.report.dropped.total == 2 and held_out.report.dropped.total == 0


@pytest.mark.parametrize(("share", "said"), [(0.999, "is left to train on"), (0.001, "is held out")])
def test_a_share_without_rows_says_so(folder, share, said):
    write(folder, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match=rf"a\.jsonl: with data\.eval: {share} no row {said}"):
        both_sides(folder, eval=share)


LONG = [
    {"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why"}, {"role": "assistant", "content": "word " * 60},
    ]},
    {"messages": [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "No."}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]},
]  # fmt: skip


def test_overlong_rows_are_dropped_and_counted(folder):
    write(folder, LONG)
    report = made(folder, max_length=40).report
    assert (report.read, report.used, report.cut, report.dropped.counts) == (3, 1, 0, {"longer than 40 tokens": 2})
    assert [place.split(": ")[0] for place in report.dropped.first["longer than 40 tokens"]] == [
        "a.jsonl:1",
        "a.jsonl:2",
    ]


def test_overlong_rows_are_cut_behind_a_whole_turn(folder):
    write(folder, LONG)
    examples = made(folder, max_length=40, overlong="truncate")
    report, rows = examples.report, examples.rows.to_list()
    assert (report.used, report.cut, report.dropped.counts) == (2, 1, {"no answer fits whole into 40 tokens": 1})
    assert [rows[0][name] for name in ("input_ids", "labels", "answer")] == [
        rows[1][name] for name in ("input_ids", "labels", "answer")
    ]
    assert rows[0]["labels"][-1] == CHATML.tokenizer().eos_token_id


def test_overlong_rows_stop_the_work_when_asked(folder):
    write(folder, LONG)
    with pytest.raises(UserError, match=r"a\.jsonl:1: [0-9]+ tokens, data\.max_length is 40\. Raise it"):
        made(folder, max_length=40, overlong="error")


def test_when_no_row_is_left_the_reasons_are_told(folder):
    write(folder, LONG[:2])
    with pytest.raises(
        UserError, match=r"a\.jsonl: no rows left \(2 read\): 2 longer than 40 tokens \(first: a\.jsonl:1: "
    ):
        made(folder, max_length=40)


def test_the_last_answer_begins_where_the_row_says(folder):
    tokenizer = CHATML.tokenizer()
    for row in made(folder).rows.to_list():
        assert tokenizer.decode(row["input_ids"][: row["answer"]]).endswith("<|im_start|>assistant\n")
        assert row["labels"][: row["answer"]] == [-100] * row["answer"]
        assert row["labels"][row["answer"] :] == row["input_ids"][row["answer"] :]


def test_a_template_that_writes_the_date_is_rendered_anew_each_day(folder):
    tokenizer = CHATML.tokenizer()
    plain = made(folder, tokenizer=tokenizer).key
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    assert made(folder, tokenizer=tokenizer).key != plain


TEXT = "word " * 100


def test_a_long_text_is_split_into_pieces_that_lose_nothing(folder):
    write(folder, [{"text": TEXT}, {"text": "short"}])
    whole = made(folder, max_length=1024).rows.to_list()
    split = made(folder, max_length=40, overlong="split")
    assert (split.report.used, split.report.several, split.report.cut) == (2, 1, 0)
    pieces = [row for row in split.rows.to_list() if row["where"] == "a.jsonl:1"]
    assert max(len(row["input_ids"]) for row in pieces) <= 40 and len(pieces) > 2
    assert [token for row in pieces for token in row["input_ids"]] == whole[0]["input_ids"]
    assert all(row["labels"] == row["input_ids"] and row["answer"] == -1 for row in pieces)
    assert made(folder, max_length=40, overlong="truncate").report.cut == 1
    write(folder, LONG[1:])
    assert made(folder, max_length=40, overlong="split").report.dropped.counts == {"longer than 40 tokens": 1}


def test_token_ids_are_taken_as_they_are(folder):
    stop = CHATML.tokenizer().eos_token_id
    write(
        folder,
        [{"input_ids": [5, 6, 7, stop], "labels": [-100, 6, 7, stop]}, {"input_ids": [5, 6], "labels": [-100, -100]}],
    )
    examples = made(folder, broken="drop")
    assert examples.rows.to_list()[0]["labels"] == [-100, 6, 7, stop]
    assert examples.rows[0]["answer"] == 1
    assert examples.report.dropped.counts == {"no token after the first is trained": 1}
    write(folder, [{"input_ids": [5, 6, 7, stop], "labels": [-100, 6, 7, -100]}])
    with pytest.raises(UserError, match="the token that ends an answer is not trained"):
        made(folder)


def several(folder, **second):
    write(folder, [{"prompt": f"Ask {number}", "completion": "yes"} for number in range(30)])
    write(folder, [{"prompt": f"Other {number}", "completion": "no"} for number in range(20)], "b.jsonl")
    return made(folder, train=[str(folder / "a.jsonl"), {"path": str(folder / "b.jsonl"), **second}])


def test_take_chooses_rows_by_what_they_say(folder):
    examples = several(folder, take=5)
    assert [(source.used, source.examples) for source in examples.report.sources] == [(30, 30), (5, 5)]
    assert examples.report.passed_over == 15 and examples.report.read == 50
    chosen = {where for where in examples.rows["where"] if where.startswith("b")}
    lines = (folder / "b.jsonl").read_text().splitlines()
    (folder / "b.jsonl").write_text("\n".join(reversed(lines)))
    again = made(folder, train=[str(folder / "a.jsonl"), {"path": str(folder / "b.jsonl"), "take": 5}])
    assert {f"b.jsonl:{21 - int(where.split(':')[1])}" for where in again.rows["where"] if where[0] == "b"} == chosen
    assert 4 <= several(folder, take=0.5).report.sources[1].used <= 16
    assert several(folder, take=100).report.sources[1].used == 20


def test_a_source_has_its_own_system_prompt_task_and_weight(folder):
    examples = several(folder, system="Say no.", task="refusal", weight=2.5)
    texts = {row["where"]: CHATML.tokenizer().decode(row["input_ids"]) for row in examples.rows}
    assert "Say no." in texts["b.jsonl:1"] and "Say no." not in texts["a.jsonl:1"]
    assert [source.task for source in examples.report.sources] == [None, "refusal"]
    assert examples.mixture == Mixture((30, 20), (1.0, 2.5)) and not several(folder).mixture.is_weighted


def test_many_processes_give_the_same_examples_in_the_same_order_as_one(folder, monkeypatch):
    write(
        folder, [{"prompt": f"Say {number} " + "word " * (number % 50), "completion": "yes"} for number in range(900)]
    )
    alone = made(folder).rows.to_list()
    monkeypatch.setenv("LORAKIT_CACHE", str(folder / "another"))
    monkeypatch.setattr("lorakit.data.pipeline._WORTHWHILE", 1)
    monkeypatch.setattr("lorakit.data.readers.json_rows._BLOCK_OF_LINES", 1 << 12)
    together = made(folder).rows.to_list()
    assert alone == together
    write(folder, [{"prompt": "a", "completion": 1}] * 900)
    with pytest.raises(UserError, match=r"a\.jsonl:1: the column 'completion'"):
        made(folder)


def test_token_ids_beyond_the_vocabulary_are_refused_with_their_place(folder):
    write(folder, [{"input_ids": [1, 2, 999_999]}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: a token id is above the .* tokenizer: it is 999999"):
        made(folder)


def test_columns_that_come_late_and_files_without_rows_are_named(folder):
    (folder / "rows").mkdir()
    plain = [{"prompt": f"Ask {n}", "completion": "yes"} for n in range(1200)]
    write(folder, [*plain, {**plain[0], "prompt": "Late", "thinking": "hm"}], "rows/a.jsonl")
    write(folder, [], "rows/b.jsonl")
    (source,) = made(folder, train=str(folder / "rows")).report.sources
    assert source.why.endswith("; not used: 'thinking'; no rows in rows/b.jsonl")


def test_a_take_that_leaves_nothing_says_so(folder):
    with pytest.raises(UserError, match=r"take leaves none of 20 rows"):
        made(folder, train=[{"path": str(folder / "a.jsonl"), "take": 1e-9}])


def test_a_number_of_rows_is_held_out_whatever_their_order(folder):
    rows = (folder / "a.jsonl").read_text(encoding="utf-8").splitlines()
    chat = ChatTemplate(CHATML.tokenizer(), train_on="assistant", system=None)
    settings = Data(train=str(folder / "a.jsonl"), eval=3, clean={"near_leakage": "off"})
    train, held_out = examples_of(settings, chat, Silent())
    assert (held_out.report.used, train.report.used + held_out.report.used) == (3, len(rows))
    before = {tuple(row["input_ids"]) for row in held_out.rows}
    (folder / "a.jsonl").write_text("\n".join(reversed(rows)) + "\n", encoding="utf-8")
    assert {tuple(row["input_ids"]) for row in examples_of(settings, chat, Silent())[1].rows} == before
    with pytest.raises(UserError, match=f"data.eval: {len(rows)} no row is left to train on"):
        examples_of(settings.model_copy(update={"eval": len(rows)}), chat, Silent())
