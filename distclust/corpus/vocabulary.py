"""Texts -> rows of TF-IDF, by scikit-learn's rules.

Everything the served model needs to turn new documents into rows is here, and nothing of Ray. Tokens, the
choice of words, idf and values equal those of ``sklearn.feature_extraction.text.TfidfVectorizer`` with the
same options; beyond it there are letters-only tokens, mail headers dropped, words ranked by summed TF-IDF
and the row scale.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from distclust.corpus.counting import count_block, remap
from distclust.errors import ConfigError, DataError

VOCABULARY_FILE = "vocabulary.json"
_VERSION = 1
# Summed TF-IDF is added up in multiples of this, as whole numbers: then the sum, and with it the choice of
# words, does not depend on how the documents were cut into parts.
_SCORE_UNIT = 2.0**-30


def _refuse(field: str, found: object, expected: str, remedy: str) -> ConfigError:
    return ConfigError(f"vocabulary.{field} is {found!r}; expected {expected}; {remedy}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyConfig:
    """How texts become rows; the defaults are 2,000 words by count, l2 rows times sqrt(2000)."""

    max_features: int | None = 2000
    """How many words to keep at most; ``None`` keeps all that pass ``min_df`` and ``max_df``."""
    rank_by: Literal["count", "tfidf"] = "count"
    """What ``max_features`` ranks words by: their count (scikit-learn's rule) or their summed TF-IDF."""
    min_df: int | float = 1
    """Words in fewer documents are dropped: a number of documents (int) or a share of them (float)."""
    max_df: int | float = 1.0
    """Words in more documents are dropped: a number of documents (int) or a share of them (float)."""
    sublinear_tf: bool = False
    """Use 1 + ln(count) in place of the count."""
    stop_words: Literal["english"] | None = None
    """scikit-learn's list of English function words, or none."""
    ngram_range: tuple[int, int] = (1, 1)
    """Shortest and longest run of words that makes a term."""
    lowercase: bool = True
    """Lower the case before anything else."""
    tokens: Literal["words", "letters"] = "words"
    """``words``: runs of 2 or more letters, digits or underscores; ``letters``: runs of 3 or more letters."""
    norm: Literal["l2", "l1"] | None = "l2"
    """What each row is divided by; ``None`` leaves it."""
    scale: float = math.sqrt(2000)
    """A plain number that each row is multiplied with at the end. It sets the temperature of the energies;
    the default stays the same whatever the size of the vocabulary."""
    strip_headers: bool = False
    """Drop the head of mails and news posts, all but the text of the subject."""

    def __post_init__(self) -> None:
        if self.max_features is not None and self.max_features < 1:
            raise _refuse(
                "max_features", self.max_features, "1 or more, or null", "set null to keep all words"
            )
        for name in ("min_df", "max_df"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if (whole and value < 1) or (isinstance(value, float) and not 0.0 <= value <= 1.0):
                expected = "a whole number of documents from 1 on, or a share from 0.0 to 1.0"
                raise _refuse(name, value, expected, "write 1.0 for all documents, 1 for one document")
        low, high = self.ngram_range
        if not 1 <= low <= high:
            raise _refuse(
                "ngram_range", self.ngram_range, "1 <= shortest <= longest", "use (1, 1) for single words"
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise _refuse("scale", self.scale, "a finite number above 0", "use 1.0 to leave rows as they are")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                listed = ", ".join("null" if k is None else k for k in known)
                raise _refuse(name, getattr(self, name), f"one of {listed}", "choose one of them")


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "rank_by": ("count", "tfidf"),
    "stop_words": ("english", None),
    "tokens": ("words", "letters"),
    "norm": ("l2", "l1", None),
}


def idf_of(df: NDArray[Any], n_documents: int) -> NDArray[np.float64]:
    """ln((1 + n) / (1 + df)) + 1, as scikit-learn smooths it; df and result (V,)."""
    return np.log((n_documents + 1) / (np.asarray(df, np.float64) + 1.0)) + 1.0


def weigh_values(
    counts: sparse.csr_matrix, idf: NDArray[np.float64], config: VocabularyConfig
) -> NDArray[np.float64]:
    """TF-IDF values of the stored entries of counts (n, V), before the row scale, in float64; shape (nnz,).

    A row's sum runs over its entries in column order, so that it depends on nothing but the row.
    """
    values = counts.data.astype(np.float64)
    if config.sublinear_tf:
        np.log(values, out=values)
        values += 1.0
    values *= idf[counts.indices]
    if config.norm is None:
        return values
    squares = values * values if config.norm == "l2" else np.abs(values)
    sums = sparse.csr_matrix((squares, counts.indices, counts.indptr), shape=counts.shape) @ np.ones(
        counts.shape[1]
    )
    norms = np.sqrt(sums) if config.norm == "l2" else sums
    norms[norms == 0] = 1.0
    return values / np.repeat(norms, np.diff(counts.indptr))


def tfidf_scores(
    counts: sparse.csr_matrix, idf: NDArray[np.float64], config: VocabularyConfig
) -> NDArray[np.int64]:
    """Each column's summed TF-IDF over these rows as whole numbers of 2**-30, to be added up over parts;
    (V,)."""
    whole = np.rint(weigh_values(counts, idf, config) / _SCORE_UNIT)
    # bincount adds in float64, which is exact here: whole numbers whose sum stays below 2**53
    return np.bincount(counts.indices, weights=whole, minlength=counts.shape[1]).astype(np.int64)


def passing_df(config: VocabularyConfig, df: NDArray[Any], n_documents: int) -> NDArray[np.bool_]:
    """Which terms pass ``min_df`` and ``max_df``, by scikit-learn's arithmetic; (V,).

    Raises:
        DataError: the two contradict each other for this many documents, or no term passes.
    """
    low = config.min_df if isinstance(config.min_df, int) else config.min_df * n_documents
    high = config.max_df if isinstance(config.max_df, int) else config.max_df * n_documents
    if high < low:
        raise DataError(
            f"No word can pass: of {n_documents} documents, max_df={config.max_df} allows words in at most "
            f"{high:g} and min_df={config.min_df} asks for at least {low:g}; expected max_df above min_df; "
            "raise vocabulary.max_df or lower vocabulary.min_df."
        )
    mask = (df <= high) & (df >= low) & (df > 0)
    if not mask.any():
        found = (
            f"{len(df)} distinct terms, none of them in {low:g} to {high:g} of"
            if len(df)
            else "no term at all in"
        )
        raise DataError(
            f"The vocabulary is empty: found {found} the {n_documents} documents (min_df={config.min_df}, "
            f"max_df={config.max_df}, stop_words={config.stop_words}, tokens={config.tokens}); expected at "
            "least one term; lower vocabulary.min_df, raise vocabulary.max_df, or check that the text "
            "column is the right one."
        )
    return mask


def choose_columns(
    config: VocabularyConfig, mask: NDArray[np.bool_], ranks: NDArray[Any]
) -> NDArray[np.int64]:
    """The columns to keep, ascending.

    Args:
        config: ``max_features`` and ``rank_by`` are taken from it.
        mask: (V,) what `passing_df` gave, terms in sorted order.
        ranks: (V,) term counts, or summed TF-IDF where ``rank_by`` says so.
    """
    passing = np.flatnonzero(mask)
    if config.max_features is None or len(passing) <= config.max_features:
        return passing
    if config.rank_by == "count":
        # The very call of scikit-learn on the very array (float64, sorted terms): its sort is not stable, and
        # ties must fall as they do there.
        order = (-ranks[mask].astype(np.float64)).argsort()
    else:
        order = np.argsort(-ranks[mask], kind="stable")
    return np.sort(passing[order[: config.max_features]])


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The terms of a corpus in column order, with what is needed to weigh them. Compare by `fingerprint`."""

    terms: tuple[str, ...]
    """The columns' names; for input that came as counts, the column numbers of the input as text."""
    df: NDArray[np.int64]
    """(V,) in how many documents each occurs."""
    idf: NDArray[np.float64]
    """(V,) the weight of each."""
    n_documents: int
    """Of how many documents."""
    config: VocabularyConfig
    """The options it was made with."""
    of: Literal["words", "columns"] = "words"
    """What ``terms`` are: words of texts, or column numbers of given counts."""

    @property
    def n_features(self) -> int:
        """Number of columns V."""
        return len(self.terms)

    @property
    def fingerprint(self) -> str:
        """sha256 over options, terms and weights: equal for vocabularies that give equal rows."""
        return hashlib.sha256(
            json.dumps(self._content(), sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "of": self.of,
            "n_documents": self.n_documents,
            "options": json.loads(json.dumps(asdict(self.config))),
            "terms": list(self.terms),
            "df": self.df.tolist(),
            "idf": self.idf.tolist(),
        }

    def count(self, texts: pa.Array | Sequence[str | None]) -> sparse.csr_matrix:
        """Counts of the vocabulary's terms in each text: CSR (n, V) int32, columns sorted; other words are
        ignored."""
        if self.of != "words":
            raise DataError(
                "This vocabulary numbers the columns of given counts and has no words; expected a "
                "vocabulary made from texts; give `weigh` a matrix of counts instead."
            )
        block = count_block(texts, self.config)
        return remap(*block[:3], self.places(block.terms), self.n_features)

    def places(self, terms: Iterable[str] | pa.Array | pa.ChunkedArray) -> NDArray[np.int32]:
        """The column of each term, -1 where the vocabulary has it not; (len(terms),)."""
        if not isinstance(terms, (pa.Array, pa.ChunkedArray)):
            terms = pa.array(terms, pa.large_string())
        found = pc.index_in(terms, value_set=pa.array(self.terms, terms.type))
        return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)

    def weigh(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Counts (n, V) -> rows as the model sees them: CSR (n, V) float32, sorted, row scale included.

        Raises:
            DataError: the matrix has another number of columns.
        """
        if counts.shape[1] != self.n_features:
            raise DataError(
                f"The counts have {counts.shape[1]} columns; expected {self.n_features}, one for each term "
                "of the vocabulary; count with the same vocabulary."
            )
        counts = sparse.csr_matrix(counts)
        if not counts.data.all():  # stored zeros are no counts, and 1 + ln(0) is no weight
            counts = counts.copy()
            counts.eliminate_zeros()
        if not counts.has_sorted_indices:
            counts = counts.sorted_indices()
        values = weigh_values(counts, self.idf, self.config) * self.config.scale
        return sparse.csr_matrix(
            (values.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape
        )

    def transform(self, texts: pa.Array | Sequence[str | None]) -> sparse.csr_matrix:
        """Texts (n,) -> rows: CSR (n, V) float32 with sorted indices. Null and empty texts give all-zero
        rows."""
        return self.weigh(self.count(texts))

    def save(self, path: str | Path) -> None:
        """Write readable JSON, one key a line, through a temporary file beside it."""
        content = self._content() | {"fingerprint": self.fingerprint}
        lines = (
            f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()
        )
        path = Path(path)
        partial = path.with_name(path.name + ".part")
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what `save` wrote; a folder stands for the ``vocabulary.json`` in it.

        Raises:
            DataError: no such file, not a vocabulary, or changed since it was written.
        """
        path = Path(path)
        if path.is_dir():
            path = path / VOCABULARY_FILE
        advice = "prepare the corpus again, or give the vocabulary.json of a prepared corpus"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            options = content["options"]
            unknown = set(options) - {field.name for field in fields(VocabularyConfig)}
            if content["version"] != _VERSION or unknown:
                raise DataError(
                    f"{path} is of another version of distclust (found version {content['version']}"
                    f"{', options ' + str(sorted(unknown)) if unknown else ''}; expected {_VERSION}); "
                    f"{advice}."
                )
            vocabulary = cls(
                terms=tuple(content["terms"]),
                df=np.array(content["df"], np.int64),
                idf=np.array(content["idf"], np.float64),
                n_documents=content["n_documents"],
                config=VocabularyConfig(**{**options, "ngram_range": tuple(options["ngram_range"])}),
                of=content["of"],
            )
            saved = content["fingerprint"]
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; expected a vocabulary; {advice}.") from None
        except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as a vocabulary ({error!r}); {advice}.") from error
        if vocabulary.fingerprint != saved or not len(vocabulary.terms) == len(vocabulary.df) == len(
            vocabulary.idf
        ):
            raise DataError(f"{path} was changed after it was written (its fingerprint differs); {advice}.")
        return vocabulary
