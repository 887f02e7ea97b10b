"""Predict the policy's pass rate on a question from the question alone, before it answers.

Several kinds are fitted to the same labelled problems of the fit split; the one that predicts those it did not see best
is kept. Baselines go through the same protocol: a constant, the question's length, what the task says of the question.
A predictor that cannot be trusted says so (`usable`, `why`), and callers then treat all questions alike.

Axis legend: _P problems. Left out: mixtures of kinds, no better than the best one on the embedded tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from configs.schema import Difficulty
from difficulty import metadata, mlp, probe, tokens
from difficulty.bins import Bins, fixed_by
from difficulty.calibration import Floats, Ints, Platt
from difficulty.labels import Counts, empirical_prior
from difficulty.prompts import Prompts
from difficulty.report import BinReport, Report, Tried, leaked, measure
from difficulty.ridge import Linear, fit_best
from search import stats
from search.belief import beta_prior, fit_strength
from search.errors import DataError, ModelError, TrainingError
from search.randomness import key64
from search.types import DifficultyEstimate, Problem

FORMAT = 2
FACTS, WEIGHTS = "predictor.json", "predictor.safetensors"
_HEADS = {"ridge": probe.RidgeHead, "mlp": mlp.MlpHead, "tokens": tokens.TokenHead}


class Head(Protocol):
    """What a kind of predictor is, once fitted."""

    @property
    def kind(self) -> str: ...
    def predict(self, prompts: Prompts) -> Floats:
        """Rates in [0, 1], shape [P]; nan where it cannot say. Raises DataError for prompts of another policy."""
        ...

    def flops(self, num_prompt_tokens: int) -> float: ...
    def tensors(self) -> dict[str, NDArray[Any]]: ...
    def facts(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Baselines:
    """Predictors that know less, to be beaten: the mean, the length in tokens, and the named numbers of the task."""

    mean_rate: float
    length: Linear
    names: tuple[str, ...] = ()
    metadata: Linear | None = None

    def rates(self, prompts: Prompts, metas_P: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
        found = {
            "constant": np.full(len(prompts), self.mean_rate),
            "length": self.length(_spread_out(prompts.lengths_P[:, None].astype(np.float64))),
        }
        if self.metadata is not None and len(metas_P):
            rates = self.metadata(_spread_out(metadata.features_like(self.names, metas_P)))
            found["metadata"] = np.where(np.isfinite(rates), rates, self.mean_rate)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """A fitted predictor of one policy's pass rates."""

    head: Head
    mean_rate: float  # what every question is given where the predictor cannot be used
    cuts: Bins  # of predicted rates
    strength: float  # how many samples' worth a prediction knows: the rate is Beta(p x strength, (1 - p) x strength)
    baselines: Baselines
    fit_keys: frozenset[int]  # hashes of the fitted problems' keys, to notice a leak
    policy: str  # fingerprint of the policy it was fitted to
    usable: bool
    why: str

    @property
    def kind(self) -> str:
        return self.head.kind

    @property
    def edges(self) -> tuple[float, ...]:
        return self.cuts.edges

    def predict(self, prompts: Prompts) -> Floats:
        """Predicted pass rates in [0, 1], shape [P]; nan where a state is not finite.

        Raises DataError on states of another shape: the predictor belongs to another policy.
        """
        return self.head.predict(prompts)

    def bins(self, rates_P: Floats) -> NDArray[np.intp]:
        """Difficulty bins of predicted rates, from 1 = easiest; 0 where a rate is not finite."""
        return self.cuts(rates_P)

    def prior(self, rates_P: Floats) -> tuple[Floats, Floats]:
        """(a, b) of the Beta distribution of each question's true pass rate, given its prediction."""
        return beta_prior(rates_P, self.strength)

    def spread(self, rates_P: Floats) -> Floats:
        """The standard deviation of each question's true pass rate around its prediction, shape [P]."""
        return np.sqrt(rates_P * (1 - rates_P) / (self.strength + 1))

    def flops(self, num_prompt_tokens: int) -> float:
        """What one prediction costs beyond the prefill of the prompt by the policy, which the search needs anyway."""
        return self.head.flops(num_prompt_tokens)

    def save(self, folder: Path) -> None:
        """Write predictor.safetensors and predictor.json into the folder."""
        from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

        tensors = {f"head.{name}": tensor for name, tensor in self.head.tensors().items()}
        baselines: dict[str, Any] = {"names": list(self.baselines.names)}
        for name, m in (("length", self.baselines.length), ("metadata", self.baselines.metadata)):
            if m is not None:
                tensors |= {f"{name}.mean": m.mean_F, f"{name}.scale": m.scale_F, f"{name}.weight": m.weight_F}
                baselines[name] = {"bias": m.bias, "platt": {"slope": m.platt.slope, "offset": m.platt.offset}}
        row = {name: getattr(self, name) for name in _FIELDS}
        row |= {"format": FORMAT, "kind": self.kind, "head": self.head.facts(), "baselines": baselines}
        row |= {"edges": list(self.edges), "fit_keys": sorted(self.fit_keys)}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / WEIGHTS)
        (folder / FACTS).write_text(json.dumps(row, allow_nan=False, indent=1, sort_keys=True) + "\n")


