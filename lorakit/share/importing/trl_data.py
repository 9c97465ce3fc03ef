"""TRL's `dataset_name` and `datasets` (ScriptArguments and DatasetMixtureConfig of trl/scripts/utils.py)."""

from pathlib import Path

from lorakit.recipe.data_files import data_suffix
from lorakit.share.importing import training
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.data_sources import (
    ImportedSource,
    read_place,
    read_split,
    read_subset,
    write_sources,
    write_training,
)
from lorakit.share.importing.paths import is_local, local_path, remote_reason
from lorakit.share.importing.row_format import format_of_columns, peek_format
from lorakit.share.importing.source import as_number

_MIXTURES = {
    "datasets": ("path", "name", "fraction"),
    "dataset_mixture.datasets": ("id", "config", "weight"),
}
"""Where a mixture of data sets stands -> its words for id, configuration and share: TRL's own, and those of the scripts
of open-r1 and of the alignment handbook."""


def import_datasets(c: Conversion) -> None:
    """`dataset_name` or a mixture -> `data.train` and `data.eval`, and what is trained of their rows."""
    mixture = next((at for at in _MIXTURES if isinstance(c.value(at), list)), "")
    key = mixture or ("dataset_mixer" if isinstance(c.value("dataset_mixer"), dict) else "dataset_name")
    if not c.has(key):
        c.refuse(key, "TRL needs it", "Write the rows to train on.")
        return
    held_out: list[ImportedSource] = []
    if mixture:
        sources = _mixture(c, mixture)
        c.ignore("dataset_name", f"{mixture} decides")
    elif key == "dataset_mixer":
        sources, held_out = _mixer(c)
    else:
        sources = _one_dataset(c)
    for source in (*sources, *held_out):
        if source.format is None:
            _set_format(c, source)
    write_sources(c, "data.train", sources, [key], key)
    eval_sources = _eval(c, sources, key, held_out)
    write_sources(c, "data.eval", eval_sources, ["dataset_test_split" if key == "dataset_name" else key], key)
    _trained(c, sources, key)


def _mixer(c: Conversion) -> tuple[list[ImportedSource], list[ImportedSource]]:
    """`dataset_mixer` of the alignment handbook: data sets with shares, whose splits are for training or for scoring
    by their names; rows have the column messages."""
    splits = c.value("dataset_splits", ["train", "test"])
    splits = [str(split) for split in (splits if isinstance(splits, list) else [splits])]
    configs = c.value("dataset_configs", [])
    configs = configs if isinstance(configs, list) else [configs]
    sides: tuple[list[ImportedSource], list[ImportedSource]] = ([], [])
    for at, (name, share) in enumerate(c.value("dataset_mixer").items()):
        if reason := remote_reason(str(name)):
            c.refuse("dataset_mixer", reason, "Download its files, and write their path.")
            continue
        for split in splits:
            is_chat = any(word.endswith("_sft") for word in splits)  # the splits of the handbook's own data sets
            source = ImportedSource(local_path(c, str(name)), format="messages" if is_chat else None)
            source.facts["split"] = None if split == "train" else split
            source.facts["subset"] = str(configs[at]) if at < len(configs) and configs[at] else None
            number = as_number(share)
            if "test" in split:
                sides[1].append(source)
            else:
                source.facts["take"] = float(number) if number is not None and 0 < number < 1 else None
                sides[0].append(source)
    c.account("dataset_mixer", "mapped", to="data.train", reason="shares are chosen by a hash of what rows say")
    for key in ("dataset_splits", "dataset_configs"):
        if c.has(key):
            c.account(key, "mapped", to="split" if key == "dataset_splits" else "subset")
    return sides


def _one_dataset(c: Conversion) -> list[ImportedSource]:
    name = str(c.value("dataset_name"))
    if reason := remote_reason(name):
        c.refuse("dataset_name", reason, "Download its files, and write their path.")
        return []
    split = str(c.value("dataset_train_split", "train"))
    sources = _splits(c, name, split, "dataset_name", "dataset_train_split")
    read_subset(c, "dataset_config", sources)
    return sources


def _splits(c: Conversion, name: str, split: str, key: str, split_key: str) -> list[ImportedSource]:
    """The rows of a split: of a folder the files that the library datasets takes for it by their names."""
    reference = local_path(c, name, bool(data_suffix(name)))
    source = ImportedSource(reference)
    c.account(key, "mapped", to="data.train")
    if not is_local(c, reference):
        source.facts["split"] = None if split == "train" else split
        c.account(split_key, "same" if split == "train" else "mapped", to=f"split: {split}") if c.has(
            split_key
        ) else None
        return [source]
    c.ignore(split_key, "the file of that name is read")
    if not Path(reference).is_dir():
        return [source]
    files = sorted(path for path in Path(reference).rglob("*") if path.is_file() and data_suffix(path.name))
    chosen = [path for path in files if split in path.stem.lower().replace("-", "_").split("_")] or files[:1]
    if not chosen or (len(files) > 1 and chosen == files[:1]):
        c.refuse(key, f"no file of the folder is named after the split {split}", "Write the file's path.")
        return []
    return [ImportedSource(str(path)) for path in chosen]


