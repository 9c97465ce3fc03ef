"""Metrics agree with the reference libraries and with cases worked out by hand."""

import json
import random
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
from recipe_files import SMALL, errors, loaded

from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.metric import compare, intervals, row_scores
from lorakit.evaluate.metrics.json_answers import JsonSchema
from lorakit.evaluate.metrics.matching import Regex, final_number, tokens
from lorakit.evaluate.metrics.similarity import Bleu, Chrf, Semantic
from lorakit.recipe.load import load
from lorakit.recipe.schema import MetricSettings
from lorakit.recipe.to_yaml import to_yaml
from lorakit.registry import METRICS

SENTENCE = "The cat sat on the mat , a dog ran into 3 houses . It's 4,000 miles; café naïve Straße !"
WORDS = SENTENCE.split()


def one(metric, answer, reference):
    """The score of a single row; None where it has none."""
    return values([metric], [answer], [reference]).get(metric if isinstance(metric, str) else name(metric))


def values(metrics, answers, references):
    """Each score over all rows that have one."""
    return {name: measure.value for name, measure in row_scores(metrics, answers, references).items()}


def by_row(metrics, answers, references):
    """The scores of each row (rows, measures)."""
    return np.stack([measure.by_row for measure in row_scores(metrics, answers, references).values()], axis=1)


def name(metric):
    return next(iter(metric.model_dump()))


