"""gensim's Word2Vec on the lists that `pipelines/words` trains on, and its vectors as Parquet for evaluate.py there.

It runs in an environment of its own (requirements.txt beside it):

    python -m venv /tmp/gensim && /tmp/gensim/bin/pip install -r tests/benchmarks/word2vec/requirements.txt
    /tmp/gensim/bin/python tests/benchmarks/word2vec/gensim_words.py data/words --out /tmp/gensim-1.parquet --seed 1

Sentences are lists of strings in memory before the clock starts; the vocabulary is counted before it, too.
"""

import argparse
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from gensim.models import Word2Vec


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/*.parquet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--hierarchical-softmax", action="store_true")
    arguments = parser.parse_args()
    lists = pq.read_table(arguments.data / "train")["words"].to_pylist()
    loss = {"hs": 1, "negative": 0} if arguments.hierarchical_softmax else {"hs": 0, "negative": 5}
    model = Word2Vec(
        vector_size=100, window=5, sample=1e-4, min_count=1, sg=1, workers=arguments.workers, seed=arguments.seed, **loss
    )
    model.build_vocab(lists)
    begin = time.perf_counter()
    model.train(lists, total_examples=model.corpus_count, epochs=arguments.epochs)
    seconds = time.perf_counter() - begin
    words = arguments.epochs * model.corpus_total_words
    print(f"{seconds:.0f} s, {words / seconds:,.0f} words/s, {arguments.workers} worker(s)")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(model.wv.vectors.ravel()), 100)
    pq.write_table(pa.table({"word": model.wv.index_to_key, "vector": vectors}), arguments.out)


if __name__ == "__main__":
    main()
