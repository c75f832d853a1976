"""Texts -> counts of their terms, block by block, with the tokens of scikit-learn's ``CountVectorizer``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from distclust.errors import DataError

if TYPE_CHECKING:
    from distclust.corpus.vocabulary import VocabularyConfig

_PATTERNS = {"words": r"(?u)\b\w\w+\b", "letters": r"(?u)[^\W\d_]{3,}"}
_SHORTEST = {"words": 2, "letters": 3}
# One block of text goes through 32-bit string offsets; larger ones are halved until they fit.
_BLOCK_BYTES = 256 << 20
_HEADER_LINE = re.compile(r"[A-Za-z][A-Za-z0-9-]*:(?:\s|$)")
_BLANK_LINE = re.compile(r"\r?\n[ \t]*\r?\n")
_SUBJECT = re.compile(r"^subject:[ \t]*(.*)$", re.IGNORECASE | re.MULTILINE)


class BlockCounts(NamedTuple):
    """The term counts of a block of documents, in a vocabulary of their own."""

    indptr: NDArray[np.int64]
    """(n + 1,) where each document's entries begin."""
    indices: NDArray[np.int32]
    """(nnz,) places in ``terms``, distinct within a document."""
    counts: NDArray[np.int32]
    """(nnz,) how often."""
    terms: list[str]
    """The block's terms, each once, in no particular order."""


def strip_headers(text: str) -> str:
    """Drop the head of a mail or news post, all but the text of its subject.

    A text whose first line does not look like ``Name: value`` is returned as it is.
    """
    if not _HEADER_LINE.match(text):
        return text
    parts = _BLANK_LINE.split(text, maxsplit=1)
    subject = _SUBJECT.search(parts[0])
    body = parts[1] if len(parts) == 2 else ""
    return f"{subject.group(1).strip()}\n{body}" if subject else body


def count_block(texts: pa.Array | Sequence[str | None], config: VocabularyConfig) -> BlockCounts:
    """Count the terms of each text.

    Args:
        texts: (n,) strings; null counts as the empty text.
        config: tokens, lower case, stop words, n-grams and header stripping are taken from it.
    """
    array = _as_strings(texts)
    if array.nbytes > _BLOCK_BYTES and len(array) > 1:
        half = len(array) // 2
        return _joined(count_block(array[:half], config), count_block(array[half:], config))
    if config.strip_headers:
        array = _as_strings([strip_headers(text) for text in array.to_pylist()])
    return _count_words(array, config) if config.ngram_range == (1, 1) else _count_ngrams(array, config)


def _as_strings(texts: pa.Array | Sequence[str | None]) -> pa.Array:
    if not isinstance(texts, (pa.Array, pa.ChunkedArray)):
        if isinstance(texts, str):
            raise DataError("One string was given; expected a list of texts; wrap it as [text].")
        items = ["" if text is None else text for text in texts]
        try:
            texts = pa.array(items, pa.string())
        except (
            UnicodeEncodeError
        ):  # a lone surrogate: not a letter, so it separates words as any other sign does
            texts = pa.array([item.encode("utf-8", "replace").decode() for item in items], pa.string())
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    if texts.type != pa.string():
        texts = texts.cast(pa.string())
    return texts.fill_null("") if texts.null_count else texts


def _joined(first: BlockCounts, second: BlockCounts) -> BlockCounts:
    known = {term: i for i, term in enumerate(first.terms)}
    mapping = np.array([known.setdefault(term, len(known)) for term in second.terms], dtype=np.int32)
    return BlockCounts(
        np.concatenate([first.indptr, second.indptr[1:] + first.indptr[-1]]),
        np.concatenate([first.indices, mapping[second.indices]]),
        np.concatenate([first.counts, second.counts]),
        list(known),
    )


@functools.lru_cache(maxsize=8)
def analyzer(config: VocabularyConfig) -> Callable[[str], list[str]]:
    """scikit-learn's own function from a text to its terms; it does not strip headers."""
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(
        lowercase=config.lowercase,
        stop_words=config.stop_words,
        ngram_range=config.ngram_range,
        token_pattern=_PATTERNS[config.tokens],
    ).build_analyzer()


@functools.lru_cache(maxsize=8)
def _byte_table(lowercase: bool, tokens: str) -> bytes:
    """What each byte becomes: ASCII outside words a blank, capitals small; bytes of other alphabets stay."""
    table = bytearray(range(256))
    for code in range(128):
        char = chr(code)
        inside = char.isalpha() or (tokens == "words" and (char.isdigit() or char == "_"))
        table[code] = ord(char.lower() if lowercase else char) if inside else ord(" ")
    return bytes(table)


