"""What tables, their vocabularies and the features that look them up must agree on."""

from __future__ import annotations

__all__ = ["check_compositions", "check_hashed_item", "check_managed", "check_tables", "check_texts"]

from typing import TYPE_CHECKING

from embedshard.config.parts import (
    DenseFeature,
    DoubleHashVocabulary,
    DrawsNegatives,
    IdFeature,
    ItemEmbeddingConfig,
    ManagedVocabulary,
    TextFeature,
    TokenizerVocabulary,
    WordNgramsVocabulary,
    WordsVocabulary,
)
from embedshard.errors import nearest

if TYPE_CHECKING:
    from embedshard.config.root import Config


def check_tables(config: Config) -> None:
    """Checks that features and tables name each other.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    for name, table in config.tables.items():
        if table.l2_lookup and config.is_sequence_table(name):
            raise ValueError(
                f"tables.{name}.l2_lookup is a penalty on pooled vectors, and a sequence looks the table up. Leave it out"
            )
    for name, feature in config.features.items():
        if not isinstance(feature, DenseFeature) and feature.table not in config.tables:
            raise ValueError(
                f"features.{name}.table: there is no table '{feature.table}'. {nearest(feature.table, config.tables)}"
            )
    used = {feature.table for feature in config.features.values() if not isinstance(feature, DenseFeature)}
    for name in config.tables:
        if name not in used:
            raise ValueError(f"tables.{name}: no feature looks it up. Remove it, or give a feature 'table: {name}'")


def check_texts(config: Config) -> None:
    """Checks that words are looked up by what has words.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    for name, table in config.tables.items():
        vocabulary = table.vocabulary
        if isinstance(vocabulary, WordNgramsVocabulary):
            if vocabulary.of not in config.tables:
                hint = nearest(vocabulary.of, config.tables)
                raise ValueError(f"tables.{name}.vocabulary.of: there is no table '{vocabulary.of}'. {hint}")
            if not isinstance(config.tables[vocabulary.of].vocabulary, TokenizerVocabulary):
                raise ValueError(
                    f"tables.{name}.vocabulary.of: table '{vocabulary.of}' has no tokenizer to divide texts by. "
                    f"Give it the vocabulary 'words' or 'bpe', or name a table that has one"
                )
    for name, feature in config.features.items():
        if isinstance(feature, DenseFeature):
            continue
        vocabulary = config.tables[feature.table].vocabulary
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
    for name, table in config.tables.items():
        vocabulary = table.vocabulary
        if isinstance(vocabulary, TokenizerVocabulary) and vocabulary.path is None and not config.texts(name):
            raise ValueError(
                f"tables.{name}.vocabulary: a tokenizer is made from texts, and no feature of kind 'text' looks this "
                f"table up. Give one, or a ready tokenizer (vocabulary.path)"
            )


def check_compositions(config: Config) -> None:
    """Checks that ids which become two rows are pooled: the sum of both is what there is of them.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    for name, feature in config.features.items():
        if isinstance(feature, DenseFeature) or config.tables[feature.table].composition is None:
            continue
        if config.is_sequence(name):
            raise ValueError(
                f"features.{name} is a sequence, a vector a place, but table '{feature.table}' has the vocabulary "
                f"'{config.tables[feature.table].vocabulary.kind}', whose ids are sums of two vectors. Make it a 'bag', "
                f"or give the table the vocabulary 'hash', 'file' or 'auto'"
            )


def check_hashed_item(config: Config) -> None:
    """Checks that items which are drawn or ranked can be listed: pairs of hashes are too many.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    item_id = config.identity("item_id")
    table = None if item_id is None else getattr(config.features[item_id], "table", None)
    if table is None or not isinstance(config.tables[table].vocabulary, DoubleHashVocabulary):
        return
    ranked = config.ranking_metrics()
    if isinstance(config.objective, DrawsNegatives) or ranked:
        who = f"metric '{ranked[0]}' ranks" if ranked else f"objective '{config.objective.kind}' draws"
        raise ValueError(
            f"tables.{table}.vocabulary is 'double_hash', and {who} items of feature '{item_id}': pairs of hashes "
            f"cannot be listed. Give the table the vocabulary 'quotient_remainder', 'hash', 'file' or 'auto', or choose "
            f"{'metrics of labels' if ranked else 'in_batch_softmax'}"
        )


def check_managed(config: Config) -> None:
    """Checks that nobody needs to know the rows of ids beforehand where they change hands.

    Raises:
        ValueError: saying what was met, what was needed and what to do.
    """
    managed = {name for name, table in config.tables.items() if isinstance(table.vocabulary, ManagedVocabulary)}
    for name in sorted(managed):
        table, where = config.tables[name], f"tables.{name}.vocabulary: a managed one"
        assert isinstance(table.vocabulary, ManagedVocabulary), "chosen by it"
        buckets = config.num_buckets(name)
        if (table.known_rows or 0) < buckets:
            raise ValueError(
                f"{where} shares its rows out among {buckets} buckets, and there are {table.known_rows}. Give it more "
                f"rows, or set vocabulary.buckets lower"
            )
        if table.init_from is not None:
            raise ValueError(f"{where} begins without ids, so there are no rows for the vectors of init_from. Leave it out")
        if any(isinstance(feature, TextFeature) and feature.table == name for feature in config.features.values()):
            raise ValueError(f"{where} is for ids, and a text is looked up there. Choose 'words' or 'bpe'")
    if not managed:
        return
    if isinstance(config.model, ItemEmbeddingConfig):
        raise ValueError("model 'item_embedding' counts ids before it trains, and a managed vocabulary meets them as it "
                         "does. Choose another vocabulary, such as 'hash'")  # fmt: skip
    of = {role: config.table_of(config.identity(role)) for role in ("user_id", "item_id")}
    if isinstance(config.objective, DrawsNegatives) and of["item_id"] in managed:
        raise ValueError(
            f"objective '{config.objective.kind}' draws items by their rows, and those of table '{of['item_id']}' change "
            f"hands. Choose 'in_batch_softmax', whose negatives are the other rows' items, or another vocabulary"
        )
    ranks = next(iter(config.ranking_metrics()), None)
    both = managed & set(of.values())
    if ranks is not None and both:
        raise ValueError(
            f"evaluate.metrics: '{ranks}' ranks all items for users by their rows, and those of table "
            f"'{min(both)}' change hands. Choose metrics of labels, such as 'auc', or another vocabulary"
        )