_FIELDS = ("mean_rate", "strength", "policy", "usable", "why")


def load(folder: Path) -> Predictor:
    """Read a saved predictor of any kind. Raises ModelError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

    try:
        row = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if row["format"] != FORMAT:
            raise ModelError(f"{folder}: predictor format {row['format']}, this version reads {FORMAT}; fit it again")
        tensors = load_file(folder / WEIGHTS)
        own = {name.removeprefix("head."): t for name, t in tensors.items() if name.startswith("head.")}
        given = row["baselines"]
        return Predictor(
            **{name: row[name] for name in _FIELDS},
            head=_load_head(folder, row["kind"], own, row["head"]),
            cuts=Bins(tuple(row["edges"])),
            fit_keys=frozenset(row["fit_keys"]),
            baselines=Baselines(
                mean_rate=row["mean_rate"],
                length=_linear(tensors, "length", given["length"]),
                names=tuple(given["names"]),
                metadata=_linear(tensors, "metadata", given["metadata"]) if "metadata" in given else None,
            ),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{folder} holds no readable difficulty predictor ({error!r}); fit it again") from error


def _load_head(folder: Path, kind: str, tensors: dict[str, NDArray[Any]], facts: dict[str, Any]) -> Head:
    if kind == "sequence":
        from difficulty.sequence import SequenceHead

        return SequenceHead.load(folder, tensors, facts)
    return _HEADS[kind].load(tensors, facts)


def _linear(tensors: Mapping[str, NDArray[Any]], name: str, facts: Mapping[str, Any]) -> Linear:
    parts = (tensors[f"{name}.{part}"] for part in ("mean", "scale", "weight"))
    return Linear(*parts, bias=facts["bias"], platt=Platt(**facts["platt"]))


# ---------------------------------------------------------------- fitting


@dataclass(frozen=True, slots=True, eq=False)
class _Fitted:
    """A head with its predictions of the problems it did not see; nan elsewhere."""

    head: Head
    rates_P: Floats


def fit(
    prompts: Prompts,
    counts: Counts,
    config: Difficulty,
    *,
    seed: int,
    metas_P: Sequence[Mapping[str, Any]] = (),
    out: Path | None = None,
) -> tuple[Predictor, Report]:
    """Fit every kind that the configuration names on the fit split, and keep the best on unseen problems of it.

    `metas_P`: what the task says of each problem. `out`: where a kind that has weights of its own writes them. The
    report is out of fold. Problems without samples are left out. Raises DataError where shapes disagree, no problem
    has a sample, or no kind could be fitted.
    """
    _check(prompts, counts, metas_P)
    rows = np.flatnonzero(counts.totals_P > 0)
    if not len(rows):
        raise DataError("difficulty: no problem has a graded sample; nothing can be fitted")
    prompts, metas_P = prompts.take(rows), [metas_P[i] for i in rows.tolist()] if len(metas_P) else []
    successes, totals = counts.successes_P[rows].astype(np.int64), counts.totals_P[rows].astype(np.int64)
    rates = successes / totals
    # the noise of a rate from n samples, against the spread of the true rates, is 1 / n to 1 / (a + b)
    weights = totals / (totals + sum(empirical_prior(successes, totals)))
    prompts, num_bad = _finite(prompts)
    fitted, tried = _fit_kinds(prompts, rates, weights, config, seed, out)
    chosen, tried = _best(fitted, tried, successes, totals, prompts)
    baselines, unseen = _fit_baselines(prompts, metas_P, rates, weights, seed)
    seen = np.isfinite(chosen.rates_P)
    held = {name: values[seen] for name, values in unseen.items()}
    predicted = chosen.rates_P[seen]
    report = measure("out of fold", chosen.head.kind, predicted, held, successes[seen], totals[seen], seed)
    if num_bad:
        report = report.unusable(f"{num_bad} prompts have hidden states that are not finite")
    cuts = fixed_by(config, predicted)
    predictor = Predictor(
        head=chosen.head,
        mean_rate=baselines.mean_rate,
        cuts=cuts,
        strength=fit_strength(predicted, successes[seen], totals[seen]),
        baselines=baselines,
        fit_keys=frozenset(key64(key) for key in counts.keys),
        policy=counts.model,
        usable=report.usable,
        why=report.why,
    )
    return predictor, _complete(report, predictor, predicted, rates[seen], prompts, config, tuple(tried))


def evaluate(
    predictor: Predictor,
    prompts: Prompts,
    counts: Counts,
    config: Difficulty,
    *,
    seed: int,
    metas_P: Sequence[Mapping[str, Any]] = (),
) -> Report:
    """The predictor on problems it was not fitted to; a shared key makes it unusable. Raises DataError."""
    _check(prompts, counts, metas_P)
    rows = np.flatnonzero(counts.totals_P > 0)
    if not len(rows):
        raise DataError("difficulty: no problem has a graded sample; nothing can be evaluated")
    prompts, metas_P = prompts.take(rows), [metas_P[i] for i in rows.tolist()] if len(metas_P) else []
    successes, totals = counts.successes_P[rows].astype(np.int64), counts.totals_P[rows].astype(np.int64)
    predicted = predictor.predict(prompts)
    num_bad = int((~np.isfinite(predicted)).sum())
    predicted = np.where(np.isfinite(predicted), predicted, predictor.mean_rate)
    baselines = predictor.baselines.rates(prompts, metas_P)
    report = measure("held out", predictor.kind, predicted, baselines, successes, totals, seed)
    if num_bad:
        report = report.unusable(f"{num_bad} prompts have hidden states that are not finite")
    if leak := leaked(counts.keys, predictor.fit_keys, [key64(key) for key in counts.keys]):
        report = report.unusable(leak)
    if report.usable and not predictor.usable:
        report = report.unusable(predictor.why)
    return _complete(report, predictor, predicted, successes / totals, prompts, config, ())


def estimator(predictor: Predictor, read: Callable[[Sequence[Problem]], Prompts]) -> DifficultyEstimate:
    """The predictor as search uses it: one rate for all where it is not usable, or a state is not finite.

    `read` makes the prompts of problems; it is not asked where they are not needed.
    """

    def estimate(problems: Sequence[Problem]) -> Sequence[float]:
        if not predictor.usable or not problems:
            return [predictor.mean_rate] * len(problems)
        rates = predictor.predict(read(problems))
        return np.where(np.isfinite(rates), rates, predictor.mean_rate).tolist()

    return estimate


# ---------------------------------------------------------------- parts


def _check(prompts: Prompts, counts: Counts, metas_P: Sequence[Mapping[str, Any]]) -> None:
    sizes = {len(prompts), len(counts.successes_P), len(counts.totals_P), len(counts.keys)}
    sizes |= {len(metas_P)} if len(metas_P) else set()
    if len(sizes) > 1:
        raise DataError(f"prompts, labels, keys and metadata are of different lengths: {sorted(sizes)}")
    if (counts.successes_P < 0).any() or (counts.successes_P > counts.totals_P).any():
        raise DataError("a problem has more right answers than samples")


def _finite(prompts: Prompts) -> tuple[Prompts, int]:
    """The prompts with states that are not finite set to 0, and how many have such."""
    states = prompts.states
    if states.ndim != 4 or states.shape[2] != 2:
        raise DataError(f"hidden states have shape {states.shape}, expected [problems, layers, 2, hidden]")
    finite = np.isfinite(states).all(axis=(1, 2, 3))
    num_bad = int((~finite).sum())
    return (prompts.with_states(np.nan_to_num(states, posinf=0, neginf=0)) if num_bad else prompts), num_bad


def _fit_kinds(
    prompts: Prompts, rates_P: Floats, weights_P: Floats, config: Difficulty, seed: int, out: Path | None
) -> tuple[list[_Fitted], list[Tried]]:
    """Every kind that could be fitted, and those that could not, with the reason."""
    fitted: list[_Fitted] = []
    failed: list[Tried] = []
    for kind in config.predictors:
        try:
            head, unseen = _fit_kind(kind, prompts, rates_P, weights_P, config, seed, out)
        except (DataError, TrainingError, np.linalg.LinAlgError) as error:
            failed.append(Tried(kind, why=str(error)))
            continue
        num_bad = int((~np.isfinite(unseen)).sum())
        if num_bad and kind != "sequence":  # which looks at its own
            failed.append(Tried(kind, why=f"{num_bad} of {len(unseen)} predictions are not finite"))
        else:
            fitted.append(_Fitted(head, unseen))
    return fitted, failed


def _fit_kind(
    kind: str,
    prompts: Prompts,
    rates_P: Floats,
    weights_P: Floats,
    config: Difficulty,
    seed: int,
    out: Path | None,
) -> tuple[Head, Floats]:
    if kind == "ridge":
        return probe.fit(prompts, rates_P, weights_P, seed=seed, layers=config.layers)
    if kind == "mlp":
        return mlp.fit(prompts, rates_P, weights_P, seed=seed)
    if kind == "tokens":
        return tokens.fit(prompts, rates_P, weights_P, seed=seed)
    from difficulty import sequence

    assert out is not None, "a sequence model needs a folder for its weights"
    return sequence.fit(prompts, rates_P, weights_P, config.sequence, out, seed=seed)


def _best(
    fitted: Sequence[_Fitted], failed: Sequence[Tried], successes_P: Ints, totals_P: Ints, prompts: Prompts
) -> tuple[_Fitted, list[Tried]]:
    """The kind with the least noise-corrected Brier score on the problems that no kind saw. Raises DataError."""
    if not fitted:
        raise DataError("difficulty: nothing could be fitted: " + "; ".join(f"{t.kind}: {t.why}" for t in failed))
    common = np.isfinite([one.rates_P for one in fitted]).all(axis=0)
    right, total, tokens_ = successes_P[common], totals_P[common], round(float(prompts.lengths_P.mean()))
    tried: list[Tried] = []
    for one in fitted:
        rates = one.rates_P[common]
        error = stats.brier_corrected(rates, right, total)
        error = stats.brier(rates, right, total) if np.isnan(error) else error
        tried.append(Tried(one.head.kind, error, stats.spearman(rates, right / total), one.head.flops(tokens_)))
    best = min(range(len(fitted)), key=lambda i: tried[i].brier_rate or 0.0)
    return fitted[best], [*tried, *failed]


def _fit_baselines(
    prompts: Prompts, metas_P: Sequence[Mapping[str, Any]], rates_P: Floats, weights_P: Floats, seed: int
) -> tuple[Baselines, dict[str, Floats]]:
    """The baselines, and their predictions of problems they did not see."""
    mean = float(np.average(rates_P, weights=weights_P))
    lengths = _spread_out(prompts.lengths_P[:, None].astype(np.float64))
    by_length = fit_best({"length": lambda: lengths}, rates_P, weights_P, seed=seed)
    unseen = {"constant": np.full(len(rates_P), mean), "length": by_length.rates_P}
    baselines = Baselines(mean, by_length.model)
    names, values = metadata.features(metas_P)
    if names:
        known = _spread_out(values)
        by_metadata = fit_best({"metadata": lambda: known}, rates_P, weights_P, seed=seed)
        baselines = replace(baselines, names=names, metadata=by_metadata.model)
        unseen["metadata"] = by_metadata.rates_P
    return baselines, unseen


def _spread_out(values_P_F: Floats) -> Floats:
    """Each number with its logarithm beside it: how much longer matters, or how many times."""
    return np.concatenate([values_P_F, np.sign(values_P_F) * np.log1p(np.abs(values_P_F))], axis=1)


def _complete(
    report: Report,
    predictor: Predictor,
    predicted_P: Floats,
    rates_P: Floats,
    prompts: Prompts,
    config: Difficulty,
    tried: tuple[Tried, ...],
) -> Report:
    return replace(
        report,
        bins=BinReport.of(predicted_P, rates_P, predictor.cuts, fixed_by(config, rates_P)),
        strength=predictor.strength,
        flops=predictor.flops(round(float(prompts.lengths_P.mean()))),
        tried=tried,
    )
