"""Tokenize and chunk a corpus that is too large for one machine: one shard in, one shard out.

    python examples/shards.py --tokenizer FOLDER_OR_NAME --output_dir rows corpus/*.parquet
    python examples/shards.py --tokenizer FOLDER_OR_NAME --output_dir rows corpus/*.parquet --ray

The unit of work is a file. `group_texts` joins documents, so its rows depend on where a batch is
cut: an engine that cuts where it likes gives other rows with each number of workers. A file always
gives the same file, whoever works on it and however often; what is there is not made again.
"""

from __future__ import annotations

from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from transformers import AutoTokenizer

from mlmadapt import group_texts, tokenize_with_word_ids


def main() -> None:
    """Prepare every shard, one after the other or on a Ray cluster."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards", nargs="+", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--chunk_size", default=128, type=int)
    parser.add_argument("--ray", action="store_true", help="on the cluster that ray.init finds")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    prepare = partial(
        prepare_shard,
        tokenizer=args.tokenizer,
        output_dir=args.output_dir.absolute(),
        chunk_size=args.chunk_size,
    )
    paths = [{"path": str(path.absolute())} for path in sorted(args.shards)]
    if args.ray:
        import ray  # noqa: PLC0415  # needed for this option alone

        made = ray.data.from_items(paths, override_num_blocks=len(paths)).map(prepare).take_all()
    else:
        made = list(map(prepare, paths))
    print(f"{sum(shard['rows'] for shard in made):,} rows in {len(made)} shards")


def prepare_shard(
    shard: dict[str, str], *, tokenizer: str, output_dir: Path, chunk_size: int
) -> dict[str, object]:
    """Make the rows of one file; a worker killed half-way leaves no half file."""
    source = Path(shard["path"])
    target = output_dir / source.name
    if not target.exists():
        documents = pq.read_table(source, columns=["text"])
        tokens = tokenize_with_word_ids(documents, AutoTokenizer.from_pretrained(tokenizer))
        rows = group_texts(tokens, chunk_size=chunk_size, labels=False)
        building = target.with_name(f".{target.name}.tmp")
        pq.write_table(rows, building)
        building.rename(target)
    return {"path": str(target), "rows": pq.read_metadata(target).num_rows}


if __name__ == "__main__":
    main()
