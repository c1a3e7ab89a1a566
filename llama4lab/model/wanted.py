"""A matrix that waits on disk: how it is read, and one that is on its way."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from llama4lab.checkpoint.matrices import Matrix
from llama4lab.checkpoint.tensor_files import TensorFiles
from llama4lab.model.packed_matrix import PackedMatrix, quantized
from llama4lab.model.tier import Key


@dataclass(frozen=True, eq=False)
class Wanted:
    """A matrix that waits on disk.

    Attributes:
        key: Of it in the store.
        matrices: What it is made of, joined along `out`.
        steady: Whether every pass uses it, unlike an expert.
        quantize: How it is rounded when it is read; None to take it as it is.
    """

    key: Key
    matrices: Sequence[Matrix]
    steady: bool = False
    quantize: str | None = None

    def read(self, files: TensorFiles) -> PackedMatrix:
        """Reads it: exactly its bytes."""
        tensors = [matrix.read(files) for matrix in self.matrices]
        return (
            quantized(self.matrices, tensors, self.quantize) if self.quantize else PackedMatrix(self.matrices, tensors)
        )

    def nbytes(self, files: TensorFiles) -> int:
        """How many bytes it takes on disk."""
        return sum(matrix.nbytes(files) for matrix in self.matrices)


@dataclass(eq=False)
class Reading:
    """A matrix on its way from its file.

    Attributes:
        result: What will be there.
        nbytes: How many bytes are read.
        threads: Those that want it. When none does any more, it is forgotten.
    """

    result: Future[PackedMatrix]
    nbytes: int
    threads: set[int] = field(default_factory=set)
