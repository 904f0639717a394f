"""The words of a config: inert, complete, printable data.

Each class is one part of a config; `root.py` puts them together and checks them against each other. A config says
what is trained, never how it is launched. Every field has its meaning in its description, which
`embedshard config schema` hands to editors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from embedshard.config.composition import Composition
from embedshard.quantities import parse_size

__all__ = [
    "AdmissionConfig",
    "AutoVocabulary",
    "BPRConfig",
    "BagFeature",
    "BpeVocabulary",
    "CheckpointConfig",
    "CompileConfig",
    "ConvEncoder",
    "CosineContrastiveConfig",
    "CrossEntropyConfig",
    "CustomModelConfig",
    "DCNv2Config",
    "DLRMConfig",
    "DataConfig",
    "DeepFMConfig",
    "DenseFeature",
    "DenseOptimizerConfig",
    "DoubleHashVocabulary",
    "DrawsNegatives",
    "EachPartition",
    "EarlyStoppingConfig",
    "EaseBaseline",
    "EvaluateConfig",
    "Feature",
    "FileVocabulary",
    "FlattenEncoder",
    "HashVocabulary",
    "HierarchicalSoftmaxConfig",
    "IdFeature",
    "IdentityVocabulary",
    "InBatchSoftmaxConfig",
    "InitConfig",
    "InitFromConfig",
    "ItemEmbeddingConfig",
    "ItemKnnBaseline",
    "MMoEConfig",
    "ManagedVocabulary",
    "MasksHits",
    "MeanBaseline",
    "ModelConfig",
    "NCEConfig",
    "Name",
    "NegativeSamplingConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PointwiseConfig",
    "PooledEncoder",
    "PopularityBaseline",
    "QuotientRemainderVocabulary",
    "RankingModel",
    "RecurrentEncoder",
    "SASRecConfig",
    "SampledSoftmaxConfig",
    "ScheduleConfig",
    "SequenceFeature",
    "SequencePooling",
    "ShardingConfig",
    "ShardingType",
    "SoftmaxConfig",
    "Strict",
    "TableConfig",
    "TableMemoryConfig",
    "TableOptimizerConfig",
    "TableOptimizerOverride",
    "TableShardingConfig",
    "TargetAttention",
    "TextClassifierConfig",
    "TextFeature",
    "TokenizerVocabulary",
    "TowerConfig",
    "TrackingConfig",
    "TrainConfig",
    "TwoTowerConfig",
    "Vocabulary",
    "WeightedBagFeature",
    "WideAndDeepConfig",
    "WordNgramsVocabulary",
    "WordsVocabulary",
]

_NAME = r"^[A-Za-z_][A-Za-z0-9_\-]*$"
Name = Annotated[str, Field(pattern=_NAME)]
"""A table's, feature's or label's name: letters, digits, `_` and `-`. Dots are kept for derived names."""


class Strict(BaseModel):
    """A part of a config: unknown keys are refused, values don't change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _as_bytes(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else value


Bytes = Annotated[
    int,
    BeforeValidator(_as_bytes),
    Field(ge=0),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "examples": ["2GB", "512MiB"]}]}),
]
"""A number of bytes, or a text such as `2GB` (10^9 each) or `512MiB`."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_kind(value: Any) -> Any:
    """Reads the short form `identity` as `{kind: identity}`."""
    return {"kind": value} if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]


# ---------------------------------------------------------------------------------------------------------------- data
class EachPartition(Strict):
    """Partitions by one pattern, as days that come one after the other."""

    each: str
    """A glob: each folder or file that it names is a partition, in the order of their paths, numbers in them by value."""
    marker: str | None = Field(None, pattern=r"^[^/]+$")
    """A file, such as `_SUCCESS`, without which a folder is not complete: the partitions end before it."""

    @field_validator("each")
    @classmethod
    def _no_folder_within_another(cls, each: str) -> str:
        if "**" in each:
            raise ValueError("'**' stands for folders at any depth, so one partition may be within another. Spell them: */*")
        return each


def _form_of_partitions(value: Any) -> str:
    """Returns which form is meant, in words that the errors of `load.py` leave out of a path."""
    return "dict[each]" if isinstance(value, Mapping | EachPartition) else "list[globs]"


Partitions = Annotated[
    Annotated[list[str], Field(min_length=1), Tag("list[globs]")] | Annotated[EachPartition, Tag("dict[each]")],
    Discriminator(_form_of_partitions),
]


class DataConfig(Strict):
    """Where the rows are and in which order they are trained."""

    train: Paths | None = None
    """Path, URI or glob of the Parquet files to train on, or a list of them."""
    partitions: Partitions | None = None
    """Ordered globs (days, say), trained one after the other; or `{each: days/day=*}`, where what the one glob names are
    the partitions. Instead of `train`."""
    validation: Paths | None = None
    """Rows that early stopping and the choice of the best checkpoint look at."""
    validation_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the training rows that is held out as the validation set and never trained. Instead of `validation`."""
    validation_seed: int = Field(0, ge=0, lt=2**32)
    """Chooses the rows of `validation_fraction`. It is not the run's `seed`: runs with other seeds hold out the same."""
    test: Paths | None = None
    """Rows that are evaluated once, at the end."""
    catalogue: Paths | None = None
    """One row per item, with each column that the item tower reads. Needed where the item tower reads more than one
    id and a metric or a negative sample needs items apart from interactions."""
    lanes: int = Field(64, ge=1, le=65536)
    """Equal spans into which an epoch is cut. The worlds that can train are the divisors of it."""
    window_steps: int | Literal["auto"] = "auto"
    """Steps within which a lane's rows are shuffled. `auto`: the whole lane if the data fit `cache_bytes`, else about
    a million rows over all lanes, or as many as take 256 MiB."""
    shuffle: bool = True
    """False trains the rows in file order (each lane's), as streams that are ordered by time may want."""
    cache_bytes: Bytes = 2 * 1024**3
    """Data whose decoded columns fit this many bytes (per process) are decoded once and kept. Of larger data so much
    may wait in memory for its turn."""
    threads: int = Field(1, ge=1, le=256)
    """Threads of a worker that decode the training data's row groups, for a machine with more cores than workers; a third as
    many more make batches. They change nothing but the time."""
    label: Name | None = None
    """Column of the one label, a number."""
    labels: dict[Name, Name] = Field(default_factory=dict)
    """Label name to column, where there are several."""
    weight: Name | None = None
    """Column of a training row's weight, a number of at least 0; held-out rows count alike."""
    on_bad_row: Literal["error", "quarantine"] = "error"
    """What a row does that holds a value which its feature, label or weight does not allow: stop the run, or be set
    aside, which is to keep its place with weight 0 and to be recorded in the run's folder."""
    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    """Share of an epoch's rows, and of each other set's, that may be set aside; more stop the run."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.train is None) == (self.partitions is None):
            raise ValueError("give either 'train' (a glob) or 'partitions' (a list of globs in order), not both")
        if self.validation is not None and self.validation_fraction is not None:
            raise ValueError("give either 'validation' (files) or 'validation_fraction' (of the training rows), not both")
        if self.label is not None and self.labels:
            raise ValueError("give either 'label' (one column) or 'labels' (name: column), not both")
        if isinstance(self.window_steps, int) and self.window_steps < 1:
            raise ValueError("window_steps must be at least 1, or 'auto'")
        return self

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation set, of files of its own or held out of the training set."""
        return self.validation is not None or self.validation_fraction is not None

    @property
    def label_columns(self) -> dict[str, str]:
        """Label name to column, in config order; a single label is named by its column."""
        return {self.label: self.label} if self.label is not None else dict(self.labels)


