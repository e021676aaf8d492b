"""Fits the head of the embedded reward model, and measures it against VADER's lexicon.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    OMP_NUM_THREADS=1 python experiments/reward_model/fit.py vaderSentiment-3.3.2.tar.gz

Takes about 4 minutes on one core; needs scikit-learn besides the project's own dependencies. The
human-rated sentences (Hutto & Gilbert, ICWSM 2014; MIT licence) are read from the source distribution
in memory, and only the fitted head is written: xpo/data/assets/reward_head/head.safetensors, 385 floats. The
figures printed are those of the data card, xpo/data/assets/reward_head/README.md.
"""

import argparse
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

from xpo.rewards.embedded import HEAD, MiniLM
from xpo.rewards.vader import VaderReward

ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SOURCES = {
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
}
# Strengths of the L2 penalty; each fit chooses among them by leave-one-out error.
PENALTIES = np.logspace(-2, 2, 17)
FOLDS = 5

Vector = NDArray[np.float64]


class Sentence(NamedTuple):
    source: str  # a key of SOURCES
    document: str  # the review, article, snippet or tweet that it comes from
    rating: float  # mean of at least 20 human ratings, -4 (very negative) to 4 (very positive)
    text: str


def read_sentences(sdist: Path) -> list[Sentence]:
    """All rated sentences in the source distribution of vaderSentiment; nothing is unpacked to disk."""
    sentences = []
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(ARCHIVE)) as inner:
        for source, name in SOURCES.items():
            member = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert member is not None
            for line in member.read().decode().splitlines():
                # The id is "document_sentence" where documents have several sentences, else "document".
                identifier, rating, text = line.split("\t")
                document = f"{source}/{identifier.split('_')[0]}"
                sentences.append(Sentence(source, document, float(rating), text))
    return sentences


def correlation(predicted: Vector, rating: Vector) -> float:
    """Pearson's r."""
    return float(np.corrcoef(predicted, rating)[0, 1])


def pair_accuracy(predicted: Vector, rating: Vector) -> float:
    """Share of the pairs with unequal ratings that `predicted` orders alike; its ties count one half."""
    better = rating[:, None] > rating[None, :]
    difference = (predicted[:, None] - predicted[None, :])[better]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sdist", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    sentences = read_sentences(parser.parse_args().sdist)
    texts = [sentence.text for sentence in sentences]
    sources = np.array([sentence.source for sentence in sentences])
    documents = np.array([sentence.document for sentence in sentences])
    rating = np.array([sentence.rating for sentence in sentences])
    print(f"{len(sentences)} sentences of {len(set(documents))} documents")

    vader = VaderReward().scores([""] * len(texts), texts).double().numpy()
    embeddings = MiniLM().embed(texts).double().numpy()  # (sentences, 384)

    # No document is split between the fit and the held-out fold. Means over the folds, +- their spread.
    head = np.empty_like(rating)
    folds = []
    splitter = GroupKFold(FOLDS, shuffle=True, random_state=0)
    for fitted, held_out in splitter.split(embeddings, groups=documents):
        ridge = RidgeCV(PENALTIES).fit(embeddings[fitted], rating[fitted])
        head[held_out] = ridge.predict(embeddings[held_out])
        folds.append(held_out)
    print(f"held out, {FOLDS} folds | r | pair accuracy")
    for name, predicted in {"head": head, "VADER": vader}.items():
        r = [correlation(predicted[fold], rating[fold]) for fold in folds]
        pairs = [pair_accuracy(predicted[fold], rating[fold]) for fold in folds]
        print(f"{name} | {np.mean(r):.3f} +- {np.std(r):.3f} | {np.mean(pairs):.3f} +- {np.std(pairs):.3f}")
    print("source | sentences | r of head | r of VADER")
    for source in SOURCES:
        rows = sources == source
        r_head, r_vader = (correlation(predicted[rows], rating[rows]) for predicted in (head, vader))
        print(f"{source} | {rows.sum()} | {r_head:.3f} | {r_vader:.3f}")

    ridge = RidgeCV(PENALTIES).fit(embeddings, rating)
    weight = torch.tensor(ridge.coef_, dtype=torch.float32)  # (384,)
    bias = torch.tensor(ridge.intercept_, dtype=torch.float32)  # ()
    HEAD.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight, "bias": bias}, HEAD)
    print(f"penalty {ridge.alpha_:.3g}; wrote {HEAD}")


if __name__ == "__main__":
    main()
