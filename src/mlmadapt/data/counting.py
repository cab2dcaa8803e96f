"""How often each word stands in texts, as a tokenizer's own pre-tokenizer tells words.

What stands between spaces is counted first, and split afterwards: there is far less of it.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Distinct strings that are counted before they are split into words: some 20 MB.
_MOST_STRINGS = 1 << 17
_PART = 5_000  # documents that a process counts at a time


def count_pre_tokens(
    texts: Iterable[str], backend: "Backend", num_proc: int | None, *, name: str
) -> Counter[str]:
    """Count what the pre-tokenizer makes of the texts, in parts where processes share them."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} is {texts!r:.40}; it must be a list or column of documents")
    rows = enumerate(texts)
    if num_proc is None or num_proc == 1:
        return _count_rows(rows, backend, name)
    counts, waiting = Counter[str](), deque[Future[Counter[str]]]()
    with ProcessPoolExecutor(num_proc) as pool:
        for part in iter(lambda: [*islice(rows, _PART)], []):
            waiting.append(pool.submit(_count_rows, part, backend, name))
            if len(waiting) > 2 * num_proc:
                counts.update(waiting.popleft().result())
        for each in waiting:
            counts.update(each.result())
    return counts


def _count_rows(rows: Iterable[tuple[int, str]], backend: "Backend", name: str) -> Counter[str]:
    counts = Counter[str]()
    for before, strings in _count_strings(rows, name):
        by_count = defaultdict[int, list[str]](list)
        for string, count in strings.items():
            by_count[count].append(string)
        # Those that are as frequent are split in one call, which saves a quarter of the time.
        size = 32 if before else 1
        for count, some in by_count.items():
            for start in range(0, len(some), size):
                for each in pre_tokens(backend, before + " ".join(some[start : start + size])):
                    counts[each] += count
    return counts


def _count_strings(
    rows: Iterable[tuple[int, str]], name: str
) -> Iterator[tuple[str, Counter[str]]]:
    """Count what stands between spaces, which is split far fewer times than it occurs.

    The first string of a text has no space before it, which byte-level tokenizers tell apart.
    """
    firsts, others = Counter[str](), Counter[str]()
    for row, text in rows:
        if not isinstance(text, str):
            raise TypeError(
                f"document {row} of {name} is {text!r:.40}, of type {type(text).__name__}; each "
                "document must be a str"
            )
        first, *rest = text.split(" ")
        firsts[first] += 1
        others.update(rest)
        if len(firsts) + len(others) > _MOST_STRINGS:
            yield from (("", firsts), (" ", others))
            firsts, others = Counter(), Counter()
    yield from (("", firsts), (" ", others))


def pre_tokens(backend: "Backend", text: str) -> list[str]:
    """Return what the normalizer and the pre-tokenizer make of a text."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
