"""What the how-to promises of an extra, in an environment that has this one and no other.

The `extras` session runs it: ``python tests/scripts/extras.py plot``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "from-documents-to-a-classifier.md"
PACKAGES = {"plot": "matplotlib", **{name: name for name in ("peft", "tensorboard", "trackio")}}
# The block of the page that needs the extra, and the file that comes of it.
BLOCKS = {
    "plot": ("result.plot()", "curves.png"),
    "peft": ("import LoraConfig", "lora/adapter_model.safetensors"),
}


def main(extra: str) -> None:
    """Train as the page does, and look at what the extra is for."""
    found = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]
    assert found == [extra], f"installed for {found}"
    os.environ["TRACKIO_DIR"] = str(Path("trackio").resolve())  # read when it is imported

    from datasets import Dataset

    import mlmadapt
    from mlmadapt.testing import tiny_corpus, tiny_model, tiny_tokenizer

    names = {each: getattr(mlmadapt, each) for each in mlmadapt.__all__}
    tokenizer = tiny_tokenizer()
    tokens = mlmadapt.tokenize_with_word_ids({"text": tiny_corpus(60)}, tokenizer)
    rows = Dataset.from_dict(mlmadapt.group_texts(tokens, chunk_size=16, labels=False))
    collator = mlmadapt.WholeWordMaskingCollator(tokenizer, seed=42)
    result = mlmadapt.accelerate_train(
        tiny_model(tokenizer),
        rows,
        rows,
        tokenizer=tokenizer,
        data_collator=collator,
        config=mlmadapt.TrainingConfig(
            output_dir="adapted",
            max_steps=4,
            report_to=extra if extra not in BLOCKS else "none",
        ),
    )
    card = Path("adapted", "README.md").read_text(encoding="utf-8")
    assert ("curves.png" in card) == (extra == "plot")
    if extra == "tensorboard":
        events = Path("adapted").rglob("events.out.tfevents.*")
        assert any(b"eval_perplexity" in each.read_bytes() for each in events)
    elif extra == "trackio":
        import trackio

        (run,) = trackio.Api().runs("mlmadapt")
        command = ["trackio", "get", "run", "--project=mlmadapt", f"--run={run.name}", "--json"]
        assert b"eval_perplexity" in subprocess.run(command, capture_output=True, check=True).stdout
    else:
        marks, made = BLOCKS[extra]
        blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        (block,) = [each for each in blocks if marks in each]
        names |= {"result": result, "tokenizer": tokenizer, "rows": rows, "collator": collator}
        exec(block, {**names, "tiny_model": tiny_model})  # noqa: S102  # our own page
        assert Path(made).stat().st_size > 1_000


if __name__ == "__main__":
    main(sys.argv[1])
