"""The parts of recipes for each size of card: what they and configs/README.md say fits is what the planner says."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorakit.cli import app
from lorakit.hardware.gpus import GPUS, Gpu, find_gpu
from lorakit.hardware.machine import machine_with
from lorakit.plan.estimate import Plan, assume_rows, plan_run
from lorakit.plan.model_info import find_model_info, known_models
from lorakit.recipe.load import load

CONFIGS = Path(__file__).parent.parent / "configs"
README = CONFIGS / "README.md"
GIB = 2**30
ONE_ROW = ("train.micro_batch=1", "train.gradient_checkpointing=true")
# Cards sold as one size show up to this share less than its GB in GiB.
LEAST_SHOWN = 0.93
# Models whose total parameters differ by less are of one size.
ONE_SIZE = 1.05
MAKERS = ("meta-llama/", "Qwen/", "mistralai/")
LINE = re.compile(r"# \| (\d+ GB) \| (\S+?)(?:, (comfortable|largest))? \| (?:(\S+=[^|]*) )?\| ([\d.]+) \| (\d+) \|")


def gigabytes(preset: Path) -> int:
    return int(preset.stem.removesuffix("gb"))


PRESETS = sorted((CONFIGS / "hardware").glob("*.yaml"), key=gigabytes)


@dataclass(frozen=True)
class Claim:
    """One line of a preset's table: what takes how much on a card of that size."""

    preset: Path
    card: str
    base: str
    role: str | None
    overrides: tuple[str, ...]
    gib: float
    rows: int

    def __str__(self) -> str:
        return " ".join([self.preset.stem, self.card.replace(" ", ""), self.base, *self.overrides])

    @property
    def whole(self) -> Gpu:
        """A card that shows all of that size."""
        return find_gpu(self.card)

    @property
    def smallest(self) -> Gpu:
        """The known card that is sold as that size and shows the least."""
        memory = self.whole.memory
        cards = [card for card in GPUS if LEAST_SHOWN * memory <= card.memory <= memory]
        return min(cards, key=lambda card: card.memory, default=self.whole)

    def plan(self, card: Gpu, *overrides: str) -> Plan:
        return planned(self.preset, self.base, card, *self.overrides, *overrides)


def lines(preset: Path) -> list[str]:
    """The lines of the table in a preset's comments, without its head."""
    table = [line for line in preset.read_text(encoding="utf-8").splitlines() if line.startswith("# |")]
    return table[2:]


def claim(preset: Path, line: str) -> Claim:
    found = LINE.fullmatch(line)
    assert found, f"{preset.name}: {line}"
    card, base, role, overrides, gib, rows = found.groups()
    return Claim(preset, card, base, role, tuple((overrides or "").split()), float(gib), int(rows))


