"""`verifier.json`: what the weights beside it are. Written by training, read by whoever runs the verifier. No torch.

A verifier folder of ours:
    model/                a Hugging Face folder (whole, or a LoRA adapter): a causal language model for the generative
                          read-out, a token classifier with one label for the scalar one; tokenizer files
    readout.safetensors   generative: the weights of the read-out
    verifier.json         this
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from search.errors import ModelError
from search.types import Aggregation

CARD = "verifier.json"
READOUT = "readout.safetensors"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Card:
    """Example: Card("prm", "generative", "prod", "\\n", policy="9f86d081884c7d65")"""

    kind: Literal["prm", "orm"]
    readout: Literal["generative", "scalar"]
    aggregation: Aggregation  # chosen on validation
    delimiter: str  # the step delimiter it was trained with
    policy: str  # fingerprint of the policy whose answers it was trained on
    history: bool = False  # reads the attempts before an answer
    scale: float = 1.0  # calibration on validation: score = sigmoid(scale * logit + shift)
    shift: float = 0.0
    base: str | None = None  # the full model under an adapter

    def save(self, folder: Path) -> None:
        row = {"version": VERSION, **asdict(self)}
        (folder / CARD).write_text(json.dumps(row, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Card:
        """Raises ModelError where there is none that this version reads."""
        try:
            row = json.loads((folder / CARD).read_text(encoding="utf-8"))
            if row.pop("version") != VERSION:
                raise ValueError(f"its version is not {VERSION}")
            return cls(**row)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{folder / CARD} does not describe a verifier: {error}") from error