# ------------------------------------------------------------------------------------------------------------ features
class IdFeature(Strict):
    """One id a row, looked up in a table."""

    kind: Literal["id"]
    """Which kind it is."""
    table: Name
    """The table that it is looked up in."""
    column: str | None = None
    """The Parquet column; the feature's name where absent."""
    unknown: Literal["error", "oov", "quarantine"] = "error"
    """What an id outside the vocabulary does: what `data.on_bad_row` says (`error`), look up the table's row for
    unknown ids (`oov`), or set its row aside (`quarantine`)."""
    null: Literal["error", "empty"] = "error"
    """What a null id does: what `data.on_bad_row` says (`error`), or count as no id (`empty`)."""


class ListFeature(Strict):
    """What lists of ids have in common, whatever becomes of their vectors."""

    kind: str
    """Which kind it is."""
    table: Name
    """The table that they are looked up in."""
    column: str | None = None
    """The Parquet column; the feature's name where absent."""
    max_length: int | None = Field(None, ge=1)
    """Ids kept of a list; all where absent."""
    keep: Literal["first", "last"] = "last"
    """Which end of a longer list is kept."""
    unknown: Literal["error", "oov", "quarantine"] = "error"
    """What an id outside the vocabulary does: what `data.on_bad_row` says (`error`), look up the table's row for
    unknown ids (`oov`), or set its row aside (`quarantine`)."""
    null: Literal["error", "empty"] = "error"
    """What a null in a list does: what `data.on_bad_row` says (`error`), or fall out of the list, with its weight if it
    has one (`empty`)."""


class BagFeature(ListFeature):
    """A list of ids a row, looked up in a table and pooled. A null or empty list pools to zeros."""

    kind: Literal["bag"]
    """Which kind it is."""
    pooling: Literal["sum", "mean", "sqrtn"] = "mean"
    """How a row's vectors become one; `sqrtn` divides their sum by the root of their number."""
    mask_zero: bool = False
    """Whether the integer 0 is padding: it falls out of the list, so it is never looked up and never trained."""


class SequenceFeature(ListFeature):
    """A list of ids a row, each looked up by itself: the model gets a vector a place, in order."""

    kind: Literal["sequence"]
    """Which kind it is."""
    mask_zero: bool = False
    """Whether the integer 0 is padding: it falls out of the list, so it is never looked up and never trained."""


class WeightedBagFeature(ListFeature):
    """A list of ids a row with a list of weights of the same lengths, pooled by them."""

    kind: Literal["weighted_bag"]
    """Which kind it is."""
    weights: str
    """The Parquet column of the weights."""
    pooling: Literal["sum", "mean"] = "sum"
    """`mean` divides by the sum of the weights."""


class TextFeature(Strict):
    """A text a row, whose words are looked up in a table. An empty text has none."""

    kind: Literal["text"]
    """Which kind it is."""
    table: Name
    """The table that its words are looked up in; its vocabulary is `words`, `bpe` or `word_ngrams`."""
    column: str | None = None
    """The Parquet column of strings; the feature's name where absent."""
    pooling: Literal["sum", "mean", "sqrtn"] | None = None
    """How a row's vectors become one; `sqrtn` divides their sum by the root of their number. Absent: a vector for each
    word."""
    max_length: int | None = Field(None, ge=1)
    """Words kept of a text; all where absent."""
    truncation: Literal["pre", "post"] = "pre"
    """Which end of a longer text is cut off: `pre` the first words, `post` the last."""
    distinct: bool = False
    """Whether each different row that a text looks up counts once, however often it occurs in what is kept of the text."""
    unknown: Literal["oov", "empty"] = "oov"
    """What a word outside the vocabulary does: look up the table's row for unknown ids (`oov`), or fall out of the text
    before it is cut (`empty`)."""
    null: Literal["error", "empty"] = "error"
    """What a null does: what `data.on_bad_row` says (`error`), or count as an empty text (`empty`)."""

    @model_validator(mode="after")
    def _what_is_distinct_has_no_order(self) -> TextFeature:
        if self.distinct and self.pooling is None:
            raise ValueError("'distinct' leaves no order of words, which a text without 'pooling' has. Give it a pooling")
        return self


class DenseFeature(Strict):
    """A number a row."""

    kind: Literal["dense"]
    """Which kind it is."""
    column: str | None = None
    """The Parquet column; the feature's name where absent."""
    normalise: Literal["none", "log1p", "standardise"] = "none"
    """`log1p`: sign(x) log(1 + |x|). `standardise`: by mean and deviation of the training set, kept with the run."""
    missing: Literal["error", "zero"] = "error"
    """What a null or NaN does: what `data.on_bad_row` says (`error`), or count as 0 after normalisation."""


Feature = Annotated[
    IdFeature | BagFeature | WeightedBagFeature | SequenceFeature | TextFeature | DenseFeature, Field(discriminator="kind")
]


# -------------------------------------------------------------------------------------------------------------- tables
class IdentityVocabulary(Strict):
    """Ids are integers from 0 to rows - 1 and are rows already."""

    kind: Literal["identity"]
    """Which kind it is."""


class HashVocabulary(Strict):
    """Ids of any kind are hashed to rows by a stable 64-bit hash; two ids may share a row."""

    kind: Literal["hash"]
    """Which kind it is."""
    rows: int | None = Field(None, ge=1)
    """The table's rows, where `rows` of the table is not given."""
    seed: int = Field(0, ge=0)
    """Of the hash."""


class FileVocabulary(Strict):
    """A Parquet file names the ids, integers or strings, in row order."""

    kind: Literal["file"]
    """Which kind it is."""
    path: str
    """The Parquet file."""
    column: str | None = None
    """The column of the ids; where absent, the file's only column, or `id` of a file that `vocabulary build` wrote."""


class AutoVocabulary(Strict):
    """The ids of the training set, integers or strings, counted when a run begins: the most frequent first."""

    kind: Literal["auto"]
    """Which kind it is."""
    min_count: int = Field(1, ge=1)
    """How often an id is met at least to have a row."""
    max_size: int | None = Field(None, ge=1)
    """Ids that have a row at most, the most frequent ones; all where absent."""


