"""The whole config, and what its parts must agree on."""

from __future__ import annotations

__all__ = ["POINTWISE_METRICS", "Config"]

import math
import re
from collections.abc import Sequence
from typing import Final

from pydantic import Field, model_validator

from embedshard.config.compilation import check_compile
from embedshard.config.memory import check_prefetch, check_table_memory
from embedshard.config.parts import (
    BagFeature,
    Baseline,
    BiasBaseline,
    CheckpointConfig,
    CosineContrastiveConfig,
    CrossEntropyConfig,
    DataConfig,
    DeepFMConfig,
    DenseFeature,
    DoubleHashVocabulary,
    DrawsNegatives,
    EaseBaseline,
    EvaluateConfig,
    Feature,
    FlattenEncoder,
    HierarchicalSoftmaxConfig,
    IdFeature,
    ItemEmbeddingConfig,
    ItemKnnBaseline,
    ManagedVocabulary,
    MeanBaseline,
    MMoEConfig,
    ModelConfig,
    Name,
    NCEConfig,
    NegativeSamplingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PointwiseConfig,
    PopularityBaseline,
    RankingModel,
    SampledSoftmaxConfig,
    SASRecConfig,
    SequenceFeature,
    ShardingConfig,
    SoftmaxConfig,
    Strict,
    TableConfig,
    TextClassifierConfig,
    TextFeature,
    TokenizerVocabulary,
    TowerConfig,
    TrackingConfig,
    TrainConfig,
    TwoTowerConfig,
    WeightedBagFeature,
    WideAndDeepConfig,
    WordNgramsVocabulary,
    WordsVocabulary,
)
from embedshard.config.placement import check_table_sharding
from embedshard.config.ranking import check_ranking_model, check_sasrec
from embedshard.errors import nearest, with_article

CUT_METRICS: Final = ("recall", "precision", "ndcg", "hit_rate", "map", "coverage")
"""The metrics of ranked lists that look at the first k of them, which is written as `recall@20`."""

POINTWISE_METRICS: Final = (
    "rmse",
    "mae",
    "log_loss",
    "auc",
    "accuracy",
    "f1",
    "pr_auc",
    "gauc",
    "normalised_entropy",
    "calibration",
)
"""The metrics that compare a row's prediction with its label; all others but `loss` rank items."""

LOSS: Final = "loss"
"""The metric of an item_embedding: the objective's own loss."""

STREAMING_METRICS: Final = (
    "auc",
    "pr_auc",
    "log_loss",
    "normalised_entropy",
    "calibration",
    "accuracy",
    "gauc",
    "rmse",
    "mae",
)
"""The metrics of training rows; those of a label that is a number are the last two."""

MOST_WINDOW_ROWS: Final = 2**22
"""Rows that the AUC of training rows within users keeps at most: about 70 MB for one label."""

STREAMING_OF_NUMBERS: Final = STREAMING_METRICS[-2:]

