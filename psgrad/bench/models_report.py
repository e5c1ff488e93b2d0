"""The page of the models table, from the record that `recipes.models_table` keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from psgrad.bench.report import require_extra

__all__ = ["page"]

INTRODUCTION = """\
# Models

Every classification model that torchvision lists, without weights from elsewhere, with ten classes and its
auxiliary heads. For psgrad, each BatchNorm is replaced by what Opacus's `ModuleValidator.fix` makes of it,
and nothing else is touched: in-place activations and residuals, layer scale, position embeddings and
relative position tables are as torchvision writes them. Opacus gets its `ModuleValidator.fix` of the whole
model, which replaces attention layers as well, and once more with every `inplace` flag cleared.

Compared is each parameter's gradient for each sample, in float64, with one ordinary backward pass per sample:
*right* is an error of at most 1e-8 of the parameter's own gradients. Dropout and stochastic depth are in
eval mode for the comparison, all else is in training mode. *How* says which modules psgrad runs one sample
at a time under `torch.func`; all others go by rule. *Not compared* are the largest, for want of memory; a
clipped training step, with everything random on, is run on every one of the models by the slow tests
(`tests/models`).

Not in the table: 19 small transformers of Hugging Face (BERT, GPT-2, LLaMA, T5, Whisper, DETR, ..), 21 models
of timm, ten networks of MONAI and nine of segmentation-models-pytorch for segmentation, three of diffusers,
and five of torchvision for segmentation and videos are compared the same way in
`tests/models/test_other_libraries.py`, with the extra `zoo`.
GPT-2's layers (`Conv1D`) have a rule of their own, and a position table that is looked up once for the
whole batch makes no module run one sample at a time. Nor do timm's networks with weight standardisation
(`nf_resnet26`, `resnetv2_50x1_bit`: layers derived from `nn.Conv2d` that compute their weight anew in
every forward). Where a weight is computed row by row (standardised, normed, centred, scaled, with a gain
or without), norms are told without any sample's gradient: three random probes find out, in every pass,
how gradients arrive at the parameters (`psgrad/capture/row_probes.py`). Of others (masks, low rank) every
sample's gradient is written out, a few samples at a time.
"""


def page(record: Mapping[str, Any]) -> str:
    """Markdown: what was compared and how, a summary, a row a model.

    Parameters
    ----------
    record
        "about": facts by name. "models": by name "parameters", "fallbacks" (type of module to count) and
        "outcomes" (contender to the fields of an `Outcome`).

    """
    require_extra()
    from tabulate import tabulate

    models = record["models"]
    notes: dict[str, int] = {}
    contenders = list(dict.fromkeys(c for row in models.values() for c in row["outcomes"]))
    lines = [
        [
            name,
            f"{row['parameters'] / 1e6:.1f}",
            _how(row.get("fallbacks", {})),
            *(_cell(row["outcomes"].get(contender), notes) for contender in contenders),
        ]
        for name, row in sorted(models.items())
    ]
    table = tabulate(
        lines, headers=["model", "M parameters", "how", *contenders], tablefmt="github", disable_numparse=True
    )
    facts = "\n".join(f"- {key}: {value}" for key, value in record["about"].items())
    summary = "\n".join(f"- {contender}: {_sum(models, contender)}" for contender in contenders)
    raised = "\n".join(f"{number}. `{note}`" for note, number in notes.items())
    again = "`python -m recipes.models_table` makes this page; errors are in full in `results/models.json`."
    parts = [INTRODUCTION.rstrip(), summary, table, "What was raised:", raised, again, facts]
    return "\n\n".join(parts if notes else parts[:3] + parts[5:]) + "\n"


def _how(fallbacks: Mapping[str, int]) -> str:
    if not fallbacks:
        return "rules"
    return "rules; torch.func: " + ", ".join(f"{count} {kind}" for kind, count in sorted(fallbacks.items()))


def _cell(outcome: Mapping[str, Any] | None, notes: dict[str, int]) -> str:
    """One cell; the first line of what was raised becomes a numbered note."""
    if outcome is None:
        return "not compared"
    if outcome["verdict"] == "right":
        return "right"
    if outcome["verdict"] == "wrong":
        percent = 100 * outcome["error"]
        parameters = "1 parameter" if outcome["wrong"] == 1 else f"{outcome['wrong']} parameters"
        return f"**wrong by {percent:.{0 if percent >= 1 else 6}f} %** ({parameters})"
    first = outcome["reason"].strip().splitlines()[0].replace("`", "'")
    first = first if len(first) <= 200 else first[:197] + "..."
    return f"raises ({notes.setdefault(first, len(notes) + 1)})"


def _sum(models: Mapping[str, Any], contender: str) -> str:
    verdicts = Counter(
        row["outcomes"][contender]["verdict"] for row in models.values() if contender in row["outcomes"]
    )
    parts = [
        f"{verdicts[verdict]} {verdict}" for verdict in ("right", "wrong", "raises") if verdicts[verdict]
    ]
    return f"{', '.join(parts)}, of {verdicts.total()} compared"
