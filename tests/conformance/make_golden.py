"""`python -m tests.conformance.make_golden` writes golden.json anew from the reference."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.conformance.reference import FORMS, TAILS, reference_divergence, value_and_gradient

GOLDEN = Path(__file__).with_name("golden.json")

# The first teacher is peaked and its student is not, the second is flat and its student is not, the third is nearly
# its student's. The student's numbers are exact in float32, and no tail is so light that 1 - sum(top-k), taken in
# float32, would be far off.
TEACHER_LOGITS = [
    [0.5, 5.0, 1.5, 3.5, 2.0, 2.5],
    [0.25, 0.0, -0.125, 0.375, 0.125, -0.25],
    [2.0, -1.0, 0.5, 1.25, -2.0, 0.0],
]
STUDENT_LOGITS = [
    [1.5, 0.75, -0.5, 1.0, 2.0, -1.25],
    [-2.0, 5.0, 0.5, -3.5, 1.0, 2.0],
    [2.0625, -1.0, 0.4375, 1.25, -1.9375, 0.125],
]
UPSTREAM = [1.0, -2.0, 0.5]
TEMPERATURES = (0.5, 1.0, 2.0)
KS = (1, 3, 6)


def golden() -> dict[str, Any]:
    """Inputs by temperature and K, and the results of every form and tail on each."""
    batches, cases = [], []
    student, upstream = torch.tensor(STUDENT_LOGITS).double(), torch.tensor(UPSTREAM).double()
    for index, (temperature, k) in enumerate(itertools.product(TEMPERATURES, KS)):
        teacher = torch.log_softmax(torch.tensor(TEACHER_LOGITS).double() / temperature, -1)
        logprobs, ids = teacher.topk(k, -1)
        batches.append({"temperature": temperature, "topk_token_ids": ids.tolist(), "topk_logprobs": logprobs.tolist()})
        for form, tail in itertools.product(FORMS, TAILS):
            function = partial(
                reference_divergence,
                topk_token_ids=ids,
                topk_logprobs=logprobs,
                **form._asdict(),
                temperature=temperature,
                tail=tail,
            )
            value, gradient = value_and_gradient(function, student, upstream)
            cases.append(
                {
                    "batch": index,
                    **form._asdict(),
                    "tail": tail,
                    "value": value.tolist(),
                    "gradient": gradient.tolist(),
                }
            )
    return {"student_logits": STUDENT_LOGITS, "upstream": UPSTREAM, "batches": batches, "cases": cases}


def main() -> None:
    """One line for each batch and case; Python writes floats so that they read back as they were."""
    content = golden()
    lines = [f'"{name}": {json.dumps(content[name])}' for name in ("student_logits", "upstream")]
    lines += [
        f'"{name}": [\n' + ",\n".join(json.dumps(entry) for entry in content[name]) + "\n]"
        for name in ("batches", "cases")
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
