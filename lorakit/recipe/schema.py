"""What a recipe may say. Each field is declared once, here, with its meaning as the docstring below it.

The reference (docs/recipe.md), the JSON schema for editors, the error texts and `lorakit check` all read this file.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, create_model, model_serializer

from lorakit.recipe.fields import (
    AdapterRef,
    Auto,
    BaseModelRef,
    ChatTemplateRef,
    CleanAction,
    DataRef,
    Day,
    ExportWord,
    Interval,
    LayerNumbers,
    LayerRange,
    NotEmpty,
    OutputDir,
    PositiveFloat,
    PositiveInt,
    RunName,
    Share,
    SystemPath,
    Targets,
    TemplateValue,
    Warmup,
    Wording,
)
from lorakit.registry import ADAPTERS, FORMATS, METRICS, QUANTIZERS, TRACKERS, AnyTable, Section


class _OneEntry(Section):
    # The keys are made from the table: there is no source text with docstrings under them.
    model_config = ConfigDict(use_attribute_docstrings=False, json_schema_extra={"minProperties": 1})

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The entries that are not chosen are left out."""
        return {name: value for name, value in handler(self).items() if value is not None}


def _settings_by_name(table: AnyTable, name: str) -> Any:
    """A mapping of one word of a table to its entry's settings, so that errors and documents know all of these."""
    keys: dict[str, Any] = {
        entry.name: (entry.settings | None, Field(default=None, description=f"Settings of {entry.name}."))
        for entry in table
        if entry.settings
    }
    purpose = f"One {table.noun}, with its settings."
    return create_model(name, __base__=_OneEntry, __module__=__name__, __doc__=purpose, **keys)


FormatSettings: Any = _settings_by_name(FORMATS, "FormatSettings")
KindSettings: Any = _settings_by_name(ADAPTERS, "KindSettings")
MetricSettings: Any = _settings_by_name(METRICS, "MetricSettings")
TrackerSettings: Any = _settings_by_name(TRACKERS, "TrackerSettings")
_words: Any = Literal  # of a table, which are known once it is read
Quantization: Any = _words[tuple(QUANTIZERS.names())]
Format: Any = _words[("auto", *FORMATS.names())] | FormatSettings
AdapterKind: Any = _words[tuple(ADAPTERS.names())] | KindSettings
Metric: Any = _words[tuple(METRICS.names())] | MetricSettings
Tracker: Any = _words[tuple(TRACKERS.names())] | TrackerSettings


