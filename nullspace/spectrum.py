"""The second moment of a layer's inputs, decomposed: C = U diag(e) U^T."""

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch

from nullspace.checks import check_softness, check_threshold
from nullspace.errors import NullSpaceError
from nullspace.names import DEFAULT_THRESHOLDS


class Spectrum(NamedTuple):
    """Eigenvalues (in,) float32, largest first, and eigenvectors (in, in) as columns, of C = E[x x^T]; its tokens.

    Eigenvectors are float32; those of bundles of format 1 are float16. `distance` is ||U - V||_F, V being them and U
    those of the decomposition in float64 that they were rounded from, or None where that is not known. It bounds what
    the rounding can hide, whichever k directions are closed: ||dW U_k||_F <= ||dW V_k||_F + ||dW||_F ||U_k - V_k||_2.
    """

    eigenvalues: torch.Tensor
    eigenvectors: torch.Tensor
    tokens: int
    distance: float | None = None

    @classmethod
    def from_sum(cls, total, tokens, name="the input"):
        """Decompose a sum of x x^T (in, in) over `tokens` tokens in float64; the eigenvectors are rounded to float32.

        Raises:
            NullSpaceError: if the sum is not finite or counts no token.
        """
        if not tokens or not torch.isfinite(total).all():
            raise NullSpaceError(
                f"The inputs collected for {name} contain NaN or infinity (or nothing at all); "
                "build with --mixed_precision no or bf16."
            )
        eigenvalues, eigenvectors = torch.linalg.eigh(total.to("cpu", torch.float64) / tokens)
        stored = eigenvectors.flip(1).float().contiguous()
        distance = (stored - eigenvectors.flip(1)).norm().item()
        return cls(eigenvalues.flip(0).clamp_min(0).float().contiguous(), stored, tokens, distance)

    @classmethod
    def from_spectra(cls, total, tokens, spectra, name="the input"):
        """Decompose a sum that was made of stored spectra; the distance is known where all of theirs are.

        It is that from the decomposition of this sum: nothing else has seen what the spectra were rounded from.
        """
        spectrum = cls.from_sum(total, tokens, name)
        return spectrum if all(item.distance is not None for item in spectra) else spectrum._replace(distance=None)

    def orthonormal(self):
        """Eigenvectors (in, in) in float32, orthonormal to its rounding again.

        Those of format 1 take one Newton-Schulz step U (3 I - U^T U) / 2, which squares the deviation that float16
        storage left (about 5e-4), and turns no direction by more than that.
        """
        vectors = self.eigenvectors.float()
        if self.eigenvectors.dtype == torch.float32:
            return vectors
        with tf32(False, vectors.device):
            return 1.5 * vectors - 0.5 * vectors @ (vectors.T @ vectors)

    def energy(self):
        """The trace of `sum`."""
        return self.eigenvalues.double().sum().item() * self.tokens

    def sum(self):
        """The sum of x x^T over the tokens, (in, in) float64, to the precision that is stored."""
        vectors = self.orthonormal().double()
        return (vectors * (self.eigenvalues.double() * self.tokens)) @ vectors.T

    def rank(self, criterion="energy", threshold=DEFAULT_THRESHOLDS["energy"]):
        """How many leading directions are protected.

        - "energy": the fewest that hold this share of the trace, in [0, 1); 0 protects nothing.
        - "eigenvalue": those whose eigenvalue is at least the threshold (AlphaEdit's absolute threshold).
        - "percentile": all but the lowest `threshold` percent of the directions, in (0, 100].

        Raises:
            NullSpaceError: if the criterion is unknown or the threshold is out of its range.
        """
        check_threshold(criterion, threshold)
        size = len(self.eigenvalues)
        if criterion == "eigenvalue":
            return int((self.eigenvalues >= threshold).sum())
        if criterion == "percentile":
            return size - math.floor(size * threshold / 100)
        energy = self.eigenvalues.double().cumsum(0)
        return int((energy < threshold * energy[-1]).sum()) + 1 if threshold > 0 else 0

    def gains(self, softness):
        """How much of a step each direction is given, (in,) float32: sqrt(softness / (softness + share of the energy)).

        They are the eigenvalues of (lambda (C + lambda I)^-1)^(1/2) with lambda = softness * tr(C). The matrix without
        the root is the soft projector of OWM (arXiv 1810.01256, eq. 1); a step is given the root twice, once for the
        gradient and once for the change that the optimizer makes of it, which optimizes A (C / lambda + I)^(1/2) in
        place of A. Infinite softness gives 1 everywhere.

        Raises:
            NullSpaceError: if the softness is not above 0.
        """
        check_softness(softness)
        share = self.eigenvalues.double() / self.eigenvalues.double().sum().clamp_min(1e-300)
        return (1 + share / softness).rsqrt().float()


@contextmanager
def tf32(use, device):
    """Let float32 matrix products on a GPU round what they read to TF32 (11 significant bits), or none at all.

    Whatever the surroundings have set, and as they have set it afterwards: `allow_tf32`, `fp32_precision` of a backend,
    `set_float32_matmul_precision`, which on some CPUs lets products read bfloat16 (8 bits), and autocast.
    """
    with torch.autocast(device.type, enabled=False):
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if use else "highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        # Here the other interface would raise where the surroundings have used this one, and reads what this one set.
        settings = [(torch.backends.cuda.matmul, "tf32" if use else "ieee"), (torch.backends.mkldnn.matmul, "ieee")]
        before = [setting.fp32_precision for setting, _ in settings]
        try:
            for setting, precision in settings:
                setting.fp32_precision = precision
            yield
        finally:
            for (setting, _), precision in zip(settings, before, strict=True):
                setting.fp32_precision = "none"  # which inherits from the backend, where that has been set
                if setting.fp32_precision != precision:
                    setting.fp32_precision = precision