class QuotientRemainderVocabulary(Strict):
    """An integer looks up two rows, its quotient's and its remainder's, whose vectors are summed (Shi et al. 2020).

    No two ids share both, in about twice the root of `ids` rows.
    """

    kind: Literal["quotient_remainder"]
    """Which kind it is."""
    ids: int = Field(ge=1)
    """How many ids there are: one more than the greatest."""
    remainders: int | None = Field(None, ge=1)
    """Divisor; as many rows are for remainders, and the rest for quotients. The root of `ids`, rounded up, where absent."""

    @property
    def parts(self) -> tuple[int, int]:
        """Rows for quotients, and for remainders."""
        remainders = self.remainders or math.isqrt(self.ids - 1) + 1
        return -(-self.ids // remainders), remainders


class DoubleHashVocabulary(Strict):
    """An id of any kind is hashed to a row of each half of the table, and the two vectors are summed (Zhang et al. 2020).

    That is a hash embedding (Svenstrup et al. 2017) of two hashes without weights.
    """

    kind: Literal["double_hash"]
    """Which kind it is."""
    rows: int | None = Field(None, ge=2)
    """The table's rows, both halves together, where `rows` of the table is not given."""
    seed: int = Field(0, ge=0)
    """Of the first hash; the second has the next seed."""


class AdmissionConfig(Strict):
    """When an id is given a row of its own."""

    min_count: int = Field(1, ge=1, le=32767)
    """Sightings in training at which it is; before, it looks up the row for unknown ids."""


class ManagedVocabulary(Strict):
    """Ids that come and go: each has a row to itself for as long as it is of use.

    Any integer of at least 0 is an id, and any string, by a 63-bit hash. An id of which training has seen enough is given a
    free row; where there is none, the least useful ids lose theirs, which begin anew, weights and optimizer state. Counts
    and evictions are those of virtual buckets of ids, so that the result is the same in every world.
    """

    kind: Literal["managed"]
    """Which kind it is."""
    rows: int | None = Field(None, ge=1)
    """The table's rows, where `rows` of the table is not given."""
    admission: AdmissionConfig = AdmissionConfig()
    """When an id is given a row."""
    eviction: Literal["lfu", "lru", "distance_lfu"] = "lfu"
    """Which ids of a full bucket are the least useful: those with the fewest sightings (`lfu`), those that were not seen for
    the longest time (`lru`), or those with the fewest sightings for each step since they were last seen (`distance_lfu`)."""
    ttl_steps: int | None = Field(None, ge=1)
    """Steps without a sighting after which an id loses its row; absent: it keeps it until there is need of it."""
    buckets: int | None = Field(None, ge=1)
    """Virtual buckets; `data.lanes` where absent. A rank has whole ones, so there are at least as many as workers."""
    seed: int = Field(0, ge=0)
    """Of the hash."""


class TokenizerVocabulary(Strict):
    """What tokenizers have in common: made from the training texts when a run begins, or read from a file."""

    path: str | None = None
    """A ready tokenizer, the JSON file of the library `tokenizers`; nothing is trained then, and nothing else is given."""
    min_count: int = Field(1, ge=1)
    """How often a word (`bpe`: a pair of neighbours) is met at least to have a row (`bpe`: to be joined)."""
    lower: bool = True
    """Whether upper case is lower case."""
    strip_html: bool = False
    """Whether HTML tags such as `<br />` are borders of words and nothing else."""
    max_train_rows: int | None = Field(None, ge=1)
    """Rows whose texts it is made from, in evenly spaced row groups; all where absent."""

    @model_validator(mode="after")
    def _a_ready_one_is_as_it_is(self) -> TokenizerVocabulary:
        others = sorted(self.model_fields_set - {"kind", "path"})
        if self.path is not None and others:
            raise ValueError(f"'path' gives a ready tokenizer, which is as it is. Leave {', '.join(others)} out")
        return self


class WordsVocabulary(TokenizerVocabulary):
    """The words of the training texts, most frequent first, equally frequent ones by their UTF-8 bytes."""

    kind: Literal["words"]
    """Which kind it is."""
    num_words: int | None = Field(20_000, ge=1)
    """Words that have a row at most; null: all."""
    punctuation: Literal["remove", "separate", "keep"] = "remove"
    """What is neither letter, digit, space nor an apostrophe within a word: a border (`remove`), a word of one character
    (`separate`), or part of the word (`keep`, where words are what spaces divide)."""


class BpeVocabulary(TokenizerVocabulary):
    """Byte-pair encoding (Sennrich et al. 2016) over the bytes of words: every text can be written, none is unknown."""

    kind: Literal["bpe"]
    """Which kind it is."""
    num_words: int = Field(8_000, ge=256)
    """Pieces of words that have a row at most: the 256 bytes, and what is joined of them."""


class WordNgramsVocabulary(Strict):
    """Runs of neighbouring words of a text, hashed to rows by a stable 64-bit hash; two may share a row."""

    kind: Literal["word_ngrams"]
    """Which kind it is."""
    of: Name
    """The table whose tokenizer divides texts into words. All words it does not know count as one."""
    n: list[int] = Field(default_factory=lambda: [2], min_length=1)
    """Words of a run."""
    rows: int | None = Field(None, ge=1)
    """The table's rows, where `rows` of the table is not given."""
    seed: int = Field(0, ge=0)
    """Of the hash."""

    @field_validator("n")
    @classmethod
    def _sizes(cls, n: list[int]) -> list[int]:
        if not all(1 <= size <= 8 for size in n) or len(set(n)) < len(n):
            raise ValueError("must be different numbers from 1 to 8")
        return n


Vocabulary = Annotated[
    Annotated[
        IdentityVocabulary
        | HashVocabulary
        | FileVocabulary
        | ManagedVocabulary
        | AutoVocabulary
        | QuotientRemainderVocabulary
        | DoubleHashVocabulary
        | WordsVocabulary
        | BpeVocabulary
        | WordNgramsVocabulary,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_as_kind),
]


class InitConfig(Strict):
    """How a table's rows begin: a function of (seed, table, row), the same under every plan."""

    kind: Literal["normal", "uniform", "zeros"] = "normal"
    """Which kind it is."""
    scale: float | None = Field(None, gt=0)
    """Standard deviation, or half the width of the uniform range. Default: 1 / sqrt(dim)."""


class InitFromConfig(Strict):
    """Vectors that rows begin with, as `embedshard checkpoint extract` writes them."""

    parquet: Paths
    """Path, URI or glob of Parquet files, or a list of them."""
    id: Name = "id"
    """The column of the ids, integers or strings, each once."""
    vector: Name = "vector"
    """The column of the vectors, lists of `dim` numbers."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class TableOptimizerConfig(Strict):
    """The fused optimizer of a table. `adam` is lazy: it moves the rows of the batch alone."""

    kind: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = "rowwise_adagrad"
    """Which kind it is."""
    lr: float = Field(0.05, gt=0)
    """Learning rate, before the schedule's factor."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the statistic (Adagrad, row-wise Adagrad, Adam)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's: what its running means of the gradient and of its square keep at each step."""


class TableOptimizerOverride(Strict):
    """What a table's optimizer has otherwise than `optimizer.tables`."""

    kind: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] | None = None
    """Which kind it is."""
    lr: float | None = Field(None, gt=0)
    """Learning rate, before the schedule's factor."""
    eps: float | None = Field(None, gt=0)
    """Added to the root of the statistic."""
    betas: tuple[Beta, Beta] | None = None
    """Adam's."""