def texts(count, seed):
    """Random answers to random references: some equal, some alike, some empty."""
    random.seed(seed)
    references = [" ".join(random.choices(WORDS, k=random.randrange(0, 25))) for _ in range(count)]
    answers = [
        random.choice([text, "", " ".join(random.sample(text.split(), len(text.split()) // 2)), " ".join(WORDS[:7])])
        for text in references
    ]
    return answers, references


def with_settings(**settings):
    return MetricSettings(**{key.replace("_", "-"): value for key, value in settings.items()})


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "score"),
    [
        ("normalized-match", "The  Eiffel Tower!", "eiffel tower", 1.0),
        ("normalized-match", "an Eiffel Tower in Paris", "eiffel tower", 0.0),
        ("normalized-match", "Theory", "ory", 0.0),
        ("token-f1", "the cat sat", "a cat sat down", 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
        ("token-f1", "red red fox", "red fox fox", 2 / 3),
        ("token-f1", "", "fox", 0.0),
        ("token-f1", "The", "a", 1.0),
        ("contains", "It is in  PARIS, France.", "paris", 1.0),
        ("contains", "concatenate", "cat", 0.0),
        ("contains", "concatenate the cat", "cat", 1.0),
        ("contains", "15", "5", 0.0),
        ("contains", "-5.", "-5", 1.0),
        ("contains", "答案是北京。", "北京", 1.0),
        ("contains", "ｆｕｌｌ width", "full WIDTH", 1.0),
        ("contains", "anything", " ", None),
        ("length-ratio", "abcd", "ab", 2.0),
        ("length-ratio", " ab ", "", None),
        ("json-valid", '{"a": 1}', "", 1.0),
        ("json-valid", '{"a": NaN}', "", 0.0),
        ("json-fields", "[1]", "[1]", None),
    ],
)
def test_scores_are_those_worked_out_by_hand(metric, answer, reference, score):
    found = one(metric, answer, reference)
    if score is None:
        assert found is None or np.isnan(found)
    else:
        assert found == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", 7),
        ("#### 1,234.50\nnot 9", 1234.5),
        ("#### $1,200", 1200),
        ("#### -$5", -5),
        ("The answer is $-5.", -5),
        ("That makes 10-3.", 3),
        ("from −4 degrees", -4),
        ("about 50%", 50),
        ("one half, 1/2", 0.5),
        ("on 1/2/2020", 2020),
        (".5 and 1e-3", 0.001),
        ("1,2,3", 3),
        ("12,34", 34),
        ("GPT42", None),
        ("version 3.2.1", 3.2),
        ("- 3 apples", 3),
        ("it costs 5€.", 5),
        ("5kg", 5),
        ("3/0", 0),
        ("3 before\n#### none", None),
        ("3 before, and then ####", None),
        ("no number at all", None),
        ("9" * 100_000, None),
    ],
)
def test_the_final_number_is_read_as_people_write_it(text, number):
    found = final_number(text)
    assert found is None if number is None else float(found) == number


def test_numbers_match_by_value():
    assert one("number-match", "so it is 1,200.00 dollars.", "#### 1200") == 1.0
    assert one("number-match", "0.5", "1/2") == 1.0
    assert one("number-match", "0.33", "1/3") == 0.0
    assert one("number-match", "I do not know", "#### 3") == 0.0
    assert one("number-match", "3", "three") is None


@pytest.mark.parametrize(
    ("settings", "answer", "reference", "score"),
    [
        ({"pattern": r"Answer: (\w+)"}, "Well. Answer: B. Answer: C", "Answer: B", 1.0),
        ({"pattern": r"Answer: (\w+)", "take": "last"}, "Answer: B. Answer: C", "Answer: C", 1.0),
        ({"pattern": r"Answer: (\w+)", "take": "last"}, "Answer: C", "Answer: C", 1.0),
        ({"pattern": r"Answer: (\w+)"}, "Answer: B", " B\n", 1.0),
        ({"pattern": r"Answer: (\w+)"}, "B", "B", 0.0),
        ({"pattern": r"\d+"}, "in 1999 or 2000", "1999", 1.0),
        ({"pattern": r"\((\w)\)|option (\w)"}, "option B", "(B)", 1.0),
    ],
)
def test_regex_compares_what_it_finds(settings, answer, reference, score):
    assert one(with_settings(regex=Regex(**settings)), answer, reference) == score


def test_token_f1_and_normalized_match_are_squads():
    """Against the formulas of SQuAD's evaluate-v1.1.py, written out with its own steps."""
    import re
    import string
    from collections import Counter

    def normal(text):
        text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    answers, references = texts(200, 1)
    scores = by_row(["normalized-match", "token-f1"], answers, references)
    for row, answer, reference in zip(scores, answers, references, strict=True):
        given, wanted = normal(answer).split(), normal(reference).split()
        same = sum((Counter(given) & Counter(wanted)).values())
        f1 = 0.0 if same == 0 else 2 / (len(given) / same + len(wanted) / same)
        assert row[0] == (normal(answer) == normal(reference))
        assert row[1] == pytest.approx(1.0 if given == wanted == [] else f1)


def test_rouge_is_rouge_scores_own_on_ascii():
    from rouge_score.rouge_scorer import RougeScorer

    answers, references = ([text.encode("ascii", "ignore").decode() for text in some] for some in texts(100, 2))
    scores = by_row(["rouge-1", "rouge-2", "rouge-l"], answers, references)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for row, answer, reference in zip(scores, answers, references, strict=True):
        expected = scorer.score(reference, answer)
        assert row.tolist() == pytest.approx([expected[kind].fmeasure for kind in ("rouge1", "rouge2", "rougeL")])


def test_rouge_reads_every_script():
    assert tokens("Straße, a_b 北京 มา") == ["straße", "a", "b", "北", "京", "ม", "า"]
    assert one("rouge-1", "Москва большая", "Большая Москва") == 1.0
    assert one("rouge-l", "我在北京", "我在上海") == 0.5


@pytest.mark.parametrize("tokenize", ["13a", "intl", "zh", "char", "none"])
def test_bleu_is_sacrebleus_corpus_score_not_a_mean_of_rows(tokenize):
    from sacrebleu.metrics import BLEU

    answers, references = texts(80, 3)
    metric = with_settings(bleu=Bleu(tokenize=tokenize))
    for chosen in (slice(0, 80), slice(0, 3), slice(40, 41)):
        some, wanted = answers[chosen], references[chosen]
        expected = BLEU(tokenize=tokenize, force=True).corpus_score(some, [wanted]).score
        assert values([metric], some, wanted)["bleu"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("word_order", [0, 2])
def test_chrf_is_sacrebleus_corpus_score(word_order):
    from sacrebleu.metrics import CHRF

    answers, references = texts(80, 4)
    metric = with_settings(chrf=Chrf(word_order=word_order))
    for chosen in (slice(0, 80), slice(0, 3), slice(40, 41)):
        some, wanted = answers[chosen], references[chosen]
        expected = CHRF(word_order=word_order).corpus_score(some, [wanted]).score
        assert values([metric], some, wanted)["chrf"] == pytest.approx(expected, abs=1e-9)


def test_bleu_of_edges_is_sacrebleus():
    from sacrebleu.metrics import BLEU

    for answers, references in (
        [["a b"], ["a b"]],
        [[""], [""]],
        [["", "x"], ["y", "z"]],
        [["a b c d e"], ["a b c d f"]],
    ):
        expected = BLEU().corpus_score(answers, [references]).score
        assert values(["bleu"], answers, references)["bleu"] == pytest.approx(expected, abs=1e-9)


def test_a_mean_leaves_out_rows_without_a_score():
    given = (["number-match", "exact-match"], ["3", "x", "y"], ["3", "none", "4"])
    assert values(*given) == {"number-match": 0.5, "exact-match": pytest.approx(1 / 3)}
    assert np.array_equal(by_row(*given), [[1, 1], [np.nan, 0], [0, 0]], equal_nan=True)
    assert values(["bleu", "exact-match"], [], []) == {}


def test_length_ratio_is_of_all_rows_together():
    assert values(["length-ratio"], ["aaaa", "a"], ["aa", "aaa"]) == {"length-ratio": 1.0}


SCHEMA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}}},
    "additionalProperties": False,
    "$defs": {"part": {"type": "integer", "minimum": 0}},
}