@functools.lru_cache(maxsize=2)
def _stop_words(name: str | None) -> frozenset[str]:
    if name is None:
        return frozenset()
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


def _count_words(array: pa.Array, config: VocabularyConfig) -> BlockCounts:
    """Single words: the same tokens as `analyzer` gives, without a Python object for each (about five times
    faster).

    scikit-learn's pattern matches whole runs of word characters, so blanks may be put in place of all other
    ASCII characters, in one sweep over the bytes, and the text split at them. Texts beyond ASCII go through
    the pattern.
    """
    beyond = pc.invert(pc.string_is_ascii(array))
    if pc.any(beyond).as_py():
        find = re.compile(_PATTERNS[config.tokens]).findall
        texts = (text.lower() if config.lowercase else text for text in array.filter(beyond).to_pylist())
        array = pc.replace_with_mask(
            array, beyond, pa.array([" ".join(find(text)) for text in texts], pa.string())
        )
    n = len(array)
    if n == 0:
        return BlockCounts(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32), [])
    _, offset_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[array.offset : array.offset + n + 1]
    data = bytes(memoryview(data_buffer)[offsets[0] : offsets[-1]]) if data_buffer else b""
    data = data.translate(_byte_table(config.lowercase, config.tokens))
    array = pa.StringArray.from_buffers(n, pa.py_buffer((offsets - offsets[0]).tobytes()), pa.py_buffer(data))
    pieces = pc.ascii_split_whitespace(array)
    lengths = np.diff(pieces.offsets.to_numpy())
    stop, shortest = _stop_words(config.stop_words), _SHORTEST[config.tokens]
    return _count_tokens(pieces.flatten(), lengths, lambda term: len(term) >= shortest and term not in stop)


def _count_ngrams(array: pa.Array, config: VocabularyConfig) -> BlockCounts:
    analyze = analyzer(config)
    lists = [analyze(text) for text in array.to_pylist()]
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    flat = pa.array([term for terms in lists for term in terms], pa.string())
    return _count_tokens(flat, lengths, None)


def _count_tokens(flat: pa.Array, lengths: NDArray[Any], keep: Callable[[str], bool] | None) -> BlockCounts:
    """Tokens of all documents one after another -> counts; ``keep`` is asked once for each distinct token."""
    encoded = flat.dictionary_encode()
    terms: list[str] = encoded.dictionary.to_pylist()
    n, width = len(lengths), max(len(terms), 1)
    # (document, token) as one number, as narrow as will hold it: sorting these is what takes the time
    kind: Any = np.uint32 if n * width < 2**32 else np.uint64
    keys = np.repeat(np.arange(n, dtype=kind) * kind(width), lengths)
    keys += encoded.indices.to_numpy(zero_copy_only=False).astype(kind)
    keys.sort()
    first = np.flatnonzero(np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]]))
    counts = np.diff(np.append(first, len(keys))).astype(np.int32)
    rows, indices = np.divmod(keys[first], kind(width))
    if keep is not None:
        wanted = np.fromiter(map(keep, terms), bool, len(terms))
        kept = wanted[indices]
        rows, indices, counts = rows[kept], indices[kept], counts[kept]
        indices = (np.cumsum(wanted) - 1)[indices]
        terms = [term for term, good in zip(terms, wanted, strict=True) if good]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows.astype(np.int64), minlength=n))]).astype(
        np.int64
    )
    return BlockCounts(indptr, indices.astype(np.int32), counts, terms)


def remap(
    indptr: NDArray[Any], indices: NDArray[Any], counts: NDArray[Any], mapping: NDArray[Any], n_features: int
) -> sparse.csr_matrix:
    """Counts (n, n_features) with the columns ``mapping[indices]``, sorted; entries mapped to -1 are
    dropped."""
    columns = mapping[indices] if len(indices) else np.zeros(0, np.int32)
    kept = columns >= 0
    before = np.concatenate([[0], np.cumsum(kept)])
    matrix = sparse.csr_matrix(
        (counts[kept], columns[kept].astype(np.int32), before[indptr].astype(np.int64)),
        shape=(len(indptr) - 1, n_features),
    )
    matrix.sort_indices()
    return matrix