ShardingType = Literal[
    "table_wise",
    "column_wise",
    "table_column_wise",
    "row_wise",
    "table_row_wise",
    "grid_shard",
    "data_parallel",
]
"""TorchRec's ways to cut a table."""


class TableShardingConfig(Strict):
    """How one table is cut, and where its pieces lie."""

    types: list[ShardingType] = Field(default_factory=list)
    """`sharding.planner: auto`: the types that the planner may choose; table-, row- and table-row-wise where empty."""
    type: ShardingType | None = None
    """`sharding.planner: explicit`: how it is cut."""
    ranks: list[int] = Field(default_factory=list)
    """`sharding.planner: explicit`: where its pieces lie. `table_wise`: one rank; `column_wise`: one for each block of
    columns; `table_column_wise`: the same, all on one machine; `table_row_wise`: all ranks of one machine; `grid_shard`:
    all ranks of each machine that has a block of columns. `row_wise` and `data_parallel` lie on all ranks. Chosen by
    size where empty. In a world of one everything lies on rank 0."""
    allow_changed_optimizer: bool = False
    """Allows types that train the table by another optimizer than the config names: those that cut columns, with
    row-wise Adagrad."""

    @property
    def asked(self) -> list[ShardingType]:
        """The types that it names, in either way."""
        return list(self.types) if self.type is None else [self.type]


class TableMemoryConfig(Strict):
    """In which memory a table's rows lie on CUDA. On a CPU there is one memory: `auto` and `device` mean it."""

    kind: Literal["auto", "device", "uvm", "uvm_caching", "ssd"] = "device"
    """`device`: in the GPU's. `uvm`: in the host's, read over the bus. `uvm_caching`: in the host's, the rows in use in a
    cache on the GPU. `auto`: `device`, or `uvm_caching` for as few tables as it takes where the GPUs' memory does not hold
    all. `ssd`: key-value placement in RocksDB, which `plan` can plan for."""
    cache_ratio: float | None = Field(None, gt=0, lt=1)
    """`auto`, `uvm_caching`, `ssd`: the share of its rows that the cache on the GPU holds; 0.2 where absent."""
    ssd_path: str | None = None
    """`ssd`: the folder where its rows lie."""

    @property
    def ratio(self) -> float:
        """The share of the rows that a cache holds, if there is one."""
        return 0.2 if self.cache_ratio is None else self.cache_ratio