def test_json_schema_judges_the_whole_answer(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    answers = [
        '{"name": "x", "parts": [1]}',
        '{"name": "x", "parts": [-1]}',
        '{"name": 3}',
        "{}",
        '{"name": "x"} so',
        "",
    ]
    for schema in (SCHEMA, str(path)):
        metric = with_settings(json_schema=JsonSchema(schema=schema))
        assert by_row([metric], answers, answers).ravel().tolist() == [1, 0, 0, 0, 0, 0]


def test_json_schema_fetches_nothing():
    metric = with_settings(json_schema=JsonSchema(schema={"$ref": "http://localhost:1/schema.json"}))
    with pytest.raises(UserError, match=r"json-schema: the schema refers to 'http://localhost:1/schema.json'"):
        row_scores([metric], ["{}"], ["{}"])


def test_json_fields_tells_true_from_1_at_any_depth():
    reference = '{"a": {"b": [1, true]}}'
    assert one("json-fields", '{"a": {"b": [1.0, true]}}', reference) is None
    assert values(["json-fields"], ['{"a": {"b": [1.0, true]}}'], [reference]) == {"json-fields.a": 1.0}
    assert values(["json-fields"], ['{"a": {"b": [1, 1]}}'], [reference]) == {"json-fields.a": 0.0}


def test_burrows_delta_is_the_root_of_the_mean_square_of_z_scores():
    """The square of a mean is here the mean product of two different parts, of which every fifth row is one."""
    random.seed(2)
    words = ["dog", "the", "a", "and", "end", "fox", "of"]
    answers, references = ([" ".join(random.choices(words, k=6)) for _ in range(23)] for _ in range(2))
    shares = [
        np.array([[text.split().count(word) / 6 for word in words] for text in of]) for of in (answers, references)
    ]
    parts = [(shares[0] - shares[1])[part::5].mean(0) for part in range(5)]
    products = [one * other for at, one in enumerate(parts) for other in parts[:at]]
    square = (np.mean(products, axis=0) / shares[1].var(0)).mean()
    found = values(["burrows-delta"], answers, references)["burrows-delta"]
    assert found == pytest.approx(np.sign(square) * abs(square) ** 0.5)
    assert values(["burrows-delta"], references, references)["burrows-delta"] == 0
    assert values(["burrows-delta"], ["a", "b"], ["...", ""]) == values(["burrows-delta"], ["a"], ["b"]) == {}
    assert values(["burrows-delta"], ["", ""], ["a b", "a a b"])["burrows-delta"] > 0


def test_burrows_delta_of_one_author_is_0_within_its_interval():
    words = ["the", "a", "of", "and", "to", "in", "is", "that", "it", "was"]
    random.seed(4)
    inside = 0
    for _ in range(20):
        one, other = ([" ".join(random.choices(words, range(10, 0, -1), k=20)) for _ in range(60)] for _ in range(2))
        scores = row_scores(["burrows-delta"], one, other)
        interval = intervals(scores)["burrows-delta"]
        assert interval.low <= scores["burrows-delta"].value <= interval.high
        inside += interval.low <= 0 <= interval.high
    assert inside >= 18


def test_burrows_delta_tells_a_style_whatever_the_subject():
    random.seed(1)
    plain, same, other = ([] for _ in range(3))
    for number in range(80):
        one, two = random.choice(["the", "a"]), random.choice(["in", "on", "of"])
        plain.append(f"{one} thing{number} is {two} the place{number}.")
        same.append(f"{two} {one} box{number} is the lid{number}.")
        other.append(f"I would say that box{number} was not what you take for {one} lid{number}.")
    near, far = (row_scores(["burrows-delta"], texts, plain) for texts in (same, other))
    assert near["burrows-delta"].value < 0.2 < 0.5 < far["burrows-delta"].value
    assert compare(far, near)["burrows-delta"].verdict == "better"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer):
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("encoder")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), **size, max_position_embeddings=24, pad_token_id=0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_semantic_similarity_is_the_cosine_of_mean_states(encoder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    answers, references = ["rivers", "lamps and clouds", "apples " * 40, ""], ["rivers", "a bridge", "letters", "x"]
    metric = with_settings(semantic_similarity=Semantic(model=str(encoder)))
    found = by_row([metric], answers, references).ravel()
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()

    def vector(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :24]
        with torch.no_grad():
            return model(ids).last_hidden_state[0].mean(0)

    for score, answer, reference in list(zip(found, answers, references, strict=True))[:3]:
        expected = torch.cosine_similarity(vector(answer), vector(reference), dim=0)
        assert score == pytest.approx(float(expected), abs=1e-5)
    assert found[0] == pytest.approx(1.0, abs=1e-6)


def test_a_model_that_pools_otherwise_is_refused(encoder, tmp_path):
    import shutil

    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Transformer"}] * 2))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    with pytest.raises(UserError, match="pools by lasttoken"):
        one(with_settings(semantic_similarity=Semantic(model=str(folder))), "a", "b")
    with pytest.raises(UserError, match="cannot be loaded as an embedding model"):
        one(with_settings(semantic_similarity=Semantic(model=str(tmp_path))), "a", "b")


def test_every_metric_says_how_its_score_is_read():
    from lorakit.registry import Unit

    answers, references = texts(6, 5)
    for entry in METRICS:
        assert entry.unit in get_args(Unit)
        if not entry.settings or entry.name in ("bleu", "chrf"):
            for found in row_scores([entry.name], answers, references).values():
                low, high = {"points": (0, 100.0001), "ratio": (-1, 9)}.get(found.unit, (0, 1))
                assert low <= found.value <= high
                assert found.write(found.value)


def test_a_score_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))

    @METRICS.register("broken")
    def broken(answer, reference):
        """Divides by nothing."""
        return {"part": float("nan")}

    with pytest.raises(LorakitError, match=r"the metric broken\.part gives answer 1 of 2 the score nan"):
        row_scores(["broken"], ["a", "b"], ["a", "b"])