_OF_CLASSES: Final = ("log_loss", "auc", "accuracy", "f1")


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
        self._check_tables()
        self._check_text()
        self._check_compositions()
        self._check_sharding()
        if isinstance(self.model, TwoTowerConfig):
            self._check_tower("user", self.model.user, self.model.biases)
            self._check_tower("item", self.model.item, self.model.biases)
            self._check_tower_sizes(self.model)
        if isinstance(self.model, TextClassifierConfig):
            self._check_text_classifier(self.model)
        if isinstance(self.model, ItemEmbeddingConfig):
            self._check_item_embedding(self.model)
        if isinstance(self.model, RankingModel):
            check_ranking_model(self, self.model)
        if isinstance(self.model, SASRecConfig):
            check_sasrec(self, self.model)
        for role in ("user_id", "item_id"):
            self._check_identity(role)
        for name in getattr(self.model, "item_features", []):
            if name not in self.features:
                raise ValueError(f"model.item_features: there is no feature '{name}'. {nearest(name, self.features)}")
        self._check_managed()
        self._check_objective()
        self._check_metrics()
        self._check_hashed_item()
        self._check_baselines()
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

    def _check_tables(self) -> None:
        for name, table in self.tables.items():
            if table.l2_lookup and self.is_sequence_table(name):
                raise ValueError(
                    f"tables.{name}.l2_lookup is a penalty on pooled vectors, and a sequence looks the table up. Leave it "
                    f"out"
                )
        for name, feature in self.features.items():
            if not isinstance(feature, DenseFeature) and feature.table not in self.tables:
                raise ValueError(
                    f"features.{name}.table: there is no table '{feature.table}'. {nearest(feature.table, self.tables)}"
                )
        used = {feature.table for feature in self.features.values() if not isinstance(feature, DenseFeature)}
        for name in self.tables:
            if name not in used:
                raise ValueError(f"tables.{name}: no feature looks it up. Remove it, or give a feature 'table: {name}'")

    def _check_text(self) -> None:
        """Checks that words are looked up by what has words."""
        for name, table in self.tables.items():
            vocabulary = table.vocabulary
            if isinstance(vocabulary, WordNgramsVocabulary):
                if vocabulary.of not in self.tables:
                    hint = nearest(vocabulary.of, self.tables)
                    raise ValueError(f"tables.{name}.vocabulary.of: there is no table '{vocabulary.of}'. {hint}")
                if not isinstance(self.tables[vocabulary.of].vocabulary, TokenizerVocabulary):
                    raise ValueError(
                        f"tables.{name}.vocabulary.of: table '{vocabulary.of}' has no tokenizer to divide texts by. "
                        f"Give it the vocabulary 'words' or 'bpe', or name a table that has one"
                    )
        for name, feature in self.features.items():
            if isinstance(feature, DenseFeature):
                continue
            vocabulary = self.tables[feature.table].vocabulary
            has_words = isinstance(vocabulary, TokenizerVocabulary | WordNgramsVocabulary)
            if isinstance(feature, TextFeature):
                if not has_words:
                    raise ValueError(
                        f"features.{name} is a text, but table '{feature.table}' has the vocabulary '{vocabulary.kind}', "
                        f"which knows whole ids. Give the table the vocabulary 'words', 'bpe' or 'word_ngrams'"
                    )
            elif has_words and (isinstance(feature, IdFeature) or not isinstance(vocabulary, WordsVocabulary)):
                raise ValueError(
                    f"features.{name} is of kind '{feature.kind}', but table '{feature.table}' has the vocabulary "
                    f"'{vocabulary.kind}', which is looked up by texts. Make it 'kind: text', or give the table the "
                    f"vocabulary 'hash' or 'file'"
                )
        for name, table in self.tables.items():
            vocabulary = table.vocabulary
            if isinstance(vocabulary, TokenizerVocabulary) and vocabulary.path is None and not self.texts(name):
                raise ValueError(
                    f"tables.{name}.vocabulary: a tokenizer is made from texts, and no feature of kind 'text' looks this "
                    f"table up. Give one, or a ready tokenizer (vocabulary.path)"
                )

    def _check_compositions(self) -> None:
        """Checks that ids which become two rows are pooled: the sum of both is what there is of them."""
        for name, feature in self.features.items():
            if isinstance(feature, DenseFeature) or self.tables[feature.table].composition is None:
                continue
            if self.is_sequence(name):
                raise ValueError(
                    f"features.{name} is a sequence, a vector a place, but table '{feature.table}' has the vocabulary "
                    f"'{self.tables[feature.table].vocabulary.kind}', whose ids are sums of two vectors. Make it a 'bag', "
                    f"or give the table the vocabulary 'hash', 'file' or 'auto'"
                )

    def _check_hashed_item(self) -> None:
        """Checks that items which are drawn or ranked can be listed: pairs of hashes are too many."""
        item_id = self.identity("item_id")
        table = None if item_id is None else getattr(self.features[item_id], "table", None)
        if table is None or not isinstance(self.tables[table].vocabulary, DoubleHashVocabulary):
            return
        ranked = [name for name in self.evaluate.metrics if name not in (LOSS, *POINTWISE_METRICS)]
        if isinstance(self.objective, DrawsNegatives) or ranked:
            who = f"metric '{ranked[0]}' ranks" if ranked else f"objective '{self.objective.kind}' draws"
            raise ValueError(
                f"tables.{table}.vocabulary is 'double_hash', and {who} items of feature '{item_id}': pairs of hashes "
                f"cannot be listed. Give the table the vocabulary 'quotient_remainder', 'hash', 'file' or 'auto', or choose "
                f"{'metrics of labels' if ranked else 'in_batch_softmax'}"
            )

    def _check_sharding(self) -> None:
        for name, table in self.tables.items():
            optimizer = table.optimizer.kind or self.optimizer.tables.kind
            check_table_sharding(name, table, optimizer, self.sharding.planner, self.is_sequence_table(name))
            check_table_memory(name, table, optimizer)

    def _check_tower(self, side: str, tower: TowerConfig, biases: Sequence[str]) -> None:
        for name in tower.features:
            if name not in self.features:
                raise ValueError(f"model.{side}.features: there is no feature '{name}'. {nearest(name, self.features)}")
            if side == "item" and self.is_sequence(name):
                raise ValueError(
                    f"model.item.features: '{name}' is a sequence, a vector a place; the item tower joins one vector a "
                    f"feature. Make it a 'bag', or a 'text' with 'pooling'"
                )
        for name in tower.sequences:
            if name not in tower.features or not self.is_sequence(name):
                raise ValueError(
                    f"model.{side}.sequences: '{name}' is no sequence among the features of the {side} tower. Name one, or "
                    f"leave it out"
                )
        dims = {name: self.width(name) for name in tower.features}
        if self.combines_by_sum(tower):
            dense = [name for name in tower.features if isinstance(self.features[name], DenseFeature)]
            if dense:
                raise ValueError(
                    f"model.{side}: a dense feature ('{dense[0]}') cannot be summed with embeddings. "
                    f"Give the tower an 'mlp', or 'combine: concat'"
                )
            if len(set(dims.values())) > 1:
                shown = ", ".join(f"{name}: {dim}" for name, dim in dims.items())
                raise ValueError(
                    f"model.{side}: the features' vectors are summed but differ in size ({shown}). "
                    f"Use one dim, 'combine: concat', or an 'mlp'"
                )
        if side in biases and self.identity(f"{side}_id") is None:
            raise ValueError(f"model.biases: '{side}' needs an 'id' feature in the {side} tower; it has none")

    def _check_tower_sizes(self, model: TwoTowerConfig) -> None:
        sizes = {side: self.tower_width(tower) for side, tower in (("user", model.user), ("item", model.item))}
        if sizes["user"] != sizes["item"]:
            raise ValueError(
                f"model: the user tower ends in {sizes['user']} numbers, the item tower in {sizes['item']}; "
                f"a dot product needs as many of each. Change a table's dim or the last size of an mlp"
            )

    def _check_text_classifier(self, model: TextClassifierConfig) -> None:
        for name in (*([] if model.text is None else [model.text]), *model.features):
            if name not in self.features:
                raise ValueError(f"model: there is no feature '{name}'. {nearest(name, self.features)}")
        if model.text is None and not model.features:
            raise ValueError("model: it reads nothing. Give 'text' the feature that is encoded, or 'features' pooled ones")
        if model.text is not None and not self.is_sequence(model.text):
            raise ValueError(
                f"model.text: feature '{model.text}' is pooled, and the encoder wants a vector a place. Make it a "
                f"'sequence', or a 'text' without 'pooling', or put it into model.features"
            )
        for name in model.features:
            if self.is_sequence(name):
                raise ValueError(
                    f"model.features: '{name}' is a sequence, a vector a place. Make it a 'bag', or a pooled 'text', "
                    f"or encode it as model.text"
                )
        flattens = model.text is not None and isinstance(model.encoder, FlattenEncoder)
        if flattens and self.max_length(str(model.text)) is None:
            raise ValueError(
                f"model.encoder 'flatten' has as many inputs as the longest text: give features.{model.text}.max_length"
            )
        if not isinstance(self.objective, PointwiseConfig | CrossEntropyConfig):
            raise ValueError(
                f"objective '{self.objective.kind}' compares items, and a text_classifier has none. Choose 'bce' for a "
                f"label of 0 or 1, 'cross_entropy' for several classes, 'mse' for a number"
            )

    def _check_item_embedding(self, model: ItemEmbeddingConfig) -> None:
        name = model.sequence
        if name not in self.features:
            raise ValueError(f"model.sequence: there is no feature '{name}'. {nearest(name, self.features)}")
        if not self.is_sequence(name):
            kind = with_article(self.features[name].kind)
            raise ValueError(
                f"model.sequence: feature '{name}' is {kind}, and pairs are made of the places of a list. Make it a "
                f"'sequence'"
            )
        for other in self.features:
            if other != name:
                raise ValueError(f"features.{other}: an item_embedding reads '{name}' alone. Leave it out")
        objective = self.objective
        if not isinstance(
            objective,
            NegativeSamplingConfig | NCEConfig | SampledSoftmaxConfig | SoftmaxConfig | HierarchicalSoftmaxConfig,
        ):
            raise ValueError(
                f"objective '{objective.kind}' does not learn pairs of a list, which is all that an item_embedding has. "
                f"Choose 'negative_sampling', 'nce', 'sampled_softmax', 'softmax' or 'hierarchical_softmax'"
            )
        if model.by_side and isinstance(objective, HierarchicalSoftmaxConfig):
            raise ValueError(
                "model.by_side: 'hierarchical_softmax' compares centres with the nodes of a tree, which have no side. "
                "Leave it out, or choose another objective"
            )
        if isinstance(objective, SampledSoftmaxConfig) and objective.mixed:
            raise ValueError("objective.mixed takes the items of other rows, and an item_embedding has lists. Leave it out")
        others = [metric for metric in self.evaluate.metrics if metric != LOSS]
        if others:
            raise ValueError(
                f"evaluate.metrics: '{others[0]}' is for models of users and items or of labels, and an item_embedding has "
                f"neither. Choose '{LOSS}', that of held-out pairs, and look at the vectors with 'embedshard similar'"
            )
        if self.evaluate.baselines != "auto" and self.evaluate.baselines:
            raise ValueError(
                "evaluate.baselines rank items or predict labels, and an item_embedding does neither. Leave them out"
            )

    def _check_identity(self, role: str) -> None:
        name = getattr(self.model, role, None)
        if name is None:
            return
        if name not in self.features:
            raise ValueError(f"model.{role}: there is no feature '{name}'. {nearest(name, self.features)}")
        if not isinstance(self.features[name], IdFeature):
            raise ValueError(f"model.{role}: feature '{name}' is {with_article(self.features[name].kind)}, it must be an id")

    def _check_objective(self) -> None:
        objective, labels = self.objective, self.data.label_columns
        if isinstance(objective, PointwiseConfig | CrossEntropyConfig):
            if isinstance(objective, CrossEntropyConfig) and isinstance(self.model, TwoTowerConfig):
                raise ValueError("objective 'cross_entropy' wants a logit a class, and a two_tower has one. Choose 'bce'")
            if isinstance(objective, PointwiseConfig):
                for name in objective.label_weights:
                    if name not in labels:
                        raise ValueError(f"objective.label_weights: there is no label '{name}'. {nearest(name, labels)}")
            if len(labels) != 1 and not (labels and self.learns_several_labels):
                raise ValueError(
                    f"objective '{objective.kind}' learns one label, data names {len(labels)}. "
                    f"Give data.label the column of it"
                )
            return
        if isinstance(objective, DrawsNegatives) and objective.num_negatives % self.data.lanes:
            raise ValueError(
                f"objective.num_negatives={objective.num_negatives} does not divide into data.lanes="
                f"{self.data.lanes}, so that every world can share them out. "
                f"Choose {math.ceil(objective.num_negatives / self.data.lanes) * self.data.lanes}"
            )
        if getattr(objective, "mask_list", False) and not isinstance(self.model, SASRecConfig):
            raise ValueError("objective.mask_list is for a model of kind 'sasrec'. Leave it out")
        if isinstance(self.model, ItemEmbeddingConfig):
            return
        if getattr(objective, "drawn_for", "batch") != "batch":
            raise ValueError("objective.drawn_for: 'lane' is for a model of kind 'item_embedding'. Leave it out")
        if isinstance(objective, NCEConfig | SoftmaxConfig | HierarchicalSoftmaxConfig):
            raise ValueError(
                f"objective '{objective.kind}' learns pairs of a list, which a model of kind 'item_embedding' makes. "
                f"Choose that, or 'sampled_softmax'"
            )
        item_id = self.identity("item_id")
        if item_id is None:
            raise ValueError(
                f"objective '{objective.kind}' needs to know the item: give model.item_id the name of an 'id' feature"
            )
        item = self.features[item_id]
        if isinstance(item, IdFeature) and item.null == "empty":
            raise ValueError(
                f"features.{item_id}.null is 'empty', but objective '{objective.kind}' learns which item belongs to a row, "
                f"so each row needs one. Use 'error', with data.on_bad_row 'quarantine' to go on without such rows"
            )
        if isinstance(objective, CosineContrastiveConfig):
            self._check_cosine(self.model)
        if isinstance(objective, DrawsNegatives):
            self._check_catalogue(f"objective '{objective.kind}'")

    @staticmethod
    def _check_cosine(model: ModelConfig) -> None:
        if isinstance(model, TwoTowerConfig) and (model.similarity != "cosine" or model.biases):
            met = f"model.similarity is '{model.similarity}'" if model.similarity != "cosine" else "the model has biases"
            raise ValueError(
                f"objective 'cosine_contrastive' compares cosines with its margin, but {met}. "
                f"Set model.similarity to 'cosine' and leave model.biases out"
            )

    def _check_metrics(self) -> None:
        for name in self.evaluate.metrics:
            word, _, cut = name.partition("@")
            if not (
                name in ("mrr", LOSS, *POINTWISE_METRICS) or (word in CUT_METRICS and re.fullmatch("[1-9][0-9]{0,8}", cut))
            ):
                known = [*(f"{one}@{cut if cut.isdigit() else 20}" for one in CUT_METRICS), "mrr", *POINTWISE_METRICS]
                raise ValueError(f"evaluate.metrics: there is no metric '{name}'. {nearest(name, known)}")
        from_ranking = [name for name in self.evaluate.metrics if name not in (LOSS, *POINTWISE_METRICS)]
        pointwise = [name for name in self.evaluate.metrics if name in POINTWISE_METRICS]
        if LOSS in self.evaluate.metrics and not isinstance(self.model, ItemEmbeddingConfig):
            raise ValueError(
                f"evaluate.metrics: '{LOSS}' is the loss of pairs of lists, and only an item_embedding has them. Choose "
                f"metrics of ranks such as 'recall@20', or of labels such as 'log_loss'"
            )
        if self.evaluate.progressive and not pointwise:
            raise ValueError(
                f"evaluate.progressive compares each partition's labels with what is predicted before they are trained, and "
                f"evaluate.metrics has nothing that does. Add one of {', '.join(POINTWISE_METRICS)}"
            )
        if pointwise and len(self.data.label_columns) != 1 and not self.learns_several_labels:
            raise ValueError(f"evaluate.metrics: '{pointwise[0]}' needs one label. Give data.label the column of it")
        allowed = (
            _OF_CLASSES
            if isinstance(self.objective, CrossEntropyConfig)
            else POINTWISE_METRICS[:4]
            if isinstance(self.objective, PointwiseConfig) and self.objective.kind == "mse"
            else POINTWISE_METRICS
        )
        self._check_label_metrics(pointwise)
        for name in pointwise:
            if name not in allowed:
                raise ValueError(
                    f"evaluate.metrics: '{name}' does not go with objective '{self.objective.kind}'. Those that do: "
                    f"{', '.join(allowed)}"
                )
        if from_ranking and isinstance(self.model, RankingModel):
            raise ValueError(
                f"evaluate.metrics: '{from_ranking[0]}' ranks items by the product of two vectors, which a model of kind "
                f"'{self.model.kind}' has not. Choose among {', '.join(POINTWISE_METRICS)}"
            )
        if from_ranking:
            for role in ("user_id", "item_id"):
                if role == "user_id" and isinstance(self.model, SASRecConfig) and self.evaluate.candidates != "catalogue":
                    continue  # a row's list is all that tells whom it is of
                if self.identity(role) is None:
                    raise ValueError(
                        f"evaluate.metrics: '{from_ranking[0]}' ranks items for users, so model.{role} must name "
                        f"an 'id' feature"
                    )
            self._check_catalogue(f"metric '{from_ranking[0]}'")
        select, metrics, measured = self.evaluate.select, self.evaluate.metrics, self.measured()
        if select is not None and select not in measured:
            raise ValueError(f"evaluate.select: '{select}' is not among evaluate.metrics. {nearest(select, measured)}")
        if self.data.validation_fraction is not None and not metrics:
            raise ValueError(
                "data.validation_fraction holds training rows out, and nothing looks at them: give evaluate.metrics, or "
                "leave it out"
            )
        if self.train.early_stopping is not None:
            if not self.data.has_validation:
                raise ValueError(
                    "train.early_stopping looks at a validation set: give data.validation or data.validation_fraction"
                )
            if not metrics:
                raise ValueError("train.early_stopping looks at a metric: give evaluate.metrics")

    def _check_label_metrics(self, pointwise: Sequence[str]) -> None:
        """Checks what looks at scored rows beside the metrics of the whole set, and at training rows."""
        if "gauc" in pointwise and self.identity("user_id") is None:
            raise ValueError("evaluate.metrics: 'gauc' is a mean over users: give model.user_id the name of an 'id' feature")
        selected = self.evaluate.select or next(iter(self.evaluate.metrics), None)
        if self.data.has_validation and selected is not None and selected.partition(":")[0] == "calibration":
            raise ValueError(
                f"evaluate.select: '{selected}' is best at 1, so that neither more nor less of it is better. Give "
                "evaluate.select another of evaluate.metrics"
            )
        for option in ("bootstrap", "slice_by"):
            if getattr(self.evaluate, option) and not pointwise:
                raise ValueError(f"evaluate.{option} looks at labels: add a metric such as 'auc' to evaluate.metrics")
        if not self.train.metrics:
            return
        if isinstance(self.objective, CrossEntropyConfig):
            raise ValueError(
                f"train.metrics are of rows with one logit a label, and objective 'cross_entropy' gives a row "
                f"{self.objective.classes}, one a class. Leave them out, and have evaluate.metrics measure a validation set"
                + ("; or learn a label of 0 or 1 by 'bce'" if self.objective.classes == 2 else "")
            )
        if not isinstance(self.objective, PointwiseConfig):
            raise ValueError(
                f"train.metrics compare predictions with labels, and objective '{self.objective.kind}' predicts none: it "
                f"compares items. Leave them out, and have evaluate.metrics measure a validation set"
            )
        allowed = STREAMING_OF_NUMBERS if self.objective.kind == "mse" else STREAMING_METRICS
        for name in self.train.metrics:
            if name not in allowed:
                raise ValueError(
                    f"train.metrics: there is no '{name}' with objective '{self.objective.kind}'. Choose among "
                    f"{', '.join(allowed)}"
                )
        if "gauc" in self.train.metrics:
            self._check_streaming_groups()

    def _check_streaming_groups(self) -> None:
        """Checks that it is known whose rows training rows are, and that those of a window can be kept."""
        if self.identity("user_id") is None:
            raise ValueError("train.metrics: 'gauc' is a mean over users: give model.user_id the name of an 'id' feature")
        if self.train.window_rows > MOST_WINDOW_ROWS:
            raise ValueError(
                f"train.metrics: 'gauc' keeps the rows of train.log_every_steps={self.train.log_every_steps} steps of "
                f"{self.train.global_batch_size:,}, which are more than {MOST_WINDOW_ROWS:,}. Set train.log_every_steps to "
                f"{max(MOST_WINDOW_ROWS // self.train.global_batch_size, 1)} or less, or leave 'gauc' to evaluate.metrics"
            )

    def _check_baselines(self) -> None:
        metrics, chosen = self.evaluate.metrics, self.evaluate.baselines
        if chosen == "auto":
            return
        kinds = [baseline.kind for baseline in chosen]
        for baseline in chosen:
            name = f"evaluate.baselines: '{baseline.kind}'"
            if kinds.count(baseline.kind) > 1:
                raise ValueError(f"{name} is there twice. Keep one of them")
            predicts = isinstance(baseline, MeanBaseline | BiasBaseline)
            if predicts and isinstance(self.objective, CrossEntropyConfig):
                raise ValueError(
                    f"{name} predicts one number, and objective 'cross_entropy' has several classes. Leave it out"
                )
            if not any((metric in POINTWISE_METRICS) == predicts for metric in metrics):
                does = "predicts labels" if predicts else "ranks items"
                raise ValueError(
                    f"{name} {does}, and no metric of evaluate.metrics looks at that. Leave it out, or add a metric "
                    f"such as {'rmse' if predicts else 'recall@20'}"
                )
            if isinstance(baseline, BiasBaseline) and self._is_managed():
                raise ValueError(f"{name} learns a number for each row, and rows of a managed vocabulary change hands")
            needs_both = isinstance(baseline, BiasBaseline | EaseBaseline | ItemKnnBaseline)
            if needs_both and not self._knows_user_and_item():
                raise ValueError(f"{name} needs to know the user and the item: give model.user_id and model.item_id")

    def _is_managed(self) -> bool:
        tables = [self._table_of(self.identity(role)) for role in ("user_id", "item_id")]
        return any(isinstance(self.tables[table].vocabulary, ManagedVocabulary) for table in tables if table)

    def _knows_user_and_item(self) -> bool:
        return self.identity("user_id") is not None and self.identity("item_id") is not None

    def _check_managed(self) -> None:
        managed = {name for name, table in self.tables.items() if isinstance(table.vocabulary, ManagedVocabulary)}
        for name in sorted(managed):
            table, where = self.tables[name], f"tables.{name}.vocabulary: a managed one"
            assert isinstance(table.vocabulary, ManagedVocabulary), "chosen by it"
            buckets = self.num_buckets(name)
            if (table.known_rows or 0) < buckets:
                raise ValueError(
                    f"{where} shares its rows out among {buckets} buckets, and there are {table.known_rows}. Give it more "
                    f"rows, or set vocabulary.buckets lower"
                )
            if table.init_from is not None:
                raise ValueError(
                    f"{where} begins without ids, so there are no rows for the vectors of init_from. Leave it out"
                )
            if any(isinstance(feature, TextFeature) and feature.table == name for feature in self.features.values()):
                raise ValueError(f"{where} is for ids, and a text is looked up there. Choose 'words' or 'bpe'")
        if not managed:
            return
        if isinstance(self.model, ItemEmbeddingConfig):
            raise ValueError("model 'item_embedding' counts ids before it trains, and a managed vocabulary meets them as it "
                             "does. Choose another vocabulary, such as 'hash'")  # fmt: skip
        of = {role: self._table_of(self.identity(role)) for role in ("user_id", "item_id")}
        if isinstance(self.objective, DrawsNegatives) and of["item_id"] in managed:
            raise ValueError(
                f"objective '{self.objective.kind}' draws items by their rows, and those of table '{of['item_id']}' change "
                f"hands. Choose 'in_batch_softmax', whose negatives are the other rows' items, or another vocabulary"
            )
        ranks = next((name for name in self.evaluate.metrics if name not in (LOSS, *POINTWISE_METRICS)), None)
        both = managed & set(of.values())
        if ranks is not None and both:
            raise ValueError(
                f"evaluate.metrics: '{ranks}' ranks all items for users by their rows, and those of table "
                f"'{min(both)}' change hands. Choose metrics of labels, such as 'auc', or another vocabulary"
            )

    def _table_of(self, feature: str | None) -> str:
        return "" if feature is None else getattr(self.features[feature], "table", "")

    def _check_catalogue(self, who: str) -> None:
        described_by = self.item_features()
        if self.data.catalogue is None and described_by != [self.identity("item_id")]:
            raise ValueError(
                f"{who} needs items apart from interactions, and the item tower reads {', '.join(described_by)}. "
                f"Give data.catalogue a Parquet file with one row per item and these columns"
            )

    # ---------------------------------------------------------------------------------------- what others ask of it
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
            if self._knows_user_and_item() and not self._is_managed():
                found.append(BiasBaseline(kind="bias"))
        return found

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
