"""`data.clean` and `lorakit data`: what is found is told, fixed or refused, and the rest stays as it is."""

import json

import pytest
from data_families import FAMILIES
from test_cli import lorakit_run as lorakit_run

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.examples import examples_of
from lorakit.data.survey import survey
from lorakit.errors import UserError
from lorakit.progress import Silent
from lorakit.recipe.schema import Clean, Data, Train

TEMPLATE = ChatTemplate(FAMILIES["chatml"].tokenizer())
PLAIN = [{"prompt": f"What is number {n} in the list?", "completion": f"It is item {n} of many."} for n in range(60)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, rows, name="a.jsonl"):
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(folder / name)


def examples(folder, rows, clean, held_out=None):
    data = Data(train=write(folder, rows), eval=held_out and write(folder, held_out, "b.jsonl"), clean=Clean(**clean))
    return examples_of(data, TEMPLATE, Silent())


LONG = {"prompt": "Describe " + " ".join(f"thing{n}" for n in range(80)), "completion": "It is large."}
PLANTED = {
    "duplicates": (PLAIN[3], "the same as an earlier row"),
    "near_duplicates": ({**LONG, "prompt": LONG["prompt"] + " now"}, "nearly the same as an earlier row"),
    "contradictions": ({**PLAIN[3], "completion": "It is nothing."}, "another answer to the same prompt"),
    "trivial": ({"prompt": "And then what?", "completion": "TODO"}, ""),
    "style": ({"prompt": "Say more of it.", "completion": "word and word " * 40}, "written unlike the others"),
    "encoding": ({"prompt": "Where is it?", "completion": "In the cafÃ© nearby."}, ""),
    "html": ({"prompt": "Where is it then?", "completion": "In the <b>house</b> there."}, ""),
    "noise": ({"prompt": "Where is that?", "completion": "In \x1b[31mred\x1b[0m letters."}, ""),
}


@pytest.mark.parametrize("check", PLANTED)
def test_a_planted_fault_is_reported_and_alone(folder, check):
    row, reason = PLANTED[check]
    data = Data(train=write(folder, [*PLAIN, LONG, row]))
    found = survey(data, TEMPLATE, Train(batch_size=4), 1e3, Silent()).findings
    wanted = 2 if check == "contradictions" else 1
    assert found[check].total == wanted
    assert any(reason in what for what in found[check].counts)
    assert any("a.jsonl:62" in case for cases in found[check].first.values() for case in cases)
    others = {name: one.total for name, one in found.items() if name not in (check, "near_duplicates", "style")}
    assert not any(others.values()), others


@pytest.mark.parametrize("check", PLANTED)
def test_error_stops_with_the_place_and_the_remedy(folder, check):
    with pytest.raises(UserError, match=rf"a\.jsonl:(62|4).*data\.clean\.{check}: fix"):
        examples(folder, [*PLAIN, LONG, PLANTED[check][0]], {check: "error"})


@pytest.mark.parametrize("check", ["duplicates", "near_duplicates", "trivial", "style"])
def test_fix_leaves_the_row_out_and_counts_it(folder, check):
    train, _ = examples(folder, [*PLAIN, LONG, PLANTED[check][0]], {check: "fix"})
    assert "a.jsonl:62" not in train.rows["where"] and train.report.used == 61
    (reason,) = train.report.dropped.counts
    assert reason.startswith(f"left out by data.clean.{check}")
    assert sum(count for found, count in train.report.findings.counts.items() if found.startswith(f"{check}: ")) == 1


@pytest.mark.parametrize(
    ("check", "said"),
    [("encoding", "In the café nearby."), ("html", "In the house there."), ("noise", "In red letters.")],
)
def test_fix_puts_the_text_right(folder, check, said):
    train, _ = examples(folder, [*PLAIN, PLANTED[check][0]], {check: "fix"})
    row = train.rows[60]
    assert TEMPLATE.tokenizer.decode(row["input_ids"][row["answer"] :]) == f"{said}<|im_end|>"
    (found,) = train.report.findings.counts
    assert found.startswith(f"{check}: ")


