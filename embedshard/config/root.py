"""The whole config, and what its parts must agree on."""

from __future__ import annotations

__all__ = ["Config"]

from collections.abc import Sequence

from pydantic import Field, model_validator

from embedshard.config.compilation import check_compile
from embedshard.config.memory import check_prefetch, check_table_memory
from embedshard.config.metrics import LOSS, POINTWISE_METRICS, check_baselines, check_metrics
from embedshard.config.models import check_item_embedding, check_text_classifier, check_two_tower
from embedshard.config.objectives import check_objective
from embedshard.config.parts import (
    BagFeature,
    Baseline,
    BiasBaseline,
    CheckpointConfig,
    CrossEntropyConfig,
    DataConfig,
    DeepFMConfig,
    DenseFeature,
    EvaluateConfig,
    Feature,
    IdFeature,
    ItemEmbeddingConfig,
    ManagedVocabulary,
    MeanBaseline,
    MMoEConfig,
    ModelConfig,
    Name,
    ObjectiveConfig,
    OptimizerConfig,
    PopularityBaseline,
    RankingModel,
    SASRecConfig,
    SequenceFeature,
    ShardingConfig,
    Strict,
    TableConfig,
    TextClassifierConfig,
    TextFeature,
    TowerConfig,
    TrackingConfig,
    TrainConfig,
    TwoTowerConfig,
    WeightedBagFeature,
    WideAndDeepConfig,
)
from embedshard.config.placement import check_table_sharding
from embedshard.config.ranking import check_ranking_model, check_sasrec
from embedshard.config.tables import check_compositions, check_hashed_item, check_managed, check_tables, check_texts
from embedshard.errors import nearest, with_article