CLAIMS = [claim(preset, line) for preset in PRESETS for line in lines(preset)]
LARGEST = [claim for claim in CLAIMS if claim.role == "largest"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The folder of the recipes that extend a preset, and nothing in any hub's cache."""
    folder = tmp_path_factory.mktemp("presets")
    (folder / "train.jsonl").write_text('{"prompt": "The capital of France is", "completion": "Paris"}\n' * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_CACHE", str(folder / "hub"))
        yield folder


def extending(preset: Path, base: str) -> Path:
    path = Path("recipe.yaml")
    path.write_text(f"extends: {preset}\nmodel: {{base: {base}}}\ndata: {{train: train.jsonl}}\n")
    return path


def planned(preset: Path, base: str, card: Gpu, *overrides: str) -> Plan:
    """The plan of a small recipe that extends a preset, with every row as long as the preset allows."""
    recipe = load(extending(preset, base), overrides).recipe
    facts = find_model_info(base, "main")
    assert recipe.adapter.rank == 16 and recipe.adapter.targets == "all-linear"
    assert facts and facts.spec, f"{base} is not known"
    return plan_run(recipe, facts, assume_rows(recipe.data.max_length, "as the preset says"), machine_with(card))


def larger_sizes(base: str) -> list[str]:
    """The known models of Meta, Qwen and Mistral AI that are of a larger size, each by one of its hub ids."""
    found = {one: model for model in known_models() for one in model["ids"]}
    least = ONE_SIZE * found[base]["parameters"]
    named = {model["parameters"]: one for one, model in found.items() if one.startswith(MAKERS)}
    return [one for parameters, one in named.items() if parameters > least]


def preset_for(card: Gpu) -> Path:
    """The largest preset that is not above a card."""
    return [preset for preset in PRESETS if LEAST_SHOWN * gigabytes(preset) * GIB <= card.memory][-1]


def test_there_is_a_preset_for_each_size_and_each_names_its_models():
    assert [preset.stem for preset in PRESETS] == ["6gb", "8gb", "12gb", "16gb", "24gb", "48gb", "80gb"]
    cards = {(claim.preset, claim.card) for claim in CLAIMS}
    assert len(cards) == len(PRESETS) + 1  # 4 and 6 GB share one
    for role in ("comfortable", "largest"):
        assert sorted(cards) == sorted((claim.preset, claim.card) for claim in CLAIMS if claim.role == role)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_a_recipe_that_extends_a_preset_is_valid_on_any_machine(preset):
    path = extending(preset, "Qwen/Qwen2.5-0.5B-Instruct")
    done = CliRunner().invoke(app, ["check", str(path)])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_what_is_said_of_a_model_is_what_the_planner_says(claim):
    plan = claim.plan(claim.whole)
    assert plan.fits == "yes"
    assert claim.rows == plan.recipe.train.micro_batch
    assert claim.gib == pytest.approx(claim.plan(claim.whole, *ONE_ROW).longest.total / GIB, rel=0.05)


@pytest.mark.parametrize("claim", LARGEST, ids=str)
def test_no_larger_size_fits(claim):
    larger = larger_sizes(claim.base)
    assert larger
    for base in larger:
        assert planned(claim.preset, base, claim.whole, *ONE_ROW).fits != "yes", base


@pytest.mark.parametrize("claim", [claim for claim in LARGEST if claim.card != "4 GB"], ids=str)
def test_up_to_24_gb_rows_twice_as_long_are_too_much_for_the_largest_model(claim):
    twice = f"data.max_length={2 * claim.plan(claim.whole).recipe.data.max_length}"
    fits = claim.plan(claim.smallest, twice, *ONE_ROW).fits == "yes"
    assert fits == (gigabytes(claim.preset) > 24)


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.role == "comfortable"], ids=str)
def test_a_comfortable_model_leaves_a_quarter_of_the_card(claim):
    assert claim.plan(claim.smallest, *ONE_ROW).longest.total <= 0.75 * claim.smallest.memory


@pytest.mark.parametrize("card", GPUS, ids=lambda card: card.name)
def test_every_known_card_trains_what_its_preset_names(card):
    preset = preset_for(card)
    dtype = "float16" if card.bfloat16 is None else "bfloat16"
    for claim in CLAIMS:
        if claim.preset == preset:
            plan = claim.plan(card)
            assert (plan.fits, plan.recipe.model.dtype) == ("yes", dtype), str(claim)


def table_under(head: str) -> str:
    """The rows of the README's table with this head."""
    after = README.read_text(encoding="utf-8").partition(f"{head}\n")[2].partition("\n")[2]
    return after.partition("\n\n")[0].strip()


def test_the_readme_has_the_lines_of_every_preset():
    rows = [f"| `{preset.name}` {line.removeprefix('# ')}" for preset in PRESETS for line in lines(preset)]
    assert table_under("| part | card | base model | with --set | GiB | rows |") == "\n".join(rows)


def test_the_readme_lists_every_known_card_at_its_preset():
    names = {preset: ", ".join(card.name for card in GPUS if preset_for(card) == preset) for preset in PRESETS}
    rows = [f"| `{preset.name}` | {cards} |" for preset, cards in names.items()]
    assert table_under("| part | cards |") == "\n".join(rows)


def test_the_recipe_of_the_readme_is_valid(folder):
    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "my-task.yaml").write_text(text)
    assert load(folder / "my-task.yaml").recipe.model.quantization == "nf4"
