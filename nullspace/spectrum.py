"""The second moment of a layer's inputs, decomposed: C = U diag(e) U^T."""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch

from nullspace.checks import check_softness, check_threshold
from nullspace.errors import NullSpaceError
from nullspace.names import DEFAULT_THRESHOLDS


# What rounding may add to the square of the drift that a softness allows: 2.5% of the drift.
ROUNDING = 0.05


def in_double(tensor):
    """A tensor in float64 on the CPU: moved before it is cast, since Apple's GPUs have no float64."""
    return tensor.detach().cpu().double()


class Spectrum(NamedTuple):
    """Eigenvalues (in,) float32, largest first, and eigenvectors (in, in) as columns, of C = E[x x^T]; its tokens.

    Eigenvectors are float32; those of bundles of format 1 are float16. Packed, as bundles hold them, only the leading k
    are there, (in, k), and `rest` has the others in half of the bytes: the Householder reflections that make them of
    the space that the leading ones leave, (m (m - 1) / 2,) float16 for m = in - k, see `pack`.

    `distances` (in,) are ||u_j - v_j||, V being what is stored and U the decomposition in float64 that it was rounded
    from, or None where that is not known, as of sums of what was stored. They bound what the rounding can hide,
    whichever k directions are closed: ||dW U_k||_F <= ||dW V_k||_F + ||dW||_F ||U_k - V_k||_F.
    """

    eigenvalues: torch.Tensor
    eigenvectors: torch.Tensor
    tokens: int
    distances: torch.Tensor | None = None
    rest: torch.Tensor | None = None

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
        eigenvalues, eigenvectors = torch.linalg.eigh(in_double(total) / tokens)
        stored = eigenvectors.flip(1).float().contiguous()
        distances = (stored - eigenvectors.flip(1)).norm(dim=0).float()
        return cls(eigenvalues.flip(0).clamp_min(0).float().contiguous(), stored, tokens, distances)

    @classmethod
    def from_rounded(cls, total, tokens, name="the input"):
        """The same of a sum that stored spectra are part of: how far from the exact sum's directions is not known.

        What their rounding adds to the sum turns a direction by its size over the gap to the next eigenvalue (Davis
        and Kahan, 1970), and of the gaps of a thousand eigenvalues most are as small as that.
        """
        return cls.from_sum(total, tokens, name)._replace(distances=None)

    def pack(self, criterion="energy", threshold=DEFAULT_THRESHOLDS["energy"]):
        """The same with only the directions that this or the default threshold closes in float32.

        The others take half the bytes. More than is in float32 cannot be closed, see `Bundle.protected`.

        An orthonormal matrix has half as many degrees of freedom as entries, and its reflections have no more: rounded
        to float16 they turn a direction by 4e-4 on average and by less than 1e-3 (random bases of 320, 768 and 1280),
        and what is made of them is orthonormal all the same.
        """
        if self.rest is not None:
            return self
        basis, exact = self.orthonormal(), max(self.rank(), self.rank(criterion, threshold))
        leading = basis[:, :exact].contiguous()
        # The others in coordinates of the space that the leading ones leave
        others = torch.ormqr(
            *(part.double() for part in torch.geqrf(leading)), basis[:, exact:].double(), transpose=True
        )
        reflections = torch.geqrf(others[exact:]).a
        packed = self._replace(eigenvectors=leading, rest=reflections[_below(len(reflections))].half())
        if self.distances is None:
            return packed
        again = packed.orthonormal()
        again *= (again * basis).sum(0).sign()  # that of an eigenvector is free
        return packed._replace(distances=self.distances + (again - basis).norm(dim=0))

    @staticmethod
    def orthonormal_all(spectra):
        """`orthonormal` of each, `list[Tensor]`: a core for each of those that are packed, for each takes a while."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                unpacked = {id(item): pool.submit(item.orthonormal) for item in spectra if item.rest is not None}
        finally:
            torch.set_num_threads(threads)
        return [unpacked[id(item)].result() if id(item) in unpacked else item.orthonormal() for item in spectra]

    @property
    def exact(self):
        """How many leading directions are stored in full."""
        return self.eigenvectors.shape[1]

    def distance(self, rank=None):
        """A bound of ||U_k - V_k||_F for the leading `rank` directions, by default those that are stored in full.

        None where it is not known; of no direction it is 0.
        """
        if self.distances is None:
            return None
        return self.distances[: self.exact if rank is None else rank].double().norm().item()

    def drift_distance(self, rank=0):
        """||(U - V) (C / tr C)^(1/2)||_F over all but the leading `rank` directions, or None where it is not known.

        It bounds what rounding hides of a drift: by ||dW||_F of it where inputs are of energy 1.
        """
        if self.distances is None:
            return None
        return (self.distances.double() * self.shares().sqrt())[rank:].norm().item()

    def shares(self):
        """The eigenvalues as shares of their sum, (in,) float64."""
        return self.eigenvalues.double() / self.eigenvalues.double().sum().clamp_min(1e-300)

    def parts(self):
        """What a bundle stores of it: names and tensors."""
        unknown = torch.full_like(self.eigenvalues, math.inf)
        yield "eigenvalues", self.eigenvalues
        yield "eigenvectors", self.eigenvectors
        if self.rest is not None:
            yield "rest", self.rest
        yield "distances", unknown if self.distances is None else self.distances

    def finest_softness(self, rank):
        """The lowest power of ten that `is_finer_than` allows."""
        return next(10.0**power for power in range(-15, 0) if self.is_finer_than(10.0**power, rank))

    def is_finer_than(self, softness, rank):
        """Whether rounding adds little to the drift that this softness leaves of all but the `rank` closed directions.

        Of a LoRA that were free in all, it leaves share * softness / (softness + share) of the square in each; the
        rounding brings share * distance^2 of the free directions into it.
        """
        if self.rest is None or self.distances is None:
            return True
        shares = self.shares()[rank:]
        return self.drift_distance(rank) ** 2 <= ROUNDING * (shares * softness / (softness + shares)).sum()

    def orthonormal(self):
        """Eigenvectors (in, in) in float32, orthonormal to its rounding again.

        Those of format 1 take one Newton-Schulz step U (3 I - U^T U) / 2 (Higham, Functions of Matrices, 2008, ch. 8),
        which squares the deviation that float16 storage left (2^-11 of each entry, so about 5e-4), and turns no
        direction by more than that.
        """
        if self.rest is not None:
            return self._unpack()
        vectors = self.eigenvectors.float()
        if self.eigenvectors.dtype == torch.float32:
            return vectors
        with tf32(False, vectors.device):
            return 1.5 * vectors - 0.5 * vectors @ (vectors.T @ vectors)

    def _unpack(self):
        size, exact = self.eigenvectors.shape
        reflections, factors = torch.zeros(size, size), torch.zeros(size)
        reflections[:, :exact], factors[:exact] = torch.geqrf(self.eigenvectors)
        others = reflections[exact:, exact:]
        others.masked_scatter_(_below(size - exact), self.rest.float())
        factors[exact:] = 2 / (1 + others.square().sum(0))  # 1 - factor v v^T reflects: so rounding keeps it orthogonal
        basis = torch.linalg.householder_product(reflections, factors).contiguous()
        basis[:, :exact] = self.eigenvectors
        return basis

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
        return (1 + self.shares() / softness).rsqrt().float()


def _below(size):
    """Where a matrix (size, size) is below its diagonal, as a mask."""
    return torch.ones(size, size, dtype=torch.bool).tril(-1)


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