class Model(Section):
    """The base model, and how it is kept in memory."""

    base: BaseModelRef
    """A hub id, a local folder, or a `.gguf` file."""
    revision: str = "main"
    """The hub branch, tag or commit. A commit pins the weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The number format of the weights and of the arithmetic."""
    quantization: Quantization = "none"
    """How the frozen weights are compressed while the adapter trains."""
    double_quant: bool = True
    """Quantize the quantization constants too. 4-bit only."""
    attention: Literal[
        "auto", "eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """The attention implementation. `varlen` is torch's own FlashAttention over rows that are packed end to end."""
    chat_template: ChatTemplateRef | None = None
    """Used instead of the tokenizer's own chat template: one of lorakit's by its name (docs/chat-templates.md), or a \
`.jinja` file. A word without a dot or a slash is a name."""
    add_tokens: list[NotEmpty] = []
    """Texts that become one token each, which the vocabulary lacks, such as ['<|im_start|>', '<|im_end|>']. The \
embeddings get a row for each, and of the embeddings these rows alone are trained (docs/chat-templates.md)."""
    template_variables: dict[NotEmpty, TemplateValue] = {}
    """Variables that the chat template reads -> their values, such as {enable_thinking: false}, for training and \
evaluation alike."""
    template_date: Day | None = "auto"
    """The date for a chat template that writes today's date (`strftime_now`), at 00:00. `auto` is the day on which \
the run begins, or null where the template writes no date. A run keeps its date when it is resumed, evaluated and \
merged."""


class Spectrum(Section):
    """Layers by how much of each weight is signal (Spectrum, arXiv 2406.06623)."""

    spectrum: Share
    """The share of the modules of each type that are chosen: those with the highest signal-to-noise ratio."""


if TYPE_CHECKING:
    _From = Section
else:
    # `from` is a word of Python's own, which a class body cannot declare.
    _FROM = (
        "A run, or a folder that PEFT saved, whose adapter is trained further: its kind, rank, alpha and modules come "
        "with it, and are not written here."
    )
    _From: Any = create_model(
        "From",
        __base__=Section,
        __config__=None,
        **{"from": (AdapterRef | None, Field(default=None, description=_FROM))},
    )


class Adapter(_From):
    """The trained low-rank weights."""

    kind: AdapterKind = "lora"
    """The member of the LoRA family, or that word with its settings, such as {pissa: {iterations: null}}."""
    rank: PositiveInt = 16
    """The rank of every adapter matrix pair; for adalora and flexlora the mean rank."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32
    """The numerator of the adapter's scale: alpha/rank, and alpha/sqrt(rank) for rslora."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: Targets = "all-linear"
    """The modules that get an adapter: `all-linear` (the output head excepted), `attention`, `mlp`, a list of module \
names, or one regular expression that is matched against whole module paths."""
    exclude: list[NotEmpty] = []
    """Names or regular expressions of modules that get no adapter."""
    layers: Annotated[
        Literal["all"] | LayerRange | LayerNumbers | Spectrum,
        Wording("all, a range such as 8-15, a list of layer numbers and ranges, or {spectrum: 0.5}", "8-15"),
    ] = "all"
    """The blocks of the model whose modules get an adapter, counted from 0."""
    rank_overrides: dict[str, PositiveInt] = {}
    """Name or regular expression of modules -> their rank. Of several that match, the last."""
    alpha_overrides: dict[str, PositiveFloat] = {}
    """Name or regular expression of modules -> their alpha. Of several that match, the last."""
    train_modules: list[NotEmpty] = []
    """Modules that are trained whole beside the adapter, such as embed_tokens or lm_head."""


class Source(Section):
    """Where rows come from."""

    path: DataRef
    """A file (JSON, JSONL, CSV, Parquet and others), a folder or pattern of files, or a hub dataset id."""
    subset: NotEmpty | None = None
    """The configuration of a hub dataset, such as `main`; null takes its default."""
    data_files: NotEmpty | Annotated[list[NotEmpty], Field(min_length=1)] | None = None
    """Files of a hub dataset, such as `data/train.jsonl`, or a list of them; null takes those of the split."""
    split: str = "train"
    """The split of a hub dataset, or a part of it such as `train[:10%]`."""
    revision: str = "main"
    """The branch, tag or commit of a hub dataset."""
    format: Format | None = None
    """The format of this source; null takes `data.format`."""
    columns: dict[str, str] | None = None
    """Our field name -> this source's column name; null takes `data.columns`."""
    system: str | None = None
    """A system prompt for this source's rows that have none; null takes `data.system`."""
    task: str | None = None
    """A tag that reports and scores are broken down by, for rows that have none in their own column `task`."""
    take: PositiveInt | Share | None = None
    """How many rows are used, or which share: chosen by a hash of what each row says, never by position."""
    weight: PositiveFloat = 1.0
    """How often each row is trained in an epoch. 2 is twice; 0.5 is half of the rows, a different half each epoch."""


class Clean(Section):
    """What each check does: off; `report` in `lorakit data`; `fix` what it finds; or stop with an `error`."""

    duplicates: CleanAction = "report"
    """Rows that say exactly the same. Fixed by keeping the first."""
    near_duplicates: CleanAction = "report"
    """Rows that say nearly the same (MinHash). Fixed by keeping the first."""
    encoding: CleanAction = "report"
    """Text that was decoded wrongly, such as `cafÃ©`. Fixed with ftfy."""
    html: CleanAction = "report"
    """HTML tags and entities in prose. Fixed by taking the tags out and decoding the entities."""
    noise: CleanAction = "report"
    """Control characters, terminal escapes, invisible characters, logs. Fixed by removing these, except logs."""
    trivial: CleanAction = "report"
    """Empty and placeholder answers. Fixed by leaving the row out."""
    special_tokens: CleanAction = "report"
    """Texts that spell a special token, or a mark that the chat template writes. Every command reports them. Fixed by \
leaving the row out."""
    contradictions: CleanAction = "report"
    """Different answers to the same prompt. Fixed by keeping the most frequent answer, or none where several are."""
    style: CleanAction = "report"
    """Answers unlike the others in length, casing, formality, script or language. Fixed by leaving the row out."""
    leakage: CleanAction = "error"
    """Held-out rows that are also training rows. Fixed by leaving the training row out."""
    near_leakage: CleanAction = "report"
    """Training rows nearly the same as a held-out row. Fixed by leaving the training row out. Unless it is off, a \
split by `data.eval` keeps near-duplicates on one side."""


class Data(Section):
    """The rows, and how they become examples."""

    train: DataRef | Source | Annotated[list[DataRef | Source], Field(min_length=1)]
    """The training rows: a path, a hub dataset id, a source, or a list of these."""
    eval: Share | PositiveInt | DataRef | Source | Annotated[list[DataRef | Source], Field(min_length=1)] | None = None
    """The held-out rows: a source, or a fraction or number of the training rows, chosen by a hash of each row's \
content."""
    format: Format = "auto"
    """How a row becomes a conversation."""
    columns: dict[str, str] = {}
    """Our field name -> their column name."""
    system: str | None = None
    """A system prompt for rows that have none."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which turns are trained: every assistant turn, only the last one, or every token of the row."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """The longest example, in tokens."""
    overlong: Literal["drop", "truncate", "split", "error"] = "drop"
    """What happens to a longer example. `truncate` keeps the turns that fit whole; `split` makes several examples of \
a text and drops conversations."""
    broken: Literal["error", "drop"] = "error"
    """What happens to a row that cannot be read or rendered. `drop` counts them and names the first."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Rows laid end to end, without seeing each other, instead of padded ones. It changes speed, not the result."""
    clean: Clean = Clean()
    """The checks on the rows. `report`: `lorakit data` reports them; `fix` and `error` act in every command."""


class EarlyStopping(Section):
    """Stop when the held-out loss no longer falls."""

    patience: PositiveInt = 3
    """How many evaluations in a row may pass without improvement."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """How much lower the loss must be to count as improvement."""


class Train(Section):
    """The run."""

    epochs: PositiveFloat | None = 3
    """Passes over the training rows. Write this or `steps`."""
    steps: PositiveInt | None = None
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Rows per optimizer step, over all micro-batches. Write this or `batch_tokens`."""
    batch_tokens: PositiveInt | None = None
    """Tokens per optimizer step: `batch_size` becomes as many rows as have them on average."""
    micro_batch: PositiveInt | Auto = "auto"
    """Rows of the longest length in memory at once, or more shorter ones in the same room. It changes speed and \
memory, not the result."""
    learning_rate: PositiveFloat | Auto = "auto"
    """The peak learning rate."""
    lora_plus: Annotated[float, Field(gt=1)] | None = None
    """LoRA+: the learning rate of the B matrices, as a multiple of that of the A matrices. Its authors recommend 16."""
    optimizer: Literal["auto", "adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "auto"
    """AdamW, with states in 32 or 8 bits; those of the paged ones move to main memory when the GPU's is full, and are \
there anyway without a GPU."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    min_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the peak rate to which cosine and linear fall."""
    warmup: Warmup = 0.03
    """How long the learning rate rises, from above zero. A fraction that rounds to 0 steps means no warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """How much of AdamW's mean of gradients, and of their squares, a step keeps."""
    epsilon: PositiveFloat = 1e-8
    """What AdamW adds to the root of the squares."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    gradient_checkpointing: bool | Auto = "auto"
    """Recompute activations in the backward pass: less memory, a third to a half more work."""
    offload_activations: bool = False
    """Keep what the backward pass needs in main memory meanwhile: less memory on the GPU, the same result, and slower \
where the link to the GPU is. GPUs only."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """RMSNorm, rotation and gated activations in fewer passes than the model's own code takes, by Liger-Kernel on a \
GPU and by lorakit on a processor: `auto` where they run and know the family. They are tried before the first step. \
It changes speed and memory, not the result."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the model's blocks. It is tried before the first step, and changes speed, not the result."""
    sharding: Literal["auto", "none", "fsdp", "zero-2", "zero-3"] = "auto"
    """What several devices share out. none: every device holds the whole base model; fsdp: each holds a part of it \
(FSDP2); zero-2 and zero-3: DeepSpeed's, an extra. It changes memory and speed, not the result, and nothing on one \
device."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """The seed of initialization, shuffling and dropout."""
    eval_every: Interval = 0.1
    """How often the held-out loss is measured; it is also measured after the last step. A fraction is at \
least 5 steps, or half of a shorter run; a number of steps is taken as it is."""
    save_every: Interval = 0.1
    """How often a checkpoint is written, counted as in `eval_every`; one is also written after the last step."""
    keep: PositiveInt = 2
    """How many checkpoints stay on disk, in addition to the best one."""
    early_stopping: EarlyStopping | None = None
    """When to stop before the end; null never does."""


class Baselines(Section):
    """The base with a better prompt, scored beside the plain base and what was trained."""

    few_shot: Annotated[int, Field(ge=0, le=100)] = 0
    """How many training rows stand before each question as examples; held-out rows never do."""
    choose: Literal["seed", "similar"] = "seed"
    """Which ones: the same for all questions, drawn by the seed, or for each question those nearest to it in words."""
    system: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    """A system text for the base, in place of the rows' own."""
    system_file: SystemPath | None = None
    """A file with that text. The resolved recipe holds what the file says, as `system`."""


class Evaluate(Section):
    """What `lorakit eval` measures on the held-out rows."""

    metrics: list[Metric] = ["exact-match"]
    """Scores of generated answers, each a word, or that word with its settings, such as {regex: {pattern: 'Answer: \
(\\w+)'}}; loss and perplexity are always measured."""
    max_new_tokens: PositiveInt = 64
    """The longest generated answer, in tokens."""
    rows: PositiveInt | Literal["all"] = "all"
    """How many held-out rows are scored, from the first on."""
    turns: Literal["last", "all"] = "last"
    """Which answers of a row are generated and scored: the last one, or each that is trained, after the row's own \
turns before it; a metric is then averaged over each row's answers first."""
    samples: Annotated[int, Field(ge=0, le=100)] = 0
    """How many held-out rows the model answers at each evaluation while it trains, always the same: the first ones \
that have a prompt and an answer."""
    baselines: Baselines = Baselines()
    """Prompting as a rival, in the same table."""


class Output(Section):
    """Where results go."""

    dir: OutputDir | None = None
    """The run's folder, relative to the working directory; null is `runs/` and the recipe's name."""
    merged: bool = False
    """Write the merged model beside the adapter when training ends."""
    export: list[ExportWord] = []
    """What is exported when training ends, such as [gguf:q4_k_m, huggingface]: targets of `lorakit export`."""


class Recipe(Section):
    """One fine-tuning task."""

    name: RunName | None = None
    """What the run is called; null takes the name of the file, or of its folder when the file is `recipe.yaml`."""
    model: Model
    adapter: Adapter = Adapter()
    data: Data
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    track: list[Tracker] = []
    """Programs that get the run's figures while it trains, each a word, or that word with its settings, such as \
{wandb: {project: support, mode: offline}}."""
    output: Output = Output()
