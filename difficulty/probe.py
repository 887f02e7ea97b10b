"""Predict the policy's pass rate on a question from its own hidden states at the prompt, before it answers.

A linear probe (ridge on the pass rate, then Platt scaling), as in "LLMs Encode Their Failures" (arXiv 2602.09924) and
"On Calibration of LLMs: From Response To Capability". Layer, pooling and penalty are chosen by cross-validation over
the problems of the fit split alone. Two baselines go through the same protocol: a constant, and the question's length.
A probe that cannot be trusted says so (`usable`, `why`), and callers then treat all questions alike.

Axis legend: _P problems, _L layers, _H hidden size; states are float32 [P, L, 2, H], the 2 being (last token, mean).
Left out: non-linear probes (no better in the second paper) and any feature made by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from difficulty.calibration import CurvePoint, Floats, Ints, Platt, Scores, curve, score
from difficulty.labels import empirical_prior
from difficulty.ridge import Linear, fit_best
from search import stats
from search.errors import DataError, ModelError
from search.randomness import key64
from search.types import DifficultyEstimate, Problem

States = NDArray[np.float32]
POOLINGS = ("last", "mean")
MIN_PROBLEMS = 50
MAX_ALL_FEATURES = 32_768  # above, "all" layers together are only tried when asked for: they need gigabytes
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Report:
    """What a probe is worth, by predictions of problems it did not see: out of fold, or held out (`source`)."""

    source: str
    n: int
    scores: Scores
    ceiling: float | None  # the Spearman of the true pass rates with these labels (split halves); None: unknown
    baselines: dict[str, Scores]
    curve: tuple[CurvePoint, ...]
    usable: bool
    why: str  # one line, also where it is usable

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, named `difficulty/...`."""
        s = self.scores
        rows: list[dict[str, Any]] = [
            {"name": "difficulty/spearman", "value": s.spearman, "se": s.spearman_se},
            {"name": "difficulty/brier", "value": s.brier},
            {"name": "difficulty/brier_rate", "value": s.brier_rate},
            {"name": "difficulty/ece", "value": s.ece},
            {"name": "difficulty/usable", "value": float(self.usable)},
        ]
        optional = {"auroc": s.auroc, "spearman_ceiling": self.ceiling}
        rows += [{"name": f"difficulty/{name}", "value": v} for name, v in optional.items() if v is not None]
        for name, b in self.baselines.items():
            rows.append({"name": f"difficulty/{name}_spearman", "value": b.spearman, "se": b.spearman_se})
            rows.append({"name": f"difficulty/{name}_brier_rate", "value": b.brier_rate})
        return rows

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Report:
        return cls(
            **{name: row[name] for name in ("source", "n", "ceiling", "usable", "why")},
            scores=Scores.from_json(row["scores"]),
            baselines={name: Scores.from_json(b) for name, b in row["baselines"].items()},
            curve=tuple(CurvePoint(**point) for point in row["curve"]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A fitted probe. `representation` is "all" or, for example, "layer 2, mean"."""

    representation: str
    shape: tuple[int, int, int]  # (L, 2, H) of the states it reads
    model: Linear
    length_model: Linear
    mean_rate: float
    edges: tuple[float, ...]  # quantile edges of the predicted rates, for `bins`
    fit_keys: frozenset[int]  # hashes of the fitted problems' keys, to notice a leak
    policy: str  # fingerprint of the policy whose states these are
    usable: bool
    why: str

    def predict(self, states: States) -> Floats:
        """Predicted pass rates in [0, 1], shape [P]; nan where a state is not finite.

        Raises DataError on states of another shape.
        """
        if states.shape[1:] != self.shape:
            raise DataError(
                f"the probe reads hidden states of shape {self.shape}, not {states.shape[1:]}: "
                "it was fitted to another policy; fit it again"
            )
        return self.model(_features(states, self.representation))

    def bins(self, rates_P: Floats) -> NDArray[np.intp]:
        """Difficulty bins of predicted rates, from 1 = easiest."""
        return stats.assign_bins(rates_P, self.edges)

    def save(self, folder: Path) -> None:
        """Write probe.safetensors and probe.json into the folder."""
        from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

        tensors: dict[str, NDArray[Any]] = {}
        models: dict[str, Any] = {}
        for name, m in (("model", self.model), ("length", self.length_model)):
            tensors |= {f"{name}.mean": m.mean_F, f"{name}.scale": m.scale_F, f"{name}.weight": m.weight_F}
            models[name] = {"bias": m.bias, "slope": m.platt.slope, "offset": m.platt.offset}
        row = {name: getattr(self, name) for name in _FIELDS}
        row |= {"format": FORMAT, "models": models, "fit_keys": sorted(self.fit_keys)}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / "probe.safetensors")
        (folder / "probe.json").write_text(json.dumps(row, allow_nan=False, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Probe:
        """Read a saved probe. Raises ModelError."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

        try:
            row = json.loads((folder / "probe.json").read_text())
            tensors = load_file(folder / "probe.safetensors")
            if row["format"] != FORMAT:
                raise ModelError(f"{folder}: probe format {row['format']}, this version reads {FORMAT}; fit it again")
            models = {
                name: Linear(
                    *(tensors[f"{name}.{part}"] for part in ("mean", "scale", "weight")),
                    bias=m["bias"],
                    platt=Platt(m["slope"], m["offset"]),
                )
                for name, m in row["models"].items()
            }
            values = {name: row[name] for name in _FIELDS}
            values |= {
                "shape": tuple(row["shape"]),
                "edges": tuple(row["edges"]),
                "fit_keys": frozenset(row["fit_keys"]),
            }
            return cls(**values, model=models["model"], length_model=models["length"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{folder} holds no readable difficulty probe ({error!r}); fit it again") from error


_FIELDS = ("representation", "shape", "mean_rate", "edges", "policy", "usable", "why")


# ---------------------------------------------------------------- fitting


def fit(
    states: States,
    successes_P: Ints,
    totals_P: Ints,
    lengths_P: Ints,
    seed: int,
    *,
    keys: Sequence[str] = (),
    layers: Literal["all", "choose"] = "choose",
    bins: int = 5,
    policy: str = "",
) -> tuple[Probe, Report]:
    """Fit on the fit split: states [P, L, 2, H], right answers, samples and prompt lengths in tokens of each problem.

    The report is out of fold. Problems without samples are left out. Raises DataError where shapes disagree or no
    problem has a sample.
    """
    _check_shapes(states, successes_P, totals_P, lengths_P, keys)
    keep = totals_P > 0
    states, successes, totals = states[keep], successes_P[keep].astype(np.int64), totals_P[keep].astype(np.int64)
    if not len(states):
        raise DataError("difficulty: no problem has a graded sample; nothing can be fitted")
    rates = successes / totals
    finite = np.logical_and.reduce(np.isfinite(states), axis=(1, 2, 3))
    num_bad = int((~finite).sum())
    if num_bad:
        states = np.where(finite[:, None, None, None], states, np.float32(0))
    # the noise of a rate from n samples, against the spread of the true rates, is 1 / n to 1 / (a + b)
    weights = totals / (totals + sum(empirical_prior(successes, totals)))
    names = _representations(states.shape, layers)
    fitted = fit_best({name: _reader(states, name) for name in names}, rates, weights, seed=seed)
    lengths = _length_features(lengths_P[keep])
    by_length = fit_best({"length": lambda: lengths}, rates, weights, seed=seed)
    mean_rate = float(np.average(rates, weights=weights))
    predictions = {"length": by_length.rates_P, "constant": np.full(len(rates), mean_rate)}
    report = _report("out of fold", fitted.rates_P, predictions, successes, totals, seed)
    if num_bad:
        report = _unusable(report, f"{num_bad} prompts have hidden states that are not finite")
    probe = Probe(
        representation=fitted.name,
        shape=(states.shape[1], states.shape[2], states.shape[3]),
        model=fitted.model,
        length_model=by_length.model,
        mean_rate=mean_rate,
        edges=stats.quantile_edges(fitted.rates_P, bins),
        fit_keys=frozenset(key64(key) for key in keys),
        policy=policy,
        usable=report.usable,
        why=report.why,
    )
    return probe, report


def evaluate(
    probe: Probe,
    states: States,
    successes_P: Ints,
    totals_P: Ints,
    lengths_P: Ints,
    seed: int,
    *,
    keys: Sequence[str] = (),
) -> Report:
    """The probe on problems it was not fitted to. A shared key makes it unusable. Raises DataError as `fit` does."""
    _check_shapes(states, successes_P, totals_P, lengths_P, keys)
    keep = totals_P > 0
    if not keep.any():
        raise DataError("difficulty: no problem has a graded sample; nothing can be evaluated")
    predicted = probe.predict(states[keep])
    num_bad = int((~np.isfinite(predicted)).sum())
    predicted = np.where(np.isfinite(predicted), predicted, probe.mean_rate)
    baselines = {
        "length": probe.length_model(_length_features(lengths_P[keep])),
        "constant": np.full(int(keep.sum()), probe.mean_rate),
    }
    successes, totals = successes_P[keep].astype(np.int64), totals_P[keep].astype(np.int64)
    report = _report("held out", predicted, baselines, successes, totals, seed)
    leaked = [key for key in keys if key64(key) in probe.fit_keys]
    if num_bad:
        report = _unusable(report, f"{num_bad} prompts have hidden states that are not finite")
    if leaked:
        report = _unusable(report, f"{len(leaked)} of {len(keys)} problems were used to fit it, first '{leaked[0]}'")
    return report if probe.usable else _unusable(report, probe.why)


def estimator(probe: Probe, states_of: Callable[[Sequence[Problem]], States]) -> DifficultyEstimate:
    """The probe as search uses it: one rate for all where the probe is not usable, or a state is not finite."""

    def estimate(problems: Sequence[Problem]) -> Sequence[float]:
        if not probe.usable or not problems:
            return [probe.mean_rate] * len(problems)
        rates = probe.predict(states_of(problems))
        return np.where(np.isfinite(rates), rates, probe.mean_rate).tolist()

    return estimate


def check_rates(rates_P: Floats) -> tuple[bool, str]:
    """Whether predictions can order problems, and why not: some are not finite, or many are all equal."""
    num_bad = int((~np.isfinite(rates_P)).sum())
    if num_bad:
        return False, f"{num_bad} of {len(rates_P)} predictions are not finite"
    if len(rates_P) > 1 and float(np.ptp(rates_P)) < 1e-6:
        return False, f"all {len(rates_P)} predictions are {float(rates_P[0]):.3f}"
    return True, "predictions differ"


# ---------------------------------------------------------------- parts


def _check_shapes(states: States, successes_P: Ints, totals_P: Ints, lengths_P: Ints, keys: Sequence[str]) -> None:
    if states.ndim != 4 or states.shape[2] != len(POOLINGS):
        raise DataError(f"hidden states have shape {states.shape}, expected [problems, layers, 2, hidden]")
    sizes = {len(states), len(successes_P), len(totals_P), len(lengths_P)} | ({len(keys)} if keys else set[int]())
    if len(sizes) > 1:
        raise DataError(f"states, labels, lengths and keys are of different lengths: {sorted(sizes)}")
    if (successes_P < 0).any() or (successes_P > totals_P).any():
        raise DataError("a problem has more right answers than samples")


def _representations(shape: tuple[int, ...], layers: Literal["all", "choose"]) -> list[str]:
    if layers == "all":
        return ["all"]
    names = [f"layer {layer}, {pooling}" for layer in range(shape[1]) for pooling in POOLINGS]
    return [*names, "all"] if shape[1] * shape[2] * shape[3] <= MAX_ALL_FEATURES else names


def _features(states: States, representation: str) -> Floats:
    """The features [P, F] of a representation by name."""
    if representation == "all":
        chosen = states.reshape(len(states), -1)
    else:
        layer, pooling = representation.removeprefix("layer ").split(", ")
        chosen = states[:, int(layer), POOLINGS.index(pooling)]
    return chosen.astype(np.float64)


def _reader(states: States, representation: str) -> Callable[[], Floats]:
    return lambda: _features(states, representation)


def _length_features(lengths_P: Ints) -> Floats:
    lengths = lengths_P.astype(np.float64)
    return np.stack([lengths, np.log1p(lengths)], axis=1)


def _report(
    source: str, predicted_P: Floats, baselines: dict[str, Floats], successes_P: Ints, totals_P: Ints, seed: int
) -> Report:
    scores = score(predicted_P, successes_P, totals_P, seed=seed)
    others = {name: score(rates, successes_P, totals_P, seed=seed) for name, rates in baselines.items()}
    ceiling = stats.spearman_ceiling(successes_P, totals_P, seed=seed)
    usable, why = check_rates(predicted_P)
    if len(predicted_P) < MIN_PROBLEMS:
        usable, why = False, f"{len(predicted_P)} labelled problems, at least {MIN_PROBLEMS} are needed"
    elif len(np.unique(successes_P / totals_P)) < 2:
        usable, why = False, f"every problem has the same pass rate, {successes_P[0] / totals_P[0]:.2f}"
    elif usable:
        # 99 %: predictions of one fold share a model, so they scatter more than the bootstrap over problems knows
        lower = scores.spearman - stats.normal_quantile(0.99) * scores.spearman_se
        gain = others["constant"].brier_rate - scores.brier_rate
        usable = lower > 0 and gain > 0
        why = (
            f"Spearman {scores.spearman:.2f} (lower bound {lower:.2f}), Brier {scores.brier_rate:.4f} against "
            f"{others['constant'].brier_rate:.4f} of a constant: {'better' if usable else 'no better'} than none"
        )
    return Report(
        source=source,
        n=len(predicted_P),
        scores=scores,
        ceiling=None if np.isnan(ceiling) else ceiling,
        baselines=others,
        curve=curve(predicted_P, successes_P / totals_P),
        usable=usable,
        why=why,
    )


def _unusable(report: Report, why: str) -> Report:
    return replace(report, usable=False, why=why)