def test_of_contradicting_answers_the_most_frequent_stays(folder):
    rows = [*PLAIN, *[{**PLAIN[3], "completion": "It is nothing."}] * 2]
    train, _ = examples(folder, rows, {"contradictions": "fix"})
    assert "a.jsonl:4" not in train.rows["where"] and "a.jsonl:61" in train.rows["where"]


def test_held_out_rows_among_the_training_rows_are_refused_or_left_out(folder):
    held_out = [PLAIN[7], {"prompt": "Another question altogether?", "completion": "Yes."}]
    with pytest.raises(UserError, match=r"1 of the training rows.*a\.jsonl:8 is the same.*b\.jsonl:1.*leakage: fix"):
        examples(folder, PLAIN, {}, held_out)
    train, kept = examples(folder, PLAIN, {"leakage": "fix"}, held_out)
    assert train.report.used == len(train.rows) == len(train.lengths()) == 59 and len(kept.rows) == 2
    assert train.report.tokens == sum(len(ids) for ids in train.rows["input_ids"])
    assert "a.jsonl:8" not in train.rows["where"]
    assert train.report.dropped.first == {
        "left out by data.clean.leakage: the same as a held-out row": ["a.jsonl:8: as b.jsonl:1"]
    }
    train, _ = examples(folder, PLAIN, {"leakage": "report"}, held_out)
    assert len(train.rows) == 60 and train.report.findings.total == 1
    train, _ = examples(folder, PLAIN, {"leakage": "off"}, held_out)
    assert len(train.rows) == 60 and train.report.findings.total == 0


def test_rows_nearly_held_out_are_left_out_when_asked(folder):
    near = {**LONG, "prompt": LONG["prompt"].replace("thing40", "something")}
    train, _ = examples(folder, [*PLAIN, LONG], {"near_leakage": "fix"}, [near])
    assert "a.jsonl:61" not in train.rows["where"] and train.report.used == 60


def test_near_duplicates_are_on_one_side_of_the_split_wherever_rows_are_added(folder):
    import random

    chance = random.Random(5)
    words = [f"w{n}" for n in range(500)]
    rows = []
    for _ in range(60):
        text = chance.choices(words, k=200)
        for _ in range(3):
            changed = [*text]
            changed[chance.randrange(200)] = "changed"
            rows.append({"prompt": " ".join(changed), "completion": "yes"})

    def held_out_of(some):
        data = Data(train=write(folder, some), eval=0.3)
        return {
            some[int(where.split(":")[1]) - 1]["prompt"]
            for where in examples_of(data, TEMPLATE, Silent())[1].rows["where"]
        }

    before = held_out_of(rows[:120])
    after = held_out_of(rows)
    assert before and after & {row["prompt"] for row in rows[:120]} == before
    sides = [{row["prompt"] in after for row in rows[at : at + 3]} for at in range(0, 180, 3)]
    assert all(len(side) == 1 for side in sides) and {True} in sides and {False} in sides


def test_the_command_says_it_all_as_one_document(recipe_file, lorakit_run, folder):
    path = recipe_file(
        data={"train": write(folder, [*PLAIN, PLAIN[3], {"prompt": "a", "completion": None}]), "broken": "drop"}
    )
    code, out, _ = lorakit_run("data", path, "--json", "--show", "2")
    facts = json.loads(out)
    assert code == 0
    assert facts["train"]["kept"] == 61 and facts["checks"]["duplicates"]["rows"] == 1
    assert sum(one["texts"] for one in facts["histogram"]) == 61 and len(facts["examples"]) == 2
    assert facts["train"]["dropped"]["counts"] == {"the column 'completion' is missing or null": 1}
    assert {limit["max_length"] for limit in facts["max_lengths"]} >= {128}


def test_the_command_prints_tables_and_examples(recipe_file, lorakit_run):
    _, out, _ = lorakit_run("data", recipe_file())
    for said in ("train: 22 of 22 rows", "tokens a text", "data.max_length", "padding", "near_leakage", "⟦"):
        assert said in out