def _mixture(c: Conversion, mixture: str) -> list[ImportedSource]:
    sources = []
    path, config, fraction = _MIXTURES[mixture]
    for index in range(len(c.value(mixture))):
        at = f"{mixture}[{index}]"
        if not isinstance(c.value(at), dict):
            c.refuse(mixture, f"an entry is not a mapping with {path}", f"Write - {path}: ...")
            continue
        read = read_place(c, at, path, "data_files", str(c.value(f"{at}.split", "train")))
        read_split(c, f"{at}.split", read)
        read_subset(c, f"{at}.{config}", read)
        share, key = c.number(f"{at}.{fraction}"), f"{at}.{fraction}"
        if share is not None and 0 < share < 1:
            for source in read:
                source.facts["take"] = float(share)
            c.account(key, "mapped", to=f"take: {share:g}", reason="chosen by a hash of what rows say")
        else:
            c.ignore(key, "all rows")
        columns = c.value(f"{at}.columns", [])
        for source in read:
            source.format = c.row_format or format_of_columns(columns if isinstance(columns, list) else [columns])
            source.is_text = source.format == "text"
        c.ignore(f"{at}.columns", "the format reads its own columns")
        sources += read
    c.ignore("dataset_mixture.seed", "train.seed draws the rows")
    return sources


def _set_format(c: Conversion, source: ImportedSource) -> None:
    form = c.row_format or peek_format(source.path)
    if form is None and c.flag("assistant_only_loss"):
        form = "messages"
    if form is None and c.flag("completion_only_loss"):
        form = "prompt-completion"
    column = str(c.value("dataset_text_field", "text"))
    if form is None and c.has("dataset_text_field"):
        form = "messages" if column == "messages" else "text"
        reason = "taken from this key; --format says otherwise"
        c.account("dataset_text_field", "mapped", to=f"format: {form}", reason=reason)
    source.format = form
    source.is_text = form == "text"
    if source.is_text and column != "text":
        source.columns = {"text": column}
        c.account("dataset_text_field", "mapped", to=f"format: text, columns: {{text: {column}}}")


def _eval(
    c: Conversion, sources: list[ImportedSource], key: str, held_out: list[ImportedSource]
) -> list[ImportedSource]:
    strategy = str(c.value("eval_strategy", c.value("evaluation_strategy", "no"))).lower()
    keys = [key for key in ("eval_strategy", "evaluation_strategy", "eval_steps") if c.has(key)]
    if strategy in ("no", "false", "none"):
        names = [*keys, "dataset_test_split", "test_split_size", "dataset_mixture.test_split_size"]
        c.ignore(names, "nothing is evaluated: eval_strategy is no")
        return []
    training.interval(c, "train.eval_every", strategy, c.number("eval_steps"), keys, c.number("logging_steps", 10))
    c.note(training.BEST_NOTE)
    if key == "dataset_mixer":
        return held_out
    if key != "dataset_name":
        training.held_out_share(c, "test_split_size" if key == "datasets" else "dataset_mixture.test_split_size")
        return []
    if sources and is_local(c, sources[0].path) and not Path(local_path(c, str(c.value("dataset_name")))).is_dir():
        c.refuse(keys[:1], "a file has one split, and none to evaluate on", "Import with --partial, write data.eval.")
        return []
    if not sources:
        c.ignore("dataset_test_split", "dataset_name is refused")
        return []
    read = _splits(c, str(c.value("dataset_name")), str(c.value("dataset_test_split", "test")), "dataset_name", "")
    read_subset(c, "dataset_config", read)
    for source in read:
        _set_format(c, source)
        if not is_local(c, source.path):
            source.facts["split"] = str(c.value("dataset_test_split", "test"))
    if c.has("dataset_test_split"):
        c.account("dataset_test_split", "mapped", to="data.eval")
    return read


def _trained(c: Conversion, sources: list[ImportedSource], key: str) -> None:
    """What is trained: all tokens of messages by default, the completion of prompt and completion."""
    keys = [key for key in ("assistant_only_loss", "completion_only_loss") if c.has(key)]
    formats = {source.format for source in sources}
    by_format = {"prompt-completion": "assistant", "messages": "all", "sharegpt": "all", "text": "all"}
    if c.flag("assistant_only_loss"):
        trains = {"assistant"}
    elif c.has("completion_only_loss"):
        trains = {"assistant" if c.flag("completion_only_loss") else "all"}
    elif None in formats or "alpaca" in formats:
        reason = (
            "TRL trains every token of messages, and the completion alone of prompt and completion; which of them the "
            "rows are is not known here"
        )
        c.refuse(key, reason, "Give --format messages, prompt-completion or text.")
        trains = {"all"}
    else:
        trains = {by_format.get(str(form), "all") for form in formats}
    for source in sources:
        source.trains = next(iter(trains)) if len(trains) == 1 else by_format.get(str(source.format), "all")
    write_training(c, sources, keys)