class TableConfig(Strict):
    """An embedding table: rows that features look up."""

    rows: int | None = Field(None, ge=1)
    """Ids that have a row of their own; unknown ids share one more. Known from the vocabulary but for `identity`."""
    dim: int = Field(gt=0)
    """Columns, a multiple of 4 (FBGEMM's vectors)."""
    vocabulary: Vocabulary = IdentityVocabulary(kind="identity")
    """How ids become rows."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Of the weights; optimizer state is always fp32."""
    stochastic_rounding: bool = False
    """Of fp16 weights on CUDA: whether an update is rounded up or down at random, in proportion, so that small ones are not
    always lost. The result is no function of config, data and seed then."""
    init: InitConfig = InitConfig()
    """How its rows begin."""
    init_from: InitFromConfig | None = None
    """Vectors that its rows begin with, where a file has one for their id."""
    optimizer: TableOptimizerOverride = TableOptimizerOverride()
    """What differs from `optimizer.tables`."""
    l2_lookup: float = Field(0.0, ge=0)
    """Penalty on what a row looks up: this times the squared length of each pooled vector, added to the row's loss."""
    sharding: TableShardingConfig = TableShardingConfig()
    """How it may be cut."""
    memory: TableMemoryConfig = TableMemoryConfig()
    """In which memory it lies, on CUDA."""

    @field_validator("dim")
    @classmethod
    def _multiple_of_four(cls, dim: int) -> int:
        if dim % 4:
            low, high = dim // 4 * 4, -(-dim // 4) * 4
            choices = f"{low} or {high}" if low else f"{high}"
            raise ValueError(f"must be a multiple of 4, which FBGEMM's kernels need. Choose {choices}")
        return dim

    @model_validator(mode="after")
    def _rows_are_known(self) -> TableConfig:
        vocabulary = self.vocabulary
        if isinstance(vocabulary, HashVocabulary | ManagedVocabulary | WordNgramsVocabulary | DoubleHashVocabulary):
            if self.rows is None and vocabulary.rows is None:
                what = "that ids can hold" if isinstance(vocabulary, ManagedVocabulary) else "to hash to"
                raise ValueError(f"a {vocabulary.kind} vocabulary needs 'rows', the number of rows {what}")
            if self.rows is not None and vocabulary.rows is not None and self.rows != vocabulary.rows:
                raise ValueError(f"rows={self.rows} and vocabulary.rows={vocabulary.rows} differ. Give one of them")
        elif isinstance(vocabulary, IdentityVocabulary) and self.rows is None:
            raise ValueError("an identity vocabulary needs 'rows', one more than the greatest id")
        elif isinstance(vocabulary, TokenizerVocabulary) and self.rows is not None:
            raise ValueError(
                f"'rows' comes from the tokenizer of a {vocabulary.kind} vocabulary: leave it out. "
                f"vocabulary.num_words says how many there are at most"
            )
        elif isinstance(vocabulary, AutoVocabulary) and self.rows is not None:
            raise ValueError(
                "'rows' comes from the ids that an auto vocabulary counts: leave it out. vocabulary.max_size says how many "
                "there are at most"
            )
        elif isinstance(vocabulary, QuotientRemainderVocabulary) and self.rows not in (None, sum(vocabulary.parts)):
            raise ValueError(
                f"rows={self.rows}, but {vocabulary.ids} ids have {vocabulary.parts[0]} quotients and "
                f"{vocabulary.parts[1]} remainders: {sum(vocabulary.parts)} rows. Leave 'rows' out"
            )
        if isinstance(vocabulary, DoubleHashVocabulary) and (self.known_rows or 0) < 2:
            raise ValueError("a double_hash vocabulary needs 2 rows at least, one for each hash")
        return self

    @model_validator(mode="after")
    def _rounds_what_is_rounded(self) -> TableConfig:
        if self.stochastic_rounding and self.dtype != "fp16":
            raise ValueError(
                f"'stochastic_rounding' is of weights that are rounded at each step, and dtype '{self.dtype}' is not. Leave "
                "it out, or give 'dtype: fp16'"
            )
        return self

    @model_validator(mode="after")
    def _ids_have_rows_of_their_own(self) -> TableConfig:
        if self.init_from is not None and isinstance(
            self.vocabulary,
            HashVocabulary
            | ManagedVocabulary
            | WordNgramsVocabulary
            | BpeVocabulary
            | QuotientRemainderVocabulary
            | DoubleHashVocabulary,
        ):
            raise ValueError(
                f"'init_from' gives the row of an id its vector, and under a {self.vocabulary.kind} vocabulary a row is not "
                f"one id's. Use the vocabulary 'identity', 'file', 'auto' or 'words'"
            )
        return self

    @property
    def known_rows(self) -> int | None:
        """The rows that the config itself tells, at most so many for words; None where a file or the data do."""
        vocabulary = self.vocabulary
        if isinstance(vocabulary, WordsVocabulary | BpeVocabulary):
            return vocabulary.num_words if vocabulary.path is None else None
        if isinstance(vocabulary, AutoVocabulary):
            return vocabulary.max_size
        if isinstance(vocabulary, QuotientRemainderVocabulary):
            return sum(vocabulary.parts)
        if self.rows is None and isinstance(
            vocabulary, HashVocabulary | ManagedVocabulary | WordNgramsVocabulary | DoubleHashVocabulary
        ):
            return vocabulary.rows
        return self.rows

    @property
    def composition(self) -> Composition | None:
        """How an id becomes two rows; None where it becomes one."""
        vocabulary = self.vocabulary
        if isinstance(vocabulary, QuotientRemainderVocabulary):
            return Composition(vocabulary.ids, *vocabulary.parts)
        if isinstance(vocabulary, DoubleHashVocabulary):
            rows = self.known_rows
            assert rows is not None, "checked above"
            return Composition(rows // 2 * (rows - rows // 2), rows // 2, rows - rows // 2)
        return None


# --------------------------------------------------------------------------------------------------------------- model
class PooledEncoder(Strict):
    """A list's or text's vectors made one: their mean, the greatest in each column, or a mean weighted by attention."""

    kind: Literal["mean", "max", "attention"]
    """Which kind it is."""


class TowerConfig(Strict):
    """One tower: features, joined, through an optional MLP."""

    features: list[Name] = Field(min_length=1)
    """Features of the tower, in order."""
    mlp: list[int] = Field(default_factory=list)
    """Sizes of the layers, ReLU between them; the last is the tower's output. Empty: the joined vectors as they are."""
    sequences: dict[Name, Annotated[PooledEncoder, BeforeValidator(_as_kind)]] = Field(default_factory=dict)
    """How the vectors of each `sequence` become one: `mean`, `max` or `attention` (the default). In the user tower alone."""
    combine: Literal["auto", "concat", "sum"] = "auto"
    """How the features' vectors are joined. `auto`: concatenated before an MLP, else summed."""


class TwoTowerConfig(Strict):
    """Two towers whose outputs are compared by a dot product."""

    kind: Literal["two_tower"]
    """Which kind it is."""
    user: TowerConfig
    """The query's tower."""
    item: TowerConfig
    """The candidate's tower."""
    similarity: Literal["dot", "cosine"] = "dot"
    """`cosine` scales both vectors to length 1."""
    biases: list[Literal["global", "user", "item"]] = Field(default_factory=list)
    """Biases added to the score. A user's or item's is a table of 4 columns whose first is used."""
    user_id: Name | None = None
    """The user tower's feature that names the user; its first `id` feature where absent."""
    item_id: Name | None = None
    """The item tower's feature that names the item; its first `id` feature where absent."""


class FlattenEncoder(Strict):
    """A text's vectors side by side; its feature has a `max_length`, to which shorter ones are filled with zeros."""

    kind: Literal["flatten"]
    """Which kind it is."""
    padding: Literal["pre", "post"] = "pre"
    """Where the zeros are."""


class ConvEncoder(Strict):
    """Convolutions of several widths, ReLU, and the greatest over all places (Kim 2014)."""

    kind: Literal["conv"]
    """Which kind it is."""
    widths: list[Annotated[int, Field(ge=1)]] = Field([3, 4, 5], min_length=1)
    """Places that a window covers."""
    channels: int = Field(100, ge=1)
    """Of each width."""


class RecurrentEncoder(Strict):
    """A recurrent network over the text, and the state that it ends with."""

    kind: Literal["gru", "lstm"]
    """Which kind it is."""
    hidden: int = Field(64, ge=1)
    """Numbers of its state."""
    layers: int = Field(1, ge=1)
    """One upon the other."""
    bidirectional: bool = False
    """Whether a second one reads from the end; their states are concatenated."""


class TextClassifierConfig(Strict):
    """A text's vectors through an encoder, beside other features, then dense layers to the class."""

    kind: Literal["text_classifier"]
    """Which kind it is."""
    text: Name | None = None
    """The feature that is encoded place by place. None where pooled features are all."""
    features: list[Name] = Field(default_factory=list)
    """Pooled and dense features that are joined to the encoded text, in order."""
    encoder: Annotated[
        Annotated[FlattenEncoder | PooledEncoder | ConvEncoder | RecurrentEncoder, Field(discriminator="kind")],
        BeforeValidator(_as_kind),
    ] = PooledEncoder(kind="mean")
    """What makes one vector of a text."""
    mlp: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Sizes of dense layers with ReLU, before the last one, which gives the classes' logits."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the joined numbers that is set to 0 in training; drawn by seed, step and row, alike in every world."""


class ItemEmbeddingConfig(Strict):
    """Skip-gram over lists of ids (Mikolov et al. 2013): each place of a list predicts those near it."""

    kind: Literal["item_embedding"]
    """Which kind it is."""
    sequence: Name
    """The feature whose lists are read: sentences, sessions, baskets."""
    window: int = Field(5, ge=1)
    """Places on each side of a centre that are its context, at most."""
    dynamic_window: bool = True
    """Whether each centre draws its own reach from 1 to `window`, so that near places count more."""
    subsample: float | None = Field(1e-3, gt=0)
    """Share of all ids above which an id is frequent: its places are kept with probability sqrt(t / f) + t / f, before
    windows are laid. None keeps all."""
    by_side: bool = False
    """Whether an id has one vector as a context before its centre and another as a context after it (Levy and Goldberg 2014,
    Ling et al. 2015)."""


class TargetAttention(Strict):
    """A sum of a sequence's vectors, weighted by what a small network makes of each and a target (DIN, Zhou et al. 2018)."""

    kind: Literal["target_attention"]
    """Which kind it is."""
    target: Name
    """The `id` feature whose vector is the target: the item that may be clicked."""
    mlp: list[Annotated[int, Field(ge=1)]] = Field([36], min_length=1)
    """Sizes of the network's layers, PReLU after each; a last one gives the weight."""


SequencePooling = Annotated[
    Annotated[PooledEncoder | TargetAttention, Field(discriminator="kind")], BeforeValidator(_as_kind)
]


class RankingModel(Strict):
    """What models have in common that predict a row's label from all of its features."""

    kind: str
    """Which kind it is."""
    features: list[Name] = Field(default_factory=list)
    """What it reads, in order; all features of the config where empty."""
    sequences: dict[Name, SequencePooling] = Field(default_factory=dict)
    """How the vectors of each `sequence` become one: `mean`, `max`, `attention` (the default), or `target_attention`."""
    norm: Literal["none", "layer", "batch"] = "none"
    """Layer norm or batch norm before each ReLU. `batch`: by moments of the whole global batch, each row by its weight."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the numbers after each ReLU that is 0 in training; drawn by seed, step and row, alike in every world."""
    user_id: Name | None = None
    """The feature that names the user, for grouped AUC and the baseline `bias`."""
    item_id: Name | None = None
    """The feature that names the item, for the baseline `bias`."""


Sizes = list[Annotated[int, Field(ge=1)]]
"""Sizes of dense layers with ReLU, from the first on."""


class DLRMConfig(RankingModel):
    """Dot products of all pairs of features' vectors, then dense layers (DLRM, Naumov et al. 2019)."""

    kind: Literal["dlrm"]
    """Which kind it is."""
    dense_mlp: Sizes = Field(default_factory=lambda: [64])
    """Layers that make a vector of the dense features; one more, of the tables' dim, follows."""
    mlp: Sizes = Field(default_factory=lambda: [64, 32], min_length=1)
    """Layers after the dot products."""


class DCNv2Config(RankingModel):
    """Layers that cross all features with each other (DCN V2, Wang et al. 2021), and dense layers."""

    kind: Literal["dcn_v2"]
    """Which kind it is."""
    cross_layers: int = Field(2, ge=1)
    """Each multiplies what it is given by the features once more."""
    low_rank: int | None = Field(None, ge=1)
    """Rank of the matrices of the cross layers; full where absent."""
    structure: Literal["stacked", "parallel"] = "stacked"
    """Whether the dense layers follow the cross layers or lie beside them."""
    mlp: Sizes = Field(default_factory=lambda: [64, 32])
    """The dense layers; none where empty."""


class DeepFMConfig(RankingModel):
    """A factorization machine and dense layers over the same vectors, added up (DeepFM, Guo et al. 2017)."""

    kind: Literal["deepfm"]
    """Which kind it is."""
    mlp: Sizes = Field(default_factory=lambda: [64, 32], min_length=1)
    """The dense layers."""


class WideAndDeepConfig(RankingModel):
    """A linear model of ids and numbers, and dense layers over vectors, added up (Cheng et al. 2016)."""

    kind: Literal["wide_and_deep"]
    """Which kind it is."""
    wide: list[Name] = Field(default_factory=list)
    """Features of the linear model; all that the model reads, sequences aside, where empty."""
    mlp: Sizes = Field(default_factory=lambda: [64, 32], min_length=1)
    """The dense layers."""


class MMoEConfig(RankingModel):
    """Experts that all labels share, mixed for each label by a gate of its own (MMoE, Ma et al. 2018)."""

    kind: Literal["mmoe"]
    """Which kind it is."""
    experts: int = Field(4, ge=1)
    """How many."""
    expert_mlp: Sizes = Field(default_factory=lambda: [64], min_length=1)
    """Layers of each expert."""
    mlp: Sizes = Field(default_factory=lambda: [32])
    """Layers of each label's tower."""


class SASRecConfig(Strict):
    """Causal self-attention over a list of items: each place tells the next one (SASRec, Kang and McAuley 2018)."""

    kind: Literal["sasrec"]
    """Which kind it is."""
    sequence: Name
    """The `sequence` of items before a row's own, oldest first; it has a `max_length` and keeps the last."""
    item_id: Name
    """The `id` feature of the row's own item, which is what comes next; in the table of the sequence."""
    user_id: Name | None = None
    """The feature that names the user, for metrics over the whole catalogue, and baselines that look at users."""
    blocks: int = Field(2, ge=1)
    """Layers of attention, each with two dense layers after it."""
    heads: int = Field(1, ge=1)
    """Of the attention; they divide the table's dim."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of the numbers that are 0 in training, of the vectors that come in and of what each layer adds; drawn by seed,
    step and row, alike in every world."""


class CustomModelConfig(Strict):
    """A module of the user's own: `factory(context)` is called and returns an nn.Module."""

    kind: Literal["custom"]
    """Which kind it is."""
    factory: str
    """Import path, `package.module:callable`."""
    user_id: Name | None = None
    """The feature that names the user, for retrieval metrics."""
    item_id: Name | None = None
    """The feature that names the item, for retrieval metrics and in-batch negatives."""
    item_features: list[Name] = Field(default_factory=list)
    """The features that describe an item: what is looked up for candidates. `item_id` alone where empty."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Handed to the factory as it is."""


ModelConfig = Annotated[
    TwoTowerConfig
    | TextClassifierConfig
    | ItemEmbeddingConfig
    | DLRMConfig
    | DCNv2Config
    | DeepFMConfig
    | WideAndDeepConfig
    | MMoEConfig
    | SASRecConfig
    | CustomModelConfig,
    Field(discriminator="kind"),
]


# ----------------------------------------------------------------------------------------------------------- objective
class PointwiseConfig(Strict):
    """A loss on each row's label: squared error, or cross entropy on the logit."""

    kind: Literal["mse", "bce"]
    """Which kind it is."""
    label_weights: dict[Name, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """What the loss of each of several labels counts in the row's; 1 where it is not named."""


class CrossEntropyConfig(Strict):
    """Cross entropy of the row's label, a whole number, among several classes."""

    kind: Literal["cross_entropy"]
    """Which kind it is."""
    classes: int = Field(ge=2)
    """Labels are from 0 to one less."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all classes (Szegedy et al. 2016)."""


class InBatchSoftmaxConfig(Strict):
    """Softmax over the batch's own items (Yi et al. 2019)."""

    kind: Literal["in_batch_softmax"]
    """Which kind it is."""
    temperature: float = Field(1.0, gt=0)
    """Logits are divided by it."""
    log_q: Literal["off", "streaming"] = "streaming"
    """Whether an item's logit is corrected by the log of how often it turns up, estimated as training goes."""
    log_q_half_life_steps: float | None = Field(None, gt=0)
    """Steps after which a count weighs half; absent: all counts weigh the same."""
    log_q_buckets: int = Field(2**22, ge=1)
    """Counters. Tables with more rows share them by the row's remainder."""
    negatives: Literal["global", "local"] = "global"
    """Whose items are candidates: all workers', or the worker's own (the result then depends on the world)."""
    mask_accidental_hits: bool = True
    """Whether other rows' candidates that are the row's own item are left out."""


class DrawsNegatives(Strict):
    """What objectives have in common that draw items once a step, for all rows of the global batch."""

    num_negatives: int = Field(1024, ge=1)
    """Items drawn a step, shared by the rows of the global batch; a multiple of `data.lanes`."""
    distribution: Literal["uniform", "popularity"] = "uniform"
    """From which items are drawn."""
    alpha: float = Field(0.75, ge=0)
    """`popularity`: an item is drawn in proportion to its training count to this power."""
    drawn_for: Literal["batch", "lane"] = "batch"
    """Which rows meet a drawn id: all of the global batch, or those of one lane alone, so that each meets `num_negatives` /
    `data.lanes` of its own and nothing that is drawn travels between workers. `lane` is for `item_embedding`."""


class MasksHits(DrawsNegatives):
    """What draws items and may leave out those that are the row's own."""

    mask_accidental_hits: bool = True
    """Whether candidates that are the row's own item are left out."""


class SampledSoftmaxConfig(MasksHits):
    """Softmax over the row's item and items drawn once a step for the whole batch."""

    kind: Literal["sampled_softmax"]
    """Which kind it is."""
    mixed: bool = False
    """Whether the batch's own items are candidates too (Yang et al. 2020)."""
    temperature: float = Field(1.0, gt=0)
    """Logits are divided by it."""
    log_q: Literal["off", "on"] = "on"
    """Whether logits are corrected by the log of the probability with which a candidate turns up."""
    mask_list: bool = False
    """`sasrec`: whether candidates that are anywhere in the row's list are left out, too: each place then learns what comes
    next among what the list does not have, before it or after."""


class BPRConfig(MasksHits):
    """Bayesian personalised ranking: the row's item above each drawn item (Rendle et al. 2009)."""

    kind: Literal["bpr"]
    """Which kind it is."""


class NegativeSamplingConfig(MasksHits):
    """Cross entropy of the row's item as 1 and of drawn items as 0 (Mikolov et al. 2013; Rendle et al. 2020)."""

    kind: Literal["negative_sampling"]
    """Which kind it is."""
    negative_weight: float = Field(8.0, gt=0)
    """What the mean over the drawn items weighs, against the row's own item: as many negatives a row."""


class CosineContrastiveConfig(MasksHits):
    """The cosine of the row's item towards 1, of drawn items below a margin (Mao et al. 2021, SimpleX)."""

    kind: Literal["cosine_contrastive"]
    """Which kind it is."""
    margin: float = Field(0.8, ge=-1, lt=1)
    """Cosine up to which a drawn item costs nothing."""
    negative_weight: float = Field(150.0, gt=0)
    """What the mean over the drawn items weighs, against the row's own item."""


class NCEConfig(DrawsNegatives):
    """Noise-contrastive estimation (Gutmann and Hyvarinen 2010; Mnih and Teh 2012), with a bias for each id.

    A drawn id that is the pair's own is not left out: the noise is what the correction says it is.
    """

    kind: Literal["nce"]
    """Which kind it is."""
    negatives_per_pair: int = Field(5, ge=1)
    """Noise samples for each pair, k of the correction log(k q). The ids drawn for the step stand for them."""


class SoftmaxConfig(Strict):
    """Softmax over all ids, for small vocabularies: what the others approximate."""

    kind: Literal["softmax"]
    """Which kind it is."""


class HierarchicalSoftmaxConfig(Strict):
    """Binary decisions down a Huffman tree of the ids' counts (Morin and Bengio 2005; Mikolov et al. 2013)."""

    kind: Literal["hierarchical_softmax"]
    """Which kind it is."""


ObjectiveConfig = Annotated[
    PointwiseConfig
    | CrossEntropyConfig
    | InBatchSoftmaxConfig
    | SampledSoftmaxConfig
    | BPRConfig
    | NegativeSamplingConfig
    | CosineContrastiveConfig
    | NCEConfig
    | SoftmaxConfig
    | HierarchicalSoftmaxConfig,
    Field(discriminator="kind"),
]


# ----------------------------------------------------------------------------------------------------------- optimizer
class DenseOptimizerConfig(Strict):
    """The optimizer of all that is not a table: torch's, by name."""

    kind: Literal["sgd", "adagrad", "adam", "adamw", "rmsprop"] = "adam"
    """Which kind it is."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate, before the schedule's factor."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the class in torch.optim (betas, eps, momentum, weight_decay, ...)."""
    clip_norm: float | None = Field(None, gt=0)
    """Greatest norm of the dense gradient; a longer one is scaled down to it. Fused tables are not clipped."""


class ScheduleConfig(Strict):
    """A factor on every learning rate, tables and dense."""

    warmup_steps: int = Field(0, ge=0)
    """Steps over which the factor rises linearly to 1."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the factor falls after warm-up."""
    decay_steps: int | None = Field(None, ge=1)
    """Steps after warm-up until the factor is `final`; the rest of the run where absent."""
    final: float = Field(0.0, ge=0, le=1)
    """The factor at the end of the decay."""


class OptimizerConfig(Strict):
    """The optimizers: of tables (fused into the backward pass) and of the dense part."""

    tables: TableOptimizerConfig = TableOptimizerConfig()
    """Of all tables, unless a table says otherwise."""
    dense: DenseOptimizerConfig = DenseOptimizerConfig()
    """Of everything else."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Of both."""


# ------------------------------------------------------------------------------------------------------------ the rest
class ShardingConfig(Strict):
    """How tables are cut and placed."""

    planner: Literal["auto", "explicit"] = "auto"
    """`auto`: TorchRec's planner, within what each table allows. `explicit`: what each table's `sharding.type` says."""
    communication: Literal["fp32", "fp16", "bf16"] = "fp32"
    """In what embeddings and their gradients travel between workers. `bf16` needs CUDA. Anything but `fp32` makes the
    result depend on the world."""


class EarlyStoppingConfig(Strict):
    """Stops when the selected metric has not improved for a while."""

    patience: int = Field(3, ge=1)
    """Evaluations without improvement after which training stops."""
    min_delta: float = Field(0.0, ge=0)
    """What counts as an improvement."""


class CompileConfig(Strict):
    """The dense part through `torch.compile`."""

    mode: Literal["default", "reduce-overhead"] = "default"
    """`reduce-overhead` also records CUDA graphs, on CUDA alone."""


def _form_of_compile(value: Any) -> str:
    """Returns which form is meant, in words that the errors of `load.py` leave out of a path."""
    return "dict[compile]" if isinstance(value, Mapping | CompileConfig) else "literal[switch]"


Compile = Annotated[
    Annotated[bool, Tag("literal[switch]")] | Annotated[CompileConfig, Tag("dict[compile]")], Discriminator(_form_of_compile)
]


class TrainConfig(Strict):
    """How long and in what portions."""

    global_batch_size: int = Field(8192, ge=1)
    """Rows a step over all workers; a multiple of `data.lanes`."""
    epochs: int = Field(1, ge=0)
    """Passes over the training data."""
    max_steps: int | None = Field(None, ge=0)
    """Ends the run after so many steps, if that comes before the epochs do. 0 evaluates the untrained model."""
    early_stopping: EarlyStoppingConfig | None = None
    """Stops when the validation set says so; absent: never."""
    log_every_steps: int = Field(50, ge=1)
    """Steps between measurements in metrics.jsonl and plain lines of progress."""
    metrics: list[str] = Field(default_factory=list)
    """Metrics of the training rows as they were predicted before they were learnt, each `log_every_steps`, over the steps
    since the last time (`train/window/auc`) and over the run (`train/run/auc`): auc, pr_auc, log_loss, normalised_entropy,
    calibration, accuracy, gauc; rmse, mae. In memory that does not grow: AUCs are from histograms, and gauc keeps a window's
    rows."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What products of the dense part are computed in, in training; `bf16` is torch's autocast to bfloat16, for CUDA.
    Tables, weights, sums and the objective stay in float32, and so does evaluation."""
    compile: Compile = False
    """Whether the dense part, from the looked-up vectors to the model's output, goes through `torch.compile` in training;
    `{mode: reduce-overhead}` for CUDA graphs. It needs a C++ compiler on a CPU, Triton on CUDA."""
    prefetch: bool = False
    """On CUDA, of tables behind a cache (`memory.kind: uvm_caching`): whether the rows of the next step are brought into it
    while one is trained. Not yet run on a GPU."""
    deterministic: bool = False
    """On CUDA: bit for bit the same result, at a cost. On CPU it always is."""

    @property
    def compiles(self) -> CompileConfig | None:
        """How the dense part is compiled; None if it is not."""
        if isinstance(self.compile, bool):
            return CompileConfig() if self.compile else None
        return self.compile

    @property
    def window_rows(self) -> int:
        """The rows between two measurements of the training rows, at most."""
        return self.log_every_steps * self.global_batch_size


class PopularityBaseline(Strict):
    """Ranks the same items for everyone: by how often each is met in training."""

    kind: Literal["popularity"]
    """Which kind it is."""


class EaseBaseline(Strict):
    """EASE^R (Steck 2019): the linear item-to-item model that reconstructs users' items best, in closed form."""

    kind: Literal["ease"]
    """Which kind it is."""
    l2: float = Field(500.0, gt=0)
    """Added to the diagonal of the Gram matrix."""


class ItemKnnBaseline(Strict):
    """Ranks items by their cosine to the items that the user met, of which each speaks for its nearest neighbours."""

    kind: Literal["item_knn"]
    """Which kind it is."""
    neighbours: int = Field(200, ge=1)
    """Nearest neighbours of each item."""


class MeanBaseline(Strict):
    """Predicts the mean label of the training set for every row."""

    kind: Literal["mean"]
    """Which kind it is."""


class BiasBaseline(Strict):
    """Predicts a label from how far the user's and the item's labels are from the mean, both drawn towards it."""

    kind: Literal["bias"]
    """Which kind it is."""
    damping: float = Field(10.0, gt=0)
    """Rows with the mean label that each user and each item is given beside its own."""


Baseline = Annotated[
    Annotated[
        PopularityBaseline | EaseBaseline | ItemKnnBaseline | MeanBaseline | BiasBaseline, Field(discriminator="kind")
    ],
    BeforeValidator(_as_kind),
]


class EvaluateConfig(Strict):
    """What is measured, on what and how often."""

    metrics: list[str] = Field(default_factory=list)
    """recall@k, precision@k, ndcg@k, hit_rate@k, map@k, coverage@k, mrr; or, of labels, rmse, mae, log_loss, auc, pr_auc,
    gauc (AUC within users), normalised_entropy, calibration, accuracy, f1."""
    candidates: str = "catalogue"
    """`catalogue`: rank every item. Else the column of each row's negatives, against which its item is ranked."""
    filter_seen: bool = True
    """Whether a user's training items (for the test set, validation items too) are left out of the ranking."""
    every_steps: int | None = Field(None, ge=1)
    """Steps between evaluations on the validation set. Absent: at the end of each epoch."""
    select: str | None = None
    """The metric by which the best checkpoint is chosen, or one label's or class's (`auc:click`); the first of `metrics`
    where absent."""
    max_users: int | None = Field(None, ge=1)
    """Users of the validation set that are evaluated, drawn once by the seed; all where absent. The test set is
    always evaluated whole."""
    batch_size: int = Field(8192, ge=1)
    """Rows encoded at once."""
    progressive: bool = False
    """Whether each partition of the training data is evaluated before it is trained for the first time, by those of
    `metrics` that compare predictions with labels."""
    slice_by: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    """Columns of integers or strings by whose values the metrics of labels are also told apart, on the test set."""
    bootstrap: int = Field(0, ge=0)
    """Resamples of the test set from which each metric of labels has an interval of 95 %; 0: none."""
    baselines: list[Baseline] | Literal["auto"] = "auto"
    """What the test set's metrics are seen beside: popularity, ease, item_knn for ranking metrics; mean, bias for
    the others. `auto`: those that cost next to nothing, popularity or mean and bias; an empty list: none."""
    baseline_bytes: Bytes = 2 * 1024**3
    """What a baseline may take; one that needs more is left out, and said."""
    id_statistics_rows: int = Field(20_000_000, ge=0)
    """Training rows whose ids are counted for result.json; of more, evenly spaced row groups are. 0 counts none."""


class CheckpointConfig(Strict):
    """When and how the state is saved."""

    every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints. Absent: at the end of each epoch."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints that are kept, beside the best one."""
    mode: Literal["auto", "background", "blocking"] = "auto"
    """`background` copies the state and writes while training goes on; `auto` does so if the copy fits
    `memory_bytes`, else writes piece by piece before training goes on."""
    memory_bytes: Bytes = 2 * 1024**3
    """How much the copy of a background save may take."""


class TrackingConfig(Strict):
    """Where curves go, beside metrics.jsonl."""

    tensorboard: bool = True
    """Whether curves are written for TensorBoard."""
    private: bool = False
    """Whether ids are kept out of `result.json` and the report: a hash stands for each of the hottest ones."""