def test_one_row_is_followed(recipe_file, lorakit_run, folder):
    path = recipe_file(data={"train": write(folder, [*PLAIN, {"prompt": "a", "completion": None}])})
    assert "⟦It is item 0 of many.<|im_end|>⟧" in lorakit_run("data", path, "--row", "a.jsonl:1")[1]
    assert "'completion' is missing or null" in lorakit_run("data", path, "--row", "a.jsonl:61")[1]
    code, _, err = lorakit_run("data", path, "--row", "a.jsonl:99")
    assert code == 2 and "no source has a row a.jsonl:99" in err


def test_cleaned_rows_are_written_and_can_be_read_again(recipe_file, lorakit_run, folder):
    rows = [*PLAIN, PLAIN[3], PLANTED["encoding"][0]]
    path = recipe_file(data={"train": write(folder, rows), "clean": {"duplicates": "fix", "encoding": "fix"}})
    lorakit_run("data", path, "--write", folder / "clean.jsonl")
    written = [json.loads(line) for line in (folder / "clean.jsonl").read_text().splitlines()]
    assert len(written) == 61 and written[60]["messages"][1]["content"] == "In the café nearby."
    assert written[60]["lorakit"]["where"] == "a.jsonl:62" and len(written[60]["lorakit"]["done"]) == 1
    code, _, err = lorakit_run("data", path, "--write", folder / "clean.jsonl")
    assert code == 2 and "already exists" in err
    code, _, err = lorakit_run("data", path, "--write", folder / "clean.txt")
    assert code == 2 and "not read as such. Write clean.jsonl." in err
    train, _ = examples_of(Data(train=str(folder / "clean.jsonl")), TEMPLATE, Silent())
    assert train.report.used == 61


def test_equal_rows_are_never_parted_even_where_all_rows_are_alike(folder):
    mails = [
        {
            "prompt": f"Read the mail from the shop to the customer number {n} about the order in June",
            "completion": "ham",
        }
        for n in range(40)
    ]
    for share in (0.1, 0.3, 0.5):
        data = Data(train=write(folder, [*mails, *mails]), eval=share)
        sides = [
            {int(where.split(":")[1]) % 40 for where in side.rows["where"]}
            for side in examples_of(data, TEMPLATE, Silent())
        ]
        assert not sides[0] & sides[1]


def test_what_stands_behind_the_last_answer_parts_no_rows(folder):
    rows = []
    for n in range(150):
        talk = [{"role": "user", "content": f"Ask {n}?"}, {"role": "assistant", "content": f"Item {n * 7}."}]
        more = {"role": "user", "content": " ".join(f"w{n * 31 + k}" for k in range(25))}
        rows += [{"messages": talk}, {"messages": [*talk, more]}]
    data = Data(train=write(folder, rows), eval=0.3)
    train, held_out = examples_of(data, TEMPLATE, Silent())
    assert not {str(ids) for ids in train.rows["input_ids"]} & {str(ids) for ids in held_out.rows["input_ids"]}


def test_the_report_is_of_the_split_that_is_trained(folder):
    data = Data(train=write(folder, [*PLAIN, *PLAIN]), eval=0.3, clean=Clean(near_leakage="off"))
    one, other = (examples_of(data, TEMPLATE, Silent(), survey=asked) for asked in (False, True))
    assert [side.rows["where"][:] for side in one] == [side.rows["where"][:] for side in other]


def test_a_text_that_begins_with_the_beginning_of_sequence_is_refused(folder):
    from tokenizers import processors

    tokenizer = FAMILIES["llama 3"].tokenizer()
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    data = Data(train=write(folder, [{"text": f"{bos}Hello there"}]))
    with pytest.raises(UserError, match="is the beginning of sequence of this model"):
        examples_of(data, ChatTemplate(tokenizer), Silent())


def test_what_would_stop_a_run_is_told_behind_the_whole_report(recipe_file, lorakit_run, folder):
    path = recipe_file(data={"train": write(folder, PLAIN), "eval": write(folder, [PLAIN[7]], "b.jsonl")})
    code, out, err = lorakit_run("data", path)
    assert (
        code == 2
        and "leakage: 1 x the same as a held-out row" in out
        and "write fix instead of error: data.clean.leakage" in err
    )
    code, out, _ = lorakit_run("data", path, "--json")
    assert code == 2 and json.loads(out)["checks"]["leakage"]["rows"] == 1