class Config(Strict):
    """All that determines a run, with the data and nothing else."""

    name: str | None = None
    """The run's name; the config file's where absent."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of every random choice: order, first values, negatives."""
    data: DataConfig
    """Where the rows are."""
    features: dict[Name, Feature] = Field(min_length=1)
    """What a model reads of a row, by name."""
    tables: dict[Name, TableConfig] = Field(default_factory=dict)
    """Embedding tables, by name."""
    model: ModelConfig
    """What maps features to scores."""
    objective: ObjectiveConfig
    """The loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """What changes the weights."""
    sharding: ShardingConfig = ShardingConfig()
    """How tables are cut and placed."""
    train: TrainConfig = TrainConfig()
    """How long and in what portions."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured, on what and how often."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When and how the state is saved."""
    tracking: TrackingConfig = TrackingConfig()
    """Where curves go."""

    # ------------------------------------------------------------------------------------------- what parts agree on
    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        self._check_batch()
        check_tables(self)
        check_texts(self)
        check_compositions(self)
        self._check_sharding()
        if isinstance(self.model, TwoTowerConfig):
            check_two_tower(self, self.model)
        if isinstance(self.model, TextClassifierConfig):
            check_text_classifier(self, self.model)
        if isinstance(self.model, ItemEmbeddingConfig):
            check_item_embedding(self, self.model)
        if isinstance(self.model, RankingModel):
            check_ranking_model(self, self.model)
        if isinstance(self.model, SASRecConfig):
            check_sasrec(self, self.model)
        for role in ("user_id", "item_id"):
            self._check_identity(role)
        for name in getattr(self.model, "item_features", []):
            self.check_feature("model.item_features", name)
        check_managed(self)
        check_objective(self)
        check_metrics(self)
        check_hashed_item(self)
        check_baselines(self)
        check_compile(self)
        check_prefetch(self)
        return self

    def _check_batch(self) -> None:
        batch, lanes = self.train.global_batch_size, self.data.lanes
        if batch % lanes:
            low, high = batch // lanes * lanes, -(-batch // lanes) * lanes
            choices = " or ".join(str(size) for size in (low, high) if size)
            divisor = max(n for n in range(1, min(batch, lanes) + 1) if batch % n == 0)
            raise ValueError(
                f"train.global_batch_size={batch} does not divide into data.lanes={lanes} lanes. "
                f"Choose global_batch_size {choices}, or lanes={divisor}"
            )

    def _check_sharding(self) -> None:
        for name, table in self.tables.items():
            optimizer = table.optimizer.kind or self.optimizer.tables.kind
            check_table_sharding(name, table, optimizer, self.sharding.planner, self.is_sequence_table(name))
            check_table_memory(name, table, optimizer)

    def _check_identity(self, role: str) -> None:
        name = getattr(self.model, role, None)
        if name is None:
            return
        self.check_feature(f"model.{role}", name)
        if not isinstance(self.features[name], IdFeature):
            raise ValueError(f"model.{role}: feature '{name}' is {with_article(self.features[name].kind)}, it must be an id")

    # ---------------------------------------------------------------------------------------- what others ask of it
    def check_feature(self, place: str, name: str) -> None:
        """Raises a ValueError if there is no feature of a name, which stands in a place of the config."""
        if name not in self.features:
            raise ValueError(f"{place}: there is no feature '{name}'. {nearest(name, self.features)}")

    def width(self, name: str) -> int:
        """The size of a feature's vector, or of each of its vectors."""
        feature = self.features[name]
        return 1 if isinstance(feature, DenseFeature) else self.tables[feature.table].dim

    @staticmethod
    def combines_by_sum(tower: TowerConfig) -> bool:
        """Whether a tower adds its features' vectors up instead of concatenating them."""
        return tower.combine == "sum" or (tower.combine == "auto" and not tower.mlp)

    def tower_width(self, tower: TowerConfig) -> int:
        """The size of a tower's output."""
        return tower.mlp[-1] if tower.mlp else self.joined_width(tower)

    def joined_width(self, tower: TowerConfig) -> int:
        """The size of a tower's features as they are joined."""
        widths = [self.width(name) for name in tower.features]
        return widths[0] if self.combines_by_sum(tower) else sum(widths)

    def identity(self, role: str) -> str | None:
        """The feature that names the user (`user_id`) or the item (`item_id`), if there is one."""
        named = getattr(self.model, role, None)
        if named is not None:
            return named
        if not isinstance(self.model, TwoTowerConfig):
            return None
        tower = self.model.user if role == "user_id" else self.model.item
        return next((name for name in tower.features if isinstance(self.features[name], IdFeature)), None)

    def knows_user_and_item(self) -> bool:
        """Whether features name both."""
        return self.identity("user_id") is not None and self.identity("item_id") is not None

    def table_of(self, feature: str | None) -> str:
        """The table that a feature is looked up in; empty where there is none."""
        return "" if feature is None else getattr(self.features[feature], "table", "")

    def is_identity_managed(self) -> bool:
        """Whether rows of users or items change hands, by a managed vocabulary."""
        tables = [self.table_of(self.identity(role)) for role in ("user_id", "item_id")]
        return any(isinstance(self.tables[table].vocabulary, ManagedVocabulary) for table in tables if table)

    def item_features(self) -> list[str]:
        """The features that describe an item, in order: what is looked up for a candidate."""
        if isinstance(self.model, TwoTowerConfig):
            return list(self.model.item.features)
        identity = self.identity("item_id")
        return list(getattr(self.model, "item_features", [])) or ([identity] if identity else [])

    def drawn_feature(self) -> str | None:
        """The feature whose ids an objective draws, or takes all of, as candidates: the item, or an embedding's list."""
        return self.model.sequence if isinstance(self.model, ItemEmbeddingConfig) else self.identity("item_id")

    def baselines(self) -> list[Baseline]:
        """The baselines that the test set's metrics are seen beside: the chosen ones, or what `auto` means."""
        if self.evaluate.baselines != "auto":
            return list(self.evaluate.baselines)
        if isinstance(self.model, ItemEmbeddingConfig) or len(self.data.label_columns) > 1:
            return []
        pointwise = [name in POINTWISE_METRICS for name in self.evaluate.metrics]
        found: list[Baseline] = [] if all(pointwise) else [PopularityBaseline(kind="popularity")]
        if any(pointwise) and not isinstance(self.objective, CrossEntropyConfig):
            found.append(MeanBaseline(kind="mean"))
            if self.knows_user_and_item() and not self.is_identity_managed():
                found.append(BiasBaseline(kind="bias"))
        return found

    def ranking_metrics(self) -> list[str]:
        """Those of `evaluate.metrics` that rank items."""
        return [name for name in self.evaluate.metrics if name not in (LOSS, *POINTWISE_METRICS)]

    def measured(self) -> list[str]:
        """The names of what is measured of a set: each of `evaluate.metrics`, and its parts, such as `auc:click`."""
        return [name for metric in self.evaluate.metrics for name in (metric, *self._parts(metric))]

    def _parts(self, metric: str) -> list[str]:
        """The names of a metric by label, or by class where it has a value for each."""
        parts: Sequence[str | int] = ()
        if metric in POINTWISE_METRICS and len(self.data.label_columns) > 1:
            parts = list(self.data.label_columns)
        elif metric == "f1" or (metric == "auc" and self.num_logits > 2):
            parts = range(max(self.num_logits, 2))
        return [f"{metric}:{part}" for part in parts]

    def num_buckets(self, table: str) -> int:
        """The virtual buckets of a table whose vocabulary is managed."""
        vocabulary = self.tables[table].vocabulary
        assert isinstance(vocabulary, ManagedVocabulary), "asked of such a table"
        return vocabulary.buckets or self.data.lanes

    def pooled_width(self, names: Sequence[str]) -> int:
        """The size of features' vectors side by side."""
        return sum(self.width(name) for name in names)

    def is_sequence(self, name: str) -> bool:
        """Whether a feature is a vector a place."""
        feature = self.features[name]
        return isinstance(feature, SequenceFeature) or (isinstance(feature, TextFeature) and feature.pooling is None)

    def max_length(self, name: str) -> int | None:
        """The most ids that a row of a feature has; None where nothing bounds them."""
        return getattr(self.features[name], "max_length", None)

    @property
    def num_logits(self) -> int:
        """The logits that a row's label needs: one for each class, one where there are two or it is a number."""
        return self.objective.classes if isinstance(self.objective, CrossEntropyConfig) else 1

    @property
    def learns_several_labels(self) -> bool:
        """Whether the model gives a logit for each label, as many as there are."""
        return isinstance(self.model, MMoEConfig)

    def first_order(self) -> list[str]:
        """The features with a table that a ranking model also gives one weight for each id, in order."""
        model = self.model
        if not isinstance(model, DeepFMConfig | WideAndDeepConfig):
            return []
        named = (isinstance(model, WideAndDeepConfig) and model.wide) or self.read_features(model)
        return [name for name in named if not isinstance(self.features[name], DenseFeature) and not self.is_sequence(name)]

    def read_features(self, model: RankingModel) -> list[str]:
        """The features that a ranking model reads, in order."""
        return list(model.features or self.features)

    def is_sequence_table(self, table: str) -> bool:
        """Whether a feature asks a table for a vector a place."""
        return any(
            self.is_sequence(name) and getattr(feature, "table", None) == table for name, feature in self.features.items()
        )

    def bags(self, table: str) -> list[BagFeature | WeightedBagFeature | TextFeature]:
        """The features over a table that pool, texts included."""
        return [
            feature
            for feature in self.features.values()
            if isinstance(feature, BagFeature | WeightedBagFeature | TextFeature)
            and feature.table == table
            and feature.pooling is not None
        ]

    def texts(self, table: str) -> dict[str, TextFeature]:
        """The text features over a table, by name."""
        return {
            name: feature
            for name, feature in self.features.items()
            if isinstance(feature, TextFeature) and feature.table == table
        }