def test_a_recipe_names_metrics_with_their_settings(tmp_path):
    text = SMALL + (
        "evaluate:\n  metrics:\n    - bleu\n    - regex: {pattern: '(a)'}\n    - json-schema:\n"
        "        schema: {type: object, properties: {a: {type: [string, 'null'], default: null}}}\n"
    )
    recipe = loaded(tmp_path, text).recipe
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(recipe, tmp_path), encoding="utf-8")
    assert load(again).recipe == recipe
    assert values(recipe.evaluate.metrics, ["a"], ["a"]) == {"bleu": 0.0, "regex": 1.0, "json-schema": 0.0}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ("[regex]", r"evaluate.metrics[0]: regex needs settings: pattern. Write for example {regex: {pattern: "),
        ("[json-schema]", "evaluate.metrics[0]: json-schema needs settings: schema. Write for example {json-schema: "),
        (
            "[{regex: {pattern: 'a('}}]",
            "evaluate.metrics[0].regex.pattern: 'a(' is not a regular expression: missing )",
        ),
        ("[{regex: {patern: a}}]", "there is no such key. Did you mean evaluate.metrics[0].regex.pattern?"),
        ("[{rouge-1: {}}]", "rouge-1 has no settings. Write the word alone: rouge-1."),
        ("[{bleu: {}, chrf: {}}]", "evaluate.metrics[0]: bleu and chrf are 2 metrics. Write one, such as exact-match"),
        ("[chrf, {chrf: {word_order: 2}}]", "evaluate.metrics[1]: 'chrf' is there twice. Remove one."),
        ("[{json-schema: {schema: nope.json}}]", "evaluate.metrics[0].json-schema.schema: 'nope.json' does not exist."),
        ("[{json-schema: {schema: train.jsonl}}]", "json-schema.schema: it cannot be read as JSON: "),
        (
            "[{json-schema: {schema: {type: objct}}}]",
            "json-schema.schema: it is no JSON schema at type: 'objct' is not",
        ),
        ("[{json-schema: {schema: {pattern: '('}}}]", "schema: it is no JSON schema at pattern: '(' is not a 'regex'"),
        ("[{semantic-similarity: {model: org/x}}]", "semantic-similarity.model: 'org/x' does not exist."),
    ],
)
def test_a_metric_that_cannot_be_has_one_error_at_its_place(tmp_path, metrics, expected):
    (found,) = errors(tmp_path, SMALL + f"evaluate: {{metrics: {metrics}}}\n")
    assert expected in found


@pytest.mark.parametrize("module", ["lorakit.evaluate.metrics", "lorakit.evaluate.metric", "lorakit.recipe.fields"])
def test_the_settings_are_known_whatever_is_imported_first(module):
    code = f"import {module}; from lorakit.recipe.schema import Evaluate; print(Evaluate(metrics=[{{'bleu': {{}}}}]))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tokenize='13a'" in answer.stdout


def test_the_table_of_metrics_is_light():
    code = (
        "import sys; from lorakit.registry import METRICS; import lorakit.recipe.load\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'scipy', 'sacrebleu', 'rouge_score', 'nltk', 'jsonschema'}\n"
        "print(len(METRICS.names()), sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "18 []"
