"""Predict when a slash forms, and at which offset, without training the model (*ours*).

docs/theory-prediction.md derives each step. The mean query and the mean key of layer 1, P complex
numbers each, and the matching strength of layer 2 follow gradient descent on `ReducedLoss`. While
attention is still uniform, they have a closed form; later, the equations are integrated numerically
with the steps of training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ..errors import TheoryError
from .model import ShallowTransformer
from .reduced import ReducedLoss, pattern
from .run import Slash, measured_offsets, read_slash
from .settings import Settings, as_number, as_settings
from .training import recorded, with_threads

#: The gradient of the reduced loss is computed anew once a logit has moved by this much.
_TOLERANCE = 0.02
#: The closed form stops where amplitudes have grown by e to this power; attention is one-hot then.
_MOST_GROWTH = 100.0


@dataclass(frozen=True)
class Prediction:
    """When and where a slash is predicted to form.

    Attributes:
        settings: The settings of the training run.
        kappa: The threshold of the slash score.
        rates: For each pair, the rate per step at which its mean query and mean key grow while
            attention is uniform: they grow by the factor 1 + rate.
        rows: Predicted slash scores `score_0`, `score_1`, … and matching strength of layer 2, at
            the steps at which training measures them.
        closed_form_rows: The scores if all pairs kept growing at `rates`.
    """

    settings: Settings
    kappa: float
    rates: tuple[float, ...]
    rows: list[dict[str, float | int]]
    closed_form_rows: list[dict[str, float | int]]

    @property
    def slash(self) -> Slash:
        """When and where the slash forms within `settings.steps`."""
        return read_slash(self.rows, self.settings.offset, self.kappa)

    @property
    def closed_form(self) -> Slash:
        """The same if all pairs kept growing at `rates`: less exact, but a formula."""
        return read_slash(self.closed_form_rows, self.settings.offset, self.kappa)

    @property
    def step(self) -> float | int:
        """`Run.time_to(kappa)`, predicted; infinite if not within `settings.steps`."""
        return self.slash.step

    @property
    def offset(self) -> int | None:
        """The offset at which a slash forms first, of those that training measures; or None."""
        return self.slash.offset


def predict(
    settings: Settings | None = None, *, kappa: float | int = 0.5, **knobs: Any
) -> Prediction:
    """Predict the step at which training makes a slash, and its offset; it takes about a second.

    The initial weights of the seed are used, but no sequence of the data. `n_sequences` and
    `batch_size` have no influence: the prediction is for the expected gradient. *Ours*.

    Args:
        settings: A `Settings`; or give its fields by name.
        kappa: The slash score from which there is a slash.
        **knobs: Fields of `Settings`.

    Raises:
        TheoryError: Invalid settings; another task than copying, another optimizer than plain
            gradient descent; or numbers that are not finite, from a learning rate too high.
    """
    settings = as_settings(Settings, settings, knobs)
    kappa = as_number("kappa", kappa, 0.0, 1.0)
    for name, known in (("task", "copying"), ("optimizer", "gd")):
        if getattr(settings, name) != known:
            raise TheoryError(
                f"the prediction is derived for {name}={known!r}; got "
                f"{getattr(settings, name)!r}. Train the model instead: slashpatch.theory.train"
            )
    with with_threads(1), torch.no_grad():
        flow = _Flow(settings)
        rates = tuple(flow.rates().tolist())
        return Prediction(settings, kappa, rates, flow.integrate(), flow.closed_form())


class _Flow:
    """The leading quantities at initialisation, and how gradient descent moves them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        model = ShallowTransformer.initial(settings)
        self.q, self.k = self._mean(model.w_q), self._mean(model.w_k)
        theta = settings.thetas()
        self.scale = (2 * len(theta)) ** -0.5
        self.waves = torch.exp(1j * theta[:, None] * torch.arange(settings.length))
        self.loss = ReducedLoss(settings)
        # Embeddings of two positions have the inner product cone², plus 1 if their token is equal.
        self.rate = settings.rate * (settings.cone**2 + 1 / settings.seen)
        # A token's diagonal entry rises while its others fall, so that their sum stays.
        self.matching_rate = settings.slower_rate / (settings.seen - 1)
        self.recorded = [
            step for step in range(settings.steps + 1) if step == settings.steps or recorded(step)
        ]

    def _mean(self, weight: Float[Tensor, "d_model d_head"]) -> Complex[Tensor, "pair"]:
        """Return the mean query or key over the tokens of training, a complex number per pair."""
        settings = self.settings
        mean = (weight[: settings.seen].mean(0) + settings.cone * weight[-1]).double()
        return torch.complex(*mean.chunk(2))

    def _profile(
        self, q: Complex[Tensor, "pair"], k: Complex[Tensor, "pair"]
    ) -> Float[Tensor, "offset"]:
        """Return the logit at each offset: scale · Re Σ_l q̄_l k̄*_l e^{iθ_l Δ}."""
        return self.scale * ((q * k.conj()) @ self.waves).real

    def _force(
        self, profile: Float[Tensor, "offset"], matching: float
    ) -> tuple[Complex[Tensor, "pair"], float]:
        """Return G_l = −scale · Σ_Δ g(Δ) e^{−iθ_l Δ}, g = ∂loss/∂profile, and −∂loss/∂matching."""
        by_profile, by_matching = self.loss.gradient(profile, matching)
        force = -self.scale * (self.waves.conj() @ by_profile.to(self.waves))
        if not bool(force.abs().sum().isfinite()) or not math.isfinite(by_matching):
            raise TheoryError(
                "the gradient of the reduced loss is not finite. Use a lower learning_rate than "
                f"{self.settings.rate:g}"
            )
        return force, -by_matching

    def rates(self) -> Float[Tensor, "pair"]:
        """Return the growth rate per step of each pair at initialisation."""
        force, _ = self._force(self._profile(self.q, self.k), self.settings.matching)
        return self.rate * force.abs()

    def closed_form(self) -> list[dict[str, float | int]]:
        """Return the slash scores if the initial forces did not change.

        With G = |G| e^{iφ}, a step maps q̄ to q̄ + r G k̄ and k̄ to k̄ + r G* q̄. So q̄ + e^{iφ} k̄ grows
        by the factor 1 + r|G| in each step, and q̄ − e^{iφ} k̄ by 1 − r|G|.
        """
        force, _ = self._force(self._profile(self.q, self.k), self.settings.matching)
        turn = torch.exp(1j * force.angle())
        rates = self.rate * force.abs()
        rising, falling = (self.q + turn * self.k) / 2, (self.q - turn * self.k) / 2
        most = _MOST_GROWTH / max(float(rates.log1p().max()), 1e-12)
        rows = []
        for step in self.recorded:
            made = min(step, int(most))
            up, down = rising * (1 + rates) ** made, falling * (1 - rates) ** made
            profile = self._profile(up + down, turn.conj() * (up - down))
            rows.append(self._row(step, profile, self.settings.matching))
        return rows

    def integrate(self, tolerance: float = _TOLERANCE) -> list[dict[str, float | int]]:
        """Return the slash scores by the steps of gradient descent on the reduced loss.

        Forces are computed anew once a logit, or the matching strength, has moved by `tolerance`.
        """
        settings, q, k, matching = self.settings, self.q, self.k, float(self.settings.matching)
        rows, recorded_steps = [], set(self.recorded)
        force, pull = torch.zeros_like(q), 0.0
        at: tuple[Tensor, float] | None = None
        for step in range(settings.steps + 1):
            profile = self._profile(q, k)
            if step in recorded_steps:
                rows.append(self._row(step, profile, matching))
            # Written so that NaN counts as moved: the new force is then refused.
            still = at is not None and (
                float((profile - at[0]).abs().max()) <= tolerance
                and abs(matching - at[1]) <= tolerance
            )
            if not still:
                force, pull = self._force(profile, matching)
                at = (profile, matching)
            q, k = q + self.rate * force * k, k + self.rate * force.conj() * q
            matching += self.matching_rate * pull
        return rows

    def _row(
        self, step: int, profile: Float[Tensor, "offset"], matching: float
    ) -> dict[str, float | int]:
        """Return predicted slash scores, named as in `Run.history`."""
        attention = pattern(profile)
        row: dict[str, float | int] = {"step": step}
        for offset in measured_offsets(self.settings):
            row[f"score_{offset}"] = float(attention.diagonal(-offset).mean())
        row["matching_strength"] = matching
        return row
