"""What the authors report of their models on the nine tasks.

Zero-shot, in percent. They don't say which accuracy; it is taken for the length-normalised one where a task has it.
The repository's README has the rows of GPT-2 small and XL on FineWeb-Edu (of XL only what is here was at hand); the
paper's section 4.2 HellaSwag of large on OpenWebText.
"""

from collections.abc import Mapping

_NINE = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande", "mmlu", "sciq")


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_NINE, values, strict=True))


PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "GPT-2 small, OpenAI": _row(39.48, 22.70, 48.72, 31.14, 27.20, 62.51, 51.62, 22.92, 64.40),
    "GPT-2 small, AdamW, FineWeb-Edu 50B": _row(51.43, 26.54, 55.78, 36.26, 30.60, 64.53, 50.36, 24.49, 71.50),
    "GPT-2 small, MARS-AdamW, FineWeb-Edu 50B": _row(52.23, 27.39, 55.84, 36.91, 32.20, 64.80, 49.96, 22.95, 71.10),
    "GPT-2 large, AdamW, OpenWebText 50B": {"hellaswag": 42.31},
    "GPT-2 large, MARS-AdamW, OpenWebText 50B": {"hellaswag": 44.20},
    "GPT-2 XL, OpenAI": dict(zip(_NINE[:5], (51.05, 28.50, 61.77, 50.89, 32.00), strict=True)),
    "GPT-2 XL, MARS-AdamW, FineWeb-Edu 50B": {"hellaswag": 56.52},
}
