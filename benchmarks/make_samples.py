"""Choose the sample gallery: the first 20 photos of each class of `clothing10`'s training split, bytes unchanged.

    python benchmarks/make_samples.py --data ../shared/data

The split's row order is a fixed shuffle, so the first rows are a fair sample; one photo is left out by hand, the rest
is as it comes. Running this again gives the same rows in the same order, and with the same pyarrow the same bytes.
"""

import argparse
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PER_CLASS = 20
LEFT_OUT = {"train/hat/fae00db0-b571-4947-8a6a-ad7edb132a75.jpg"}  # a campaign slogan has no place in a sample
SAMPLES = Path(__file__).resolve().parent.parent / "serve" / "patchsight_serve" / "samples" / "clothing.parquet"


def choose(table: pa.Table, per_class: int) -> pa.Table:
    """The first `per_class` rows of every label, in the table's order. Raises ValueError where a class has fewer."""
    taken: dict[int, int] = {}
    rows = []
    for row, (image, label) in enumerate(zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True)):
        if image["path"] in LEFT_OUT:
            continue
        taken[label] = taken.get(label, 0) + 1
        if taken[label] <= per_class:
            rows.append(row)
    short = {label: count for label, count in taken.items() if count < per_class}
    if short:
        raise ValueError(f"these labels have fewer than {per_class} images: {short}")
    return table.take(rows)


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds clothing10/train.parquet")
    parser.add_argument("--out", type=Path, default=SAMPLES, help="default: the package's own samples")
    arguments = parser.parse_args(argv)
    table = choose(pq.read_table(arguments.data / "clothing10" / "train.parquet"), PER_CLASS)
    names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    # JPEG does not compress further, and a dictionary of unique blobs only doubles them.
    pq.write_table(table, arguments.out, compression="none", use_dictionary=["label"])
    print(f"{arguments.out}: {table.num_rows} images of {len(names)} classes, {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
